"""`offramp evaluate`: a bundle run for real, with exits, on a data file; exit by exit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from offramp_common.bundle import Bundle
from offramp_common.errors import ConfigError
from offramp_train.measure import subject
from offramp_train.metrics import METRICS, prediction_of
from offramp_train.progress import Report
from offramp_train.quality import at_exit, curve_points, exit_table
from offramp_train.tables import Rows


def evaluate(
    bundle: Bundle, rows: Rows, runtime: str, oos_label: str, report: Report
) -> dict[str, Any]:
    """Everything `offramp evaluate` says, as JSON. runtime: "fp32", "int8" or "torch".

    Raises ConfigError or DataError where rows, labels or graphs are missing.
    """
    m = bundle.manifest
    knobs = bundle.knobs("fp32" if runtime == "torch" else runtime)
    here = subject(bundle, runtime, rows)
    started = time.perf_counter()
    depth_N, answer_NC = here.run(knobs, report, "with exits")
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    recording = here.record(report, "to full depth")
    full_seconds = time.perf_counter() - started
    full_NC = at_exit(here, recording, m.n_layers)
    chosen_N, full_N = prediction_of(m.task, answer_NC), prediction_of(m.task, full_NC)
    target_N = here.target_N
    out: dict[str, Any] = {
        "bundle": m.name,
        "method": m.method,
        "runtime": runtime,
        "rows": len(rows),
        "knobs": {name: list(values) for name, values in knobs.items()},
        "n_layers": m.n_layers,
        "mean_depth": float(depth_N.mean()),
        "layers_run": int(depth_N.sum()),
        "share_of_layers": float(depth_N.mean() / m.n_layers),
        "seconds": round(seconds, 3),
        "seconds_full_depth_all_exits": round(full_seconds, 3),
        "quality": _qualities(m.task.kind, chosen_N, full_N, target_N),
        "exits": [asdict(row) for row in exit_table(here, recording, depth_N, answer_NC)],
        "curve": curve_points(here, recording, knobs, rows.path.name),
    }  # fmt: skip
    if m.task.kind == "classification":
        out["agreement_with_full_depth"] = float((chosen_N == full_N).mean())
        if oos_label in m.task.labels:
            out["out_of_scope"] = out_of_scope(
                m.task.labels.index(oos_label), chosen_N, full_N, target_N
            )
    return out


def _qualities(
    kind: str, chosen_N: np.ndarray, full_N: np.ndarray, target_N: np.ndarray
) -> dict[str, dict[str, float]]:
    one_N = np.ones(len(target_N))
    return {
        name: {
            "with_exits": metric(chosen_N, target_N, one_N),
            "full_depth": metric(full_N, target_N, one_N),
        }
        for name, metric in METRICS[kind].items()
    }


def out_of_scope(
    index: int, chosen_N: np.ndarray, full_N: np.ndarray, target_N: np.ndarray
) -> dict[str, Any]:
    """Recall of the out-of-scope label, and accuracy on all other rows; None where there are no such rows."""

    def share(prediction_N: np.ndarray, rows_N: np.ndarray) -> float | None:
        return float((prediction_N == target_N)[rows_N].mean()) if rows_N.any() else None

    outside_N = target_N == index
    return {
        "rows": int(outside_N.sum()),
        "recall": {
            "with_exits": share(chosen_N, outside_N), "full_depth": share(full_N, outside_N)
        },
        "in_scope_accuracy": {
            "with_exits": share(chosen_N, ~outside_N), "full_depth": share(full_N, ~outside_N)
        },
    }  # fmt: skip


def limited(rows: Rows, limit: int | None) -> Rows:
    """The first `limit` rows. Raises ConfigError for a limit below 1."""
    if limit is None:
        return rows
    if limit < 1:
        raise ConfigError(f"--limit {limit}: must be at least 1")
    return rows.take(list(range(min(limit, len(rows)))))


def table_of(result: Mapping[str, Any]) -> str:
    """The result as text for people."""
    first = next(iter(result["quality"]))
    lines = [f"{'exit':>6} {'leaving':>9} {'of those':>9} {'on all':>9}   ({first}, %)"]
    for row in result["exits"]:
        of_those = "-" if row["of_those"] is None else f"{100 * row['of_those']:.2f}"
        lines.append(
            f"{row['depth']:>6} {100 * row['leaving']:>8.2f}% {of_those:>9} {100 * row['on_all']:>9.2f}"
        )
    lines.append(
        f"mean depth {result['mean_depth']:.3f} of {result['n_layers']}; {result['layers_run']} layers run, "
        f"{100 * result['share_of_layers']:.1f} % of {result['rows'] * result['n_layers']}"
    )
    for name, value in result["quality"].items():
        drop = 100 * (value["full_depth"] - value["with_exits"])
        lines.append(
            f"{name} {100 * value['with_exits']:.2f}, at full depth {100 * value['full_depth']:.2f} "
            f"(drop {drop:.2f} points)"
        )
    if "agreement_with_full_depth" in result:
        lines.append(f"agreement with full depth {100 * result['agreement_with_full_depth']:.2f} %")
    for name, value in result.get("out_of_scope", {}).items():
        if isinstance(value, Mapping):
            shown = [
                f"{where.replace('_', ' ')} " + ("-" if share is None else f"{100 * share:.2f} %")
                for where, share in value.items()
            ]
            lines.append(f"out of scope, {name.replace('_', ' ')}: {', '.join(shown)}")
    lines.append(
        f"{result['runtime']}, {result['rows']} rows: {result['seconds']:.1f} s with exits, "
        f"{result['seconds_full_depth_all_exits']:.1f} s to full depth looking at every exit"
    )
    return "\n".join(lines)
