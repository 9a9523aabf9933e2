"""Numbers and names as the pages write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comparison import N_LAYERS, SETS
from curves import SPEEDUPS
from derived import AGAINST, MAX_DROP, NOT_RUN, Line, Mean, SetNumbers, area, at

TITLES = {
    "trec": "TREC",
    "sst2": "SST-2",
    "clinc150": "CLINC150",
    "stsb": "STS-B",
}
WHAT = {
    "trec": "6 question types",
    "sst2": "sentiment",
    "clinc150": "150 intents and out of scope",
    "stsb": "similarity of two sentences, a value",
}
VERDICTS = {"above": "beats", "mixed": "mixed", "below": "**fails**", NOT_RUN: NOT_RUN}
"""Against the truncated models, in a word."""

NONE = "-"
GENERATED = (
    "<!-- Written by benchmarks/methods/write_docs.py from the table of methods and the results: "
    "do not edit. -->"
)

if set(TITLES) != set(SETS):
    raise RuntimeError(f"cells.py names the sets {set(TITLES)}, comparison.py has {set(SETS)}")


def quality(mean: Mean | None) -> str:
    """A hundred times the quality."""
    if mean is None:
        return NONE
    spread = "" if mean.spread is None else f" ±{100 * mean.spread:.1f}"
    return f"{100 * mean.value:.1f}{spread}"


def points(mean: Mean | None, sure: bool = False) -> str:
    """A difference of qualities in points, signed."""
    if mean is None:
        return NONE
    shown = _signed(100 * mean.value)
    return f"{shown}{'*' if sure else ''}"


def share(mean: Mean | None) -> str:
    return NONE if mean is None else f"{mean.value:.2f}"


def _signed(value: float) -> str:
    """To a tenth; what rounds to 0 has no sign."""
    return f"{value:+.1f}" if abs(value) >= 0.05 else "0.0"


def lost(mean: Mean | None) -> str:
    """Points lost, as a signed difference; a tick where they are within the bar."""
    if mean is None:
        return NONE
    shown = _signed(-mean.value)
    return f"{shown}{' ✓' if mean.value <= MAX_DROP else ''}"


def numbers_cell(line: Line) -> str:
    """1.5x / 2x / 3x and the verdict; why there are none."""
    if not line.seeds:
        return short(line.status)
    return " / ".join(quality(at(s)(line)) for s in SPEEDUPS) + f"; {VERDICTS[line.verdict]}"


def short(status: str) -> str:
    return status.partition(":")[0]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    ]


LINE_HEAD = (
    "seeds",
    "full depth",
    *(f"{s:g}x" for s in SPEEDUPS),
    "area",
    "2x against full",
    *(f"against {d} layers" for d in AGAINST),
    "verdict",
)


def line_row(line: Line, wanted: int) -> list[str]:
    """The cells of LINE_HEAD."""
    full = line.mean(lambda seed: seed.own_full[1])
    return [
        f"{len(line.seeds)} of {wanted}",
        quality(full),
        *(quality(at(s)(line)) for s in SPEEDUPS),
        quality(area(line)),
        lost(line.drop_at_2x),
        *(points(line.against(d), line.sure(d)) for d in AGAINST),
        VERDICTS[line.verdict],
    ]


def static_rows(numbers: SetNumbers) -> list[list[str]]:
    """Rows of the full model and the truncated ones, for the head of `lines_table`."""
    curve = numbers.static_curve
    rows = [["**full model**", f"{len(numbers.bases)} of {numbers.wanted}", quality(numbers.full)]]
    rows[0] += [""] * (len(LINE_HEAD) - 2)
    if curve is not None:
        cells = [curve.at(1 / s) for s in SPEEDUPS]
        shown = [NONE if q is None else f"{100 * q:.1f}" for q in cells]
        own = ["**truncated models**", f"{len(numbers.bases)} of {numbers.wanted}", ""]
        below = NONE
        if numbers.full is not None and (q := curve.at(0.5)) is not None:
            below = lost(Mean(100 * (numbers.full.value - q), None, 1))
        rows.append([*own, *shown, f"{100 * curve.area():.1f}", below, *[""] * len(AGAINST), ""])
    return rows


def truncated(numbers: SetNumbers) -> str:
    """Each truncated model's quality, in a sentence; "" where none was run."""
    found = [(depth, numbers.static(depth)) for depth in range(1, N_LAYERS)]
    said = [f"{quality(both[1])} at {depth}" for depth, both in found if both is not None]
    return f"Cut to fewer layers and fine-tuned: {', '.join(said)}." if said else ""


def about_set(numbers: SetNumbers) -> str:
    """What the set is, in a line."""
    about: Mapping[str, Any] | None = numbers.about
    known = f"{TITLES[numbers.name]} ({WHAT[numbers.name]})"
    if about is None:
        return known
    metric = "Pearson's correlation" if about["metric"] == "pearson" else about["metric"]
    return (
        f"{known}: {metric} x 100 on {about['rows']['test']} test rows of {about['mean_tokens']:.0f} tokens "
        f"on average, operating points chosen on {about['rows']['dev']} dev rows"
    )
