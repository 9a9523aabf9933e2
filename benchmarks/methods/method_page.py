"""docs/methods/NAME.md: one method, from its record, its docstrings and its results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import cells
from combinations import Combinations, combinations
from comparison import SETS, VARIANTS
from costs import COST_HEAD, Costs
from derived import SetNumbers
from docstrings import method_doc, recipe_doc
from method_results import guarantee_table, online_table, points_tables, results
from overview import carried

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
        f"# {_title(method)}",
        "",
        cells.GENERATED,
        "",
        f"{method.paper.authors}. {method.paper.venue}. <{method.paper.link}>. Code: "
        f"[{method.name}.py](../../model/offramp_model/methods/{method.name}.py). "
        "[All methods](../methods.md)",
        "",
        f"**The rule.** {doc.rule}",
        "",
        f"**When to take it:** {method.use}",
        "",
        f"**When not:** {method.avoid}",
        "",
        *results(method, sets),
        *(guarantee_table(guarantee) if guarantee and method.guarantee else []),
        *online_table(method, sets),
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
        *([f"**Not verified:** {doc.unverified}", ""] if doc.unverified else []),
        *_training(method),
        *points_tables(method, sets),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _title(method: Method) -> str:
    """The paper's title names most methods itself."""
    title = method.paper.title
    named = re.sub(r"\W", "", title).lower().startswith(method.name.replace("_", ""))
    return title if named else f"{method.name}: {title}"


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
        "## Commands",
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
    rows = [[f"`{name}`", setting["meaning"], f"`{_toml(setting['default'])}`"]
            for name, setting in about["settings"].items()]  # fmt: skip
    if rows:
        out += [*cells.table(["`[settings]` of `--config`", "meaning", "default"], rows), ""]
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
        out += [f"Not verified: {doc.unverified}", ""]
    if recipe.settings:
        rows = [[f"`{s.name}`", s.meaning, f"`{s.default}`"] for s in recipe.settings]
        out += [*cells.table(["setting of `[loss]`", "meaning", "default"], rows), ""]
    out += ["### Other recipes", ""]
    variants: dict[str, Mapping[str, Any]] = {"": {}, **VARIANTS.get(method.name, {})}
    for settings in variants.values():
        kinds = ("classification",) if settings else method.tasks  # VARIANTS are for classes alone
        words = ", ".join(f"`{name} = {_toml(value)}`" for name, value in settings.items())
        out += _combined(method, combinations(method, kinds, settings), words)
    return out


def _combined(method: Method, found: Combinations, settings: str) -> list[str]:
    others = [
        f"`{name}`"
        + ("" if settings or kinds == method.tasks else f" ({' and '.join(kinds)} only)")
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
