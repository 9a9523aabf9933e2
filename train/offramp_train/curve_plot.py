"""The picture of a curve, quality against mean depth, drawn by matplotlib: SVG, PNG or PDF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp_common.errors import ConfigError

# By ending, what matplotlib is told not to write, so that the same curve gives the same bytes.
_UNSAID = {
    ".svg": ("Date", "Creator"), ".png": ("Software",), ".pdf": ("CreationDate", "Creator", "Producer")
}  # fmt: skip
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "offramp",  # without, shapes get random names within the file
    "svg.fonttype": "none",  # text stays text; the first font is the one that matplotlib brings
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9.0,
    "text.parse_math": False,  # a bundle's name may have dollar signs
    "pdf.fonttype": 42,  # whole letters that can be searched and edited
}
# Okabe and Ito's colours, told apart by colour-blind eyes too; marks for prints without colour.
_LOOKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "v"))


@dataclass(frozen=True, slots=True)
class Line:
    """Points are (mean depth, quality x 100), left to right; full: quality x 100 at full depth."""

    points: tuple[tuple[float, float], ...]
    operating: tuple[float, float]
    full: float


def check_picture(path: str | Path) -> None:
    """Before the numbers are measured: ConfigError for a path that cannot be drawn to, and
    ModuleNotFoundError, which the command line explains, where matplotlib is not installed."""
    path = Path(path)
    if path.suffix.lower() not in _UNSAID:
        raise ConfigError(f"picture {path}: its name must end in {', '.join(_UNSAID)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"picture {path}: there is no directory {path.parent}; make it first")
    import matplotlib.figure  # noqa: F401


def draw(path: Path, title: str, quality: str, n_layers: int, lines: Mapping[str, Line]) -> None:
    """Lines by name, at most four, into a file of the kind that its ending says; quality in words."""
    check_picture(path)
    import matplotlib.figure  # not pyplot, which would look for a screen

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's own settings
        matplotlib.rcParams.update(_SETTINGS)
        figure, bottom = matplotlib.figure.Figure(figsize=(6.4, 4.0)), 0.16 + 0.05 * len(lines)
        axes = figure.add_axes((0.12, bottom, 0.85, 0.91 - bottom))
        axes.set_title(title, loc="left")
        axes.set(xlabel=f"mean depth (layers run per input, of {n_layers})", ylabel=quality)
        _draw_lines(axes, n_layers, lines)
        axes.set(xlim=(1 - 0.03 * n_layers, 1.03 * n_layers), ymargin=0.15, axisbelow=True)
        axes.locator_params(axis="x", integer=True)
        axes.locator_params(axis="y", nbins=6)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="lower center", ncols=3, frameon=False)
        said: Any = {"Title": title, **dict.fromkeys(_UNSAID[path.suffix.lower()])}
        figure.savefig(path, dpi=200, metadata=said)


def _draw_lines(axes: Any, n_layers: int, lines: Mapping[str, Line]) -> None:
    """The legend's columns in turn: curves, operating points, full depth."""
    order = sorted(lines, key=lambda name: lines[name].operating[1], reverse=True)
    styles = [(*pair, *look) for pair, look in zip(lines.items(), _LOOKS, strict=False)]
    for i, (name, line, colour, mark) in enumerate(styles):  # thinner and thinner: all can be seen
        style = {"color": colour, "marker": mark, "markersize": 3.5, "linewidth": 2.2 - 0.4 * i}
        axes.plot(*zip(*line.points, strict=True), label=f"{name}, knobs swept", **style)
    for name, line, colour, _ in styles:
        (depth, value), is_left = line.operating, line.operating[0] <= 0.6 * n_layers
        style = {"s": 64, "marker": "D", "color": colour, "edgecolor": "white", "zorder": 4}
        axes.scatter(depth, value, label=f"operating point, {name}", **style)
        where = (7 if is_left else -7, 7 if name == order[0] else -2 - 12 * order.index(name))
        axes.annotate(
            f"{name}: {value:.2f} at {depth:.2f} layers", (depth, value), where,
            textcoords="offset points", ha="left" if is_left else "right",
            bbox={"color": "white", "alpha": 0.6, "pad": 0.5, "linewidth": 0},
        )  # fmt: skip
    for i, (name, line, colour, _) in enumerate(styles):  # each in the other's gaps
        style = {"color": colour, "linestyle": (4 * i, (4, 4)), "linewidth": 1.2, "zorder": 1.5}
        axes.axhline(line.full, label=f"full depth, {name}: {line.full:.2f}", **style)
