"""One cell live: device, link and cloud in processes of their own, real layers, real gRPC over TLS."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

from offramp_edge import EdgeWorker
from offramp_edge.answers import Answer, Sample
from offramp_edge.breaker import UP
from offramp_simulate.arrivals import Draws, requests
from offramp_simulate.processes import Child
from offramp_simulate.scenario import Scenario
from validation.cells import LEAD_S, SETTLE_S, WARM_UP, Cell
from validation.place import Place

_START_S = 20.0
_LONGEST_S = 120.0
STAGES = ("queue", "device", "encode", "network", "cloud")


async def run(place: Place, cell: Cell, scenario: Scenario) -> dict[str, Any]:
    """Rows in order of asking, and the bytes that came out of the link from the first request on."""
    link = await Child.start(
        "link", "link", "--to", place.cloud, *link_arguments(cell, scenario), "--control-stdin"
    )
    try:
        address = (await link.read(_START_S))["listening"]
        zero_s = time.perf_counter() - float((await link.ask("stats"))["time_s"])
        plan = cell_settings(place, scenario)
        settings = replace(scenario.agent, **plan)
        worker = await asyncio.to_thread(place.worker, address, settings)
        try:
            return await _block(place, worker, link, scenario, zero_s + LEAD_S)
        finally:
            await asyncio.to_thread(worker.close)
    finally:
        await link.stop()


async def _block(
    place: Place, worker: EdgeWorker, link: Child, scenario: Scenario, began_s: float
) -> dict[str, Any]:
    await asyncio.sleep(max(began_s - 0.1 - time.perf_counter(), 0.0))
    session = worker.agent.session
    assert session is not None
    if session.breaker.state != UP or time.perf_counter() > began_s:
        raise RuntimeError(f"not connected within {LEAD_S} s of the link's start: try again")
    before = await link.ask("stats")
    found: dict[int, list[Any]] = {}

    async def ask(number: int, sample: int) -> None:
        asked_s = time.perf_counter() - began_s
        answer = await worker.answer_async(Sample(place.texts[sample], id=str(number)))
        found[number] = _row(asked_s, answer)

    await asyncio.wait_for(_asking(place, scenario, began_s, ask), _LONGEST_S)
    await asyncio.sleep(SETTLE_S)
    after = await link.ask("stats")
    return {
        "columns": ["asked_s", "ms", "where", "reason", "exit", "split", "up", "down", *STAGES],
        "rows": [found[number] for number in sorted(found)],
        "warm_up": WARM_UP,
        **{
            f"bytes_{way}": after[f"bytes_{way}"] - before[f"bytes_{way}"] for way in ("up", "down")
        },
    }


async def _asking(
    place: Place,
    scenario: Scenario,
    began_s: float,
    ask: Callable[[int, int], Awaitable[None]],
) -> None:
    """The simulator's own requests, at their times."""
    if scenario.arrivals.kind == "closed":
        samples, _, _ = Draws(scenario, place.record).take(scenario.requests)
        await asyncio.sleep(max(began_s - time.perf_counter(), 0.0))
        for number, sample in enumerate(samples.tolist()):
            await ask(number, sample)
        return
    tasks = []
    for number, (when_s, sample) in enumerate(open_requests(place, scenario)):
        await asyncio.sleep(max(began_s + when_s - time.perf_counter(), 0.0))
        tasks.append(asyncio.ensure_future(ask(number, sample)))
    await asyncio.gather(*tasks)


def open_requests(place: Place, scenario: Scenario) -> Iterator[tuple[float, int]]:
    for chunk in requests(scenario, place.record):
        yield from zip(chunk.when_N.tolist(), chunk.sample_N.tolist(), strict=True)


def _row(asked_s: float, answer: Answer) -> list[Any]:
    stages = [round(getattr(answer.stages_ms, name), 2) for name in STAGES]
    return [
        round(asked_s, 4), round(answer.ms, 3), answer.where, answer.reason, answer.exit_depth,
        answer.split, answer.bytes_up, answer.bytes_down, *stages,
    ]  # fmt: skip


def cell_settings(place: Place, scenario: Scenario) -> dict[str, Any]:
    """The plan as the agent's settings."""
    plan, header = scenario.plans[0], place.record.header
    point = next(p for p in header.points if p.name == plan.point)
    settings: dict[str, Any] = {"knobs": dict(point.knobs[header.precision])}
    if plan.planner == "fixed":
        return {**settings, "split": plan.split}
    return {**settings, "plan": plan.planner}


def link_arguments(cell: Cell, scenario: Scenario) -> list[str]:
    """Of `offramp link`; faults by its own timetable, which counts from its start."""
    choice, words = scenario.link, []
    if choice.profile:
        words += ["--profile", choice.profile]
    else:
        words += ["--trace", str(scenario.file(choice.trace)), "--trace-name", choice.trace_name]
        words += ["--downlink-factor", str(choice.downlink_factor), "--rtt-ms", str(choice.rtt_ms)]
    for fault in scenario.faults:
        if (fault.what, fault.how) != ("link", "silent") or not math.isfinite(fault.for_s):
            raise ValueError(f"{cell.name}: the live run knows black holes only, not {fault}")
        words += ["--fault", f"at={fault.at_s + LEAD_S},for={fault.for_s},kind=blackhole"]
    return words
