"""A burst of eight times the load: how many requests are late, by our scaling and by Serve's own? Simulated.

    python benchmarks/burst.py [--seeds N] [--quick] [--json FILE]

Engines, queues and admission are the simulator's (offramp_simulate.farm), on the recorded layer times of
`assistant-intents`; what decides is not simulated: our policy is offramp_cloud.scaling.WorkLeft over what
offramp_cloud.rates.Rates measures, Serve's is its default `replica_queue_length_autoscaling_policy` over the
requests in the house (ray.serve.autoscaling_policy, Ray 2.60; documented under "Ray Serve Autoscaling",
target_ongoing_requests, upscale_delay_s, downscale_delay_s, look_back_period_s). Both sit in Serve's loop:
asked ten times a second, over the mean of a look-back, told of what replicas count in intervals, with Serve's
own code for factors and delays.

The load: a minute at the base, two minutes at eight times that, four at the base again; each request is a
sample that the device did not let go, and has a second to be answered. A request that is refused or late is
a miss. `target_ongoing_requests` of Serve's policy is the largest that costs at least as many replica-seconds
as ours.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from serves_loop import ServesLoop, Settings

from offramp_cloud.scaling import WorkLeft
from offramp_common.cli import write_json
from offramp_simulate.engine_model import Job
from offramp_simulate.engine_times import EngineTimes
from offramp_simulate.farm import Busy, Farm
from offramp_simulate.record import Record
from offramp_simulate.scenario_parts import Cloud

_RECORD = Path("simulate/offramp_simulate/records/assistant-intents.npz")
_BASE_S, _BURST_S, _AFTER_S = 60.0, 120.0, 240.0
_BURST = 8.0
_BASE_RATE = 30.0  # requests a second: about half of what one engine does
_DEADLINE_S = 1.0
_CLOUD = Cloud(
    slowdown=8.0,  # a larger model than the recorded one, so that a run is thousands of requests
    max_replicas=16,
    start_s=5.0,
    max_batch=64,
    max_padding=2.0,
    max_age_s=1.0,
)
_TARGETS = [round(1.08**step, 2) for step in range(-10, 55)]  # of target_ongoing_requests
_LEARN_SEEDS = 3  # runs that a target is chosen by
_RAMP_S = 30.0


_DEFAULTS = Settings()
_OURS = Settings(look_back_s=2.0, told_s=0.5, up_s=0.0, down_s=30.0)


def arrivals(shape: str, rng: random.Random) -> Iterator[float]:
    """Poisson's, at the base rate and at eight times that between; "ramp" takes half a minute to it."""
    now_s = 0.0
    while (now_s := now_s + rng.expovariate(_BURST * _BASE_RATE)) < _BASE_S + _BURST_S + _AFTER_S:
        inside = now_s - _BASE_S
        grown = min(1.0, inside / _RAMP_S) if shape == "ramp" else 1.0
        times = 1.0 + (_BURST - 1.0) * grown if 0 <= inside < _BURST_S else 1.0
        if rng.random() * _BURST < times:
            yield now_s


def one_run(
    record: Record, times: EngineTimes, cloud: Cloud, shape: str,
    scaler: ServesLoop, seed: int,
) -> dict[str, float]:  # fmt: skip
    """Shares of requests that missed their deadline, replica-seconds, and the most replicas."""
    rng = random.Random(seed)
    farm = Farm(times, cloud, seed, scaler)
    own, split = (
        record.leaves_PKN[record.precision("fp32"), record.point("own")],
        record.header.split,
    )
    sent = np.flatnonzero(own > split)
    exits, tokens = own[sent].tolist(), record.tokens_N[sent].tolist()
    asked = met = burst_asked = burst_met = 0
    born: list[float] = []
    for key, now_s in enumerate(arrivals(shape, rng)):
        in_burst = _BASE_S <= now_s < _BASE_S + _BURST_S
        while farm.next_s <= now_s:
            met, burst_met = _count(farm.advance(now_s), born, met, burst_met)
        row = rng.randrange(len(sent))
        job = Job(key, split, int(exits[row]), int(tokens[row]), 1.0, now_s + _DEADLINE_S)
        born.append(now_s)
        asked, burst_asked = asked + 1, burst_asked + in_burst
        with suppress(Busy):  # a miss
            farm.offer(job, now_s)
    end_s = _BASE_S + _BURST_S + _AFTER_S
    met, burst_met = _count(farm.advance(end_s), born, met, burst_met)
    farm.closed(end_s)
    return {
        "missed": 1 - met / asked,
        "missed_in_burst": 1 - burst_met / burst_asked,
        "replica_s": farm.replica_s,
        "most": farm.most,
    }


def _count(
    done: Sequence[tuple[float, list[Job]]], born: list[float], met: int, burst_met: int
) -> tuple[int, int]:
    for when_s, jobs in done:
        for job in jobs:
            if when_s <= born[job.key] + _DEADLINE_S:
                met += 1
                burst_met += _BASE_S <= born[job.key] < _BASE_S + _BURST_S
    return met, burst_met


def row_of(runs: list[dict[str, float]]) -> dict[str, float]:
    missed = sorted(run["missed"] for run in runs)
    return {
        "missed_median": round(statistics.median(missed), 4),
        "missed_p95": round(float(np.quantile(missed, 0.95)), 4),
        "missed_in_burst": round(statistics.median(run["missed_in_burst"] for run in runs), 4),
        "replica_s": round(statistics.fmean(run["replica_s"] for run in runs)),
        "most_replicas": max(run["most"] for run in runs),
    }


def compare(record: Record, shape: str, seeds: range) -> dict[str, Any]:
    times = EngineTimes(record, _CLOUD)
    runs = partial(one_run, record, times, _CLOUD, shape)
    make = partial(ServesLoop, target=1.0, most=_CLOUD.max_replicas)
    table: dict[str, Any] = {}
    for name, policy in (
        ("offramp: work left and forecast", WorkLeft()),
        ("the same without the forecast", WorkLeft(ahead_s=1e-9)),
    ):
        table[name] = row_of([runs(make(_OURS, policy), seed) for seed in seeds])
        print(shape, name, table[name], file=sys.stderr)
    most_s, learn = next(iter(table.values()))["replica_s"], seeds[:_LEARN_SEEDS]
    for name, settings in (
        ("Serve's default policy, its default delays", _DEFAULTS),
        ("Serve's default policy, our delays", _OURS),
    ):
        rival = partial(ServesLoop, settings, replica_queue_length_autoscaling_policy)

        def cost_s(target: float, rival: Any = rival) -> float:
            tried = (runs(rival(target=target, most=_CLOUD.max_replicas), n) for n in learn)
            return statistics.fmean(run["replica_s"] for run in tried)

        target = _equal(cost_s, most_s)
        found = [runs(rival(target=target, most=_CLOUD.max_replicas), seed) for seed in seeds]
        table[name] = row_of(found) | {"target_ongoing_requests": target}
        print(shape, name, table[name], file=sys.stderr)
    return table


def _equal(cost_s: Callable[[float], float], least_s: float) -> float:
    """The largest target that costs at least so many replica-seconds; the cheapest there is, if none does."""
    low, high = 0, len(_TARGETS) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if cost_s(_TARGETS[middle]) >= least_s:
            low = middle
        else:
            high = middle - 1
    return _TARGETS[low]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, metavar="N")
    parser.add_argument("--quick", action="store_true", help="one seed, the step alone")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    record = Record.load(_RECORD)
    seeds = range(1 if args.quick else args.seeds)
    shapes = ("step",) if args.quick else ("step", "ramp")
    found = {
        **report.about(),
        "simulated": True,
        "seeds": len(seeds),
        "tables": {shape: compare(record, shape, seeds) for shape in shapes},
    }
    if args.json:
        write_json(found, args.json)
    else:
        print(json.dumps(found["tables"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
