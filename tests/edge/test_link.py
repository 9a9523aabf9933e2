"""The link estimate, from transfers on a made-up link and a clock that is turned by hand."""

from __future__ import annotations

import math
import random

import pytest

from offramp_edge.link import Link


class Clock:
    now_s = 5.0

    def now(self) -> float:
        return self.now_s


class Wire:
    """A link with a rate and a round trip; transfers queue for its uplink."""

    def __init__(self, rtt_ms: float, mbps: float) -> None:
        self.clock = Clock()
        self.link = Link(self.clock)
        self.rtt_ms, self.mbps = rtt_ms, mbps
        self.free_s = 0.0

    def ms(self, nbytes: int) -> float:
        return self.rtt_ms + nbytes * 8 / 1000 / self.mbps

    def exchange(self, nbytes: int, late_ms: float = 0.0, cloud_ms: float = 3.0) -> None:
        """One transfer from its beginning to its end."""
        transfer = self.link.sent(nbytes, cloud_ms)
        self.clock.now_s += (self.ms(nbytes) + late_ms + cloud_ms) / 1000
        self.link.answered(transfer, cloud_ms)

    def said_ms(self, nbytes: int) -> float:
        rtt_ms, ms_per_byte = self.link.costs()
        return self.link.queue_ms() + rtt_ms + nbytes * ms_per_byte

    def burst(self, sizes: list[int]) -> None:
        """All sent at once; answers come as the uplink lets them through."""
        began_s, flying = self.clock.now_s, []
        for nbytes in sizes:
            transfer = self.link.sent(nbytes)
            self.free_s = max(self.free_s, began_s) + nbytes * 8e-6 / self.mbps
            flying.append((self.free_s + self.rtt_ms / 1000, transfer))
        for done_s, transfer in flying:
            self.clock.now_s = done_s
            self.link.answered(transfer, 0.0)


def test_nothing_is_known_before_the_first_transfer() -> None:
    estimate = Link(Clock()).estimate()
    assert (estimate.rtt_ms, estimate.uplink_mbps, estimate.age_s) == (None, None, None)


@pytest.mark.parametrize(("rtt_ms", "mbps"), [(40.0, 5.0), (5.0, 0.3), (600.0, 2.0)])
def test_transfers_of_different_sizes_tell_round_trip_and_goodput(
    rtt_ms: float, mbps: float
) -> None:
    wire, rng = Wire(rtt_ms, mbps), random.Random(0)
    for _ in range(30):
        wire.exchange(rng.choice((90, 500, 2_000, 8_000, 20_000)))
    estimate = wire.link.estimate()
    assert estimate.rtt_ms == pytest.approx(rtt_ms, rel=0.1)
    if rtt_ms < 100:  # on the long link 20 KB take 80 of 680 ms: a time may be off by as much
        assert estimate.uplink_mbps == pytest.approx(mbps, rel=0.1)
    for nbytes in (90, 2_000, 20_000):
        assert wire.said_ms(nbytes) == pytest.approx(wire.ms(nbytes), rel=0.08)


def test_two_transfers_already_tell_the_next_within_a_quarter() -> None:
    wire = Wire(40.0, 1.0)
    wire.exchange(100)
    wire.exchange(10_000)
    assert wire.said_ms(8_000) == pytest.approx(wire.ms(8_000), rel=0.25)


def test_equal_sizes_tell_their_own_time_but_no_goodput() -> None:
    wire = Wire(40.0, 5.0)
    for _ in range(10):
        wire.exchange(100)
    assert wire.link.estimate().uplink_mbps is None
    assert wire.said_ms(100) == pytest.approx(wire.ms(100), rel=0.05)


def test_jitter_blurs_it_but_little() -> None:
    wire, rng = Wire(40.0, 5.0), random.Random(0)
    for _ in range(200):
        wire.exchange(rng.randrange(500, 20_000), late_ms=rng.uniform(0, 4))
    # The jitter's mean of 2 ms is taken for the round trip's; the rest is within a tenth.
    assert wire.said_ms(8_000) == pytest.approx(wire.ms(8_000) + 2, rel=0.1)


def test_a_link_that_got_slower_shows_after_three_transfers() -> None:
    wire, rng = Wire(40.0, 10.0), random.Random(0)
    for _ in range(40):
        wire.exchange(rng.randrange(2_000, 20_000))
    wire.mbps = 1.0
    for _ in range(3):
        wire.exchange(10_000)
    assert wire.said_ms(10_000) == pytest.approx(wire.ms(10_000), rel=0.2)


def test_one_stall_is_counted_and_moves_it_by_less_than_half_of_what_it_cost() -> None:
    wire, rng = Wire(40.0, 5.0), random.Random(0)
    for _ in range(40):
        wire.exchange(rng.randrange(500, 20_000))
    before_ms = wire.said_ms(4_000)
    wire.exchange(4_000, late_ms=1_000)
    assert wire.link.estimate().stalls == 1
    assert wire.said_ms(4_000) < 2 * before_ms
    for _ in range(3):
        wire.exchange(4_000)
    assert wire.said_ms(4_000) == pytest.approx(wire.ms(4_000), rel=0.2)


def test_what_waits_in_front_is_the_queue_and_not_the_links_fault() -> None:
    wire = Wire(40.0, 1.0)
    for nbytes in (100, 10_000, 3_000, 8_000):
        wire.exchange(nbytes)
    for _ in range(5):
        wire.burst([10_000] * 4)
    assert wire.said_ms(10_000) == pytest.approx(wire.ms(10_000), rel=0.05)
    for _ in range(4):
        wire.link.sent(10_000)
    # Four frames of 80 ms stand in front.
    assert wire.link.queue_ms() == pytest.approx(320, rel=0.1)


def test_an_overdue_answer_counts_as_a_queue_before_it_comes() -> None:
    wire = Wire(40.0, 5.0)
    for nbytes in (100, 10_000, 3_000, 8_000):
        wire.exchange(nbytes)
    wire.link.sent(100, cloud_ms=5.0)
    wire.clock.now_s += 0.030
    assert wire.link.queue_ms() == 0
    wire.clock.now_s += 1.0
    # A second late: it may last another.
    assert wire.link.queue_ms() > 900


def test_a_failure_after_a_long_wait_tells_that_the_link_is_slow() -> None:
    wire = Wire(40.0, 5.0)
    for nbytes in (100, 10_000, 3_000, 8_000):
        wire.exchange(nbytes)
    before_ms = wire.said_ms(4_000)
    for _ in range(2):
        transfer = wire.link.sent(4_000)
        wire.clock.now_s += 2.0
        wire.link.failed(transfer)
    assert wire.said_ms(4_000) > 5 * before_ms
    assert wire.link.estimate().failures == 2


def test_a_silence_makes_it_ready_to_learn_anew() -> None:
    errors = []
    for silence_s in (0.0, 60.0):
        wire = Wire(40.0, 5.0)
        for nbytes in (100, 10_000, 3_000, 8_000) * 5:
            wire.exchange(nbytes)
        wire.clock.now_s += silence_s
        wire.mbps = 2.5
        wire.exchange(8_000)
        errors.append(abs(math.log(wire.said_ms(8_000) / wire.ms(8_000))))
    assert errors[1] < errors[0]


def test_the_first_handshake_is_a_guess_until_something_is_transferred() -> None:
    link = Link(Clock())
    link.connected(1200.0)
    assert link.costs()[0] == pytest.approx(600)
    assert link.estimate().rtt_ms is None


def test_it_says_how_old_it_is_and_what_failed() -> None:
    wire = Wire(10.0, 5.0)
    wire.exchange(1000)
    wire.link.failed()
    wire.link.dropped(wire.link.sent(100))
    wire.clock.now_s += 7
    estimate = wire.link.estimate()
    assert estimate.age_s == pytest.approx(7)
    assert (estimate.transfers, estimate.failures, estimate.queue_ms) == (1, 1, 0)
