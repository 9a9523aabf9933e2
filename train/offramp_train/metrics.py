"""Quality of answers, in [0, 1] or [-1, 1]; rows may be weighted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from offramp_common.activations import NumpyArray
from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec

Quality = Callable[[NumpyArray, NumpyArray, NumpyArray], float]
"""(prediction_N, target_N, weight_N) -> quality."""


def prediction_of(task: TaskSpec, answer_NC: NumpyArray) -> NumpyArray:
    """What an answer comes down to: the class index (int64), or the value (float64), of each row."""
    if task.kind == "regression":
        return answer_NC[:, 0].astype(np.float64)
    index_N: NumpyArray = answer_NC.argmax(axis=-1)
    return index_N


def accuracy(prediction_N: NumpyArray, target_N: NumpyArray, weight_N: NumpyArray) -> float:
    """Weighted share of rows whose class is the target's."""
    return float(((prediction_N == target_N) * weight_N).sum() / weight_N.sum())


def pearson(prediction_N: NumpyArray, target_N: NumpyArray, weight_N: NumpyArray) -> float:
    """Weighted linear correlation; 0 where either side is constant."""
    return _correlation(prediction_N, target_N.astype(np.float64), weight_N)


def spearman(prediction_N: NumpyArray, target_N: NumpyArray, weight_N: NumpyArray) -> float:
    """Pearson's correlation of the ranks, ties at their mean rank."""
    return _correlation(ranks(prediction_N), ranks(target_N), weight_N)


METRICS: dict[str, dict[str, Quality]] = {
    "classification": {"accuracy": accuracy},
    "regression": {"pearson": pearson, "spearman": spearman},
}
"""By task kind; the first is what calibration and the best epoch go by."""


def metric_of(task: TaskSpec, name: str = "") -> tuple[str, Quality]:
    """The task's metric of that name (its first by default). Raises ConfigError."""
    known = METRICS[task.kind]
    name = name or next(iter(known))
    if name not in known:
        raise ConfigError(f"metric {name!r}: {task.kind} has {', '.join(known)}")
    return name, known[name]


def ranks(values_N: NumpyArray) -> NumpyArray:
    """1-based ranks as float64, equal values share the mean of theirs."""
    _, inverse_N, count = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    mean_rank: NumpyArray = (last - (count - 1) / 2.0)[inverse_N]
    return mean_rank


def _correlation(x_N: NumpyArray, y_N: NumpyArray, weight_N: NumpyArray) -> float:
    weight_N = weight_N / weight_N.sum()
    dx_N, dy_N = x_N - (weight_N * x_N).sum(), y_N - (weight_N * y_N).sum()
    spread = np.sqrt((weight_N * dx_N**2).sum() * (weight_N * dy_N**2).sum())
    return float((weight_N * dx_N * dy_N).sum() / spread) if spread > 0 else 0.0
