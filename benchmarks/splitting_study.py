"""The study docs/studies/when-splitting-pays.md: runs its scenarios, draws its pictures, fills its tables.

python benchmarks/splitting_study.py    # about two minutes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "studies" / "when-splitting-pays"
PAGE = FOLDER.with_suffix(".md")
RESULTS = Path(__file__).parent / "results" / "splitting_study.json"
LOCAL, INPUT = "all on the device", "send the input"
LETTERS = {
    LOCAL: "L",
    INPUT: "I",
    "split 1": "1",
    "split 1, int4+z": "1z",
    "split 2": "2",
    "split 4": "4",
}
COLOURS = {LOCAL: "#999999", INPUT: "#0072B2", "split 1": "#E69F00", "split 1, int4+z": "#F0E442",
           "split 2": "#009E73", "split 4": "#CC79A7"}  # fmt: skip
"""Okabe and Ito's, told apart by the colour-blind; letters stand in the cells too."""
Cells = Sequence[dict[str, Any]]
PRICES = (0.10, 1.00, 4.00)
"""Dollars an hour of a replica: a small shared core, a large machine, a GPU. Traffic as in the scenario."""


def run(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        scenario = FOLDER / f"{name}.toml"
        command = [sys.executable, "-m", "offramp_common", "simulate", str(scenario)]
        subprocess.run([*command, "--json", str(out), "--workers", "1"], check=True)
        result: dict[str, Any] = json.loads(out.read_text())
    return trimmed(result)


def trimmed(result: dict[str, Any]) -> dict[str, Any]:
    """What pictures and tables need."""
    kept = ("values", "plan", "right", "bytes_up", "bytes_down", "cloud_ms", "engine_used")
    cells = [
        {
            **{name: cell[name] for name in kept},
            "ms": {q: cell["ms"][q] for q in ("mean", "p50", "p95")},
        }
        for cell in result["cells"]
    ]
    traffic = result["scenario"]["costs"]["traffic_usd_per_gb"]
    return {
        "axes": result["axes"],
        "record": result["record"],
        "scenario": {"costs": {"traffic_usd_per_gb": traffic}},
        "cells": cells,
    }


def winner(cells: Cells, of: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """The least; among equals the one named first, which sends less."""
    return min(cells, key=of)


def places(result: dict[str, Any]) -> dict[tuple[float, ...], list[dict[str, Any]]]:
    """Cells by device, round trip and bandwidth."""
    found: dict[tuple[float, ...], list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        key = tuple(cell["values"][axis] for axis in result["axes"])
        found.setdefault(key, []).append(cell)
    return found


def mean_ms(cell: dict[str, Any]) -> float:
    return float(cell["ms"]["mean"])


def p95_ms(cell: dict[str, Any]) -> float:
    return float(cell["ms"]["p95"])


def usd(cell: dict[str, Any], price: float, per_gb: float) -> float:
    """A million requests: the engine's time at `price` an hour, and traffic."""
    traffic = (cell["bytes_up"] + cell["bytes_down"]) / 1e9 * per_gb
    return float(1e6 * (cell["cloud_ms"] / 3.6e6 * price + traffic))


def draw_links(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    matplotlib.rcParams.update({"svg.hashsalt": "offramp", "svg.fonttype": "none"})
    slows, rtts, rates = result["axes"].values()
    by_place = places(result)
    figure, axes = plt.subplots(2, len(slows), figsize=(14, 6.4), sharex=True, sharey=True)
    for row, (title, plans) in enumerate(
        (("every plan", set(LETTERS)), ("the input must stay", set(LETTERS) - {INPUT}))
    ):
        for column, slow in enumerate(slows):
            axis = axes[row][column]
            for y, rtt in enumerate(rtts):
                for x, rate in enumerate(rates):
                    cells = [c for c in by_place[slow, rtt, rate] if c["plan"] in plans]
                    plan = winner(cells, mean_ms)["plan"]
                    axis.add_patch(Rectangle((x, y), 1, 1, fc=COLOURS[plan], ec="white"))
                    axis.text(x + 0.5, y + 0.5, LETTERS[plan], ha="center", va="center", size=9)
            axis.set(xlim=(0, len(rates)), ylim=(0, len(rtts)))
            axis.set_xticks([i + 0.5 for i in range(len(rates))], [f"{r:g}" for r in rates])
            axis.set_yticks([i + 0.5 for i in range(len(rtts))], [f"{r:g}" for r in rtts])
            if row == 0:
                axis.set_title(f"device x {slow:g} slower", size=10)
        axes[row][0].set_ylabel(f"{title}\nround trip, ms")
    figure.supxlabel("uplink, Mbit/s", size=10)
    handles = [Rectangle((0, 0), 1, 1, color=COLOURS[plan]) for plan in LETTERS]
    names = [f"{letter}: {plan}" for plan, letter in LETTERS.items()]
    figure.legend(handles, names, ncols=6, loc="upper center", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    save(figure, "links.svg")


def draw_crowd(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "offramp", "svg.fonttype": "none"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    marks = dict(zip(LETTERS, "osD^v*", strict=True))
    for plan in dict.fromkeys(cell["plan"] for cell in result["cells"]):
        cells = [cell for cell in result["cells"] if cell["plan"] == plan]
        counts = [cell["values"]["devices.count"] for cell in cells]
        look = {"color": COLOURS[plan], "marker": marks[plan], "label": plan}
        left.plot(counts, [p95_ms(cell) for cell in cells], **look)
        right.plot(counts, [100 * cell["engine_used"] for cell in cells], **look)
    for axis, title in (
        (left, "95th percentile, ms"),
        (right, "the replica is at work, % of the time"),
    ):
        axis.set(xscale="log", xlabel="devices, a question every two seconds each", ylabel=title)
        axis.grid(alpha=0.3)
    left.set(yscale="log")
    left.legend(frameon=False)
    figure.tight_layout()
    save(figure, "crowd.svg")


def save(figure: Any, name: str) -> None:
    figure.savefig(FOLDER / name, metadata={"Date": None})
    path = FOLDER / name
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def wins_table(result: dict[str, Any]) -> str:
    """By device: of how many links each plan is the fastest, by mean and by 95th percentile."""
    lines = [
        "| device, times slower | judged by | "
        + " | ".join(LETTERS)
        + " | input must stay: split wins |"
    ]
    lines.append("| --- " * (len(LETTERS) + 3) + "|")
    by_place = places(result)
    for slow in next(iter(result["axes"].values())):
        for title, of in (("mean", mean_ms), ("p95", p95_ms)):
            here = [cells for key, cells in by_place.items() if key[0] == slow]
            won = [winner(cells, of)["plan"] for cells in here]
            without = [
                winner([c for c in cells if c["plan"] != INPUT], of)["plan"] for cells in here
            ]
            counts = [f"{won.count(plan)} of {len(won)}" for plan in LETTERS]
            split = sum(plan != LOCAL for plan in without)
            lines.append(
                f"| {slow:g} | {title} | " + " | ".join([*counts, f"{split} of {len(won)}"]) + " |"
            )
    return "\n".join(lines)


def gain_table(result: dict[str, Any]) -> str:
    """Where a split of hidden states wins over both rivals: by how much at the most, and where that is."""
    lines = [
        "| judged by | links and devices where a split wins | largest gain over the better rival | there |"
    ]
    lines.append("| --- | --- | --- | --- |")
    for title, of in (("mean", mean_ms), ("p95", p95_ms)):
        gains = []
        for key, cells in places(result).items():
            best = winner(cells, of)
            rival = min(of(cell) for cell in cells if cell["plan"] in (LOCAL, INPUT))
            if best["plan"] not in (LOCAL, INPUT):
                gains.append((1 - of(best) / rival, key, best["plan"], of(best), rival))
        count = f"{len(gains)} of {len(places(result))}"
        if not gains:
            lines.append(f"| {title} | {count} | none | |")
            continue
        gain, (slow, rtt, rate), plan, ms, rival = max(gains)
        there = f"x {slow:g}, {rtt:g} ms, {rate:g} Mbit/s: {plan} {ms:.0f} ms, rival {rival:.0f} ms"
        lines.append(f"| {title} | {count} | {100 * gain:.0f} % | {there} |")
    return "\n".join(lines)


def price_table(result: dict[str, Any]) -> str:
    """What a million requests cost: the same on every link, so one place's cells stand for all."""
    per_gb = result["scenario"]["costs"]["traffic_usd_per_gb"]
    cells = next(iter(places(result).values()))
    head = ["plan", "right %", "bytes up", "cloud ms", *(f"$ at {price:.2f}/h" for price in PRICES)]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for cell in cells:
        words = [
            cell["plan"],
            f"{100 * cell['right']:.1f}",
            f"{cell['bytes_up']:.0f}",
            f"{cell['cloud_ms']:.2f}",
        ]
        words += [f"{usd(cell, price, per_gb):.2f}" for price in PRICES]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def crowd_table(result: dict[str, Any]) -> str:
    head = ["devices", "plan", "p50 ms", "p95 ms", "right %", "replica at work", "cloud ms"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for cell in result["cells"]:
        words = [f"{cell['values']['devices.count']:,}", cell["plan"], f"{cell['ms']['p50']:.0f}"]
        words += [f"{p95_ms(cell):,.0f}", f"{100 * cell['right']:.1f}"]
        words += [f"{100 * cell['engine_used']:.0f} %", f"{cell['cloud_ms']:.2f}"]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def put(page: str, name: str, text: str) -> str:
    """Between the two marks of `name`."""
    begin, end = f"<!-- {name}: benchmarks/splitting_study.py -->", f"<!-- end of {name} -->"
    before, after = page.split(begin)[0], page.split(end)[1]
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def tables(results: dict[str, Any]) -> dict[str, str]:
    links, crowd = results["links"], results["crowd"]
    return {"wins": wins_table(links), "gains": gain_table(links), "price": price_table(links),
            "crowd": crowd_table(crowd)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draw", action="store_true", help="from the results that are there")
    args = parser.parse_args()
    if args.draw:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    else:
        results = {name: run(name) for name in ("links", "crowd")}
        text = json.dumps({**report.about(), **results}).replace("}, {", "},\n{")
        RESULTS.write_text(text + "\n", encoding="utf-8")
    draw_links(results["links"])
    draw_crowd(results["crowd"])
    page = PAGE.read_text(encoding="utf-8")
    for name, text in tables(results).items():
        page = put(page, name, text)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
