"""docs/methods.md: all methods side by side, and what the results say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import cells
from comparison import BACKBONE, N_LAYERS, SETS
from costs import COST_HEAD, Costs
from curves import SPEEDUPS, standard_error
from derived import AGAINST, MAX_DROP, NOT_RUN, Line, Mean, SetNumbers, area, at
from families import FAMILIES
from plots import grid, panel, sheet, spans

from offramp_model.methods import METHODS
from offramp_model.methods_cli import table as methods_table
from offramp_train.recipes import RECIPES

Sets = Mapping[str, SetNumbers]

DEFINITIONS = (
    f"All runs share the backbone ({BACKBONE.partition('gt-')[2]}, {N_LAYERS} layers, 384 wide, mean "
    "pooling), optimiser, rates, batch and epochs (`benchmarks/methods/comparison.py`); losses, "
    "stages and what is frozen are each recipe's own. Operating points are chosen on dev and run on "
    "test, where rows really leave the batch.",
    "**FLOPs** are counted by one counter for all, on the real modules, heads and whatever else "
    "exits evaluate included, each row at its own length, and stand as shares of those of the full "
    "model, which is fine-tuned by itself and has no exits.",
    "**1.5x, 2x, 3x**: quality x 100 at so many times fewer FLOPs, on the straight line between the "
    'measured neighbours (for accuracy that is what a coin between the two gives); "-" where even '
    "the cheapest point costs more. **Area**: the mean quality over budgets from 1/3 to 1 of the "
    "full model's FLOPs; below a method's cheapest point it falls in a line to 0 at no FLOPs (some "
    "samples get no answer, which is wrong).",
    f"**2x against full**: points lost against the full model at twice fewer FLOPs; ✓ within {MAX_DROP:.1f}. "
    "**Full depth** is the method's own answer when nobody leaves early, which training with exits changes.",
    f"**Against {', '.join(map(str, AGAINST))} layers**: points above the static model that is cut to "
    "so many layers before it is fine-tuned, at that model's own FLOPs. * marks a difference of more "
    "than two standard errors of two independent samples of rows; smaller ones may be chance. "
    "*Beats* is above all three, *mixed* above some, **fails** above none (not reaching so few FLOPs "
    "counts as not above). ± is the standard deviation over seeds.",
)


def page(sets: Sets, costs: Costs, progress: str) -> str:
    lines = [
        "# Exit methods, compared",
        "",
        cells.GENERATED,
        "",
        "Nineteen published ways to let samples leave a transformer early, each trained by its own "
        "recipe on the same backbone and data with the same budget, beside the baseline that shames "
        "many papers: the same model cut to fewer layers. One method, one page: follow its name. "
        "[report.html](methods/report.html) is the same to click on (one file, no network).",
        "",
        f"{progress} Runs: `python benchmarks/methods/compare.py`; this page: "
        "`python benchmarks/methods/write_docs.py`.",
        "",
        "## What the results say",
        "",
        *(f"- {sentence}" for name in SETS for sentence in findings(sets[name])),
        "",
        "## The methods",
        "",
        "Carried: bytes that cross a cut in the middle of BERT-base for two classes, beside the "
        "hidden states. Numbers: quality at 1.5x / 2x / 3x fewer FLOPs; and whether the curve beats "
        "the truncated models.",
        "",
        *_methods(sets),
        "",
    ]
    for name in SETS:
        lines += [*_set(sets[name]), ""]
    lines += [*_recipes(), ""]
    lines += [*_costs(sets, costs), "", "## How to read the numbers", ""]
    lines += [f"- {text}" for text in DEFINITIONS]
    return "\n".join(lines) + "\n"


def _recipes() -> list[str]:
    """All training recipes, whatever method they come from."""
    rows = []
    for recipe in RECIPES.values():
        training = recipe.defaults.get("training", {})
        brings = ", ".join(f"{key} {_plain(value)}" for key, value in training.items())
        keys = "; ".join(f"`{s.name}` = {_plain(s.default)}: {s.meaning}" for s in recipe.settings)
        stages = "; then ".join(stage.name for stage in recipe.stages)
        rows.append((f"`{recipe.name}`", recipe.summary, stages, brings, keys))
    return [
        "## Recipes",
        "",
        "How exits are trained is a choice of its own: `offramp train --method pabee --recipe "
        "berxit`. A pair that makes no sense is refused with the reason; each method's page lists which "
        "go together.",
        "",
        *cells.table(
            ("recipe", "in words", "stages", "settings it brings", "keys of `[loss]`"), rows
        ),
    ]


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_plain, value)) + ")"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def findings(numbers: SetNumbers) -> list[str]:
    """What a set's numbers say, in sentences."""
    title, done = cells.TITLES[numbers.name], [line for line in numbers.lines if line.seeds]
    if not done or numbers.full is None:
        return [f"**{title}**: {NOT_RUN}."]
    best = numbers.best(at(2.0))
    out = []
    if best is not None:
        names, value = best
        drop = 100 * (numbers.full.value - value)
        bar = "within" if drop <= MAX_DROP else "not within"
        out.append(
            f"**{title}**: at twice fewer FLOPs {_and(names)} {'is' if len(names) == 1 else 'are'} best with "
            f"{100 * value:.1f}, {_below(drop)} the full model ({100 * numbers.full.value:.1f}): {bar} "
            f"{MAX_DROP:.1f} point. {_others(numbers)} {_chance(numbers)}"
        )
    static = numbers.static_curve
    if static is not None:
        shown = [
            f"{100 * q:.1f} at {s:g}x" for s in SPEEDUPS if (q := static.at(1 / s)) is not None
        ]
        out.append(f"**{title}**, truncated models: {', '.join(shown)}. {_verdicts(done)}")
    waiting = [line.name for line in numbers.lines if line.status == NOT_RUN]
    wrong = [f"{line.name} ({line.status})" for line in numbers.lines if _went_wrong(line.status)]
    for what, names in ((NOT_RUN, waiting), ("without a result", wrong)):
        if names:
            out.append(f"**{title}**, {what}: {', '.join(names)}.")
    return out


def _went_wrong(status: str) -> bool:
    return status.startswith(("refused", "failed"))


def _others(numbers: SetNumbers) -> str:
    said = []
    keys: list[tuple[str, Callable[[Line], Mean | None]]] = [
        ("at 1.5x", at(1.5)),
        ("at 3x", at(3.0)),
        ("largest area", area),
    ]
    for what, value in keys:
        best = numbers.best(value)
        if best is not None:
            said.append(f"{what} {_and(best[0])} ({100 * best[1]:.1f})")
    return f"Best {', '.join(said)}."


def _chance(numbers: SetNumbers) -> str:
    about, full = numbers.about, numbers.full
    if about is None or full is None:
        return ""
    rows = about["rows"]["test"]
    points = 100 * 2 * math.sqrt(2) * standard_error(full.value, rows, about["metric"])
    return f"On {rows} rows differences below about {points:.1f} points may be chance."


def _verdicts(done: list[Line]) -> str:
    words = {
        "below": "**Fail to beat them** at 2, 3 and 4 layers",
        "mixed": "beat them at some",
        "above": "beat them at all three",
    }
    said = []
    for verdict, text in words.items():
        names = [line.name for line in done if line.verdict == verdict]
        said.append(f"{text}: {', '.join(names) or 'none'}")
    return "; ".join(said) + "."


def _below(drop: float) -> str:
    return f"{drop:.1f} points below" if drop >= 0 else f"{-drop:.1f} points above"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _methods(sets: Sets) -> list[str]:
    head = ["method", "paper", "a sample leaves", "carried", "knobs", "recipe"]
    head += [cells.TITLES[name] for name in SETS]
    rows = []
    for m in methods_table():
        lines = [_line(sets[name], m["name"]) for name in SETS]
        rows.append(
            [
                f"[{m['name']}](methods/{m['name']}.md)",
                f"[{m['paper']}]({m['link']}), {m['venue']}",
                m["rule"],
                carried(m),
                ", ".join(f"`{knob}`" for knob in m["knobs"]),
                f"`{m['recipe']}`",
                *(cells.numbers_cell(line) for line in lines),
            ]
        )
    return cells.table(head, rows)


def _line(numbers: SetNumbers, name: str) -> Line:
    return next(line for line in numbers.lines if line.name == name)


def carried(m: Mapping[str, Any]) -> str:
    """Bytes, of one record of `offramp methods --json`."""
    tokens = m["carried_bytes_per_token"]
    row = f"{m['carried_bytes_per_row']}"
    return f"{row} + {tokens} a token" if tokens else row


def _set(numbers: SetNumbers) -> list[str]:
    title = cells.TITLES[numbers.name]
    out = [f"## {title}", ""]
    if not any(line.seeds for line in numbers.lines):
        return [*out, f"{cells.about_set(numbers)}: {NOT_RUN}."]
    picture = f"methods/curves-{numbers.name}.svg"
    out += [
        f"{cells.about_set(numbers)}. {cells.truncated(numbers)}".strip(),
        "",
        f"![Curves of all methods on {title}, by family, with the truncated models in each]({picture})",
        "",
    ]
    rows = cells.static_rows(numbers)
    for line in numbers.lines:
        if line.seeds:
            link = f"[{line.name}](methods/{line.method}.md)"
            rows.append([link, *cells.line_row(line, numbers.wanted)])
    return out + cells.table(["", *cells.LINE_HEAD], rows)


def set_picture(numbers: SetNumbers) -> str | None:
    """A panel for each family; None where nothing was run."""
    span = spans(numbers)
    if span is None:
        return None
    known = {line.name for line in numbers.lines if not line.status.startswith("not for")}
    shown = [(f, [name for name in f.lines if name in known]) for f in FAMILIES]
    shown = [(family, names) for family, names in shown if names]
    frames, size = grid(span, len(shown), 3)
    panels = [
        panel(frame, numbers, names, family.title)
        for frame, (family, names) in zip(frames, shown, strict=True)
    ]
    note = (
        f"{cells.about_set(numbers).partition(':')[2].partition(',')[0].strip()}. Grey: all other lines. "
        "Thin black line: the full model. What is worse than one layer alone runs out of the picture."
    )
    return sheet(cells.TITLES[numbers.name], note, panels, size)


def _costs(sets: Sets, costs: Costs) -> list[str]:
    machines = sorted({timed["machine"] for timed in costs.timings.values()})
    out = [
        "## What exits cost, and what leaving saves, on the device",
        "",
        "ONNX Runtime, fp32, one thread, one sample at a time: times so many times as long as the "
        "full model without exits, medians of rounds in which the two took turns (`compare.py "
        "--timings`). A model's exits at full depth are to cost at most 1.10 times; where a design "
        "cannot, the last column says why.",
        "",
    ]
    out += cells.table(COST_HEAD, [costs.row(method, sets) for method in METHODS])
    return out + ([""] + [f"Timed on {machine}." for machine in machines] if machines else [])
