"""Probes in the event kernel: they take the link and an engine, and what becomes of them is believed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from made_record import N_LAYERS, Rows, made_record, made_scenario

from offramp_edge.breaker import UP
from offramp_edge.requests import PROBE_TOKENS
from offramp_simulate.device_model import resolve
from offramp_simulate.planners import maker
from offramp_simulate.scenario import Scenario
from offramp_simulate.world import World

RECORD = made_record(60)
FAR = {"uplink_mbps": 5.0, "downlink_mbps": 20.0, "rtt_ms": 900.0}
"""So far that no sample is sent: whatever is heard of the cloud, a probe has told."""


def planned(**tables: Any) -> Scenario:
    values: dict[str, Any] = {
        "requests": 60,
        "devices": {"count": 1, "jitter": False},
        "arrivals": {"kind": "regular", "rate_per_s": 2.0},
        "agent": {},
        "plans": [{"name": "p", "planner": "auto"}],
    }
    return made_scenario(**{**values, **tables})


def ran(scenario: Scenario) -> tuple[World, Rows]:
    rows: Any = Rows()
    plan = resolve(scenario.plans[0], scenario, RECORD)
    make = maker(scenario.plans[0], scenario, RECORD, plan)
    world = World(scenario, RECORD, scenario.profile(), plan, rows, make)
    world.run()
    return world, rows


def sent(rows: Rows) -> np.ndarray:
    return np.array(rows.column("cut_N") >= 0)


@pytest.mark.parametrize("rtt_ms", [3.0, 900.0])
def test_engines_run_the_layers_of_samples_and_of_probes(rtt_ms: float) -> None:
    world, rows = ran(planned(link={**FAR, "rtt_ms": rtt_ms}, agent={"hedge_after": math.inf}))
    (side,) = world.sides()
    (engine,) = world.farm.engines
    at = sent(rows)
    assert side.probes >= 3
    assert at.any() == (rtt_ms < 100)
    samples = int((rows.column("exit_N") - rows.column("cut_N"))[at].sum())
    assert engine.rows == samples + side.probes * (N_LAYERS - 1)
    tokens = [PROBE_TOKENS[number % len(PROBE_TOKENS)] for number in range(side.probes)]
    assert engine.done_work == 16 * samples + (N_LAYERS - 1) * sum(tokens)


def test_the_link_and_the_cloud_are_known_from_probes_alone() -> None:
    world, rows = ran(planned(link=FAR))
    (side,) = world.sides()
    assert not sent(rows).any()
    assert side.link.estimate().rtt_ms == pytest.approx(900.0, rel=0.1)
    assert side.cloud_times.layer_ms(16) == pytest.approx(2.0, rel=0.1)
    assert side.usual_s == pytest.approx(0.9, rel=0.1)


@pytest.mark.parametrize("fault", [("link", "silent"), ("cloud", "silent"), ("cloud", "refused")])
def test_probes_without_an_answer_put_the_cloud_aside(fault: tuple[str, str]) -> None:
    what, how = fault
    scenario = planned(link=FAR, faults=[{"what": what, "how": how, "at_s": 6.0, "for_s": 1000.0}])
    world, rows = ran(scenario)
    (side,) = world.sides()
    assert not sent(rows).any()
    assert side.breaker is not None
    assert side.breaker.state != UP
    assert side.put_aside > 0


def test_a_probe_on_a_link_that_is_cut_is_lost_at_once_and_another_follows() -> None:
    scenario = planned(
        link=FAR, faults=[{"what": "link", "how": "refused", "at_s": 0.4, "for_s": 1.0}]
    )
    world, _ = ran(scenario)
    (side,) = world.sides()
    estimate = side.link.estimate()
    assert estimate.failures == 1
    assert estimate.transfers == side.probes - 1
    assert side.breaker is not None
    assert side.breaker.state == UP
    assert side.put_aside >= 1
