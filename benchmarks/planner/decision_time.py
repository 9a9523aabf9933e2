"""How long a decision takes: the median of many, while estimates move as they do in use.

    python benchmarks/planner/decision_time.py [--bundle DIR] [--decisions N] [--json FILE|-]

Samples of 5 to 30 tokens stand at every depth, some with others waiting; every third decision the device's
layer times move by up to a tenth, and every tenth the link is told of a transfer whose time is a fifth off.
"solve" is one decision with nothing kept from before.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_edge.cloud_times import CloudTimes
from offramp_edge.device import LayerTimes
from offramp_edge.forecast import foreseen
from offramp_edge.link import Link
from offramp_edge.menu import EncodeTimes, Menu, within
from offramp_edge.planner import AutoPlanner, World
from offramp_edge.planning import Standing
from offramp_edge.settings import EdgeSettings, plan_for

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

ROOT = Path(__file__).parents[2]


class Clock:
    now_s = 0.0

    def now(self) -> float:
        return self.now_s


def measure(bundle: Bundle, decisions: int) -> dict[str, Any]:
    settings, rng, clock = EdgeSettings(), random.Random(0), Clock()
    plan, n = plan_for(bundle, settings), bundle.n_layers
    link, cloud, times = Link(clock), CloudTimes(clock), LayerTimes(n)
    menu = Menu(bundle, plan.depths, within(bundle, 0.5, None), EncodeTimes({}), {})
    planner = AutoPlanner(menu, foreseen(bundle, plan, settings), World(lambda: times, link, cloud))
    cloud.ran(n, 16, 0.5, 1.0 * n)
    took_us: list[float] = []
    for number in range(decisions):
        if number % 3 == 0:
            for depth in range(n):
                times.ran(depth, 16, 10.0 * rng.uniform(0.9, 1.1))
        if number % 10 == 0:
            nbytes = rng.choice((100, 2_000, 5_000))
            transfer = link.sent(nbytes, 5.0)
            clock.now_s += (5.0 + (40 + nbytes * 8e-3 / 5) * rng.uniform(0.8, 1.2)) / 1000
            link.answered(transfer, 5.0)
        depth = rng.randrange(n)
        confidence = rng.random() if depth else None
        standing = Standing(depth, rng.randrange(5, 30), confidence, waiting=rng.choice((0, 0, 1)))
        began_s = time.perf_counter()
        planner.choose(standing)
        took_us.append(1e6 * (time.perf_counter() - began_s))
    solve_us = []
    for _ in range(500):
        planner._kept = {}
        began_s = time.perf_counter()
        planner.choose(Standing(0, 16))
        solve_us.append(1e6 * (time.perf_counter() - began_s))
    cuts = quantiles(took_us, n=100)
    return {
        "bundle": bundle.manifest.name, "layers": n, "decisions": decisions, "solved": planner.solved - 500,
        "median_us": round(cuts[49], 2), "p99_us": round(cuts[98], 1),
        "mean_us": round(sum(took_us) / decisions, 2), "solve_us": report.spread(solve_us),
        "a_second": round(1e6 * decisions / sum(took_us)),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=ROOT / "bundles" / "assistant-intents")
    parser.add_argument("--decisions", type=int, default=20_000)
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    args = parser.parse_args()
    found = measure(Bundle.read(args.bundle), args.decisions)
    print(found, file=sys.stderr)
    if args.json:
        write_json({**report.about(), **found}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
