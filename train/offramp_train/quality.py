"""The numbers of a bundle on one data file: its operating point, its exits, its curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp_common.runner import Knobs
from offramp_common.spec import never_exit
from offramp_train.calibrate import sweep
from offramp_train.curve_plot import Line, draw
from offramp_train.measure import Subject, policy_of
from offramp_train.metrics import metric_of, prediction_of
from offramp_train.replay import Recording, replay

CURVE = "curve.svg"
_IN_WORDS = {"accuracy": "accuracy (% of inputs)", "pearson": "Pearson's correlation \u00d7 100"}


@dataclass(frozen=True)
class ExitRow:
    """One exit of the table.

    leaving      share of rows that leave here;  of_those: their quality (None when none leave)
    on_all       quality of this exit's answers on every row
    """

    depth: int
    leaving: float
    of_those: float | None
    on_all: float


def exit_table(
    subject: Subject, recording: Recording, depth_N: np.ndarray, answer_NC: np.ndarray
) -> list[ExitRow]:
    """Exit by exit, for rows that left at depth_N with answer_NC."""
    task = subject.bundle.manifest.task
    _, quality = metric_of(task)
    target_N, one_N = subject.target_N, np.ones(len(subject.rows))
    chosen_N = prediction_of(task, answer_NC)
    out = []
    for depth in sorted(recording.outputs):
        here = depth_N == depth
        of_those = (
            float(quality(chosen_N[here], target_N[here], one_N[here])) if here.any() else None
        )
        on_all = quality(prediction_of(task, at_exit(subject, recording, depth)), target_N, one_N)
        out.append(ExitRow(depth, float(here.mean()), of_those, on_all))
    return out


def at_exit(subject: Subject, recording: Recording, depth: int) -> np.ndarray:
    """answer_NC of every row at one exit."""
    passed = {d: outputs for d, outputs in recording.outputs.items() if d <= depth}
    cut = Recording(passed, recording.lengths_N, depth)
    never = never_exit(subject.bundle.manifest.knobs, subject.bundle.n_layers)
    _, answer_NC = replay(policy_of(subject.bundle), cut, never)
    return answer_NC


def curve_points(
    subject: Subject, recording: Recording, knobs: Knobs, split: str
) -> list[dict[str, Any]]:
    """For the manifest: the operating point, each exit on all rows, and the sweep."""
    name, _ = metric_of(subject.bundle.manifest.task)
    scorer = subject.scorer(recording)
    base = {"precision": subject.runtime, "split": split}
    depth_N, answer_NC = replay(policy_of(subject.bundle), recording, knobs)
    table = exit_table(subject, recording, depth_N, answer_NC)
    score, full = scorer.score(knobs), table[-1].on_all
    out: list[dict[str, Any]] = [
        {
            **base,
            "kind": "operating point",
            "mean_depth": round(score.mean_depth, 4),
            name: round(score.quality, 5),
            "full_depth": round(full, 5),
            "leaving": {str(row.depth): round(row.leaving, 5) for row in table},
        }
    ]
    out += [
        {**base, "kind": "exit", "depth": row.depth, name: round(row.on_all, 5)} for row in table
    ]
    for point, scored in sweep(scorer):
        shown = {knob: values[0] for knob, values in point.items()}
        out.append(
            {
                **base,
                "kind": "sweep",
                "mean_depth": round(scored.mean_depth, 4),
                name: round(scored.quality, 5),
                "knobs": shown,
            }
        )
    return out


def plot(
    path: Path, title: str, metric: str, n_layers: int, points: Sequence[Mapping[str, Any]]
) -> None:
    """The picture of curve points as `curve_points` makes them, a line for each precision."""
    lines = {}
    for precision in dict.fromkeys(point["precision"] for point in points):
        mine = [point for point in points if point["precision"] == precision]
        swept = tuple((p["mean_depth"], 100 * p[metric]) for p in mine if p["kind"] == "sweep")
        (chosen,) = (p for p in mine if p["kind"] == "operating point")
        operating = (chosen["mean_depth"], 100 * chosen[metric])
        lines[precision] = Line(swept, operating, 100 * chosen["full_depth"])
    draw(path, title, _IN_WORDS.get(metric, f"{metric} \u00d7 100"), n_layers, lines)
