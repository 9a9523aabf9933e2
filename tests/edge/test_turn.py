"""Whose turn it is: samples in order, hedges behind them, nobody lost by a cancellation."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from offramp_edge.turn import SAMPLE, Turn


async def _queue(turn: Turn, ranks: list[int]) -> tuple[list[asyncio.Task[None]], list[int]]:
    """Waiters in this order, and the list of who got the turn."""
    got: list[int] = []

    async def take(number: int, rank: int) -> None:
        await turn.acquire(rank)
        got.append(number)
        try:
            await asyncio.sleep(0)
        finally:
            turn.release()

    tasks = [asyncio.create_task(take(i, rank)) for i, rank in enumerate(ranks)]
    await asyncio.sleep(0)
    return tasks, got


async def test_samples_come_in_order_and_hedges_behind_them_the_oldest_first() -> None:
    turn = Turn()
    await turn.acquire()
    tasks, got = await _queue(turn, [7, SAMPLE, 3, SAMPLE])
    assert turn.samples == 2
    turn.release()
    await asyncio.gather(*tasks)
    assert got == [1, 3, 2, 0]
    assert turn.samples == 0


async def test_each_is_told_whether_it_had_to_wait() -> None:
    turn = Turn()
    assert not await turn.acquire()
    behind = asyncio.create_task(turn.acquire())
    await asyncio.sleep(0)
    turn.release()
    assert await behind
    turn.release()
    assert not await turn.acquire()


async def test_who_asks_when_it_is_handed_over_does_not_come_between() -> None:
    turn = Turn()
    await turn.acquire()
    tasks, got = await _queue(turn, [5])
    turn.release()  # handed to the hedge, which has not run yet
    late, _ = await _queue(turn, [SAMPLE])
    await asyncio.gather(*tasks, *late)
    assert got == [0]


@given(
    ranks=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    cancelled=st.sets(st.integers(0, 7)),
    at=st.integers(0, 6),
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_whoever_is_cancelled_and_when_the_turn_is_free_in_the_end(
    ranks: list[int], cancelled: set[int], at: int
) -> None:
    async def scenario() -> None:
        turn = Turn()
        await turn.acquire()
        tasks, got = await _queue(turn, ranks)
        turn.release()
        for _ in range(at):
            await asyncio.sleep(0)
        for number in cancelled & set(range(len(tasks))):
            tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(set(got)) == len(got)
        async with asyncio.timeout(1):
            await turn.acquire()
        assert turn.samples == 0

    with asyncio.Runner() as runner:
        runner.run(scenario())
