"""`offramp methods`: the table of exit methods, and the details of one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from offramp_common.cli import OK, write_json
from offramp_common.errors import ConfigError

_LOG_COLUMNS = 132  # a file has no width to fit
_TASKS = {"classification": "classes", "regression": "values"}
_WIDTH, _LAYERS = 768, 12  # the example that carried bytes are counted for: BERT-base, two classes


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "methods",
        help="the table of exit methods: paper, rule, knobs, carried state",
        description="Lists the exit methods, or shows the details of one. Bytes carried are those that "
        "cross a cut in the middle of BERT-base for two classes, beside the hidden states. docs/methods.md "
        "compares the methods.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="show the details of this method")
    parser.add_argument("--json", metavar="FILE", help="write JSON to FILE (- for standard output)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    methods = table()
    chosen = [m for m in methods if m["name"] == args.name]
    if args.name is not None and not chosen:
        known = ", ".join(m["name"] for m in methods)
        raise ConfigError(f"method {args.name!r} is unknown; known: {known}")
    if args.json:
        write_json(chosen[0] if chosen else methods, args.json)
    elif chosen:
        _show(chosen[0])
    else:
        _list(methods)
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
                "settings": _settings(method),
            }
        )
    return out


def _settings(method: Any) -> dict[str, dict[str, Any]]:
    from offramp_model.methods.method import setting_meaning

    return {
        name: {"default": default, "meaning": setting_meaning(method.name, name)}
        for name, default in method.settings.items()
    }


def _knobs(method: Any, spec: Any, tasks: dict[str, Any]) -> dict[str, Any]:
    """Every knob of every task the method is for; the ranges of the example's task."""
    from dataclasses import replace

    found: dict[str, Any] = {}
    for kind in method.tasks:
        for knob in method.knobs(replace(spec, task=tasks[kind])):
            found.setdefault(knob.name, {**knob.to_json(), "tasks": []})["tasks"].append(kind)
    return found


def carried_words(method: Mapping[str, Any]) -> str:
    """What crosses a cut, such as "16 B"; "-" for nothing."""
    row, token = method["carried_bytes_per_row"], method["carried_bytes_per_token"]
    parts = [f"{row} B"] if row else []
    parts += [f"{token} B a token"] if token else []
    return " + ".join(parts) or "-"


def _console() -> Any:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, width=_LOG_COLUMNS)


def _list(methods: Sequence[Mapping[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("method", no_wrap=True)
    shown.add_column("published", max_width=18)
    shown.add_column("a sample leaves", ratio=1)
    shown.add_column("carried", justify="right")
    shown.add_column("recipe", no_wrap=True)
    shown.add_column("tasks")
    for m in methods:
        first, _, _ = m["rule"].partition(". ")
        tasks = ", ".join(_TASKS[task] for task in m["tasks"])
        cells = (m["name"], m["venue"], first.rstrip("."), carried_words(m), m["recipe"], tasks)
        shown.add_row(*map(_plain, cells))
    console = _console()
    console.print(shown)
    console.print("The details of one: offramp methods NAME")


def _show(m: Mapping[str, Any]) -> None:
    from rich.table import Table

    fields = ", ".join(f"{name} {dtype}" for name, (dtype, _, _) in m["carried"].items())
    knobs = [
        f"{name}: {knob['meaning']} ({knob['low']:g} to {knob['high']:g}; "
        f"nobody leaves early at {knob['never']:g})"
        for name, knob in m["knobs"].items()
    ]
    settings = [
        f"{name} = {setting['default']!r}: {setting['meaning']}"
        for name, setting in m["settings"].items()
    ]
    rows = [
        ("rule", m["rule"]),
        ("tasks", ", ".join(m["tasks"])),
        *(("knob", knob) for knob in knobs),
        ("carried", f"{carried_words(m)} ({fields})" if fields else "nothing"),
        *(("setting", setting) for setting in settings),
        ("recipe", m["recipe"]),
        ("use it", m["use"]),
        ("avoid it", m["avoid"]),
        ("reported", m["reported"]),
        ("its page", f"docs/methods/{m['name']}.md"),
    ]
    shown = Table.grid(padding=(0, 2))
    shown.add_column(no_wrap=True, style="bold")
    shown.add_column(ratio=1)
    for title, text in rows:
        shown.add_row(title, _plain(text))
    console = _console()
    console.print(_plain(f"{m['name']}: {m['paper']}"), style="bold")
    console.print(_plain(f"{m['authors']}. {m['venue']}. {m['link']}"))
    console.print(shown)


def _plain(text: str) -> Any:
    """As it is: square brackets are no markup."""
    from rich.text import Text

    return Text(text)
