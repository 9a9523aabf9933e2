"""The report: one HTML page that needs nothing else, neither a network nor a server.

The page's parts are files beside this one: report.css, report.js (drawing), report_explorer.js (the sliders'
arithmetic) and report_page.js (what is drawn where).
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from offramp_simulate.record import Record
from offramp_simulate.report_tables import explorer_tables, trace_course
from offramp_simulate.scenario import Scenario

_PARTS = Path(__file__).parent
_SCRIPTS = ("report.js", "report_explorer.js", "report_page.js")
_MODELLED = (
    ("what", "how", "from"),
    (
        "exits, answers, confidences",
        "replayed, sample by sample",
        "the record: the bundle's graphs run on data",
    ),
    (
        "bytes",
        "replayed: real frames, encoded",
        "the record; HTTP/2, gRPC and TLS as a constant beside",
    ),
    (
        "device's layers",
        "median by length times the slowdown, with the recorded spread",
        "the record",
    ),
    (
        "link",
        "first in, first out at the rate, then the delay: the emulator's own arithmetic",
        "offramp link",
    ),
    (
        "engine",
        "the live rule of batches; time by rows, length and layers",
        "the record: a real engine, timed",
    ),
    ("gateway", "a constant", "the record"),
    (
        "agent",
        "the live estimates, breaker, budget and planner; its steps as events",
        "offramp_edge",
    ),
    (
        "energy, money",
        "constants times seconds and bytes",
        "the scenario: round figures, give your own",
    ),
)
_STYLE_KEY = "/*STYLE*/"


def render(result: dict[str, Any], scenario: Scenario, record: Record) -> str:
    """The page for what `outcome` gives."""
    lines = result["timelines"].values()
    until_s = max((rows[-1][0] for rows in lines if rows), default=1.0)
    data = {
        "result": result,
        "explorer": explorer_tables(record, scenario),
        "trace": trace_course(scenario, until_s),
        "faults": result["scenario"]["faults"],
    }
    # "</" must not end the script, whatever a title says.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    scripts = "".join(f"<script>{_part(name)}</script>" for name in _SCRIPTS)
    page = _part("report.template.html")
    return (
        page.replace(_STYLE_KEY, _part("report.css"))
        .replace("<!--TITLE-->", escape(scenario.title))
        .replace("<!--ABOUT-->", escape(scenario.about))
        .replace("<!--SUBTITLE-->", _subtitle(result))
        .replace("<!--MODELLED-->", _modelled())
        .replace("<!--VALIDATED-->", validated())
        .replace("<!--SCRIPTS-->", f"<script>const DATA={text};</script>{scripts}")
    )


def _subtitle(result: dict[str, Any]) -> str:
    record, cells = result["record"], result["cells"]
    requests = sum(cell["requests"] for cell in cells)
    return escape(
        f"{requests:,} simulated requests in {len(cells)} runs over {record['samples']:,} recorded samples "
        f"({record['data']}, {record['bundle']}, {record['method']}, {record['precision']}); times from "
        f"{record['machine']}; seed {result['scenario']['seed']}"
    )


_BAR_WORDS = {
    "p50": "median",
    "p95": "95th percentile",
    "bytes": "bytes",
    "exits": "exit shares",
    "sent": "share sent",
    "missed": "deadline misses",
}


def validated() -> str:
    """What `make validate` last found: of the live system's cells, how many the simulator met, and how far
    off it was. The file is written by benchmarks/validate.py."""
    found = json.loads(_part("validation.json"))
    head = [
        "against the live system",
        "bar",
        "cells within it",
        "held out",
        "median error",
        "largest",
    ]
    rows = [_bar_row(name, bar, found["cells"]) for name, bar in found["bars"].items()]
    cells = "".join(f"<th>{escape(word)}</th>" for word in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(word)}</td>" for word in row) + "</tr>" for row in rows
    )
    held = sum(cell["held_out"] for cell in found["cells"])
    about = (
        f"Measured {' and '.join(found['days'])} in {len(found['cells'])} cells, {held} of them held out "
        f"while the model was tuned; {found['machine']}; the device slowed. Links that go away are told "
        "least well."
    )
    return (
        f"<div class='scroll'><table class='words'><tr>{cells}</tr>{body}</table></div>"
        f"<p class='soft'>{escape(about)}</p>"
    )


def _bar_row(name: str, bar: float, cells: list[dict[str, Any]]) -> list[str]:
    unit = "%" if name in ("p50", "p95", "bytes") else "points"
    errors = sorted(abs(cell[f"{name}_error"]) for cell in cells)
    met = [name not in cell["misses"] for cell in cells]
    held = [ok for ok, cell in zip(met, cells, strict=True) if cell["held_out"]]
    return [
        _BAR_WORDS[name],
        f"{100 * bar:g} {unit}",
        f"{sum(met)} of {len(met)}",
        f"{sum(held)} of {len(held)}",
        *(f"{100 * error:.1f} {unit}" for error in (errors[len(errors) // 2], errors[-1])),
    ]


def _modelled() -> str:
    head, *rows = _MODELLED
    cells = "".join(f"<th>{escape(word)}</th>" for word in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(word)}</td>" for word in row) + "</tr>" for row in rows
    )
    return f"<table class='words'><tr>{cells}</tr>{body}</table>"


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")
