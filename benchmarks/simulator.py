"""The simulator's speed: requests a second by kernel and plan, whether cost and memory stay linear, and a
plain heap against SimPy. Every run has a process of its own, so that peak memory is its own; rates are by
processor time, so that what else the machine does hardly counts.

    python benchmarks/simulator.py            # some minutes
    python benchmarks/simulator.py --quick    # small runs, nothing is written
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import report

RESULTS = Path(__file__).parent / "results" / "simulator.json"
RECORD = "assistant-intents.npz"
INFINITE = float("inf")
ALONE = {"hedge_after": INFINITE, "deadline_ms": INFINITE}
CASES: dict[str, dict[str, Any]] = {
    # name: kernel wanted, plan, agent, link, devices' rate
    "fixed plan, one-way": {"plan": {"split": 2}, "agent": ALONE},
    "fixed plan, one-way, rates that jump": {"plan": {"split": 2}, "agent": ALONE, "trace": True},
    "all on the device": {"plan": {"split": 6}, "agent": {}},
    "fixed plan, the agent as shipped": {"plan": {"split": 2}, "agent": {}},
    "send the input, one-way": {"plan": {"split": 0}, "agent": ALONE},
    "send the input, the agent as shipped": {"plan": {"split": 0}, "agent": {}},
    "the live planner": {"plan": {"planner": "auto"}, "agent": {}},
    "the live planner, a slow device": {"plan": {"planner": "auto"}, "agent": {}, "slowdown": 30.0},
}
SIZES = {"full": (10_000, 100_000, 1_000_000, 10_000_000), "quick": (10_000, 30_000)}
MOST = {"fixed plan, one-way": 10_000_000, "all on the device": 10_000_000}
USUAL_MOST = 1_000_000
PLANNER_MOST = 100_000


def one(name: str, requests: int) -> dict[str, Any]:
    """In a process of its own: this case, so many requests."""
    from offramp_simulate.record import Record
    from offramp_simulate.scenario import scenario_of
    from offramp_simulate.simulate_cli import _RECORDS
    from offramp_simulate.simulate_run import simulate

    case = CASES[name]
    link: dict[str, Any] = {"profile": "lte"}
    if case.get("trace"):
        link = {"markov_mbps": [0.8, 3.0, 12.0], "markov_s": [2.0, 8.0, 4.0], "rtt_ms": 60.0}
    scenario = scenario_of(
        {
            "title": name,
            "requests": requests,
            "devices": {"count": 1000, "slowdown": case.get("slowdown", 4.0)},
            "arrivals": {"rate_per_s": 0.1},
            "link": link,
            "cloud": {"replicas": 4},
            "agent": case["agent"],
            "plans": [{"name": "plan", **case["plan"]}],
        }
    )
    record = Record.load(_RECORDS / RECORD)
    began, began_cpu = time.perf_counter(), time.process_time()
    ran = simulate(scenario, record, scenario.plans[0])
    cpu_s, wall_s = time.process_time() - began_cpu, time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "kernel": ran.kernel,
        "requests": requests,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "peak_mib": peak,
        "sent": ran.summary["sent"],
    }


def by_heap(count: int) -> float:
    """A device, then an engine, one request after another: seconds of processor time."""
    import heapq
    import random

    rng, serial, done = random.Random(0), 0, 0
    heap: list[tuple[float, int, Any, tuple[int, int]]] = []
    queues: list[list[int]] = [[], []]
    busy = [False, False]
    began = time.process_time()

    def begin(stage: int, now: float) -> None:
        nonlocal serial
        busy[stage] = True
        serial += 1
        heapq.heappush(heap, (now + 0.8, serial, ends, (stage, queues[stage].pop(0))))

    def arrives(stage: int, number: int) -> None:
        queues[stage].append(number)
        if not busy[stage]:
            begin(stage, now)

    def ends(stage: int, number: int) -> None:
        nonlocal done
        busy[stage] = False
        if queues[stage]:
            begin(stage, now)
        if stage == 0:
            arrives(1, number)
        else:
            done += 1

    when = 0.0
    for number in range(count):
        when += rng.expovariate(1.0)
        serial += 1
        heapq.heappush(heap, (when, serial, arrives, (0, number)))
    while heap:
        now, _, call, args = heapq.heappop(heap)
        call(*args)
    assert done == count
    return time.process_time() - began


def by_simpy(count: int) -> float:
    """The same in SimPy."""
    import random

    import simpy

    rng = random.Random(0)
    environment = simpy.Environment()
    stages = [simpy.Resource(environment) for _ in range(2)]
    done = 0
    began = time.process_time()

    def request() -> Any:
        nonlocal done
        for stage in stages:
            with stage.request() as turn:
                yield turn
                yield environment.timeout(0.8)
        done += 1

    def source() -> Any:
        for _ in range(count):
            yield environment.timeout(rng.expovariate(1.0))
            environment.process(request())

    environment.process(source())
    environment.run()
    assert done == count
    return time.process_time() - began


def in_process(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def measure(sizes: tuple[int, ...], turns: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for name in CASES:
        planner = "planner" in name
        most = PLANNER_MOST if planner else MOST.get(name, USUAL_MOST)
        for requests in sizes:
            if requests > most:
                continue
            for turn in range(1 if requests > 1_000_000 else turns):
                runs[name].append(in_process("--one", name, "--requests", str(requests)))
                ran = runs[name][-1]
                rate = f"{requests / ran['cpu_s']:,.0f} a second, {ran['peak_mib']:.0f} MiB"
                said = f"{name}: {requests:,} requests, {ran['kernel']}, {rate} (turn {turn + 1})"
                print(said, file=sys.stderr)
    return runs


def kernels(count: int, turns: int) -> dict[str, Any] | None:
    try:
        import simpy
    except ModuleNotFoundError:
        print("no SimPy here: not compared (pip install simpy)", file=sys.stderr)
        return None
    heap, simpy_s = [], []
    for _ in range(turns):
        heap.append(by_heap(count))
        simpy_s.append(by_simpy(count))
    return {
        "simpy": simpy.__version__,
        "requests": count,
        "heap_us": report.spread([1e6 * s / count for s in heap]),
        "simpy_us": report.spread([1e6 * s / count for s in simpy_s]),
        "ratio": report.ratio(simpy_s, heap),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=3, help="of runs up to a million requests")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.requests)))
        return
    result = {
        **report.about(),
        "record": RECORD,
        "kernels": kernels(5_000 if args.quick else 100_000, 5),
        "runs": measure(SIZES["quick" if args.quick else "full"], 1 if args.quick else args.turns),
    }
    if args.quick:
        print(json.dumps(result, indent=1))
    else:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {RESULTS.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
