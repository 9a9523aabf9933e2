"""Each fault of the TCP proxy on real sockets: what it does, that it ends, what it leaves alone."""

from __future__ import annotations

import asyncio
import time

import pytest
from link_world import (
    FAR_AWAY,
    LATE_S,
    MB_A_SECOND,
    assert_lasted,
    connected,
    far_through,
    until,
)

from offramp_common.errors import ConfigError
from offramp_simulate.faults import Fault
from offramp_simulate.link_emulator import LinkEmulator
from offramp_simulate.links import PROFILES, LinkProfile
from offramp_simulate.loss import GilbertElliott

UNSHAPED = PROFILES["unshaped"]
FAST = LinkProfile("fast", 800.0, 800.0, 0.0)


async def round_trip(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> float:
    reader, writer = streams
    start_s = time.perf_counter()
    writer.write(b"-")
    await reader.readexactly(1)
    return time.perf_counter() - start_s


async def nothing_comes(reader: asyncio.StreamReader, within_s: float = 0.1) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(within_s):
            await reader.readexactly(1)


async def test_a_stall_holds_everything_and_at_its_end_all_of_it_comes_at_once() -> None:
    async with far_through(MB_A_SECOND) as (far, link), connected(link) as (_, writer):
        writer.write(b"-")
        await far.total(1)
        number = link.inject(Fault("stall", direction="up"))
        writer.write(bytes(150_000))  # 150 ms at the rate of the link
        await asyncio.sleep(0.3)
        assert len(far.got[0]) == 1
        link.heal(number)
        start_s = time.perf_counter()
        await far.total(150_001)
        assert time.perf_counter() - start_s < 0.1  # the link had carried it meanwhile


async def test_a_stall_of_the_replies_lets_requests_through() -> None:
    async with far_through(UNSHAPED, echoes=True) as (far, link), connected(link) as (r, w):
        await round_trip((r, w))
        link.inject(Fault("stall", direction="down"))
        w.write(b"-")
        await far.total(2)
        await nothing_comes(r)
        link.restore()
        assert await r.readexactly(1) == b"-"


async def test_a_black_hole_of_the_replies_lets_requests_through() -> None:
    async with far_through(UNSHAPED, echoes=True) as (far, link), connected(link) as (r, w):
        await round_trip((r, w))
        link.inject(Fault("blackhole", direction="down"))
        assert link.stats().state == "silent"
        w.write(b"-")
        await far.total(2)
        await nothing_comes(r)
        link.restore()
        assert await r.readexactly(1) == b"-"


async def test_delay_can_be_added_to_replies_only_and_taken_away_again() -> None:
    async with far_through(UNSHAPED, echoes=True) as (far, link), connected(link) as streams:
        await round_trip(streams)
        number = link.inject(Fault("delay", ms=150.0, direction="down"))
        start_s = time.perf_counter()
        back = asyncio.create_task(round_trip(streams))
        await far.total(2)
        assert time.perf_counter() - start_s < 0.14  # the request is not delayed
        await back
        assert_lasted(start_s, 0.15)
        link.heal(number)
        assert await round_trip(streams) < 0.14


async def test_a_reset_breaks_what_is_open_and_new_connections_work() -> None:
    async with far_through(FAST, echoes=True) as (_, link):
        async with connected(link) as streams:
            await round_trip(streams)
            link.inject(Fault("reset"))
            with pytest.raises(ConnectionError):
                await streams[0].readexactly(1)
        assert (link.stats().state, link.stats().faults) == ("up", ())
        async with connected(link) as streams:
            await round_trip(streams)


async def test_resets_come_again_and_again_until_they_are_healed() -> None:
    async with far_through(FAST, echoes=True) as (_, link):
        start_s = time.perf_counter()
        link.inject(Fault("reset", every_s=0.1))
        for _ in range(3):
            async with connected(link) as (reader, writer):
                writer.write(b"-")
                with pytest.raises(ConnectionError):
                    await reader.readexactly(2)
        assert_lasted(start_s, 0.3)
        assert link.stats().faults == ("1 reset",)
        link.heal()
        async with connected(link) as (reader, writer):
            writer.write(b"-")
            await reader.readexactly(1)
            await nothing_comes(reader, within_s=0.2)


async def test_one_byte_in_so_many_is_inverted_in_the_direction_named() -> None:
    async with far_through(FAST, echoes=True) as (far, link), connected(link) as (r, w):
        link.inject(Fault("corrupt", nbytes=1000, direction="up"))
        w.write(bytes(10_500))
        back = await r.readexactly(10_500)
        wrong = [place for place, byte in enumerate(far.got[0]) if byte == 0xFF]
        assert wrong == list(range(999, 10_500, 1000))
        assert back == far.got[0]  # the way back was left alone
        stats = link.stats()
        assert (stats.corrupted_bytes_up, stats.corrupted_bytes_down) == (10, 0)
        link.heal()
        w.write(bytes(5000))
        assert await r.readexactly(5000) == bytes(5000)


async def test_the_bandwidth_changes_on_command_and_back() -> None:
    link_of_ten = LinkProfile("link", 80.0, 80.0, 0.0)
    changes = [Fault("rate", mbps=2.0), Fault("rate", factor=0.025, direction="up")]
    async with far_through(link_of_ten) as (far, link), connected(link) as (_, writer):
        for n_done, fault in enumerate(changes):
            number = link.inject(fault)
            start_s = time.perf_counter()
            writer.write(bytes(50_000))
            await far.total(50_000 * (n_done + 1))
            assert_lasted(start_s, 0.2)
            link.heal(number)
        start_s = time.perf_counter()
        writer.write(bytes(50_000))
        await far.total(150_000)
        assert time.perf_counter() - start_s < 0.15


async def test_a_factor_of_no_limit_is_refused() -> None:
    fault = Fault("rate", factor=0.5)
    async with far_through(UNSHAPED) as (_, link):
        with pytest.raises(ConfigError, match="unshaped has no limit to multiply: give mbps"):
            link.inject(fault)
    with pytest.raises(ConfigError, match="no limit"):
        LinkEmulator(UNSHAPED, ("127.0.0.1", 1), faults=[fault])


# The first packet is lost and, but for one in a million, no other.
THE_FIRST = GilbertElliott(to_bad=1.0, to_good=1e-6, lost_bad=0.0, lost_good=1.0)


async def test_a_lost_segment_with_nothing_behind_it_waits_for_the_timer() -> None:
    async with far_through(FAR_AWAY, echoes=True) as (_, link), connected(link) as streams:
        await round_trip(streams)
        link.inject(Fault("loss", loss=THE_FIRST, direction="up"))
        start_s = time.perf_counter()
        await round_trip(streams)
        assert_lasted(start_s, 0.06 + 0.06 + 0.2)
        assert await round_trip(streams) < 0.32
        assert link.stats().lost_segments_up == 1


async def test_a_lost_segment_comes_a_round_trip_after_what_follows_it() -> None:
    async with far_through(FAR_AWAY, echoes=True) as (_, link), connected(link) as (r, w):
        await round_trip((r, w))
        link.inject(Fault("loss", loss=THE_FIRST, direction="up"))
        start_s = time.perf_counter()
        w.write(b"-")
        await until(lambda: link.stats().lost_segments_up == 1)
        w.write(b"-")
        await r.readexactly(2)
        lasted_s = time.perf_counter() - start_s
        # What follows arrives after 30 ms, its ACK and the segment again take 60, the answer 30.
        assert 0.12 <= lasted_s < 0.32


async def test_loss_delays_what_it_hits_and_spoils_nothing() -> None:
    link_with_loss = LinkProfile("lossy", 40.0, 40.0, 20.0, loss=GilbertElliott.of(0.05, 3.0))
    sent = bytes(range(256)) * 1200
    async with far_through(link_with_loss) as (far, link), connected(link) as (reader, writer):
        writer.write(sent)
        writer.write_eof()
        assert await reader.readexactly(len(sent)) == sent
        assert far.got[0] == sent
        stats = link.stats()
        # 211 segments at least each way, 5 % of them in runs of 3: none at all is one in 30 000.
        assert stats.lost_segments_up > 0
        assert stats.lost_segments_down > 0


async def test_a_lost_segment_holds_up_its_own_connection_only() -> None:
    async with (
        far_through(FAR_AWAY, echoes=True) as (_, link),
        connected(link) as hit,
        connected(link) as other,
    ):
        await round_trip(hit)
        await round_trip(other)
        link.inject(Fault("loss", loss=THE_FIRST, direction="up"))
        waits = asyncio.create_task(round_trip(hit))
        await until(lambda: link.stats().lost_segments_up == 1)
        await round_trip(other)
        assert not waits.done()
        await waits


async def test_a_timetable_is_kept_from_the_start_on() -> None:
    timetable = [Fault("stall", at_s=0.1, for_s=0.2), Fault("cut", at_s=0.5, for_s=0.1)]
    start_s = time.perf_counter()
    async with far_through(UNSHAPED, echoes=True, faults=timetable) as (_, link):
        async with connected(link) as streams:
            await round_trip(streams)
            await until(lambda: link.stats().faults == ("1 stall",))
            await round_trip(streams)
            assert_lasted(start_s, 0.3)
            with pytest.raises(ConnectionError):
                await streams[0].readexactly(1)
            assert_lasted(start_s, 0.5)
        await until(lambda: link.stats().state == "up")
        assert_lasted(start_s, 0.6)
        async with connected(link) as streams:
            await round_trip(streams)


async def test_a_fault_that_is_healed_before_it_begins_never_does() -> None:
    async with far_through(UNSHAPED, echoes=True) as (_, link), connected(link) as streams:
        number = link.inject(Fault("cut", at_s=0.1))
        link.heal(number)
        await asyncio.sleep(0.15)
        await round_trip(streams)
        with pytest.raises(ConfigError, match="heal 2: there were 1 faults"):
            link.heal(2)


async def test_ending_one_fault_leaves_the_others() -> None:
    async with far_through(UNSHAPED, echoes=True) as (_, link), connected(link) as streams:
        stall = link.inject(Fault("stall"))
        link.inject(Fault("delay", ms=100.0, direction="up"))
        assert link.stats().faults == ("1 stall", "2 delay")
        link.heal(stall)
        assert link.stats().faults == ("2 delay",)
        assert await round_trip(streams) >= 0.1


async def test_closing_ends_a_stall_and_a_black_hole_and_their_timers() -> None:
    before = asyncio.all_tasks()
    async with far_through(UNSHAPED) as (_, link), connected(link) as (_, writer):
        writer.write(b"-")
        link.inject(Fault("stall", for_s=60.0))
        link.inject(Fault("blackhole", at_s=0.01))
        await until(lambda: link.stats().state == "silent")
        start_s = time.perf_counter()
        await link.close()
        assert time.perf_counter() - start_s < LATE_S
    await asyncio.sleep(0.01)  # the far server's handlers end in the turns after
    assert asyncio.all_tasks() == before
