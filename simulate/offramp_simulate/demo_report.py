"""The demo's report: one HTML page that needs nothing else, with the table, plots and every answer."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from offramp_simulate import svg
from offramp_simulate.demo_view import COLUMNS, cells, fell_back

Record = dict[str, Any]

_STYLE = """
:root { --text: #1c2330; --soft: #5b6575; --back: #ffffff; --panel: #f4f6f9; --grid: #d9dee6;
  --k0: #1565c0; --k1: #2e8b57; --k2: #d9822b; --k3: #8e5bb5; --k4: #7a8594; --k5: #b0436a; }
@media (prefers-color-scheme: dark) { :root { --text: #e6eaf0; --soft: #a3adba; --back: #14181f;
  --panel: #1d232c; --grid: #343d4a;
  --k0: #64a8f0; --k1: #5fc58c; --k2: #f0a75c; --k3: #bd90e0; --k4: #98a4b3; --k5: #e88fb0; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.soft, figcaption, footer { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; } tr.ours td { font-weight: 600; }
table.answers td, table.answers th { text-align: left; white-space: normal; }
td.wrong { color: #c62828; } @media (prefers-color-scheme: dark) { td.wrong { color: #ff8a80; } }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1.2rem; }
@media (max-width: 520px) { .plots { grid-template-columns: 1fr; } }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: .8rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--text); font-size: 12px; }
.legend svg { width: 12px; height: 12px; } .legend span { margin-right: 1rem; white-space: nowrap; }
.middle { text-anchor: middle; } .end { text-anchor: end; } .grid { stroke: var(--grid); }
.line { fill: none; stroke-width: 2.2; }
.line.c0 { stroke: var(--k0); } .line.c1 { stroke: var(--k1); } .line.c2 { stroke: var(--k2); }
.line.c3 { stroke: var(--k3); } .line.c4 { stroke: var(--k4); } .line.c5 { stroke: var(--k5); }
.bar.c0 { fill: var(--k0); } .bar.c1 { fill: var(--k1); } .bar.c2 { fill: var(--k2); }
.bar.c3 { fill: var(--k3); } .bar.c4 { fill: var(--k4); } .bar.c5 { fill: var(--k5); }
"""


def render(result: Record) -> str:
    """The page for what `demo.to_json` gives."""
    rows, records = result["table"], result["records"]
    figures = _figures(rows, records)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>offramp demo: {escape(result['bundle'])} over {escape(result['link'])}</title>"
        f"<style>{_STYLE}</style></head><body>"
        f"<h1>offramp demo: {escape(result['bundle'])} over {escape(result['link'])}</h1>"
        f'<p class="soft">{result["sentences"]} sentences of {escape(result["source"])}, one at a time; '
        f"{escape(result['hardware'])}; {escape(result['finished'])}. Device, link and cloud shared this "
        "machine: read ratios rather than absolutes.</p>"
        f"{_table(rows)}{_notes(rows)}{_choices(rows)}<h2>Plots</h2><div class='plots'>{figures}</div>"
        f"{_kinds(records['offramp'])}{_answers(records['offramp'])}</body></html>\n"
    )


def _figures(rows: list[Record], records: dict[str, list[Record]]) -> str:
    titles = [row["title"] for row in rows]
    ours = records["offramp"]
    latency = {row["title"]: [r["ms"] for r in records[row["strategy"]]] for row in rows}
    depths = sorted({r["exit_depth"] for r in ours})
    stacks = {
        f"exit {d}": dict(Counter(r["where"] for r in ours if r["exit_depth"] == d)) for d in depths
    }
    places = sorted({r["where"] for r in ours})
    return "".join(
        [
            _figure(
                "Latency",
                svg.cumulative(latency, "milliseconds (log scale)", "share answered"),
                "Share of sentences answered within a time; further left is faster.",
                svg.legend(titles),
            ),
            _figure(
                "Bytes up",
                svg.bars({r["title"]: r["bytes_up"] for r in rows}, "bytes a sentence"),
                "Read off the link, TLS, gRPC and TCP/IP headers included.",
            ),
            _figure(
                "Where samples leave",
                svg.columns(stacks, "", "sentences"),
                "offramp: the exit each sentence left at, and who answered it.",
                svg.legend(places),
            ),
            _figure(
                "Layers run in the cloud",
                svg.bars(
                    {r["title"]: 100 * r["cloud_layers"] for r in rows}, "layers in 100 sentences"
                ),
                "What the cloud has to pay for.",
            ),
        ]
    )


def _table(rows: list[Record]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        f"<tr{' class=ours' if row['strategy'] == 'offramp' else ''}><td>{escape(row['title'])}</td>"
        + "".join(f"<td>{cell}</td>" for cell in cells(row))
        + "</tr>"
        for row in rows
    )
    head = f"<thead><tr><th></th>{head}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _notes(rows: list[Record]) -> str:
    notes = (
        "<p class='soft'>accuracy: against the given labels. agree: with the full model. bytes up: a "
        "sentence, on the link. layers: run a sentence, on the device and in the cloud."
    )
    notes += "".join(f"<br>{escape(line)}" for line in fell_back(rows))
    return notes + "</p>"


def _choices(rows: list[Record]) -> str:
    """What the planner did with the samples."""
    ours = next(row for row in rows if row["strategy"] == "offramp")
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{count}</td><td>{count / ours['n']:.1%}</td></tr>"
        for name, count in ours["choices"].items()
    )
    return (
        "<h2>What the planner chose</h2><table><thead><tr><th></th><th>sentences</th><th>share</th></tr>"
        f"</thead><tbody>{body}</tbody></table>"
    )


def _figure(title: str, picture: str, caption: str, key: str = "") -> str:
    words = f"<figcaption>{escape(caption)}</figcaption>"
    return f"<figure><strong>{escape(title)}</strong>{picture}{key}{words}</figure>"


def _kinds(records: list[Record]) -> str:
    kinds = sorted({r["kind"] for r in records if r.get("kind")})
    if not kinds:
        return ""
    rows = []
    for kind in kinds:
        of_kind = [r for r in records if r["kind"] == kind]
        right = sum(r["label"] == r["expected"] for r in of_kind) / len(of_kind)
        depth = sum(r["exit_depth"] for r in of_kind) / len(of_kind)
        device = sum(r["where"] != "cloud" for r in of_kind) / len(of_kind)
        rows.append(
            f"<tr><td>{escape(kind)}</td><td>{len(of_kind)}</td><td>{right:.1%}</td><td>{depth:.2f}</td><td>{device:.1%}</td></tr>"
        )
    return (
        "<h2>By kind of sentence</h2><table><thead><tr><th></th><th>sentences</th><th>accuracy</th>"
        f"<th>mean exit depth</th><th>on device</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _answers(records: list[Record]) -> str:
    rows = "".join(
        f"<tr><td>{escape(r['text'] if isinstance(r['text'], str) else ' / '.join(r['text']))}</td>"
        f"<td{'' if r['label'] == r['expected'] else ' class=wrong'}>{escape(str(r['label']))}</td>"
        f"<td>{escape(r['expected'])}</td><td>{r['exit_depth']}</td><td>{escape(r['where'])}</td>"
        f"<td>{r['ms']:.1f}</td><td>{r['bytes_up']}</td><td>{escape(r.get('reason') or '')}</td></tr>"
        for r in records
    )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("text", "answer", "expected", "exit", "where", "ms", "bytes up", "fallback")
    )
    return (
        f"<h2>Every answer of offramp</h2><details><summary>{len(records)} sentences</summary>"
        f'<div class="scroll"><table class="answers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )
