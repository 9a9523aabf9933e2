"""The part of a method's page that is made of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cells
from comparison import UNFAVOURABLE
from derived import NOT_RUN, Line, SetNumbers
from plots import grid, panel, sheet, spans
from reading import ONLINE

from offramp_model.methods import Method

Sets = Mapping[str, SetNumbers]


def picture(method: Method, sets: Sets) -> str | None:
    """The method's lines on every set that has results."""
    shown = [(numbers, span) for numbers in sets.values() if (span := spans(numbers)) is not None]
    panels, size = [], (0.0, 0.0)
    for i, (numbers, span) in enumerate(shown):
        frames, size = grid(span, len(shown), 2)
        names = [
            line.name
            for line in numbers.lines
            if line.method == method.name and not line.status.startswith("not for")
        ]
        panels.append(panel(frames[i], numbers, names, cells.TITLES[numbers.name], seeds=True))
    note = "Grey: all other lines. Thin black line: the full model."
    return sheet(method.name, note, panels, size) if panels else None


def _mine(method: Method, sets: Sets) -> list[tuple[SetNumbers, Line]]:
    return [(n, line) for n in sets.values() for line in n.lines if line.method == method.name]


def results(method: Method, sets: Sets) -> list[str]:
    mine = _mine(method, sets)
    out = ["## Results", ""]
    if any(spans(numbers) for numbers in sets.values()):
        out += [f"![Curves of {method.name}]({method.name}.svg)", ""]
    rows = []
    for numbers, line in mine:
        head = [cells.TITLES[numbers.name], line.name]
        if line.seeds:
            rows.append([*head, *cells.line_row(line, numbers.wanted), cells.quality(numbers.full)])
        else:
            rows.append([*head, line.status, *[""] * len(cells.LINE_HEAD)])
    out += cells.table(["data", "line", *cells.LINE_HEAD, "full model"], rows)
    out += [
        "",
        "What the columns mean: [how to read the numbers](../methods.md#how-to-read-the-numbers).",
        "",
    ]
    out += [
        f"**The paper reports:** {method.reported}",
        "",
        "**What differs:** another backbone (six layers, 384 wide), one budget for all methods, mean "
        "pooling, FLOPs rather than the paper's own measure of speed, and what the lists below say."
        + UNFAVOURABLE.get(method.name, ""),
        "",
    ]
    return [*out, *_exits(mine)]


def _exits(mine: Sequence[tuple[SetNumbers, Line]]) -> list[str]:
    rows = []
    for numbers, line in mine:
        if line.seeds and not line.name.endswith(")"):
            seed = line.seeds[0]
            shown = {depth: f"{100 * quality:.1f}" for depth, _, quality in seed.exits}
            point = seed.measured.get("calibrated")
            chosen = ""
            if point is not None:
                chosen = (
                    f"{100 * point['quality']:.1f} with {point['mean_layers']:.2f} layers, "
                    f"{point['flops'] / seed.base.flops:.2f} of the FLOPs"
                )
            last = max(depth for depth, _, _ in seed.exits)
            row = [shown.get(depth, "-") for depth in range(1, last + 1)]
            rows.append([cells.TITLES[numbers.name], *row, chosen])
            static = {depth: f"{100 * q:.1f}" for depth, (_, q) in seed.base.static.items()}
            row = [static.get(depth, NOT_RUN) for depth in range(1, last + 1)]
            rows.append(["cut to so many layers", *row, ""])
    if not rows:
        return []
    head = [
        "data",
        *(f"exit {i}" for i in range(1, len(rows[0]) - 1)),
        "calibrated on dev to lose 1.0 point",
    ]
    return ["Each exit's answers on every test row (first seed):", "", *cells.table(head, rows), ""]


def guarantee_table(record: Mapping[str, Any]) -> list[str]:
    """What conformal_validity.py found."""
    rows = [
        [
            r["score"],
            f"{r['epsilon']:g}",
            f"{r['violations']:.4f}",
            f"{r['allowed']:.4f}",
            "yes" if r["holds"] else "**no**",
            f"{r['mean_depth']:.2f}",
            f"{100 * r['quality']:.1f}",
        ]
        for r in record["results"]
    ]
    head = ["score", "epsilon", "violations", "allowed", "holds", "mean depth", record["metric"]]
    return [
        "## Does the guarantee hold?",
        "",
        f"Over {record['splits']} random splits of {record['rows']} held-out rows "
        f'({record["bundle"]}); allowed is epsilon and two standard errors. "random" is a score of '
        "random numbers: the guarantee must hold for it too, and only depth may suffer.",
        "",
        *cells.table(head, rows),
        "",
    ]


def online_table(method: Method, sets: Sets) -> list[str]:
    if not method.online:
        return []
    out = [
        "## The bandit at work",
        "",
        "The device's bandit goes over the test split without labels, each sample leaving where it "
        "says; means of random orders. The last columns are a long run over the same rows, again and "
        'again. "Best" is the fixed exit that labels would choose at this price.',
        "",
    ]
    rows = []
    for numbers, line in _mine(method, sets):
        if not line.name.endswith(f"({ONLINE})"):
            continue
        if not line.seeds:
            rows.append([cells.TITLES[numbers.name], line.status, *[""] * 7])
            continue
        seed = line.seeds[0]
        for point in seed.measured[ONLINE]["points"]:
            long = point["long_run"]
            rows.append(
                [
                    cells.TITLES[numbers.name],
                    f"{point['price']:g}",
                    f"{100 * point['quality']:.1f} ±{100 * point['quality_spread']:.1f}",
                    f"{point['mean_layers']:.2f}",
                    f"{point['flops'] / seed.base.flops:.2f}",
                    str(point["best_fixed_exit"]),
                    f"{100 * long['quality']:.1f}",
                    f"{long['mean_layers']:.2f}",
                    f"{100 * long['leaving'][point['best_fixed_exit'] - 1]:.0f} %",
                ]
            )
    head = ["data", "price of all layers", "quality", "layers", "FLOPs", "best exit"]
    head += ["long run: quality", "layers", "at the best exit"]
    return [*out, *cells.table(head, rows), ""]


def points_tables(method: Method, sets: Sets) -> list[str]:
    """Every measured operating point of the first seed."""
    out = []
    for numbers, line in _mine(method, sets):
        if not line.seeds or line.name.endswith(f"({ONLINE})"):
            continue
        seed = line.seeds[0]
        records = [*seed.measured["points"], seed.measured["full_depth"]]
        agrees = "agreement" if "agreement" in records[0] else "distance"
        rows = [
            [
                ", ".join(f"{name} {value:.4g}" for name, value in p["knobs"].items()),
                f"{p['mean_layers']:.2f}",
                f"{p['flops'] / seed.base.flops:.3f}",
                f"{100 * p['quality']:.1f}",
                f"{100 * p[agrees]:.1f}" if agrees == "agreement" else f"{p[agrees]:.3f}",
            ]
            for p in records
        ]
        title = f"{cells.TITLES[numbers.name]}, {line.name}: operating points (first seed)"
        head = ["knobs", "mean layers", "FLOPs", f"{seed.measured['metric']} x 100"]
        head.append(
            "agreement with its full depth, %"
            if agrees == "agreement"
            else "distance from full depth"
        )
        out += [
            "<details>",
            f"<summary>{title}</summary>",
            "",
            *cells.table(head, rows),
            "",
            "</details>",
            "",
        ]
    return ["## All operating points", "", *out] if out else [f"No operating points: {NOT_RUN}."]
