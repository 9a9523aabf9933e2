"""docs/methods/NAME.md: one method, from its record, its docstrings and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cells
from combinations import Combinations, combinations
from comparison import SETS, VARIANTS
from costs import COST_HEAD, Costs
from derived import NOT_RUN, Line, SetNumbers
from docstrings import method_doc, recipe_doc
from overview import carried
from plots import grid, panel, sheet, spans
from reading import ONLINE

from offramp_model.methods import METHODS, Method
from offramp_train.recipes import RECIPES

Sets = Mapping[str, SetNumbers]


def page(
    about: Mapping[str, Any], sets: Sets, costs: Costs, guarantee: Mapping[str, Any] | None
) -> str:
    """about: the method's record of `offramp methods --json`."""
    method = METHODS[about["name"]]
    doc = method_doc(method.name)
    lines = [
        f"# {method.name}: {method.paper.title}",
        "",
        cells.GENERATED,
        "",
        f"{method.paper.authors}. {method.paper.venue}. <{method.paper.link}>. Code: "
        f"[{method.name}.py](../../model/offramp_model/methods/{method.name}.py). "
        "[All methods](../methods.md)",
        "",
        f"**The rule.** {doc.rule}",
        "",
        f"**Use it** {_lower(method.use)}",
        "",
        f"**Avoid it** {_lower(method.avoid)}",
        "",
        *_results(method, sets),
        *(_guarantee(guarantee) if guarantee and method.guarantee else []),
        *_online(method, sets),
        "## On the device",
        "",
        *cells.table(COST_HEAD, [costs.row(method.name, sets)]),
        "",
        *_commands(about),
        *_settings(about, method),
        "## Differs from the paper",
        "",
        doc.differs,
        "",
        *([f"**Not verified:** {_lower(doc.unverified)}", ""] if doc.unverified else []),
        *_training(method),
        *_points(method, sets),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


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


def _lower(text: str) -> str:
    """To go on with in a sentence; words like BERT keep their capitals."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _mine(method: Method, sets: Sets) -> list[tuple[SetNumbers, Line]]:
    return [(n, line) for n in sets.values() for line in n.lines if line.method == method.name]


def _results(method: Method, sets: Sets) -> list[str]:
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
        "pooling, FLOPs rather than the paper's own measure of speed, and what the lists below say.",
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
    if not rows:
        return []
    head = [
        "data",
        *(f"exit {i}" for i in range(1, len(rows[0]) - 1)),
        "calibrated on dev to lose 1.0 point",
    ]
    return ["Each exit's answers on every test row (first seed):", "", *cells.table(head, rows), ""]


def _guarantee(record: Mapping[str, Any]) -> list[str]:
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


def _online(method: Method, sets: Sets) -> list[str]:
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


def commands(method: Method) -> list[str]:
    """Command lines that train, calibrate, evaluate and run it."""
    goal = "--epsilon 0.1" if method.guarantee else "--max-drop 1.0"
    bundle = f"my-{method.name}"
    run = f"offramp edge run --bundle {bundle} --input requests.jsonl"
    return [
        f"offramp train --method {method.name} --backbone sentence-transformers/all-MiniLM-L6-v2 --data DIR "
        f"--out {bundle}",
        f"offramp calibrate {bundle} --data DIR/dev.tsv {goal}",
        f"offramp evaluate {bundle} --data DIR/test.tsv --plot curve.svg",
        run,
        f"{run} --cloud localhost:7443 --ca certs/ca.pem --split 3",
    ]


def _commands(about: Mapping[str, Any]) -> list[str]:
    method = METHODS[about["name"]]
    sets = ",".join(name for name, data in SETS.items() if data.kind in method.tasks)
    online = []
    if method.online:
        online = [
            "",
            "Run so, its bandit chooses and learns; `bandit_cost`, `bandit_upload`, `bandit_alpha` and "
            "`bandit_file` in `--config` are its settings, and `knobs` there fixes the exit instead.",
        ]
    return [
        "## Use it",
        "",
        "With the recipe's own settings (`DIR` has train, dev and test files; docs/training.md says more):",
        "",
        *(f"    {command}" for command in commands(method)),
        *online,
        "",
        "As the comparison does, with its budget:",
        "",
        f"    python benchmarks/methods/compare.py --only {method.name} --sets {sets}",
        "",
    ]


def _settings(about: Mapping[str, Any], method: Method) -> list[str]:
    fields = ", ".join(f"{name} ({dtype})" for name, (dtype, _, _) in about["carried"].items())
    crossing = f"{carried(about)} bytes: {fields}" if fields else "nothing"
    out = [
        f"For {' and '.join(method.tasks)}. What crosses a cut beside the hidden states (BERT-base, in the "
        f"middle, two classes): {crossing}.",
        "",
    ]
    rows = [[f"`{name}`", knob["meaning"], f"{knob['low']:g} to {knob['high']:g}", f"{knob['never']:g}"]
            for name, knob in about["knobs"].items()]  # fmt: skip
    out += [*cells.table(["knob", "meaning", "range", "nobody leaves early at"], rows), ""]
    if method.settings:
        shown = ", ".join(f"`{name} = {_toml(value)}`" for name, value in method.settings.items())
        out += [f"Settings and their defaults, section `[settings]` of `--config`: {shown}.", ""]
    return out


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value}"


def _training(method: Method) -> list[str]:
    recipe, doc = RECIPES[method.recipe], recipe_doc(method.recipe)
    out = [f"## How it is trained: recipe `{recipe.name}`", "", doc.rule, ""]
    if doc.differs:
        out += [
            "Differs from the paper:" if doc.differs.startswith("1.") else "Differs:",
            "",
            doc.differs,
            "",
        ]
    if doc.unverified:
        out += [f"Not verified: {_lower(doc.unverified)}", ""]
    if recipe.settings:
        rows = [[f"`{s.name}`", s.meaning, f"`{s.default}`"] for s in recipe.settings]
        out += [*cells.table(["setting of `[loss]`", "meaning", "default"], rows), ""]
    out += ["### Other recipes", ""]
    variants: dict[str, Mapping[str, Any]] = {"": {}, **VARIANTS.get(method.name, {})}
    for settings in variants.values():
        words = ", ".join(f"`{name} = {_toml(value)}`" for name, value in settings.items())
        out += _combined(method, combinations(method, settings), words)
    return out


def _combined(method: Method, found: Combinations, settings: str) -> list[str]:
    others = [
        f"`{name}`" + ("" if kinds == method.tasks else f" ({' and '.join(kinds)} only)")
        for name, kinds in found.fits.items()
        if name != method.recipe
    ]
    where = (
        f"With {settings} it"
        if settings
        else f"`offramp train --method {method.name} --recipe R` also"
    )
    out = [f"{where} takes: {', '.join(others) or 'no other'}. Refused are:", ""]
    rows = [[", ".join(f"`{n}`" for n in names), why] for why, names in found.refused.items()]
    return [*out, *cells.table(["recipe", "because"], rows), ""]


def _points(method: Method, sets: Sets) -> list[str]:
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
