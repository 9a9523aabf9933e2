"""What is measured of one trained bundle: its whole curve, rows really leaving, and FLOPs by one counter.

Operating points have one value of each knob for all exits. They are chosen on dev, spread evenly over mean
depth (with several knobs those that another beats on dev are left out), and measured on test: batches run
through the torch reference, rows leave the batch, and what each row cost is counted for its own length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from offramp_common.bundle import Bundle
from offramp_common.runner import Knobs
from offramp_common.spec import never_exit
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel, TorchLayers
from offramp_model.store import About, load_model, save_model
from offramp_train.calibrate import Goal, calibrate, sweep
from offramp_train.data import Splits
from offramp_train.flops import FlopTable
from offramp_train.measure import Subject, subject
from offramp_train.metrics import METRICS, metric_of, prediction_of
from offramp_train.progress import Report
from offramp_train.quality import at_exit

POINTS = 16
MAX_DROP = 1.0  # points of quality that the calibrated operating point may lose on dev


def measure(bundle: Bundle, splits: Splits, report: Report) -> dict[str, Any]:
    """The numbers of a bundle with the settings it has."""
    assert splits.test is not None, "every set of the comparison has a test split"
    dev, test = subject(bundle, "torch", splits.dev), subject(bundle, "torch", splits.test)
    scorer = dev.scorer(dev.record(report, "dev"))
    never = never_exit(bundle.manifest.knobs, bundle.n_layers)
    found = calibrate(scorer, Goal(max_drop=MAX_DROP, per_exit=False))
    chosen = [(knobs, score) for knobs, score in sweep(scorer, POINTS) if knobs != never]
    measured = _Measured(test, report)
    points = [
        {
            "dev": {"mean_layers": round(score.mean_depth, 4), "quality": round(score.quality, 5)},
            **measured.point(knobs),
        }
        for knobs, score in chosen
    ]
    return {
        "settings": dict(bundle.manifest.settings),
        "metric": metric_of(bundle.manifest.task)[0],
        "rows": {"dev": len(splits.dev), "test": len(splits.test)},
        "mean_tokens": round(float(np.mean(test.lengths)), 2),
        "flops_layers": measured.flops_of_layers(),
        "exits": measured.exits(),
        "full_depth": measured.point(never),
        "calibrated": {"max_drop": MAX_DROP, **measured.point(found.knobs)},
        "points": points,
    }


def with_settings(bundle: Bundle, settings: Mapping[str, Any], path: Path) -> Bundle:
    """The same weights under other structural settings. Raises ValueError where a weight is missing."""
    model = load_model(bundle)
    spec: HeadSpec = replace(model.spec, settings={**model.spec.settings, **settings})
    other = MultiExitModel(model.backbone, METHODS[bundle.manifest.method], spec)
    missing, _ = other.load_state_dict(model.state_dict(), strict=False)
    if missing:
        raise ValueError(f"settings {dict(settings)}: {missing[0]} was not trained")
    m = bundle.manifest
    tokenizer = (bundle.path / "tokenizer.json").read_text()
    return save_model(path, other.eval(), tokenizer, About(m.name, m.max_tokens, m.split))


class _Measured:
    """A test set, really run at operating points."""

    def __init__(self, test: Subject, report: Report) -> None:
        assert isinstance(test.layers, TorchLayers)
        self.test, self.report = test, report
        self.task = test.bundle.manifest.task
        self.table = FlopTable(test.layers.model)
        self.lengths_N = np.array(test.lengths)
        never = never_exit(test.bundle.manifest.knobs, test.bundle.n_layers)
        _, full_NC = test.run(never, report, "test, full depth")
        self.full_N = prediction_of(self.task, full_NC)

    def point(self, knobs: Knobs) -> dict[str, Any]:
        depth_N, answer_NC = self.test.run(knobs, self.report, "test")
        chosen_N = prediction_of(self.task, answer_NC)
        flops_N = self.table.rows(depth_N, self.lengths_N)
        depths = range(1, self.test.bundle.n_layers + 1)
        return {
            "knobs": {name: values[0] for name, values in knobs.items()},
            "mean_layers": round(float(depth_N.mean()), 4),
            "flops": round(float(flops_N.mean())),
            **self._quality(chosen_N),
            **self._agreement(chosen_N),
            "leaving": [round(float((depth_N == depth).mean()), 5) for depth in depths],
        }

    def exits(self) -> list[dict[str, Any]]:
        """Each exit's answers on every row."""
        recording = self.test.record(self.report, "test, every exit")
        out = []
        for depth in sorted(recording.outputs):
            chosen_N = prediction_of(self.task, at_exit(self.test, recording, depth))
            cost_N = self.table.rows(np.full(len(self.lengths_N), depth), self.lengths_N)
            out.append(
                {"depth": depth, "flops": round(float(cost_N.mean())), **self._quality(chosen_N)}
            )
        return out

    def flops_of_layers(self) -> int:
        """Mean over rows, of all layers without any head: the same for every method."""
        totals = [sum(self.table.of(n_tokens).layers) for n_tokens in self.lengths_N.tolist()]
        return round(float(np.mean(totals)))

    def _quality(self, chosen_N: np.ndarray) -> dict[str, float]:
        """`quality` by the task's first metric; others by their names."""
        target_N, one_N = self.test.target_N, np.ones(len(chosen_N))
        metrics = METRICS[self.task.kind]
        values = {
            name: round(metric(chosen_N, target_N, one_N), 5) for name, metric in metrics.items()
        }
        return {"quality": values.pop(next(iter(metrics))), **values}

    def _agreement(self, chosen_N: np.ndarray) -> dict[str, float]:
        """With the answers at full depth: the share of equal classes, or the mean distance of values."""
        if self.task.kind == "regression":
            return {"distance": round(float(np.abs(chosen_N - self.full_N).mean()), 5)}
        return {"agreement": round(float((chosen_N == self.full_N).mean()), 5)}
