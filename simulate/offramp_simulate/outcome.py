"""A simulation's result as plain data, as a table for people, and as Parquet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offramp_common.errors import ConfigError
from offramp_simulate.record import Record
from offramp_simulate.scenario import Scenario
from offramp_simulate.sweep import Cell

FORMAT = 1
Result = dict[str, Any]


def outcome(scenario: Scenario, record: Record, cells: Sequence[Cell]) -> Result:
    """Everything, the same to the byte for the same scenario, record and seed: no time of day, no duration
    on this machine. Infinity is None: JSON has none."""
    h = record.header
    tables = {k: v for k, v in asdict(scenario).items() if k not in ("folder", "sweep")}
    return {
        "format": FORMAT,
        "title": scenario.title,
        "scenario": _finite(tables),
        "axes": {key: list(values) for key, values in scenario.sweep.items()},
        "record": {
            "bundle": h.bundle,
            "method": h.method,
            "n_layers": h.n_layers,
            "data": h.data,
            "samples": record.n_samples,
            "machine": h.machine,
            "precision": scenario.devices.precision or h.precision,
        },
        "cells": [_finite(cell.to_json()) for cell in cells],
        "timelines": _timelines(scenario, cells),
    }


def table(result: Result) -> str:
    """For people: a line a cell."""
    head = [
        "plan",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "right %",
        "up B",
        "cloud ms",
        "sent %",
        "fallback %",
    ]
    head += ["missed %", "mJ", "$/million"]
    axes = list(result["axes"])
    rows = [[*(key.partition(".")[2] for key in axes), *head]]
    rows += [
        [*(f"{cell['values'][key]}" for key in axes), *_line(cell)] for cell in result["cells"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = len(axes) + 1
    return "\n".join(
        "  ".join(
            word.ljust(width) if i < left else word.rjust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def write_parquet(result: Result, path: Path) -> None:
    """A row a cell, nested names joined by dots."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ConfigError("--parquet: needs pyarrow: pip install 'offramp[parquet]'") from None
    rows = [_flat(cell) for cell in result["cells"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _line(cell: dict[str, Any]) -> list[str]:
    ms = cell["ms"]
    return [
        cell["plan"],
        *(f"{ms[name]:.1f}" for name in ("p50", "p95", "p99")),
        f"{100 * cell['right']:.2f}",
        f"{cell['bytes_up']:.0f}",
        f"{cell['cloud_ms']:.2f}",
        *(
            f"{100 * share:.1f}"
            for share in (cell["sent"], cell["where"]["fallback"], cell["missed"])
        ),
        f"{cell['device_mj']:.0f}",
        f"{cell['usd_per_million']:.2f}",
    ]


def _timelines(scenario: Scenario, cells: Sequence[Cell]) -> dict[str, list[list[float]]]:
    """Of each plan in the first cell of the sweep; one report has room for no more."""
    first = cells[: len(scenario.plans)]
    return {cell.plan: cell.ran.timeline for cell in first}


def _flat(value: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            flat |= _flat(entry, f"{before}{name}.")
        elif not isinstance(entry, list):
            flat[before + name] = entry
    return flat


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
