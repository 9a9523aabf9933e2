"""How long to wait between attempts."""

from __future__ import annotations

import random

import pytest

from offramp_common.errors import ConfigError
from offramp_common.retry import Backoff


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
