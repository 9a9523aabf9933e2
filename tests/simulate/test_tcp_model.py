"""The model of TCP: window by window, against sums done by hand, and what no link can do better than.

How near it comes to the kernel is measured by benchmarks/tcp_model.py.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp_simulate.links import ConstantRate, Shaper
from offramp_simulate.loss import GilbertElliott, LossDraws
from offramp_simulate.tcp_model import TcpSender, TcpSettings

MSS, PACKET = 1448, 1500
FAST_MBPS = 12_000.0  # a packet a microsecond: only round trips count
ONE_WAY_S = 0.05
# Two in three packets are lost, one at a time or two in a row.
MOSTLY_LOST = GilbertElliott(0.6, 0.3)
FIRST_LOST = GilbertElliott(to_bad=1.0, to_good=1e-9, lost_bad=0.0, lost_good=1.0)


def sender(
    mbps: float = FAST_MBPS,
    *,
    queue_nbytes: float = math.inf,
    losses: LossDraws | None = None,
    **options: bool,
) -> TcpSender:
    shaper = Shaper(ConstantRate(mbps), delay_s=ONE_WAY_S, queue_nbytes=queue_nbytes)
    return TcpSender(shaper, ONE_WAY_S, TcpSettings(**options), losses)


def arrival(model: TcpSender, nbytes: int, now_s: float) -> float:
    """When one message arrives, nothing being sent meanwhile."""
    ((_, arrives_s),) = model.send(nbytes, now_s) + model.advance(math.inf)
    return arrives_s


@pytest.mark.parametrize(
    ("segments", "round_trips"), [(1, 0), (10, 0), (11, 1), (30, 1), (31, 2), (70, 2), (71, 3)]
)
def test_the_window_begins_with_ten_segments_and_doubles_each_round_trip(
    segments: int, round_trips: int
) -> None:
    took_s = arrival(sender(hystart=False), segments * MSS, 0.0)
    # Delayed ACKs of an odd segment may hold up the last one by 40 ms.
    assert took_s == pytest.approx(ONE_WAY_S + round_trips * 2 * ONE_WAY_S, abs=0.041)
    assert took_s >= ONE_WAY_S + round_trips * 2 * ONE_WAY_S


def test_a_long_transfer_is_bound_by_the_rate_of_the_link() -> None:
    nbytes = 1000 * MSS
    took_s = arrival(sender(10.0), nbytes, 0.0)
    wire_s = 1000 * PACKET * 8 / 10e6
    assert wire_s + ONE_WAY_S < took_s < 1.5 * wire_s


def test_an_idle_connection_starts_slowly_again_and_one_of_bbr_does_not() -> None:
    for restarts in (True, False):
        model = sender(slow_start_after_idle=restarts, hystart=False)
        arrival(model, 70 * MSS, 0.0)
        grown = model.window
        assert grown >= 40
        took_s = arrival(model, 30 * MSS, 5.0) - 5.0
        assert took_s == pytest.approx(0.15 if restarts else 0.05, abs=0.045)


def test_the_window_is_halved_for_each_time_out_of_a_pause() -> None:
    model = sender(hystart=False)
    arrival(model, 70 * MSS, 0.0)
    grown, idle_since_s = model.window, 0.2
    model.send(1, idle_since_s + 1.5 * model.timeout_s)
    assert model.window == pytest.approx(grown / 2, abs=1)


def test_a_window_that_is_not_used_does_not_grow() -> None:
    model = sender()
    for number in range(50):
        arrival(model, MSS, 0.2 * number)
    assert model.window == 10


def test_a_message_waits_for_those_before_it_on_its_connection() -> None:
    model = sender(8.0)
    known = [arrived for _ in range(4) for arrived in model.send(20 * MSS, 0.0)]
    known += model.advance(math.inf)
    assert [number for number, _ in known] == [0, 1, 2, 3]
    arrivals = [arrives_s for _, arrives_s in known]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] >= ONE_WAY_S + 80 * PACKET * 8 / 8e6


def test_a_lost_segment_with_others_behind_it_costs_a_round_trip() -> None:
    model = sender(losses=LossDraws(FIRST_LOST, 0))
    assert arrival(model, 5 * MSS, 0.0) == pytest.approx(3 * ONE_WAY_S, abs=0.001)


def test_a_lost_segment_alone_waits_for_the_timer() -> None:
    model = sender(losses=LossDraws(FIRST_LOST, 0))
    # Before its first sample of a round trip the timer is a second.
    assert arrival(model, MSS, 0.0) == pytest.approx(1.0 + ONE_WAY_S, abs=0.001)
    model = sender()
    arrival(model, MSS, 0.0)
    model._losses = LossDraws(FIRST_LOST, 0)
    assert arrival(model, MSS, 1.0) == pytest.approx(1.0 + 0.2 + 3 * ONE_WAY_S, abs=0.001)


def test_what_finds_the_queue_full_is_sent_again_and_the_window_shrinks() -> None:
    model = sender(10.0, queue_nbytes=10 * PACKET, hystart=False)
    took_s = arrival(model, 200 * MSS, 0.0)
    assert took_s > ONE_WAY_S + 200 * PACKET * 8 / 10e6
    assert model.window < 100


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.integers(1, 100_000), st.floats(0, 2)), min_size=1, max_size=8),
    st.floats(0.5, 200),
    st.integers(3, 100),
    st.sampled_from([0.05, 0.3, 0.6]),
    st.integers(0, 100),
)
def test_everything_arrives_in_order_and_never_faster_than_the_link(
    messages: list[tuple[int, float]], mbps: float, queue: int, loss: float, seed: int
) -> None:
    losses = LossDraws(GilbertElliott.of(loss, 2.0), seed)
    model = sender(mbps, queue_nbytes=queue * PACKET, losses=losses)
    now_s, known, sent = 0.0, [], []
    for nbytes, pause_s in messages:
        now_s += pause_s
        sent.append((nbytes, now_s))
        known += model.send(nbytes, now_s)
    n_steps = 0
    while (next_s := model.next_s()) < math.inf:
        known += model.advance(next_s)
        n_steps += 1
        # It moves on: an ACK for each time a segment is sent, 2.5 times on average, or a timer.
        assert n_steps < 1000 + 20 * sum(1 + nbytes // MSS for nbytes, _ in sent)
    assert [number for number, _ in known] == list(range(len(messages)))
    arrivals = [arrives_s for _, arrives_s in known]
    assert arrivals == sorted(arrivals)
    for (nbytes, sent_s), arrives_s in zip(sent, arrivals, strict=True):
        assert arrives_s >= sent_s + ONE_WAY_S + nbytes * 8 / (mbps * 1e6) - 1e-9


def test_it_gets_through_a_link_that_loses_most() -> None:
    model = sender(losses=LossDraws(MOSTLY_LOST, 0))
    assert arrival(model, 40 * MSS, 0.0) < 60
