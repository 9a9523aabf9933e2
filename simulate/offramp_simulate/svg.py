"""Small pictures as inline SVG: lines and bars, readable in light and dark pages alike.

Colours come from the page's style sheet (classes c0, c1, ...), text from its text colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 12, 44


@dataclass(frozen=True, slots=True)
class Frame:
    """The drawing area: pixels for values between `x` and `y` limits; `log_x` for a logarithmic axis."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        low, high = self.x
        if self.log_x:
            x, low, high = math.log10(max(x, low)), math.log10(low), math.log10(high)
        across = self.width - _LEFT - _RIGHT
        up = self.height - _TOP - _BOTTOM
        return (
            _LEFT + across * (x - low) / ((high - low) or 1),
            self.height - _BOTTOM - up * (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1),
        )


def cumulative(series: Mapping[str, Sequence[float]], x_title: str, y_title: str) -> str:
    """For each series the share of values at or below x; x logarithmic."""
    values = [v for points in series.values() for v in points]
    low, high = _nice_log(min(values), max(values))
    frame = Frame(640, 320, (low, high), (0.0, 1.0), log_x=True)
    parts = [
        _axes(frame, _log_ticks(low, high), [0, 0.25, 0.5, 0.75, 1], x_title, y_title, "{:.0%}")
    ]
    for index, (name, points) in enumerate(series.items()):
        ordered = sorted(points)
        path = []
        for rank, value in enumerate(ordered):
            before, after = rank / len(ordered), (rank + 1) / len(ordered)
            path += [frame.at(value, before), frame.at(value, after)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
        parts.append(
            f'<polyline class="line c{index}" points="{line}"><title>{escape(name)}</title></polyline>'
        )
    return _svg(frame, parts)


def bars(values: Mapping[str, float], x_title: str, unit: str = "") -> str:
    """A horizontal bar a name, with its value at the end."""
    rows = list(values.items())
    height = _TOP + 34 * len(rows) + _BOTTOM
    longest = max(values.values(), default=1) or 1
    frame = Frame(640, height, (0.0, longest * 1.18), (0.0, float(len(rows))))
    ticks = _ticks(longest)
    parts = [_axes(frame, ticks, [], x_title, "", "{}")]
    for index, (name, value) in enumerate(rows):
        x, y = frame.at(value, len(rows) - index - 0.5)
        left, _ = frame.at(0, 0)
        parts.append(
            f'<rect class="bar c{index}" x="{left:.1f}" y="{y - 5:.1f}" '
            f'width="{max(x - left, 1):.1f}" height="14">'
            f"<title>{escape(name)}: {value:,.0f}{unit}</title></rect>"
            f'<text x="{left:.1f}" y="{y - 9:.1f}">{escape(name)}</text>'
            f'<text x="{x + 6:.1f}" y="{y + 6:.1f}">{value:,.0f}{unit}</text>'
        )
    return _svg(frame, parts)


def columns(stacks: Mapping[str, Mapping[str, int]], x_title: str, y_title: str) -> str:
    """Stacked columns: for each x, counts by name; names keep one colour."""
    names = sorted({name for counts in stacks.values() for name in counts})
    tallest = max((sum(counts.values()) for counts in stacks.values()), default=1) or 1
    frame = Frame(640, 300, (0.0, float(len(stacks))), (0.0, tallest * 1.1))
    ticks = _ticks(tallest)
    parts = [_axes(frame, [], ticks, x_title, y_title, "{:g}")]
    for position, (label, counts) in enumerate(stacks.items()):
        bottom = 0
        left, _ = frame.at(position + 0.2, 0)
        right, floor = frame.at(position + 0.8, 0)
        for name, count in sorted(counts.items()):
            _, low = frame.at(0, bottom)
            _, top = frame.at(0, bottom + count)
            bottom += count
            parts.append(
                f'<rect class="bar c{names.index(name)}" x="{left:.1f}" y="{top:.1f}" '
                f'width="{right - left:.1f}" height="{low - top:.1f}">'
                f"<title>{escape(label)}, {escape(name)}: {count}</title></rect>"
            )
        middle = (left + right) / 2
        _, top = frame.at(0, bottom)
        parts.append(
            f'<text class="middle" x="{middle:.1f}" y="{floor + 16:.1f}">{escape(label)}</text>'
        )
        parts.append(
            f'<text class="middle" x="{middle:.1f}" y="{top - 4:.1f}">{bottom or ""}</text>'
        )
    return _svg(frame, parts)


def legend(names: Sequence[str]) -> str:
    """The colours' meaning, as HTML."""
    keys = "".join(
        f'<span><svg width="12" height="12"><rect class="bar c{i}" width="12" height="12"/></svg> '
        f"{escape(n)}</span>"
        for i, n in enumerate(names)
    )
    return f'<p class="legend">{keys}</p>'


def _svg(frame: Frame, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img">{"".join(parts)}</svg>'


def _axes(
    frame: Frame,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_title: str,
    y_title: str,
    y_format: str,
) -> str:
    parts = []
    for value in x_ticks:
        x, floor = frame.at(value, frame.y[0])
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{floor:.1f}"/>')
        parts.append(f'<text class="middle" x="{x:.1f}" y="{floor + 16:.1f}">{value:,g}</text>')
    for value in y_ticks:
        left, y = frame.at(frame.x[0], value)
        right = frame.width - _RIGHT
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = y_format.format(value)
        parts.append(f'<text class="end" x="{left - 6:.1f}" y="{y + 4:.1f}">{label}</text>')
    middle, bottom = (frame.width + _LEFT - _RIGHT) / 2, frame.height - 8
    parts.append(f'<text class="middle" x="{middle}" y="{bottom}">{escape(x_title)}</text>')
    if y_title:
        up = (frame.height - _BOTTOM + _TOP) / 2
        parts.append(
            f'<text class="middle" x="14" y="{up}" transform="rotate(-90 14 {up})">{escape(y_title)}</text>'
        )
    return "".join(parts)


def _ticks(longest: float) -> list[float]:
    step = 10 ** math.floor(math.log10(longest))
    step = step / 5 if longest / step < 1.5 else step / 2 if longest / step < 3 else step
    return [i * step for i in range(int(longest / step) + 1)]


def _nice_log(low: float, high: float) -> tuple[float, float]:
    low, high = max(low, 0.1), max(high, 0.2)
    marks = [m * 10.0**e for e in range(-1, 6) for m in (1, 2, 5)]
    return max(m for m in marks if m <= low), min(m for m in marks if m >= high)


def _log_ticks(low: float, high: float) -> list[float]:
    marks = [m * 10.0**e for e in range(-1, 6) for m in (1, 2, 5)]
    return [m for m in marks if low <= m <= high]
