"""Back-off and retries, on a hand-turned clock."""

from __future__ import annotations

import random

import pytest

from offramp_common.errors import CloudUnavailable, ConfigError, RequestError
from offramp_common.retry import Backoff, retry


class Turned:
    """A clock that only `sleep` turns."""

    def __init__(self) -> None:
        self.now_s = 50.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def test_the_longest_wait_doubles_up_to_the_cap() -> None:
    backoff = Backoff(base_s=0.5, cap_s=3.0)
    assert [backoff.longest_s(k) for k in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff.longest_s(10**6) == 3.0


def test_jitter_covers_the_whole_interval() -> None:
    rng, backoff = random.Random(0), Backoff(base_s=1.0, cap_s=1.0)
    waits = [backoff.wait_s(0, rng) for _ in range(2000)]
    assert min(waits) < 0.01
    assert max(waits) > 0.99
    assert sum(waits) / len(waits) == pytest.approx(0.5, abs=0.03)  # 4 standard errors


@pytest.mark.parametrize(("base_s", "cap_s"), [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_a_back_off_that_cannot_be_meant_is_refused(base_s: float, cap_s: float) -> None:
    with pytest.raises(ConfigError):
        Backoff(base_s, cap_s)


async def test_a_call_is_made_again_until_it_answers() -> None:
    clock, calls = Turned(), 0

    async def call() -> str:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise CloudUnavailable("gone")
        return "there"

    said = await retry(
        call, Backoff(), until_s=1e9, clock=clock, rng=random.Random(0), sleep=clock.sleep
    )
    assert said == "there"
    assert len(clock.slept) == 3


async def test_the_last_error_is_raised_when_time_is_up() -> None:
    clock = Turned()

    async def call() -> None:
        raise CloudUnavailable(f"at {clock.now_s:.1f}")

    with pytest.raises(CloudUnavailable, match="at 5"):
        await retry(
            call,
            Backoff(1.0, 1.0),
            until_s=55.0,
            clock=clock,
            rng=random.Random(0),
            sleep=clock.sleep,
        )
    assert clock.now_s < 55.0


async def test_an_error_that_retrying_cannot_cure_is_raised_at_once() -> None:
    clock = Turned()

    async def call() -> None:
        raise RequestError("wrong")

    with pytest.raises(RequestError):
        await retry(
            call, Backoff(), until_s=1e9, clock=clock, rng=random.Random(0), sleep=clock.sleep
        )
    assert clock.slept == []
