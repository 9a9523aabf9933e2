"""The deadline contract around the cloud: what is sent again, when it is left alone, how it comes back."""

from __future__ import annotations

import asyncio
import random

import pytest
from edge_world import LAYER_S, LAYERS, RTT_S, N, World, in_world, local, texts
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from offramp_common.errors import ConfigError
from offramp_common.retry import RetryBudget
from offramp_edge.settings import EdgeSettings

HARD = next(text for text in texts(50) if local(text, LAYERS.knobs())[0] == N)
SLOW_LAYERS = 40
"""Times slower than usual, so that the cloud is worth waiting for."""


def test_a_sample_whose_connection_was_lost_is_sent_again_and_the_cloud_may_still_be_first() -> (
    None
):
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.layers.factor = SLOW_LAYERS
        answering = asyncio.create_task(world.answer(HARD))
        await asyncio.sleep(3 * SLOW_LAYERS * LAYER_S + RTT_S / 2)
        world.cloud.mode = "gone"  # in mid-flight
        await asyncio.sleep(RTT_S)
        world.cloud.mode = "up"
        answer = await answering
        assert (answer.where, answer.complete) == ("cloud", True)
        assert answer.ms < 1000 * N * SLOW_LAYERS * LAYER_S
        assert world.agent.offloads is not None
        assert world.agent.offloads.budget.retries == 1

    in_world(scenario)


def test_while_it_waits_to_be_sent_again_the_device_runs_on() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode = "gone"
        answer = await world.answer(HARD)
        assert (answer.where, answer.reason, answer.complete) == ("fallback", "unavailable", True)
        assert answer.ms == pytest.approx(1000 * N * LAYER_S)

    in_world(scenario)


def test_retries_are_a_share_of_the_samples_sent() -> None:
    async def scenario(world: World) -> None:
        sent = 0
        for _ in range(300):
            world.cloud.mode = "up"
            await world.breaker.up.wait()
            await world.answer(HARD)
            world.cloud.mode = "gone"
            await world.answer(HARD)
            sent += 2
        budget = world.agent.offloads.budget  # type: ignore[union-attr]
        assert budget.retries <= 10 + 0.1 * sent

    in_world(scenario)


@pytest.mark.parametrize("mode", ["busy", "silent", "mismatch", "refused"])
def test_nothing_else_is_sent_again(mode: str) -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode = mode
        before = len(world.cloud.works)
        await world.answer(HARD)
        assert len(world.cloud.works) == before + 1

    in_world(scenario)


@given(
    share=st.sampled_from([0.0, 0.05, 0.1, 0.5, 1.0]),
    most=st.sampled_from([0.0, 1.0, 10.0]),
    wants=st.lists(st.booleans(), max_size=300),
)
@hypothesis_settings(max_examples=50, deadline=None)
def test_a_budget_is_never_overdrawn(share: float, most: float, wants: list[bool]) -> None:
    budget = RetryBudget(share, most)
    for requests, want in enumerate(wants, start=1):
        budget.requested()
        if want:
            budget.take()
        assert budget.retries <= most + share * requests + 1e-9  # sums of floats
    assert share or not budget.retries


def test_a_budget_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        RetryBudget(1.5)


def test_a_cloud_that_says_for_how_long_it_is_full_is_left_alone_for_that_long() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode, world.cloud.retry_after_ms = "busy", 3000.0
        assert (await world.answer(HARD)).reason == "busy"
        sent, until = len(world.cloud.works), world.loop.time() + 2.9
        world.cloud.mode = "up"
        while world.loop.time() < until:
            answer = await world.answer(HARD)
            # Answered here, at once: nothing queues.
            assert (answer.where, answer.reason, answer.complete) == ("fallback", "busy", True)
            assert answer.ms == pytest.approx(1000 * N * LAYER_S)
        assert len(world.cloud.works) == sent
        assert world.breaker.state == "up"
        await asyncio.sleep(0.2)
        assert (await world.answer(HARD)).where == "cloud"

    in_world(scenario)


def test_a_cloud_that_asks_for_an_hour_is_asked_again_within_a_minute() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode, world.cloud.retry_after_ms = "busy", 3_600_000.0
        await world.answer(HARD)
        world.cloud.mode = "up"
        await asyncio.sleep(61)
        assert (await world.answer(HARD)).where == "cloud"

    in_world(scenario)


def test_after_a_setback_one_sample_at_a_time_is_sent_until_one_is_answered() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode = "gone"
        await world.answer(HARD)
        world.cloud.mode, world.cloud.slow_s = "slow", 0.2
        async with asyncio.timeout(30):
            await world.breaker.up.wait()
        before = len(world.cloud.works)
        answers = await asyncio.gather(*(world.answer(HARD) for _ in range(4)))
        assert len(world.cloud.works) == before + 1
        assert sorted(a.where for a in answers) == ["cloud"] + ["fallback"] * 3
        answers = await asyncio.gather(*(world.answer(HARD) for _ in range(4)))
        assert {a.where for a in answers} == {"cloud"}

    in_world(scenario)


@pytest.mark.parametrize("outage_s", [1.0, 20.0, 300.0])
@pytest.mark.parametrize("mode", ["gone", "silent"])
def test_while_samples_come_the_cloud_is_in_use_again_within_two_seconds(
    mode: str, outage_s: float
) -> None:
    async def scenario(world: World) -> None:
        rng = random.Random(int(outage_s))
        await world.answer(HARD)
        world.cloud.mode = mode
        back = world.loop.time() + outage_s
        while world.loop.time() < back:
            await world.answer(HARD, deadline_ms=500)
            await asyncio.sleep(rng.uniform(0, 0.05))
        world.cloud.mode, began = "up", world.loop.time()
        while (await world.answer(HARD, deadline_ms=500)).where != "cloud":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert world.loop.time() - began <= 2.0

    in_world(scenario)


def test_every_sample_has_a_deadline_unless_it_is_taken_away() -> None:
    assert EdgeSettings().deadline_ms == 2000
    assert EdgeSettings(deadline_ms=None).deadline_ms is None

    async def scenario(world: World) -> None:
        world.cloud.mode = "greets"
        assert (await world.answer(HARD)).ms <= 2000
        assert (await world.answer(HARD, deadline_ms=float("inf"))).reason == "timeout"

    in_world(scenario, deadline_ms=2000.0, offload_timeout_ms=10_000.0)
