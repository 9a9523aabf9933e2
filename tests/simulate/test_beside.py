"""Bytes beside requests and replies, and greetings that take the link as messages do."""

from __future__ import annotations

import math
from typing import Any

import pytest
from made_record import made_record, made_scenario

from offramp_simulate.beside import CANCEL_NBYTES, CONNECTING, GREETING, STREAM_NBYTES, Pings
from offramp_simulate.device_model import fixed, resolve
from offramp_simulate.flow import Flow
from offramp_simulate.results import Tally
from offramp_simulate.scenario import Scenario
from offramp_simulate.world import World

RECORD = made_record(60)
PINGS_NBYTES = 4 * 39
NEVER: dict[str, Any] = {"hedge_after": math.inf, "deadline_ms": math.inf}


def beside(scenario: Scenario, by_flow: bool = False) -> float:
    """Bytes beside, of the whole run."""
    profile, plan = scenario.profile(), resolve(scenario.plans[0], scenario, RECORD)
    tally = Tally(RECORD.header.n_layers, scenario.costs, profile, scenario.deadline_ms)
    if by_flow:
        Flow(scenario, RECORD, profile, fixed(RECORD, scenario, plan), tally).run()
    else:
        World(scenario, RECORD, profile, plan, tally).run()
    found: float = tally.summary()["bytes_beside"] * tally.requests
    return found


def test_a_first_reply_costs_the_stream_and_a_ping_each_way() -> None:
    pings = Pings()
    pings.replied(7, 100.0)
    assert pings.nbytes == STREAM_NBYTES + PINGS_NBYTES


def test_pings_follow_replies_ever_more_seldom_and_each_of_rare_ones() -> None:
    often, seldom = Pings(), Pings()
    for number in range(1000):
        often.replied(0, number / 50)
        seldom.replied(0, 60.0 * number)
    # After 0.1 s twice, then 0.15 s later each time: 0.2 + 0.25 + ... + 2.5 s and the next are beyond 20 s.
    assert (often.nbytes - STREAM_NBYTES) / PINGS_NBYTES == 19
    assert (seldom.nbytes - STREAM_NBYTES) / PINGS_NBYTES == 1000


def test_replies_before_the_next_ping_is_due_cause_one_together() -> None:
    pings = Pings()
    for now_s in (0.0, 0.01, 0.02, 0.03):
        pings.replied(0, now_s)
    assert pings.nbytes == STREAM_NBYTES + 2 * PINGS_NBYTES


def test_work_over_a_new_connection_opens_its_stream_and_is_measured_anew() -> None:
    kept, anew = Pings(), Pings()
    for pings in (kept, anew):
        for number in range(100):
            pings.replied(0, number / 20)
    anew.connected(0)
    for pings in (kept, anew):
        pings.replied(0, 5.0)
    assert anew.nbytes - kept.nbytes == STREAM_NBYTES + PINGS_NBYTES


def test_both_kernels_count_the_same_bytes_beside() -> None:
    scenario = made_scenario(
        devices={"count": 3}, requests=400, agent=NEVER, plans=[{"name": "p", "split": 1}]
    )
    assert beside(scenario) == pytest.approx(beside(scenario, by_flow=True))
    assert beside(scenario) > 3 * (STREAM_NBYTES + PINGS_NBYTES)


def one_silence(for_s: float, **agent: Any) -> Scenario:
    return made_scenario(
        devices={"count": 1, "jitter": False},
        requests=120,
        arrivals={"kind": "regular", "rate_per_s": 10.0},
        link={"uplink_mbps": 8.0, "downlink_mbps": 9.0, "rtt_ms": 30.0},
        agent={**NEVER, **agent},
        plans=[{"name": "p", "split": 2, "point": "never"}],
        faults=[{"what": "link", "how": "silent", "at_s": 5.0, "for_s": for_s}],
    )


def test_a_link_silent_for_a_moment_delays_and_loses_nothing() -> None:
    class Kept(Tally):
        fallbacks = 0

        def add(self, a: Any) -> None:
            type(self).fallbacks += int((a.where_N == 2).sum())
            super().add(a)

    scenario = one_silence(0.2)
    profile, plan = scenario.profile(), resolve(scenario.plans[0], scenario, RECORD)
    tally = Kept(RECORD.header.n_layers, scenario.costs, profile, scenario.deadline_ms)
    World(scenario, RECORD, profile, plan, tally).run()
    assert Kept.fallbacks == 0
    assert 1e3 * 0.2 < tally.summary()["ms"]["longest"] < 1e3 * 0.5


def test_a_link_silent_for_longer_is_greeted_over_a_new_connection() -> None:
    """The first greeting uses the connection that is there; it has no answer soon, and the next ones come
    over connections of their own, which all come about when the link is back."""
    calm, lost = one_silence(1e-3), one_silence(3.0)
    more = beside(lost) - beside(calm)
    assert more > sum(map(sum, GREETING)) + 2 * sum(map(sum, CONNECTING))


def test_what_is_given_up_is_cancelled_over_the_link() -> None:
    patient, hasty = one_silence(1e-3), one_silence(1e-3, offload_timeout_ms=20.0)
    assert beside(hasty) > beside(patient) + CANCEL_NBYTES
