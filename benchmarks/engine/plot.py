"""The sweep's numbers as a picture: requests/s and p95 against the number of clients.

    python benchmarks/engine/plot.py RESULT.json [RESULT.json ...] --svg FILE

Results of compare.py at other numbers of clients are put together; medians of rounds, with the range shaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PERFECT = "one perfect batch"


def points(results: list[dict[str, Any]]) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Name of a server -> clients -> its rounds."""
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for result in results:
        for at in result["results"]:
            for name, rounds in at["servers"].items():
                found.setdefault(name, {})[at["clients"]] = rounds
            perfect = [{"rate": rate} for rate in at["perfect_batch_rate"]]
            found.setdefault(PERFECT, {})[at["clients"]] = perfect
    return {name: dict(sorted(by_clients.items())) for name, by_clients in found.items()}


def draw(axes: Any, found: dict[str, dict[int, list[dict[str, float]]]], what: str) -> None:
    for name, by_clients in found.items():
        if what not in next(iter(by_clients.values()))[0]:
            continue
        clients = list(by_clients)
        values = [[one[what] for one in rounds] for rounds in by_clients.values()]
        style = {"linestyle": "--", "color": "gray"} if name == PERFECT else {"marker": "o"}
        (line,) = axes.plot(clients, [median(v) for v in values], label=name, **style)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(clients, low, high, alpha=0.15, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xticks(clients, [str(n) for n in clients])
    axes.set_xlabel("clients")
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--svg", type=Path, required=True)
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in args.results]
    found = points(results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    draw(left, found, "rate")
    left.set_ylabel("requests per second")
    left.set_ylim(bottom=0)
    draw(right, found, "p95_ms")
    right.set_ylabel("p95 latency, ms")
    right.set_yscale("log")
    left.legend(fontsize=8, loc="lower center", ncols=2)
    first = results[0]
    tokens = first["workload"]["tokens_mean"]
    figure.suptitle(f"{first['model']}, {first['data']} ({tokens} tokens on average), one thread")
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "offramp"
    figure.savefig(args.svg, metadata={"Date": None})


if __name__ == "__main__":
    main()
