"""UEE-UCB as it is meant: a bandit goes over the test set and learns from disagreement alone.

For several prices of depth the device's own bandit (offramp_edge.bandit) plays every sample of the test split
once, in several random orders. Each sample leaves at the exit that was chosen before it ran, so these are
operating points like any other; what they cost the bandit to find is in them. Some hundred samples are few
for it: beside each stands what it comes to when it goes over the same rows again and again.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from comparison import Run
from kept import kept, test_rows

from offramp_common.activations import NumpyArray
from offramp_common.cli import write_json
from offramp_common.exit_classes import classes_of
from offramp_edge.bandit import ExitBandit, layer_costs, play, regret
from offramp_model.split_model import TorchLayers
from offramp_train.flops import FlopTable
from offramp_train.measure import Subject, subject
from offramp_train.progress import Report

SCALES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Prices: what all layers of a sample cost, on the scale of error rates (0.1: ten points of accuracy)."""

ORDERS = 10
LONG = 10_000  # samples of the long run
ALPHA = 1.0  # the paper's


def online_pass(run: Run, work: Path, data: Path, report: Report) -> bool:
    """Write the pass into the run's result; False where there is no kept bundle."""
    found = kept(run, work)
    if found is None:
        return False
    bundle, result = found
    here = subject(bundle, "torch", test_rows(run, data, work, result))
    result["online"] = measured(here, run.seed, report)
    write_json(result, str(run.result))
    return True


def measured(here: Subject, seed: int, report: Report, long: int = LONG) -> dict[str, Any]:
    """What the bandit does, for every price; `long`: samples of the long run."""
    recording = here.record(report, "test, every exit")
    exits, n = sorted(recording.outputs), here.bundle.n_layers
    logits = [recording.outputs[depth]["logits"].numpy() for depth in exits]
    classes_NE = np.stack([classes_of(answer_NC) for answer_NC in logits], axis=1).astype(np.int64)
    assert isinstance(here.layers, TorchLayers)
    table, lengths_N = FlopTable(here.layers.model), np.array(here.lengths)
    flops_NE = np.stack([table.rows(np.full(len(lengths_N), d), lengths_N) for d in exits], axis=1)
    right_NE = classes_NE == here.target_N[:, None]
    world = World(tuple(exits), n, classes_NE, right_NE, flops_NE)
    return {
        "alpha": ALPHA,
        "orders": ORDERS,
        "rows": len(lengths_N),
        "long_run_rounds": long,
        "disagreement": [
            round(float(v), 5) for v in (classes_NE != classes_NE[:, :1]).mean(axis=0)
        ],
        "points": [world.point(scale, seed, long) for scale in SCALES],
    }


class World:
    """A test set, as the bandit meets it. Axes: N rows, E exits."""

    def __init__(
        self,
        exits: tuple[int, ...],
        n_layers: int,
        classes_NE: NumpyArray,
        right_NE: NumpyArray,
        flops_NE: NumpyArray,
    ) -> None:
        self.exits, self.n_layers = exits, n_layers
        self.classes_NE, self.right_NE, self.flops_NE = classes_NE, right_NE, flops_NE

    def point(self, scale: float, seed: int, long: int) -> dict[str, Any]:
        cost_E = layer_costs(self.exits, self.n_layers, self.n_layers, scale)
        error_E = 1 - self.right_NE.mean(axis=0)
        best = int((error_E + cost_E).argmin())
        rows, passes = len(self.classes_NE), []
        for order in range(ORDERS):
            rng = np.random.default_rng([seed, order])
            passes.append(self._played(rng.permutation(rows), cost_E, error_E))
        rng = np.random.default_rng([seed, ORDERS])
        again = np.concatenate([rng.permutation(rows) for _ in range(-(-long // rows))])[:long]
        spread = stdev(one["quality"] for one in passes)
        return {
            "price": scale,
            **{name: _mean([one[name] for one in passes]) for name in passes[0]},
            "quality_spread": round(spread, 5),
            "best_fixed_exit": self.exits[best],
            "long_run": self._played(again, cost_E, error_E),
        }

    def _played(
        self, order_R: NumpyArray, cost_E: NumpyArray, error_E: NumpyArray
    ) -> dict[str, Any]:
        """R rounds, in this order of rows."""
        chosen_R = play(ExitBandit(cost_E, ALPHA), self.classes_NE[order_R])
        share_E = np.bincount(chosen_R, minlength=len(self.exits)) / len(order_R)
        by_depth = dict(zip(self.exits, share_E.tolist(), strict=True))
        return {
            "mean_layers": round(float(np.array(self.exits)[chosen_R].mean()), 4),
            "flops": round(float(self.flops_NE[order_R, chosen_R].mean())),
            "quality": round(float(self.right_NE[order_R, chosen_R].mean()), 5),
            "leaving": [round(by_depth.get(d, 0.0), 5) for d in range(1, self.n_layers + 1)],
            "regret_a_round": round(float(regret(chosen_R, error_E, cost_E)[-1]) / len(order_R), 5),
        }


def _mean(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [round(fmean(column), 5) for column in zip(*values, strict=True)]
    return round(fmean(values)) if isinstance(values[0], int) else round(fmean(values), 5)
