"""The device runs on while the cloud is late: when it begins, who wins, what it costs."""

from __future__ import annotations

import asyncio
import math

import pytest
from edge_world import LAYER_S, LAYERS, RTT_S, N, World, in_world, local, texts

from offramp_edge.answers import Answer, Sample
from offramp_edge.usual import UsualTime

HARD = next(text for text in texts(50) if local(text, LAYERS.knobs())[0] == N)
SPLIT = 3
REST_S = (N - SPLIT) * LAYER_S
FIRST_S = SPLIT * LAYER_S


async def _used_to_it(world: World) -> None:
    """The cloud's usual time is known: a round trip, without spread in the end."""
    for _ in range(30):
        assert (await world.answer(HARD)).where == "cloud"


def test_a_cloud_that_answers_as_usual_is_not_hedged() -> None:
    async def scenario(world: World) -> None:
        await _used_to_it(world)
        answer = await world.answer(HARD)
        assert (answer.where, answer.hedge) == ("cloud", "")
        assert world.agent.hedges.layers == 0

    in_world(scenario, hedge_after=1.0)


@pytest.mark.parametrize("mode", ["slow", "silent", "greets"])
def test_a_cloud_that_is_late_is_overtaken_by_the_device(mode: str) -> None:
    async def scenario(world: World) -> None:
        await _used_to_it(world)
        world.cloud.mode = mode
        answer = await world.answer(HARD)
        assert (answer.where, answer.reason, answer.hedge) == ("device", "", "device")
        assert answer.complete
        assert answer.exit_depth == N
        # Begun as soon as the answer is late: four deviations above the mean, next to none here.
        assert answer.ms == pytest.approx(1000 * (FIRST_S + RTT_S + REST_S), rel=0.05)
        hedges = world.agent.hedges
        assert (hedges.begun, hedges.won, hedges.layers, hedges.wasted) == (1, 1, 3, 0)

    in_world(scenario, hedge_after=1.0)


def test_the_side_that_lost_is_cancelled() -> None:
    async def scenario(world: World) -> None:
        world.cloud.mode = "slow"
        answer = await world.answer(HARD)
        assert answer.hedge == "device"
        assert world.cloud.in_air == 0, "the call goes on"
        world.cloud.mode, world.cloud.slow_s = "slow", 1.5 * LAYER_S
        runs = world.layers.runs
        answer = await world.answer(HARD)  # comes while the second layer of the rest runs
        assert (answer.where, answer.hedge) == ("cloud", "cloud")
        await asyncio.sleep(1)
        assert world.layers.runs - runs == SPLIT + 2, "layers after the answer"

    in_world(scenario, hedge_after=0.0)


def test_layers_run_for_nothing_are_counted() -> None:
    async def scenario(world: World) -> None:
        world.cloud.mode, world.cloud.slow_s = "slow", 1.5 * LAYER_S
        answer = await world.answer(HARD)
        assert answer.hedge == "cloud"
        await asyncio.sleep(1)
        hedges = world.agent.hedges
        assert (hedges.begun, hedges.won, hedges.layers, hedges.wasted) == (1, 0, 2, 2)

    in_world(scenario, hedge_after=0.0)


def test_before_the_first_answer_it_begins_as_late_as_still_leaves_time() -> None:
    async def scenario(world: World) -> None:
        world.cloud.mode = "greets"
        answer = await world.answer(HARD, deadline_ms=500)
        assert answer.hedge == "device"
        assert answer.complete
        assert 500 - 10 < answer.ms <= 500

    in_world(scenario, hedge_after=1.0)


def test_at_the_deadline_the_deepest_exit_answers_that_the_hedge_has_reached() -> None:
    async def scenario(world: World) -> None:
        world.cloud.mode = "greets"
        # Of the rest's three layers two fit: the exit at 5.
        answer = await world.answer(HARD, deadline_ms=1000 * (FIRST_S + 2.5 * LAYER_S) + 5)
        assert (answer.where, answer.reason, answer.exit_depth) == ("fallback", "deadline", 5)
        assert not answer.complete
        assert answer.ms <= 1000 * (FIRST_S + 2.5 * LAYER_S) + 5

    in_world(scenario, hedge_after=0.0)


def test_samples_go_before_hedges_between_layers() -> None:
    async def scenario(world: World) -> None:
        await _used_to_it(world)
        world.cloud.mode = "silent"
        hedged = asyncio.create_task(world.answer(HARD))
        await asyncio.sleep(FIRST_S + RTT_S + 1.5 * LAYER_S)  # the hedge's second layer runs
        answer = await world.answer(HARD, deadline_ms=1000 * (FIRST_S + LAYER_S) + 5)
        # It waited for one layer at most.
        assert answer.stages_ms.queue <= 1000 * LAYER_S
        assert answer.exit_depth == SPLIT
        assert (await hedged).hedge == "device"

    in_world(scenario, hedge_after=1.0)


def test_with_hedging_off_the_device_waits() -> None:
    async def scenario(world: World) -> None:
        await _used_to_it(world)
        world.cloud.mode = "greets"
        answer = await world.answer(HARD, deadline_ms=500)
        assert (answer.where, answer.reason, answer.exit_depth) == ("fallback", "deadline", SPLIT)
        assert world.agent.hedges.layers == 0

    in_world(scenario, hedge_after=math.inf)


def test_a_link_that_has_become_slower_is_believed_after_a_few_samples() -> None:
    async def scenario(world: World) -> None:
        await _used_to_it(world)
        world.cloud.mode, world.cloud.slow_s = "slow", 6 * RTT_S
        hedges = [(await world.answer(HARD)).hedge for _ in range(20)]
        assert hedges[0] == "device"
        assert hedges[-1] == "", "waits for what is usual now"

    in_world(scenario, hedge_after=1.0, probe_timeout_ms=3000.0)


def test_with_fallback_exit_nothing_is_run_for_the_case() -> None:
    async def scenario(world: World) -> None:
        world.cloud.mode = "greets"
        runs = world.layers.runs
        answer = await world.answer(HARD, deadline_ms=500)
        assert answer.exit_depth == SPLIT
        assert world.layers.runs - runs == SPLIT

    in_world(scenario, hedge_after=0.0, fallback="exit")


@pytest.mark.parametrize("split", [0, 1])
def test_a_provisional_answer_before_any_exit_is_the_first_exits(split: int) -> None:
    async def scenario(world: World) -> None:
        first: list[Answer] = []
        final = await world.agent.answer(Sample(HARD), first.append)
        (provisional,) = first
        assert (provisional.exit_depth, provisional.provisional) == (2, True)
        assert not provisional.complete
        assert provisional.ms == pytest.approx(1000 * 2 * LAYER_S)
        assert (final.where, final.hedge) == ("cloud", "cloud")
        assert world.agent.hedges.layers == 2 - split

    in_world(scenario, split=split)


def test_late_is_mean_and_four_deviations_as_tcp_has_it() -> None:
    usual = UsualTime()
    assert usual.late_s is None
    usual.took(0.1)
    assert usual.late_s == pytest.approx(0.1 + 4 * 0.05)
    for _ in range(200):
        usual.took(0.1)
    assert usual.late_s == pytest.approx(0.1)
    usual.took(0.18)
    assert usual.late_s == pytest.approx(0.1 + 0.01 + 4 * 0.02)  # RFC 6298, (2.3)


def test_answers_given_up_double_the_time_once_for_all_that_were_in_the_air() -> None:
    usual = UsualTime()
    usual.took(0.1)
    late_s = usual.late_s
    assert late_s is not None
    for _ in range(5):
        usual.given_up(began_s=1.0, now_s=1.5)
    assert usual.late_s == pytest.approx(2 * late_s)
    assert not usual.known
    usual.given_up(began_s=2.0, now_s=2.5)
    assert usual.late_s == pytest.approx(4 * late_s)
    usual.took(0.1)
    assert usual.known
