"""Curves as SVG, written by hand: small, the same bytes every time, and readable with twenty lines.

A panel shows a few lines in colours and marks of their own (Okabe and Ito's colours, told apart by
colour-blind eyes too), the static truncated models in black, and all other lines in grey behind them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from curves import Curve
from derived import NOT_RUN, Line, SetNumbers

# Colours, dashes and marks go together: a print without colour can be read.
_LOOKS = (
    ("#0072B2", "", "circle"),
    ("#D55E00", "7 3", "square"),
    ("#009E73", "2 2", "up"),
    ("#CC79A7", "9 3 2 3", "down"),
    ("#B07A00", "4 2", "diamond"),
)
_GREY, _INK = "#d2d2d2", "#1a1a1a"
_TICKS = {1 / 6: "6x", 1 / 3: "3x", 1 / 2: "2x", 2 / 3: "1.5x", 1.0: "1x"}
_FONT = 'font-family="Helvetica, Arial, sans-serif"'
_MARKS = 6  # on a line, about

TRUNCATED_LINE = "truncated models"


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a panel's plot stands on the page (pixels), and what it spans."""

    left: float
    top: float
    width: float
    height: float
    costs: tuple[float, float]
    qualities: tuple[float, float]

    def x(self, cost: float) -> float:
        low, high = self.costs
        return self.left + (cost - low) / (high - low) * self.width

    def y(self, quality: float) -> float:
        low, high = self.qualities
        return self.top + (high - quality) / (high - low) * self.height


def spans(numbers: SetNumbers) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """(costs, qualities) that the panels of a set show; None where nothing was run.

    Quality begins a little below the truncated model of one layer: what is worse runs out of the picture."""
    curves = [line.curve for line in numbers.lines if line.curve is not None]
    static = numbers.static_curve
    shown = [*curves, *([static] if static else [])]
    if not shown:
        return None
    values = [q for curve in shown for _, q in curve.points]
    low = min(values) if static is None else static.points[0][1]
    high = max([*values, *([numbers.full.value] if numbers.full else [])])
    dearest = max(curve.points[-1][0] for curve in shown)
    room = 0.12 * (high - low) + 0.002
    return (0.14, min(max(dearest, 1.0) + 0.03, 1.4)), (low - room, high + room / 2)


def panel(
    frame: Frame,
    numbers: SetNumbers,
    highlighted: Sequence[str],
    title: str,
    seeds: bool = False,
) -> list[str]:
    """One panel as SVG elements. seeds: each seed's own curve, thin, beside the mean."""
    by_name = {line.name: line for line in numbers.lines}
    # Several pictures may stand in one HTML file, whose names are common to all.
    clip = "clip-" + re.sub(r"\W+", "-", f"{numbers.name} {title}")
    out = [
        f'<clipPath id="{clip}"><rect x="{_n(frame.left)}" y="{_n(frame.top)}" '
        f'width="{_n(frame.width)}" height="{_n(frame.height)}"/></clipPath>',
        f'<text x="{_n(frame.left)}" y="{_n(frame.top - 8)}" font-weight="bold">{escape(title)}</text>',
        *_axes(frame, numbers),
        f'<g clip-path="url(#{clip})" fill="none">',
    ]
    for name, line in by_name.items():
        if name not in highlighted and line.curve is not None:
            out.append(_path(frame, line.curve, name, f'stroke="{_GREY}" stroke-width="1"'))
    if numbers.static_curve is not None:
        style = f'stroke="{_INK}" stroke-width="1.4" stroke-dasharray="1 2.5"'
        out.append(_path(frame, numbers.static_curve, TRUNCATED_LINE, style))
        out += _marks(frame, numbers.static_curve, "cross", _INK, TRUNCATED_LINE, every=1)
    for name, look in zip(highlighted, _LOOKS, strict=False):
        out += _line(frame, by_name[name], look, seeds)
    return [*out, "</g>", *_legend(frame, [by_name[name] for name in highlighted])]


def sheet(title: str, note: str, panels: Sequence[list[str]], size: tuple[float, float]) -> str:
    """A whole file of panels."""
    width, height = size
    elements = [element for one in panels for element in one]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" '
            f'{_FONT} font-size="11" fill="{_INK}">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{_n(width)}" height="{_n(height)}" fill="#ffffff"/>',
            f'<text x="12" y="20" font-size="15" font-weight="bold">{escape(title)}</text>',
            f'<text x="12" y="37" fill="#444444">{escape(note)}</text>',
            *elements,
            "</svg>\n",
        ]
    )


def grid(
    spans: tuple[tuple[float, float], tuple[float, float]], count: int, columns: int
) -> tuple[list[Frame], tuple[float, float]]:
    """Frames for so many panels of the same span, and the size of the page that holds them."""
    wide, high, head = 320.0, 270.0, 46.0
    frames = [
        Frame(
            44 + wide * (i % columns),
            head + 26 + high * (i // columns),
            wide - 58,
            high - 76,
            *spans,
        )
        for i in range(count)
    ]
    return frames, (wide * min(columns, count), head + high * math.ceil(count / columns))


def _axes(frame: Frame, numbers: SetNumbers) -> list[str]:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    out = []
    for value in _steps(*frame.qualities):
        y = _n(frame.y(value))
        out.append(f'<path d="M{_n(frame.left)} {y}H{_n(right)}" stroke="#ececec"/>')
        out.append(
            f'<text x="{_n(frame.left - 5)}" y="{_n(frame.y(value) + 4)}" text-anchor="end">'
            f"{100 * value:.4g}</text>"
        )
    for cost, name in _TICKS.items():
        if frame.costs[0] <= cost <= frame.costs[1]:
            x = _n(frame.x(cost))
            out.append(f'<path d="M{x} {_n(frame.top)}V{_n(bottom)}" stroke="#ececec"/>')
            out.append(f'<text x="{x}" y="{_n(bottom + 14)}" text-anchor="middle">{name}</text>')
    if numbers.full is not None:
        y = _n(frame.y(numbers.full.value))
        out.append(
            f'<path d="M{_n(frame.left)} {y}H{_n(right)}" stroke="{_INK}" stroke-width="0.7"/>'
        )
    out.append(
        f'<rect x="{_n(frame.left)}" y="{_n(frame.top)}" width="{_n(frame.width)}" '
        f'height="{_n(frame.height)}" fill="none" stroke="#888888"/>'
    )
    out.append(
        f'<text x="{_n(frame.left + frame.width / 2)}" y="{_n(bottom + 28)}" text-anchor="middle" '
        'fill="#444444">times fewer FLOPs than the full model</text>'
    )
    return out


def _line(frame: Frame, line: Line, look: tuple[str, str, str], seeds: bool) -> list[str]:
    colour, dashes, mark = look
    if line.curve is None:
        return []
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    out = []
    if seeds and len(line.seeds) > 1:
        thin = f'stroke="{colour}" stroke-width="0.8" opacity="0.45"'
        out = [_path(frame, seed.curve, line.name, thin) for seed in line.seeds]
    out.append(_path(frame, line.curve, line.name, f'stroke="{colour}" stroke-width="2"{dashed}'))
    every = max(1, round(len(line.curve.points) / _MARKS))
    return out + _marks(frame, line.curve, mark, colour, line.name, every)


def _path(frame: Frame, curve: Curve, name: str, style: str) -> str:
    points = "L".join(f"{_n(frame.x(cost))} {_n(frame.y(q))}" for cost, q in curve.points)
    return f'<path class="line" data-line={quoteattr(name)} d="M{points}" {style}/>'


def _marks(frame: Frame, curve: Curve, mark: str, colour: str, name: str, every: int) -> list[str]:
    places = [(frame.x(cost), frame.y(q)) for cost, q in curve.points[::every]]
    shapes = "".join(_shape(mark, x, y) for x, y in places)
    fill = "none" if mark == "cross" else colour
    return [
        f'<path class="mark" data-line={quoteattr(name)} d="{shapes}" fill="{fill}" stroke="{colour}"/>'
    ]


def _shape(mark: str, x: float, y: float, r: float = 3.2) -> str:
    if mark == "circle":
        return f"M{_n(x - r)} {_n(y)}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0"
    if mark == "cross":
        return f"M{_n(x - r)} {_n(y - r)}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}"
    corners: Mapping[str, Sequence[tuple[float, float]]] = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "up": ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
        "down": ((0, 1.2), (1.1, -0.9), (-1.1, -0.9)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    }
    return "M" + "L".join(f"{_n(x + r * a)} {_n(y + r * b)}" for a, b in corners[mark]) + "z"


def _legend(frame: Frame, lines: Sequence[Line]) -> list[str]:
    """Below on the right, where curves that rise to the right leave room."""
    out, x, step = [], frame.left + frame.width - 8, 14
    entries = [(line.name, look, line) for line, look in zip(lines, _LOOKS, strict=False)]
    first = frame.top + frame.height - 10 - step * len(entries)
    for i, (name, (colour, _, mark), line) in enumerate(entries):
        y, missing = first + step * i, line.curve is None
        said = f"{name}: {_short(line.status)}" if missing else name
        fill = "#767676" if missing else colour
        out.append(
            f'<text class="name" data-line={quoteattr(name)} x="{_n(x - 12)}" y="{_n(y)}" '
            f'text-anchor="end" fill="{fill}" {_HALO}>{escape(said)}</text>'
        )
        if not missing:
            out.append(
                f'<path d="{_shape(mark, x - 2, y - 4)}" fill="{colour}" stroke="{colour}"/>'
            )
    out.append(
        f'<text class="name" data-line={quoteattr(TRUNCATED_LINE)} x="{_n(x - 12)}" '
        f'y="{_n(first + step * len(entries))}" text-anchor="end" {_HALO}>{TRUNCATED_LINE}</text>'
    )
    cross = _shape("cross", x - 2, first + step * len(entries) - 4)
    return [*out, f'<path d="{cross}" fill="none" stroke="{_INK}"/>']


# A white rim keeps names readable on lines.
_HALO = 'stroke="#ffffff" stroke-width="3" paint-order="stroke" stroke-linejoin="round"'


def _short(status: str) -> str:
    kind = status.partition(":")[0]
    return NOT_RUN if status == NOT_RUN else kind


def _steps(low: float, high: float) -> list[float]:
    """Round values, four to eight of them."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * m for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def _n(value: float) -> str:
    """Coordinates to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
