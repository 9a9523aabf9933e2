"""The link estimate, from transfers on a made-up link."""

from __future__ import annotations

import random

import pytest

from offramp_edge.link import Link


class Clock:
    now_s = 5.0

    def now(self) -> float:
        return self.now_s


def network_ms(nbytes: int, rtt_ms: float, mbps: float) -> float:
    return rtt_ms + nbytes * 8 / 1000 / mbps


def test_nothing_is_known_before_the_first_transfer() -> None:
    estimate = Link(Clock()).estimate()
    assert (estimate.rtt_ms, estimate.uplink_mbps, estimate.age_s) == (None, None, None)


@pytest.mark.parametrize(("rtt_ms", "mbps"), [(40.0, 5.0), (5.0, 0.3), (600.0, 2.0)])
def test_transfers_of_different_sizes_tell_round_trip_and_goodput(
    rtt_ms: float, mbps: float
) -> None:
    link, rng = Link(Clock()), random.Random(0)
    for _ in range(30):
        nbytes = rng.randrange(500, 20_000)
        link.transferred(nbytes, network_ms(nbytes, rtt_ms, mbps))
    estimate = link.estimate()
    assert estimate.rtt_ms == pytest.approx(rtt_ms, rel=1e-6)
    assert estimate.uplink_mbps == pytest.approx(mbps, rel=1e-6)


def test_jitter_blurs_it_but_little() -> None:
    link, rng = Link(Clock()), random.Random(0)
    for _ in range(200):
        nbytes = rng.randrange(500, 20_000)
        link.transferred(nbytes, network_ms(nbytes, 40, 5) + rng.uniform(0, 4))
    estimate = link.estimate()
    # Within a quarter: about ten transfers count, each off by 1 ms of up to 32.
    assert estimate.rtt_ms == pytest.approx(42, abs=4)
    assert estimate.uplink_mbps == pytest.approx(5, rel=0.25)


def test_equal_sizes_tell_nothing_of_the_goodput() -> None:
    link = Link(Clock())
    for _ in range(10):
        link.transferred(100, 41.0)
    estimate = link.estimate()
    assert estimate.rtt_ms == pytest.approx(41.0)
    assert estimate.uplink_mbps is None


def test_a_link_that_got_slower_shows_after_a_few_transfers() -> None:
    link, rng = Link(Clock()), random.Random(0)
    for mbps in (10.0, 1.0):
        for _ in range(40):
            nbytes = rng.randrange(500, 20_000)
            link.transferred(nbytes, network_ms(nbytes, 40, mbps))
    assert link.estimate().uplink_mbps == pytest.approx(1.0, rel=0.2)


def test_it_says_how_old_it_is_and_what_failed() -> None:
    clock = Clock()
    link = Link(clock)
    link.transferred(1000, 10.0)
    link.failed()
    clock.now_s += 7
    estimate = link.estimate()
    assert (estimate.age_s, estimate.transfers, estimate.failures) == (7, 1, 1)
