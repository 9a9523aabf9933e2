"""`offramp methods`: the table of exit methods."""

from __future__ import annotations

import argparse
from typing import Any

from offramp_common.cli import OK, write_json

_WIDTH, _LAYERS = 768, 12  # the example that carried bytes are counted for: BERT-base, two classes


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "methods", help="the table of exit methods: paper, rule, knobs, carried state"
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON to FILE (- for standard output)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    methods = table()
    if args.json:
        write_json(methods, args.json)
    else:
        _print(methods)
    return OK


def table() -> list[dict[str, Any]]:
    """One record a method, in order of year; carried state as for BERT-base cut in the middle."""
    from offramp_common.spec import TaskSpec
    from offramp_model.exits import HeadSpec
    from offramp_model.methods import METHODS

    tasks = {
        "classification": TaskSpec("classification", ("no", "yes")), "regression": TaskSpec("regression")
    }  # fmt: skip
    out = []
    for method in METHODS.values():
        spec = HeadSpec(
            tasks[method.tasks[0]], _WIDTH, _LAYERS, tuple(range(1, _LAYERS + 1)), method.settings
        )
        fields = method.policy(spec).state_fields(_LAYERS // 2)
        rows = {name: f for name, f in fields.items() if not f.per_token}
        tokens = {name: f for name, f in fields.items() if f.per_token}
        out.append(
            {
                "name": method.name,
                "paper": method.paper.title,
                "authors": method.paper.authors,
                "venue": method.paper.venue,
                "link": method.paper.link,
                "rule": method.rule,
                "tasks": list(method.tasks),
                "knobs": _knobs(method, spec, tasks),
                "carried": {name: f.to_json() for name, f in fields.items()},
                "carried_bytes_per_row": sum(f.nbytes for f in rows.values()),
                "carried_bytes_per_token": sum(f.nbytes for f in tokens.values()),
                "recipe": method.recipe,
                "use": method.use,
                "avoid": method.avoid,
                "reported": method.reported,
                "settings": dict(method.settings),
            }
        )
    return out


def _knobs(method: Any, spec: Any, tasks: dict[str, Any]) -> dict[str, Any]:
    """Every knob of every task the method is for; the ranges of the example's task."""
    from dataclasses import replace

    found: dict[str, Any] = {}
    for kind in method.tasks:
        for knob in method.knobs(replace(spec, task=tasks[kind])):
            found.setdefault(knob.name, {**knob.to_json(), "tasks": []})["tasks"].append(kind)
    return found


def _print(methods: list[dict[str, Any]]) -> None:
    import sys

    for m in methods:
        carried = f"{m['carried_bytes_per_row']} bytes a sample"
        if m["carried_bytes_per_token"]:
            carried += f", {m['carried_bytes_per_token']} bytes a token"
        fields = ", ".join(f"{name} {dtype}" for name, (dtype, _, _) in m["carried"].items())
        lines = [
            f"{m['name']}: {m['paper']}",
            f"  {m['authors']}. {m['venue']}. {m['link']}",
            f"  rule     {m['rule']}",
            f"  tasks    {', '.join(m['tasks'])}",
            *(f"  knob     {name}: {knob['meaning']}" for name, knob in m["knobs"].items()),
            f"  carried  {f'{carried} ({fields})' if fields else 'nothing'}",
            f"  recipe   {m['recipe']}",
        ]
        print("\n".join(lines), file=sys.stderr)
