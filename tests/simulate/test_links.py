"""The arithmetic of a link, on a clock that the test turns."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp_common.errors import ConfigError
from offramp_simulate.links import (
    DEFAULT_PROFILE,
    PROFILES,
    ConstantRate,
    LinkProfile,
    Shaper,
    header_nbytes,
)
from offramp_simulate.traces import RateTrace

# Times are sums of a few hundred floats below 1e4: rounding stays far below a nanosecond.
NS = 1e-9

sizes = st.lists(st.integers(1, 20_000), min_size=1, max_size=60)


def megabyte_a_second(**options: Any) -> Shaper:
    return Shaper(ConstantRate(8.0), **options)


def test_the_delay_is_added_once_to_each_chunk_and_does_not_limit_the_rate() -> None:
    shaper = megabyte_a_second(delay_s=3.0)
    passages = [shaper.send(100_000, 0.0) for _ in range(10)]
    assert [p.departs_s for p in passages] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert [p.arrives_s for p in passages] == pytest.approx([3 + 0.1 * n for n in range(1, 11)])


def test_a_chunk_that_finds_the_link_idle_departs_at_once() -> None:
    shaper = megabyte_a_second()
    shaper.send(100_000, 0.0)
    assert shaper.send(100_000, 5.0).departs_s == pytest.approx(5.1)


@settings(deadline=None)  # the machine may be busy
@given(sizes, st.floats(0.1, 1000), st.floats(0, 2))
def test_how_bytes_are_cut_into_chunks_does_not_change_when_the_last_one_arrives(
    chunks: list[int], mbps: float, delay_s: float
) -> None:
    cut, whole = (Shaper(ConstantRate(mbps), delay_s=delay_s) for _ in range(2))
    arrivals = [cut.send(nbytes, 0.0).arrives_s for nbytes in chunks]
    assert arrivals[-1] == pytest.approx(whole.send(sum(chunks), 0.0).arrives_s, rel=NS)


@settings(deadline=None)  # the machine may be busy
@given(sizes, st.integers(0, 5), st.lists(st.floats(0, 0.05), min_size=60, max_size=60))
def test_jitter_keeps_the_order_and_its_bound(
    chunks: list[int], seed: int, pauses: list[float]
) -> None:
    shaper = megabyte_a_second(delay_s=0.02, jitter_s=0.03, seed=seed)
    now_s = 0.0
    passages = []
    for nbytes, pause_s in zip(chunks, pauses, strict=False):
        now_s += pause_s
        passages.append(shaper.send(nbytes, now_s))
    arrivals = [p.arrives_s for p in passages]
    assert arrivals == sorted(arrivals)
    assert all(-NS <= p.arrives_s - p.departs_s - 0.02 <= 0.03 + NS for p in passages)


def test_the_seed_fixes_the_jitter_and_the_two_directions_differ() -> None:
    profile = LinkProfile("jittery", 8.0, 8.0, 10.0, jitter_ms=50.0, seed=7)

    def arrivals(shaper: Shaper) -> list[float]:
        return [shaper.send(1000, float(n)).arrives_s for n in range(5)]

    assert arrivals(profile.shaper("up")) == arrivals(profile.shaper("up"))
    assert arrivals(profile.shaper("up")) != arrivals(profile.shaper("down"))


@settings(deadline=None)  # the machine may be busy
@given(sizes, st.integers(20_000, 60_000))
def test_a_sender_that_waits_for_room_never_overfills_the_queue_nor_idles_the_link(
    chunks: list[int], queue_nbytes: int
) -> None:
    shaper = megabyte_a_second(queue_nbytes=queue_nbytes)
    now_s = departs_s = 0.0
    for nbytes in chunks:
        now_s = shaper.room_s(nbytes, now_s)
        departs_s = shaper.send(nbytes, now_s).departs_s
        assert shaper.queued_nbytes(now_s) <= queue_nbytes
    assert departs_s == pytest.approx(sum(chunks) / 1e6, rel=NS)


def test_room_comes_when_enough_chunks_have_departed() -> None:
    shaper = megabyte_a_second(queue_nbytes=30_000)
    for _ in range(3):
        shaper.send(10_000, 0.0)
    assert shaper.queued_nbytes(0.0) == 30_000
    assert shaper.room_s(1, 0.0) == pytest.approx(0.01)
    assert shaper.room_s(15_000, 0.0) == pytest.approx(0.02)
    assert shaper.queued_nbytes(0.015) == 20_000
    assert shaper.room_s(10_000, 0.015) == 0.015


def test_a_chunk_larger_than_the_queue_waits_for_an_empty_one() -> None:
    shaper = megabyte_a_second(queue_nbytes=1000)
    assert shaper.room_s(5000, 0.0) == 0.0
    shaper.send(5000, 0.0)
    assert shaper.room_s(5000, 0.0) == pytest.approx(0.005)


def test_an_empty_chunk_waits_its_turn_and_takes_no_time() -> None:
    shaper = megabyte_a_second(delay_s=1.0)
    shaper.send(500_000, 0.0)
    assert shaper.send(0, 0.0) == pytest.approx((0.5, 1.5))


def test_a_flush_forgets_what_was_queued_and_under_way() -> None:
    shaper = megabyte_a_second(delay_s=1.0)
    shaper.send(5_000_000, 0.0)
    shaper.flush()
    assert shaper.queued_nbytes(0.0) == 0
    assert shaper.send(1_000_000, 0.0) == pytest.approx((1.0, 2.0))


def test_an_unshaped_link_takes_no_time_and_queues_nothing() -> None:
    shaper = PROFILES["unshaped"].shaper("up")
    assert shaper.send(10**9, 3.0) == (3.0, 3.0)
    assert shaper.queued_nbytes(3.0) == 0


@pytest.mark.parametrize("name", PROFILES)
def test_each_profile_sends_at_its_rates_and_half_its_round_trip_away(name: str) -> None:
    profile = PROFILES[name]
    assert profile.name == name
    for direction, mbps in (("up", profile.uplink_mbps), ("down", profile.downlink_mbps)):
        passage = profile.shaper(direction).send(1_000_000, 0.0)  # type: ignore[arg-type]
        assert passage.departs_s == pytest.approx(8 / mbps)
        assert passage.arrives_s - passage.departs_s == pytest.approx(profile.rtt_ms / 2e3)


def test_the_default_profile_is_lte_at_40_ms_5_up_and_20_down() -> None:
    lte = PROFILES[DEFAULT_PROFILE]
    assert (lte.name, lte.rtt_ms, lte.uplink_mbps, lte.downlink_mbps) == ("lte", 40, 5, 20)


def test_a_chunk_is_a_segment_on_a_slow_link_and_a_few_on_a_fast_one() -> None:
    assert PROFILES["3g"].chunk_nbytes("up") == 1460
    assert PROFILES["5g"].chunk_nbytes("down") == 8 * 1460


def test_the_queue_is_given_as_time_at_the_rate_and_holds_two_chunks_at_least() -> None:
    assert LinkProfile("a", 8.0, 8.0, 0.0, queue_ms=50.0).shaper("up").queue_nbytes == 50_000
    assert LinkProfile("a", 0.1, 8.0, 0.0, queue_ms=1.0).shaper("up").queue_nbytes == 2 * 1460


def test_a_traced_link_uses_the_trace_upward_and_scales_it_downward() -> None:
    trace = RateTrace("bus", (0.0, 1.0, 2.0), (8.0, 16.0))
    profile = LinkProfile.from_trace(trace, rtt_ms=20.0, downlink_factor=2.0)
    assert (profile.uplink_mbps, profile.downlink_mbps) == (12.0, 24.0)
    assert profile.shaper("up").send(2_000_000, 0.0).departs_s == pytest.approx(1.5)
    assert profile.shaper("down").send(4_000_000, 0.0).departs_s == pytest.approx(1.5)


def test_a_trace_can_be_scaled_in_each_direction_by_more_than_nothing() -> None:
    trace = RateTrace("bus", (0.0, 1.0, 2.0), (8.0, 16.0))
    profile = LinkProfile.from_trace(trace, rtt_ms=20.0, uplink_factor=0.25)
    assert (profile.uplink_mbps, profile.downlink_mbps) == (3.0, 12.0)
    assert profile.shaper("up").send(250_000, 0.0).departs_s == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"uplink_factor is 0\.0"):
        LinkProfile.from_trace(trace, rtt_ms=20.0, uplink_factor=0.0)


def test_an_offer_is_refused_where_the_queue_is_full_and_changes_nothing() -> None:
    shaper = megabyte_a_second(queue_nbytes=3000)
    assert shaper.offer(1500, 0.0) is not None
    assert shaper.offer(1500, 0.0) is not None
    assert shaper.offer(1, 0.0) is None
    assert shaper.queued_nbytes(0.0) == 3000
    # The first has departed after 1.5 ms.
    passage = shaper.offer(1500, 0.002)
    assert passage is not None
    assert passage.departs_s == pytest.approx(0.0045)


def test_a_packet_larger_than_the_queue_is_taken_when_it_is_empty() -> None:
    shaper = megabyte_a_second(queue_nbytes=100)
    assert shaper.offer(1500, 0.0) is not None
    assert shaper.offer(1500, 0.0) is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"uplink_mbps": 0.0}, "uplink_mbps"),
        ({"downlink_mbps": math.nan}, "downlink_mbps"),
        ({"rtt_ms": -1.0}, "rtt_ms"),
        ({"rtt_ms": math.inf}, "rtt_ms"),
        ({"queue_ms": 0.0}, "queue_ms"),
        ({"jitter_ms": math.nan}, "jitter_ms"),
    ],
)
def test_a_profile_out_of_range_is_refused_by_the_name_of_its_field(
    changes: dict[str, float], field: str
) -> None:
    values: dict[str, Any] = {"uplink_mbps": 1.0, "downlink_mbps": 1.0, "rtt_ms": 1.0} | changes
    with pytest.raises(ConfigError, match=f"link odd: {field}"):
        LinkProfile("odd", **values)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 10**7))
def test_headers_are_estimated_by_full_segments(nbytes: int) -> None:
    assert header_nbytes(nbytes) == 40 * math.ceil(nbytes / 1460)
