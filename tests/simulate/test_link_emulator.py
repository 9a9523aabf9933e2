"""The emulator with real sockets: shaped bytes are never early, and not very late.

Lower bounds are strict: nothing may pass faster than the link. Upper bounds leave LATE_S and half
as much again, since the machine that runs the tests may be busy with others.
"""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from link_world import FAR_AWAY, MB_A_SECOND, Far, assert_lasted, connected, far_through, until

from offramp_common.errors import ConfigError
from offramp_simulate.link_emulator import LinkEmulator
from offramp_simulate.links import PROFILES, LinkProfile
from offramp_simulate.live_link import precise_loop
from offramp_simulate.traces import RateTrace


async def test_one_connection_gets_the_rate_of_the_link() -> None:
    async with far_through(MB_A_SECOND) as (far, link), connected(link) as (_, writer):
        start_s = time.perf_counter()
        writer.write(bytes(200_000))
        await far.total(200_000)
        assert_lasted(start_s, 0.2)


async def test_two_connections_share_the_rate_evenly() -> None:
    async with (
        far_through(MB_A_SECOND) as (far, link),
        connected(link) as (_, one),
        connected(link) as (_, two),
    ):
        start_s = time.perf_counter()
        one.write(bytes(150_000))
        two.write(bytes(150_000))
        await far.total(250_000)
        # One may fill the queue (100 ms) before the other is first read; from then on in turns.
        assert min(map(len, far.got)) >= 70_000
        await far.total(300_000)
        assert_lasted(start_s, 0.3)


async def test_the_two_directions_do_not_share_their_rates() -> None:
    async with far_through(MB_A_SECOND, echoes=True) as (_, link), connected(link) as (r, w):
        start_s = time.perf_counter()
        w.write(bytes(300_000))
        await r.readexactly(300_000)
        assert 0.3 <= time.perf_counter() - start_s < 0.6  # one after the other takes 0.6 s


async def test_a_byte_there_and_back_takes_a_round_trip() -> None:
    async with far_through(FAR_AWAY, echoes=True) as (_, link), connected(link) as (r, w):
        w.write(b"-")
        await r.readexactly(1)
        start_s = time.perf_counter()
        w.write(b"-")
        await r.readexactly(1)
        assert_lasted(start_s, 0.06)


async def test_a_new_connection_pays_a_round_trip_before_its_first_byte() -> None:
    async with far_through(FAR_AWAY, echoes=True) as (_, link):
        start_s = time.perf_counter()
        async with connected(link) as (reader, writer):
            writer.write(b"-")
            await reader.readexactly(1)
        assert_lasted(start_s, 0.12)


async def test_messages_under_way_do_not_wait_for_one_another() -> None:
    async with far_through(FAR_AWAY, echoes=True) as (_, link), connected(link) as (r, w):
        start_s = time.perf_counter()
        for _ in range(40):
            w.write(b"-")
            await asyncio.sleep(0.002)
        await r.readexactly(40)
        assert time.perf_counter() - start_s < 40 * 0.06 / 2


async def test_what_is_sent_comes_out_unchanged_in_both_directions() -> None:
    rng = random.Random(0)
    sent = rng.randbytes(300_000)
    jittery = LinkProfile("jittery", 200.0, 100.0, 4.0, queue_ms=2.0, jitter_ms=3.0)
    async with far_through(jittery, echoes=True) as (far, link), connected(link) as (r, w):
        back = asyncio.create_task(r.readexactly(len(sent)))
        start = 0
        while start < len(sent):
            stop = start + rng.choice([1, 100, 1460, 5000, 60_000])
            w.write(sent[start:stop])
            await w.drain()
            start = stop
        assert await back == sent
        assert far.got[0] == sent


async def test_an_end_that_is_half_closed_still_gets_its_answer() -> None:
    async with far_through(PROFILES["unshaped"]) as (_, link), connected(link) as (r, w):
        w.write(b"all I have to say")
        w.write_eof()
        assert await r.read() == b"all I have to say"


async def test_a_connection_that_both_ends_have_ended_is_gone() -> None:
    async with far_through(PROFILES["unshaped"]) as (_, link):
        async with connected(link) as (reader, writer):
            writer.write_eof()
            assert await reader.read() == b""
        await until(lambda: not link.stats().open_connections)
        assert link.stats().connections == 1


async def test_a_reset_is_passed_on() -> None:
    async with far_through(FAR_AWAY, echoes=True) as (far, link), connected(link) as (r, w):
        w.write(b"-")
        await r.readexactly(1)
        w.transport.abort()
        await until(lambda: not link.stats().open_connections)
        assert far.got == [b"-"]


async def test_closing_leaves_neither_task_nor_open_port_and_may_be_repeated() -> None:
    before = asyncio.all_tasks()
    async with far_through(MB_A_SECOND, echoes=True) as (_, link), connected(link) as (r, w):
        w.write(bytes(100_000))
        await r.readexactly(1000)
        address = link.address
        await link.close()
        await link.close()
        assert link.stats().open_connections == 0
        with pytest.raises(ConnectionError):
            await r.readexactly(100_000)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)
    await asyncio.sleep(0.01)  # the far server's handlers end in the turns after
    assert asyncio.all_tasks() == before


async def test_closing_an_emulator_that_was_never_started_does_nothing() -> None:
    await LinkEmulator(MB_A_SECOND, ("127.0.0.1", 1)).close()


async def test_a_cut_resets_connections_old_and_new_until_restored() -> None:
    async with far_through(MB_A_SECOND, echoes=True) as (_, link):
        async with connected(link) as (reader, writer):
            writer.write(bytes(100_000))
            await reader.readexactly(1)
            link.cut()
            assert link.stats().state == "cut"
            with pytest.raises(ConnectionError):
                await reader.readexactly(100_000)
        async with connected(link) as (reader, writer):
            writer.write(b"-")
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
        link.restore()
        assert link.stats().state == "up"
        async with connected(link) as (reader, writer):
            start_s = time.perf_counter()
            writer.write(b"-")
            await reader.readexactly(1)
            # What was queued at the cut (100 ms) is not waited for.
            assert time.perf_counter() - start_s < 0.09


async def test_a_silent_cut_delivers_nothing_and_a_restored_link_everything() -> None:
    async with far_through(MB_A_SECOND, echoes=True) as (far, link), connected(link) as (r, w):
        w.write(b"-")
        await r.readexactly(1)
        w.write(bytes(50_000))
        link.cut(silent=True)
        await asyncio.sleep(0.03)  # what had come out of the link at the cut may still be read
        stalled = len(far.got[0])
        async with connected(link) as (_, newcomer):
            newcomer.write(b"-")
            await asyncio.sleep(0.15)
            assert (len(far.got), len(far.got[0])) == (1, stalled)
            assert link.stats().state == "silent"
            assert link.stats().open_connections == 2
            start_s = time.perf_counter()
            link.restore()
            await r.readexactly(50_000)
            # At the rate of the link: the time of the outage was not saved up.
            assert_lasted(start_s, (50_000 - stalled) / 1e6)
            await far.total(50_002)


async def test_a_plain_cut_ends_a_silent_one() -> None:
    async with far_through(MB_A_SECOND, echoes=True) as (_, link), connected(link) as (r, w):
        link.cut(silent=True)
        w.write(b"-")
        await asyncio.sleep(0.02)
        link.cut()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await r.readexactly(1)


async def test_the_counters_are_the_payload_that_came_out_and_its_headers() -> None:
    async with far_through(PROFILES["unshaped"]) as (_, link):
        before = link.stats()
        for nbytes in (1000, 5000):
            async with connected(link) as (reader, writer):
                writer.write(bytes(nbytes))
                writer.write_eof()
                await reader.read()
        after = link.stats()
        assert (after.bytes_up, after.bytes_down, after.connections) == (6000, 6000, 2)
        # 1 and 4 segments if each write is read at once; the kernel may hand it over in pieces.
        assert 5 * 40 <= after.header_bytes_up <= 10 * 40
        assert after.since(before).bytes_up == 6000
        assert after.since(after).bytes_down == after.since(after).connections == 0
        assert after.queued_bytes_up == after.queued_bytes_down == 0


async def test_a_full_queue_holds_the_sender_back() -> None:
    slow = LinkProfile("slow", 1.0, 1.0, 0.0, queue_ms=200.0)  # the queue: 25 kB
    async with far_through(slow) as (far, link), connected(link) as (_, writer):
        writer.transport.set_write_buffer_limits(high=0)
        writer.write(bytes(30_000_000))  # more than the kernel's buffers on the way
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await writer.drain()
        queued = []
        for _ in range(50):
            queued.append(link.stats().queued_bytes_up)
            await asyncio.sleep(0.004)
        assert max(queued) <= 25_000
        # A slow machine may find a chunk or two gone; an idle link would be another matter.
        assert sorted(queued)[25] >= 15_000
        assert len(far.got[0]) < 125_000
        writer.transport.abort()


async def test_a_receiver_that_does_not_read_stops_its_sender_and_nobody_else() -> None:
    fast = LinkProfile("fast", 800.0, 800.0, 0.0)
    async with far_through(fast, reads=False) as (_, link), connected(link) as (_, stuck):
        stuck.write(bytes(60_000_000))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.4):
                await stuck.drain()
        assert stuck.transport.get_write_buffer_size() > 10_000_000
        stalled = link.stats().bytes_up
        async with connected(link) as (_, other):
            other.write(b"-")
            await until(lambda: link.stats().bytes_up >= stalled + 1)
        stuck.transport.abort()


async def test_a_target_that_refuses_closes_the_connection_after_a_round_trip(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = await asyncio.start_server(Far(), "127.0.0.1", 0)
    target = server.sockets[0].getsockname()[:2]
    server.close()
    async with LinkEmulator(FAR_AWAY, target) as link:
        start_s = time.perf_counter()
        async with connected(link) as (reader, _):
            with pytest.raises(ConnectionResetError):
                await reader.readexactly(1)
        assert_lasted(start_s, 0.06)
    assert f"cannot reach the target 127.0.0.1:{target[1]}" in caplog.text


async def test_an_address_that_is_taken_is_an_error_of_the_set_up() -> None:
    async with LinkEmulator(MB_A_SECOND, ("127.0.0.1", 1)) as first:
        with pytest.raises(ConfigError, match="cannot listen"):
            await LinkEmulator(MB_A_SECOND, ("127.0.0.1", 1), first.address).start()


async def test_a_trace_that_starts_with_an_outage_delivers_nothing_until_it_ends() -> None:
    trace = RateTrace("tunnel", (0.0, 0.2, 5.0), (0.0, 800.0))
    start_s = time.perf_counter()
    profile = LinkProfile.from_trace(trace, rtt_ms=0.0)
    async with far_through(profile) as (far, link), connected(link) as (_, writer):
        writer.write(b"-")
        await far.total(1)
        assert_lasted(start_s, 0.2)


def test_the_timers_of_the_precise_loop_do_not_round_up_to_milliseconds() -> None:
    async def sleeps() -> list[float]:
        took_s = []
        for _ in range(30):
            start_s = time.perf_counter()
            await asyncio.sleep(0.0012)
            took_s.append(time.perf_counter() - start_s)
        return took_s

    with asyncio.Runner(loop_factory=precise_loop) as runner:
        took_s = runner.run(sleeps())
    # The shortest, since a busy machine wakes late; asyncio's own loop never takes less than 2 ms.
    assert 0.0012 <= min(took_s) < 0.0019
