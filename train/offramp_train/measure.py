"""What a bundle does on a data file: exits recorded on any runtime, and runs with exits for real.

This package may import the device's runtime (offramp_edge.runtime): int8 is calibrated as it will run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.errors import ConfigError
from offramp_common.runner import Knobs, Layers, run
from offramp_common.text import TextEncoder
from offramp_model.exits import HeadSpec, Policy
from offramp_model.methods import METHODS
from offramp_model.split_model import TorchLayers, to_torch
from offramp_model.store import load_model
from offramp_train.data import row_weights, targets_of
from offramp_train.metrics import metric_of
from offramp_train.progress import Report
from offramp_train.replay import Recording, Scorer, record
from offramp_train.tables import Rows

PRECISIONS = ("fp32", "int8")
_BATCH = 64


def policy_of(bundle: Bundle) -> Policy:
    """The exit policy of a bundle, without its weights."""
    m = bundle.manifest
    spec = HeadSpec(m.task, m.cuts[-1].width, m.n_layers, m.exits, m.settings)
    return METHODS[m.method].policy(spec)


def has_graphs(bundle: Bundle, precision: str) -> bool:
    return (bundle.path / "graphs" / precision).is_dir()


def layers_for(bundle: Bundle, runtime: str) -> Layers[Any]:
    """The layers on "torch", or on the device's runtime in "fp32" or "int8". Raises ConfigError."""
    if runtime == "torch":
        return TorchLayers(load_model(bundle))
    if not has_graphs(bundle, runtime):
        raise ConfigError(
            f"{bundle.path}: has no {runtime} graphs; make the bundle again with `offramp train`, or "
            "give --precision torch"
        )
    from offramp_edge.runtime import OnnxLayers

    return OnnxLayers(bundle, runtime)


@dataclass(frozen=True)
class Subject:
    """A bundle on a runtime, and rows to run it on."""

    bundle: Bundle
    runtime: str
    layers: Layers[Any]
    rows: Rows
    lengths: tuple[int, ...]
    start: Callable[[Sequence[int]], Activations[Any]]

    @property
    def target_N(self) -> NumpyArray:
        return targets_of(self.rows, self.bundle.manifest.task)

    def record(self, report: Report, title: str) -> Recording:
        """Every exit's outputs for every row."""
        with report.bar(title, len(self.rows)) as bar:
            knobs = self.bundle.manifest.knobs
            return record(self.layers, self.start, self.lengths, knobs, _BATCH, bar.step)

    def run(self, knobs: Knobs, report: Report, title: str) -> tuple[NumpyArray, NumpyArray]:
        """(depth_N, answer_NC) of really running with exits."""
        order = sorted(range(len(self.rows)), key=lambda i: self.lengths[i])
        width = self.bundle.manifest.task.answer_width
        depth_N = np.zeros(len(order), dtype=np.int64)
        answer_NC = np.zeros((len(order), width), dtype=np.float32)
        with report.bar(title, len(order)) as bar:
            for first in range(0, len(order), _BATCH):
                rows = np.array(order[first : first + _BATCH])
                done = run(self.layers, self.start(rows.tolist()), self.layers.n_layers, knobs)
                for left in done.left:
                    depth_N[rows[left.rows]] = left.depth
                    answer_NC[rows[left.rows]] = np.asarray(left.answer)
                bar.step(rows.size)
        return depth_N, answer_NC

    def scorer(self, recording: Recording, weights: dict[str, float] | None = None) -> Scorer:
        """Scores operating points by the task's first metric; `weights` by label, 1 where not named."""
        m = self.bundle.manifest
        _, quality = metric_of(m.task)
        weight_N = row_weights(self.rows, weights or {})
        return Scorer(
            policy_of(self.bundle), recording, m.knobs, m.task, quality, self.target_N, weight_N
        )


def subject(bundle: Bundle, runtime: str, rows: Rows) -> Subject:
    """Raises ConfigError for rows that do not fit the bundle, or graphs that are not there."""
    encode = TextEncoder(bundle)
    lengths = tuple(encode(rows.texts).lengths_B.tolist())
    convert = to_torch if runtime == "torch" else _as_it_is

    def start(chosen: Sequence[int]) -> Activations[Any]:
        return convert(encode([rows.texts[i] for i in chosen]))

    return Subject(bundle, runtime, layers_for(bundle, runtime), rows, lengths, start)


def _as_it_is(acts: Activations[NumpyArray]) -> Activations[Any]:
    return acts
