"""The live cells in one table, and the bars they are held to.

    python benchmarks/planner/summary.py [--cells DIR] [--json FILE|-] [--markdown]

Reads what live.py wrote. "best" is the best fixed plan of a cell: all on the device, send the input, or a
split. A ratio above 1 is a lost cell by so much. --markdown: the table of docs/decisions/0009 on standard
output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp_common.cli import write_json

RULES = ("neurosurgeon", "spinn", "splitee")
_NEAR = 1.1


def row_of(cell: dict[str, Any], key: str) -> dict[str, Any]:
    """The planner beside the best fixed plan, the better of the two ends, and the rules."""
    plans = cell["plans"]
    planner = plans["planner"]
    fixed = {name: p for name, p in plans.items() if name not in ("planner", *RULES)}
    best = min(fixed, key=lambda name: fixed[name][key])
    ends = [fixed[name][key] for name in ("all local", "send input") if name in fixed]
    return {
        "model": cell["model"], "link": cell["link"], "load": cell["load"], "mix": cell["mix"],
        "min_split": cell["min_split"], "commit": cell.get("commit", ""),
        "planner": planner[key], "best": best, "best_ms": fixed[best][key],
        "ratio": round(planner[key] / fixed[best][key], 3), "to_ends": round(planner[key] / min(ends), 3),
        "p95_ms": planner["p95_ms"], "best_p95_ms": fixed[best]["p95_ms"],
        "mean_ms": planner["mean_ms"], "best_mean_ms": min(p["mean_ms"] for p in fixed.values()),
        "bytes_up": planner["bytes_up"], "best_bytes_up": fixed[best]["bytes_up"],
        "cloud": planner["cloud"],
        "rules": {name: plans[name][key] for name in RULES if name in plans},
    }  # fmt: skip


def bars(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one set of cells."""
    near = sum(row["ratio"] <= _NEAR for row in rows)
    ends = sum(row["to_ends"] <= _NEAR for row in rows)
    return {
        "cells": len(rows),
        "within_10_percent_of_best": near,
        "share": round(near / len(rows), 3),
        "within_1.1_of_better_end": ends,
        "worst_ratio": max(row["ratio"] for row in rows),
        "beats_every_fixed": sum(row["ratio"] < 1 for row in rows),
    }


def tables(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By median and by mean: for each set of cells the bars and a row a cell; told on standard error."""
    out: dict[str, Any] = {}
    for key in ("p50_ms", "mean_ms"):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in (row_of(cell, key) for cell in cells):
            name = f"{row['model']}, {row['mix']}, min_split {row['min_split']}"
            groups.setdefault(name, []).append(row)
        out[key] = {name: {"bars": bars(group), "cells": group} for name, group in groups.items()}
        for name, group in groups.items():
            print(f"\n{key} | {name} | {bars(group)}", file=sys.stderr)
            for row in group:
                print(_line(row), file=sys.stderr)
    return out


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['link']:<32} {row['load']:<14} {row['planner']:>7.1f} {row['best_ms']:>7.1f} "
        f"{row['best']:<16} x{row['ratio']:<6} ends x{row['to_ends']:<6} "
        f"p95 {row['p95_ms']:.0f} ({row['best_p95_ms']:.0f}) "
        f"bytes {row['bytes_up']} ({row['best_bytes_up']}) cloud {row['cloud']}"
    )


def markdown(rows: Sequence[dict[str, Any]], beside: Sequence[dict[str, Any]]) -> list[str]:
    """A table of one set of cells by median, the means' ratio in its last column."""
    means = {(row["link"], row["load"]): row["ratio"] for row in beside}
    lines = [
        "| link | load | p50 ms: planner, best fixed | ratio | to the better end | p95 ms | bytes up | "
        "ratio of means | planner of |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio = f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['link'].removeprefix('trace ')} | {row['load']} | {row['planner']:.0f}, "
            f"{row['best_ms']:.0f} ({row['best']}) | {ratio if row['ratio'] <= _NEAR else f'**{ratio}**'} | "
            f"{row['to_ends']:.2f} | {row['p95_ms']:.0f}, {row['best_p95_ms']:.0f} | "
            f"{row['bytes_up']}, {row['best_bytes_up']} | {means[row['link'], row['load']]:.2f} | "
            f"{row['commit']} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = Path(__file__).parents[1] / "results" / "planner"
    parser.add_argument("--cells", type=Path, default=default)
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    parser.add_argument("--markdown", action="store_true", help="tables of all sets of cells")
    args = parser.parse_args()
    out = tables([json.loads(file.read_text()) for file in sorted(args.cells.glob("*.json"))])
    if args.json:
        write_json(out, args.json)
    for name, group in out["p50_ms"].items() if args.markdown else ():
        table = markdown(group["cells"], out["mean_ms"][name]["cells"])
        print("\n".join([f"\n{name}\n", *table]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
