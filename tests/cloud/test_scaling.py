"""How many replicas Serve is asked for, from what replicas measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from cloud_world import World

from offramp_cloud.costs import Group
from offramp_cloud.rates import Rates, refuse_late
from offramp_cloud.scaling import WorkLeft
from offramp_common.errors import CloudBusy


@dataclass
class Context:
    """What Serve's autoscaler shows a policy (the part that is looked at)."""

    aggregated_metrics: dict[str, dict[Any, float]]
    current_time: float = 0.0
    target_num_replicas: int = 1
    policy_state: dict[str, Any] = field(default_factory=dict)


def seen(left: float, arriving: float, capacity: float, replicas: int = 1) -> dict[str, Any]:
    """Each replica measured this."""
    values = {"left": left, "arriving": arriving, "capacity": capacity}
    return {name: dict.fromkeys(range(replicas), value) for name, value in values.items()}


def test_replicas_are_asked_for_by_the_work_that_comes_and_waits() -> None:
    policy = WorkLeft(done_in_s=2.0, busy=0.5)
    for left, arriving, wanted in (
        (0, 0, 1),
        (0, 400, 1),  # 400 of 1000 a second, half of which may be used
        (0, 600, 2),
        (4000, 0, 2),  # to be done in two seconds
        (4000, 1000, 4),
    ):
        assert policy(Context(seen(left, arriving, 1000)))[0] == wanted


def test_what_all_replicas_measure_counts_together() -> None:
    policy = WorkLeft(done_in_s=2.0, busy=0.5)
    assert policy(Context(seen(2000, 500, 1000, replicas=4)))[0] == 8


def test_where_nothing_is_measured_yet_waiting_work_asks_for_one_more() -> None:
    policy = WorkLeft()
    assert policy(Context(seen(100, 0, 0), target_num_replicas=3))[0] == 4
    assert policy(Context(seen(0, 0, 0), target_num_replicas=3))[0] == 3
    assert policy(Context({}, target_num_replicas=3))[0] == 3


def test_arrivals_that_grow_are_met_before_they_are_there() -> None:
    policy = WorkLeft(ahead_s=5.0, busy=1.0)
    state: dict[str, Any] = {}
    steady: list[int] = []
    growing: list[int] = []
    for found, slope in ((steady, 0.0), (growing, 100.0)):
        state = {}
        for second in range(10):
            arriving = 1000 + slope * second
            number, state = policy(
                Context(seen(0, arriving, 500), current_time=float(second), policy_state=state)
            )
            found.append(number)
    assert set(steady) == {2}
    assert growing[-1] == 5  # 1900 come now, about 2300 five seconds from now


def test_no_more_than_twice_what_comes_is_believed_in() -> None:
    policy = WorkLeft(ahead_s=5.0, busy=1.0)
    _, state = policy(Context(seen(0, 1000, 1000), current_time=0.0))
    assert policy(Context(seen(0, 9000, 1000), current_time=1.0, policy_state=state))[0] == 18


def test_the_trend_does_not_depend_on_how_often_serve_asks() -> None:
    """Ten times a second, while what replicas say is new only every half second."""
    policy = WorkLeft(ahead_s=5.0, busy=1.0)
    state: dict[str, Any] = {}
    for tenth in range(100):
        arriving = 1000 + 100 * (tenth // 5) / 2
        number, state = policy(
            Context(seen(0, arriving, 500), current_time=tenth / 10, policy_state=state)
        )
    assert number == 5  # 1950 come now, about 2450 five seconds from now


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        WorkLeft(busy=1.5)


async def test_an_engine_is_measured_by_what_it_ran(world: World) -> None:
    now_s = 0.0
    engine = world.engine()
    rates = Rates(engine, lambda: now_s)
    assert rates.now().capacity == 0
    never = {"threshold": (0.0,) * 4}
    await engine.complete(world.offload((10,), 0, knobs=never))
    now_s = 1.0
    work = rates.now()
    counters = engine.counters
    assert counters.layer_tokens == 40
    # At its best: many rows of ten tokens together, by what a layer was learned to cost.
    rows = min(engine.load.max_batch, engine.load.max_batch_tokens // 10)
    best = 10 * rows / engine.cost.seconds(Group(rows, 10 * rows))
    assert work.capacity == pytest.approx(
        max(best, 40 / (counters.compute_s + counters.overhead_s))
    )
    assert work.arriving == pytest.approx(0.2 * 40)  # the newest of several weighs a fifth
    assert work.left == 0
    await engine.close()


async def test_an_engine_that_is_never_idle_is_measured_by_what_it_gets_done(world: World) -> None:
    """Whatever else its process does beside the layers."""
    now_s = 0.0
    engine = world.engine()
    rates = Rates(engine, lambda: now_s)
    rates.now()
    engine._shaft._posted = 10**6  # so much waits
    now_s = 1.0
    rates.now()
    engine.counters.layer_tokens, engine.counters.compute_s = 4000, 0.1
    now_s = 2.0
    assert rates.now().capacity == pytest.approx(4000)
    await engine.close()


def test_work_that_cannot_be_done_in_time_is_refused() -> None:
    refuse_late(500, 1000, 501)
    refuse_late(500, 0, 1)  # nothing is known
    with pytest.raises(CloudBusy, match="for about 500 ms before it, and 100 ms") as caught:
        refuse_late(500, 1000, 100)
    assert caught.value.retry_after_ms == 400
