"""docs/methods/report.html: the comparison in one file, without a network, to read, click on and print."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import cells
from comparison import SETS
from costs import COST_HEAD, Costs
from derived import NOT_RUN, SetNumbers
from families import FAMILIES
from overview import DEFINITIONS, carried, findings
from plots import Frame, panel, spans

from offramp_model.methods import METHODS
from offramp_model.methods_cli import table as methods_table

Sets = Mapping[str, SetNumbers]

_TEMPLATE = Path(__file__).with_name("report.template.html")
_SMALL, _LARGE = (330, 250), (760, 430)  # pixels of a picture; they shrink with the page


def page(sets: Sets, costs: Costs, progress: str) -> str:
    said = [_words(sentence) for name in SETS for sentence in findings(sets[name])]
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        progress=escape(progress),
        findings="\n".join(f"<li>{sentence}</li>" for sentence in said),
        links=" ".join(f'<a href="#{name}">{cells.TITLES[name]}</a>' for name in SETS),
        sets="\n".join(_set(sets[name]) for name in SETS),
        methods=_methods(),
        costs=_table(COST_HEAD, [(m, costs.row(m, sets)) for m in METHODS]),
        definitions="\n".join(f"<li>{_words(text)}</li>" for text in DEFINITIONS),
    )


def _set(numbers: SetNumbers) -> str:
    title, span = cells.TITLES[numbers.name], spans(numbers)
    about = f"{cells.about_set(numbers)}. {cells.truncated(numbers)}".strip()
    head = f'<section id="{numbers.name}"><h2>{title}</h2><p>{escape(about)}</p>'
    if span is None:
        return f"{head}<p>{NOT_RUN}</p></section>"
    pictures = [_picture(numbers, span, (), f"{title}: all lines", _LARGE)]
    known = {line.name for line in numbers.lines if not line.status.startswith("not for")}
    for family in FAMILIES:
        names = [name for name in family.lines if name in known]
        if names:
            pictures.append(_picture(numbers, span, names, family.title, _SMALL))
    rows: list[tuple[str, Sequence[str]]] = [
        (line.name, [line.name, *cells.line_row(line, numbers.wanted)])
        for line in numbers.lines
        if line.seeds
    ]
    pinned = cells.static_rows(numbers)
    waiting = ", ".join(f"{x.name} ({x.status})" for x in numbers.lines if not x.seeds)
    return "\n".join(
        [
            head,
            '<div class="pictures">',
            *pictures,
            "</div>",
            _table(["line", *cells.LINE_HEAD], rows, pinned),
            f'<p class="small">Without numbers: {escape(waiting)}.</p>' if waiting else "",
            "</section>",
        ]
    )


def _picture(
    numbers: SetNumbers,
    span: tuple[tuple[float, float], tuple[float, float]],
    names: Sequence[str],
    title: str,
    size: tuple[int, int],
) -> str:
    width, height = size
    frame = Frame(40, 24, width - 50, height - 62, *span)
    kind = "large" if size == _LARGE else "small"
    inside = "\n".join(panel(frame, numbers, names, title))
    return (
        f'<figure class="{kind}"><svg viewBox="0 0 {width} {height}" role="img" font-size="11" '
        f'aria-label="{escape(title)}, {cells.TITLES[numbers.name]}">{inside}</svg></figure>'
    )


def _methods() -> str:
    rows = []
    for m in methods_table():
        link = f'<a href="{escape(m["link"])}">{escape(m["paper"])}</a>, {escape(m["venue"])}'
        texts = [
            m["rule"],
            carried(m),
            ", ".join(m["knobs"]),
            m["recipe"],
            m["use"],
            m["avoid"],
            m["reported"],
        ]
        others = "".join(f"<td>{escape(text)}</td>" for text in texts)
        name = f'<td><button data-pick="{m["name"]}">{m["name"]}</button></td>'
        rows.append(f'<tr data-line="{m["name"]}">{name}<td>{link}</td>{others}</tr>')
    head = [
        "method",
        "paper",
        "a sample leaves",
        "bytes carried",
        "knobs",
        "recipe",
        "use it",
        "avoid it",
    ]
    cells_of_head = "".join(f"<th>{text}</th>" for text in [*head, "the paper reports"])
    return (
        '<div class="wide"><table class="words"><thead><tr>'
        f"{cells_of_head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _table(
    head: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    pinned: Sequence[Sequence[str]] = (),
) -> str:
    """rows: (line, cells); sorted by a click on the head, those that are pinned stay on top."""
    top = "".join(f"<tr>{''.join(f'<td>{_words(c)}</td>' for c in row)}</tr>" for row in pinned)
    body = []
    for line, (name, *others) in rows:
        first = f'<td><button data-pick="{escape(line)}">{escape(name)}</button></td>'
        rest = "".join(f"<td>{_words(cell)}</td>" for cell in others)
        body.append(f'<tr data-line="{escape(line)}">{first}{rest}</tr>')
    heads = "".join(f'<th><button class="sort">{escape(text)}</button></th>' for text in head)
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{heads}</tr></thead>'
        f'<tbody class="pinned">{top}</tbody><tbody class="sorted">{"".join(body)}</tbody></table></div>'
    )


def _words(text: str) -> str:
    """The little Markdown that sentences and cells have."""
    text = escape(text, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<![\w*])\*(\w+)\*(?!\w)", r"<em>\1</em>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
