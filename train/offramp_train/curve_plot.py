"""The picture of a curve, quality against mean depth, as a small SVG written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 400, 64, 56, 40, 24
_COLOURS = ("#1f6f8b", "#c8553d", "#588157", "#7b4b94")


Place = Callable[[float], float]
"""A value's place on the page."""


@dataclass(frozen=True, slots=True)
class Line:
    """points: (mean depth, quality in [0, 1]), left to right; marked: points drawn larger."""

    points: tuple[tuple[float, float], ...]
    marked: tuple[tuple[float, float], ...] = ()


def curve_svg(title: str, quality: str, n_layers: int, lines: Mapping[str, Line]) -> str:
    """A page for browsers and READMEs; lines by name, at most four."""
    values = [q for line in lines.values() for _, q in (*line.points, *line.marked)]
    low, high = _span(min(values), max(values))

    def x(depth: float) -> float:
        return _LEFT + (depth - 1) / max(n_layers - 1, 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    out += _axes(quality, n_layers, (low, high), x, y)
    for i, (name, line) in enumerate(lines.items()):
        out += _drawn(line, _COLOURS[i % len(_COLOURS)], x, y)
        out.append(
            f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - _BOTTOM - 12 - 18 * i}" text-anchor="end" '
            f'fill="{_COLOURS[i % len(_COLOURS)]}">{escape(name)}</text>'
        )
    return "\n".join([*out, "</svg>"]) + "\n"


def _axes(quality: str, n_layers: int, span: tuple[float, float], x: Place, y: Place) -> list[str]:
    out = []
    for i in range(5):
        value = span[0] + (span[1] - span[0]) * i / 4
        out.append(f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" stroke="#dddddd"/>')
        out.append(
            f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{100 * value:.1f}</text>'
        )
    ticks: Sequence[int] = range(1, n_layers + 1, max(1, n_layers // 12))
    out += [
        f'<text x="{x(depth):.1f}" y="{_HEIGHT - 34}" text-anchor="middle">{depth}</text>'
        for depth in ticks
    ]
    out.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 12}" text-anchor="middle">mean depth, layers</text>'
    )
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    out.append(
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(quality)} x 100</text>"
    )
    return out


def _drawn(line: Line, colour: str, x: Place, y: Place) -> list[str]:
    path = "L".join(f"{x(d):.1f} {y(q):.1f}" for d, q in line.points)
    out = [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for points, radius in ((line.points, 3), (line.marked, 6)):
        out += [
            f'<circle cx="{x(d):.1f}" cy="{y(q):.1f}" r="{radius}" fill="{colour}"/>'
            for d, q in points
        ]
    return out


def _span(low: float, high: float) -> tuple[float, float]:
    room = max(0.02 * (high - low), 0.002)
    return low - room, high + room
