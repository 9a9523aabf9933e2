"""A request whose replica dies is repeated once, within its deadline, on another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from offramp_cloud.backends import ReplicatedBackend
from offramp_cloud.statuses import Outcome
from offramp_common.errors import CloudBusy, CloudUnavailable

GONE = CloudUnavailable("no replica could answer (ActorDiedError); retry later")


class Scripted:
    """Replicas that answer their calls one after another as they are told."""

    def __init__(self, *answers: Outcome | Exception | Callable[[], Awaitable[Any]]) -> None:
        self._answers = list(answers)
        self.budgets_ms: list[float] = []

    async def call(self, method: str, *args: Any) -> Any:
        assert method == "complete"
        self.budgets_ms.append(args[1])
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Outcome) else await answer()


async def ended() -> None:
    """Nothing to close."""


def backend(replicas: Scripted, retry_s: float = 5.0) -> ReplicatedBackend:
    return ReplicatedBackend({"toy": replicas}, 2, ended, retry_s)


async def test_a_request_is_repeated_once_with_what_is_left_of_its_deadline() -> None:
    async def dies_later() -> None:
        await asyncio.sleep(0.02)
        raise GONE

    replicas = Scripted(dies_later, Outcome(b"answer"))
    assert await backend(replicas).complete("toy", b"request", 500.0) == Outcome(b"answer")
    first_ms, second_ms = replicas.budgets_ms
    assert first_ms == 500.0
    assert 0 < second_ms <= 481.0


async def test_it_is_not_repeated_twice() -> None:
    with pytest.raises(CloudUnavailable, match="ActorDiedError"):
        await backend(Scripted(GONE, GONE)).complete("toy", b"request", 500.0)


async def test_replicas_that_are_full_are_not_asked_again() -> None:
    with pytest.raises(CloudBusy):
        await backend(Scripted(CloudBusy("full"))).complete("toy", b"request", 500.0)


async def test_no_other_replica_in_time_is_unavailable() -> None:
    waits = asyncio.Event().wait
    with pytest.raises(CloudUnavailable, match=r"no other answered within 0\.05 s; retry later"):
        await backend(Scripted(GONE, waits), retry_s=0.05).complete("toy", b"request", 500.0)


async def test_an_error_that_a_replica_answered_with_is_an_answer() -> None:
    refused = Outcome(b"", 3, "not a frame")
    assert await backend(Scripted(refused)).complete("toy", b"request", 500.0) == refused
