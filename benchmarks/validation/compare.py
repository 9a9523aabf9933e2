"""Predicted beside measured, against the bars that the simulator is to meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from offramp_simulate.record import Record
from validation import predicted
from validation.cells import WARM_UP, Cell

BARS = {"p50": 0.10, "p95": 0.15, "bytes": 0.01, "exits": 0.01, "sent": 0.01, "missed": 0.01}
"""p50, p95 and bytes as a share of what was measured; the others in points of all answers."""
Facts = dict[str, Any]


def compared(cell: Cell, measured: dict[str, Any], record: Record) -> dict[str, Any]:
    """The cell's facts by simulator, by both live runs together, and by each of them; the errors, and which
    bars they miss."""
    scenario = cell.scenario(measured["requests"])
    said = facts(predicted.runs(scenario, record), record.header.n_layers, scenario.deadline_ms)
    runs = [facts([run], record.header.n_layers, scenario.deadline_ms) for run in measured["runs"]]
    both = facts(measured["runs"], record.header.n_layers, scenario.deadline_ms)
    errors = differences(said, both)
    return {
        "cell": cell.name,
        "held_out": cell.held_out,
        "day": measured["day"],
        "n": both["n"],
        "predicted": said,
        "measured": both,
        "runs": runs,
        "errors": errors,
        "live_spread": differences(runs[0], runs[-1]),
        "misses": [name for name, bar in BARS.items() if not abs(errors[name]) <= bar],
    }


def facts(runs: Sequence[dict[str, Any]], n_layers: int, deadline_ms: float) -> Facts:
    """What is compared. Bytes count every request, warm-up included, a request on average."""
    every = [row for run in runs for row in run["rows"]]
    rows = [row for run in runs for row in run["rows"][WARM_UP:]]
    n, ms = len(rows), [row[1] for row in rows]
    exits = [sum(row[4] == depth for row in rows) / n for depth in range(1, n_layers + 1)]
    nbytes = sum(run["bytes_up"] + run["bytes_down"] + run.get("connection", 0) for run in runs)
    sent = [row[1] for row in rows if row[5] < n_layers]
    return {
        "n": n,
        "p50": quantile(ms, 0.50),
        "p95": quantile(ms, 0.95),
        "sent_p50": quantile(sent, 0.50),
        "bytes": nbytes / len(every),
        "exits": exits,
        "sent": len(sent) / n,
        "cloud": sum(row[2] == "cloud" for row in rows) / n,
        "fallback": sum(row[2] == "fallback" for row in rows) / n,
        "missed": sum(value > deadline_ms for value in ms) / n,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Between neighbours in proportion; NaN of none."""
    return float(np.quantile(values, share)) if values else math.nan


def differences(said: Facts, measured: Facts) -> dict[str, float]:
    """Relative for p50, p95 and bytes; of exit shares the largest in points."""
    found = {
        name: relative(said[name], measured[name]) for name in ("p50", "p95", "sent_p50", "bytes")
    }
    pairs = zip(said["exits"], measured["exits"], strict=True)
    found["exits"] = max((a - b for a, b in pairs), key=abs)
    for name in ("sent", "cloud", "fallback", "missed"):
        found[name] = said[name] - measured[name]
    return found


def relative(said: float, measured: float) -> float:
    if said == measured or math.isnan(said) or math.isnan(measured):
        return 0.0
    return said / measured - 1 if measured else math.inf


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: predicted / measured, held-out cells apart."""
    head = [
        "cell",
        "p50 ms",
        "p95 ms",
        "bytes",
        "exits, points off",
        "sent %",
        "fallback %",
        "missed %",
        "bars missed",
    ]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    tuned = [cell for cell in found if not cell["held_out"]]
    held = [cell for cell in found if cell["held_out"]]
    for title, cells in (("seen while the model was tuned", tuned), ("held out", held)):
        lines.append("| *" + title + "*" + " |" * len(head))
        lines += [_line(cell) for cell in cells]
    return "\n".join(lines)


def _line(cell: dict[str, Any]) -> str:
    said, real, errors, spread = (
        cell[name] for name in ("predicted", "measured", "errors", "live_spread")
    )
    words = [cell["cell"]]
    for name, digits in (("p50", 1), ("p95", 1), ("bytes", 0)):
        pair = f"{said[name]:.{digits}f} / {real[name]:.{digits}f}"
        words.append(f"{pair} ({100 * errors[name]:+.1f} %, live ±{50 * abs(spread[name]):.1f})")
    words.append(f"{100 * errors['exits']:+.1f}")
    shares = ("sent", "fallback", "missed")
    words += [f"{100 * said[name]:.1f} / {100 * real[name]:.1f}" for name in shares]
    words.append(", ".join(cell["misses"]) or "none")
    return "| " + " | ".join(words) + " |"


def summary(found: Sequence[dict[str, Any]], machine: str) -> dict[str, Any]:
    """Everything, and `short`: what every report shows."""
    rows = [
        {
            "cell": cell["cell"],
            "held_out": cell["held_out"],
            **{f"{name}_error": round(cell["errors"][name], 4) for name in BARS},
            "misses": cell["misses"],
        }
        for cell in found
    ]
    days = sorted({cell["day"] for cell in found})
    short = {"days": days, "machine": machine, "bars": BARS, "cells": rows}
    return {"cells": list(found), "short": short}
