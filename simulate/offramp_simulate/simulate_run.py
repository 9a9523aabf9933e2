"""One run: a scenario without its sweep, one plan, the kernel that fits."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from offramp_edge.settings import FIXED
from offramp_simulate import device_model
from offramp_simulate.flow import Feedback, Flow, feeds_back
from offramp_simulate.record import Record
from offramp_simulate.results import Tally
from offramp_simulate.scenario import Scenario
from offramp_simulate.scenario_parts import Plan
from offramp_simulate.world import World

AUTO, FLOW, EVENTS = "auto", "flow", "events"


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of it. `summary` is the same for the same scenario, record and seed, to the byte.

    kernel   "flow" or "events";  why   what kept the flow kernel from it
    wall_s   that it took here, which is not part of the result
    """

    plan: str
    summary: dict[str, Any]
    timeline: list[list[float]]
    kernel: str
    why: str
    wall_s: float


def simulate(scenario: Scenario, record: Record, plan: Plan, kernel: str = AUTO) -> Ran:
    """Raises ConfigError or DataError for what the record cannot answer, and Feedback where the flow
    kernel is asked for by name and does not fit."""
    began = time.perf_counter()
    profile, resolved = scenario.profile(), device_model.resolve(plan, scenario, record)
    n_layers = record.header.n_layers

    def tally() -> Tally:
        return Tally(n_layers, scenario.costs, profile, scenario.deadline_ms)

    why, counted = "a planner", tally()
    if plan.planner == FIXED and kernel != EVENTS:
        fixed = device_model.fixed(record, scenario, resolved)
        why = feeds_back(scenario, profile, fixed.cut is not None)
        if not why:
            try:
                flow = Flow(scenario, record, profile, fixed, counted)
                flow.run()
                return _ran(plan, counted, flow, FLOW, "", began)
            except Feedback as feedback:
                why, counted = str(feedback), tally()
        if kernel == FLOW:
            raise Feedback(why)
    make = None
    if plan.planner != FIXED:
        from offramp_simulate.planners import maker

        make = maker(plan, scenario, record, resolved)
    world = World(scenario, record, profile, resolved, counted, make, plan.min_split)
    world.run()
    return _ran(plan, counted, world, EVENTS, why, began)


def _ran(plan: Plan, tally: Tally, ran: Flow | World, kernel: str, why: str, began: float) -> Ran:
    farm = ran.farm
    cloud = tally.cloud(farm.busy_s, farm.replica_s, farm.rows_a_layer)
    summary = {**tally.summary(), **cloud, "kernel": kernel}
    return Ran(plan.name, summary, tally.timeline, kernel, why, time.perf_counter() - began)


def without_sweep(scenario: Scenario) -> Scenario:
    return replace(scenario, sweep={})
