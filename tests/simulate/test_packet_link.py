"""The layer-3 link with the kernel's own TCP and UDP: as the profile says, and gone at the end.

Lower bounds are strict, upper ones leave LATE_S, since the machine that runs the tests may be busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest
from link_world import LATE_S, assert_lasted, until

from offramp_common.errors import ConfigError
from offramp_simulate.faults import Fault
from offramp_simulate.links import LinkProfile
from offramp_simulate.loss import GilbertElliott
from offramp_simulate.netns import End, socket_in, why_not
from offramp_simulate.packet_link import PacketLink
from offramp_simulate.traces import RateTrace

pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]

PORT = 7000
SO_RCVBUFFORCE = 33  # asm-generic/socket.h; it takes root, which these tests have
FAST = LinkProfile("fast", 400.0, 400.0, 0.0)
FAR_AWAY = LinkProfile("far", 100.0, 100.0, 60.0)
UDP_HEADERS_NBYTES = 28


class Received(asyncio.DatagramProtocol):
    """The datagrams that came, and when."""

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.times_s: list[float] = []

    def datagram_received(self, data: bytes, address: object) -> None:
        self.data.append(data)
        self.times_s.append(time.perf_counter())


@contextlib.asynccontextmanager
async def udp(receiver: End, sender: End) -> AsyncIterator[tuple[Received, socket.socket]]:
    """What comes at one end, and a socket at the other that sends there."""
    sink = socket_in(receiver.namespace, socket.SOCK_DGRAM)
    sink.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)  # a burst of small ones fits
    sink.bind((receiver.address, PORT))
    loop = asyncio.get_running_loop()
    transport, received = await loop.create_datagram_endpoint(Received, sock=sink)
    with socket_in(sender.namespace, socket.SOCK_DGRAM) as source:
        source.connect((receiver.address, PORT))
        try:
            yield received, source
        finally:
            transport.close()


@contextlib.asynccontextmanager
async def echo(link: PacketLink) -> AsyncIterator[None]:
    """A server at the cloud's end that sends back what it gets."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    listener = socket_in(link.cloud.namespace)
    listener.bind((link.cloud.address, PORT))
    server = await asyncio.start_server(serve, sock=listener)
    try:
        yield
    finally:
        server.close()


@contextlib.asynccontextmanager
async def connected(
    link: PacketLink,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    end = socket_in(link.device.namespace)
    end.setblocking(False)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        await asyncio.get_running_loop().sock_connect(end, (link.cloud.address, PORT))
    except OSError:
        end.close()
        raise
    reader, writer = await asyncio.open_connection(sock=end)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def round_trip(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> float:
    reader, writer = streams
    start_s = time.perf_counter()
    writer.write(b"-")
    await reader.readexactly(1)
    return time.perf_counter() - start_s


async def test_a_byte_there_and_back_takes_a_round_trip_and_so_does_the_handshake() -> None:
    async with PacketLink(FAR_AWAY) as link, echo(link):
        start_s = time.perf_counter()
        async with connected(link) as streams:
            assert_lasted(start_s, 0.06)
            start_s = time.perf_counter()
            await round_trip(streams)
            assert_lasted(start_s, 0.06)


async def test_packets_leave_at_the_rate_of_their_direction() -> None:
    async with PacketLink(LinkProfile("uneven", 4.0, 16.0, 0.0, queue_ms=2000.0)) as link:
        for receiver, sender, took_s in (
            (link.cloud, link.device, 0.2),
            (link.device, link.cloud, 0.05),
        ):
            async with udp(receiver, sender) as (received, source):
                start_s = time.perf_counter()
                for _ in range(100):
                    source.send(bytes(1000 - UDP_HEADERS_NBYTES))
                await until(lambda got=received: len(got.data) == 100)  # type: ignore[misc]
                assert_lasted(start_s, took_s)


async def test_tcp_gets_the_rate_less_its_headers_and_spoils_nothing() -> None:
    sent = bytes(range(256)) * 1000
    profile = LinkProfile("link", 16.0, 16.0, 10.0)
    async with PacketLink(profile) as link, echo(link), connected(link) as (reader, writer):
        start_s = time.perf_counter()
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
        assert_lasted(start_s, len(sent) * 8 / 16e6 + 0.01)


async def test_a_full_queue_drops_what_comes_last() -> None:
    short = LinkProfile("short", 0.8, 0.8, 0.0, queue_ms=100.0)
    async with PacketLink(short) as link, udp(link.cloud, link.device) as (received, source):
        for number in range(100):
            source.send(number.to_bytes(2, "big") + bytes(1000 - UDP_HEADERS_NBYTES - 2))
        await until(lambda: link.stats().full_queue_up + link.stats().packets_up == 100)
        # 10 kB wait, and on a busy machine the first have left before the last are sent.
        assert 10 <= link.stats().packets_up < 60
        await until(lambda: len(received.data) == link.stats().packets_up)
        first = [int.from_bytes(data[:2], "big") for data in received.data[:10]]
        assert first == list(range(10))


async def test_packets_are_lost_at_the_rate_and_in_the_runs_of_the_profile() -> None:
    chances = GilbertElliott.of(0.2, 5.0)
    lossy = LinkProfile("lossy", 400.0, 400.0, 0.0, loss=chances, seed=1)
    async with PacketLink(lossy) as link, udp(link.cloud, link.device) as (received, source):
        for number in range(3000):
            source.send(number.to_bytes(2, "big"))
            if number % 50 == 0:
                await asyncio.sleep(0)  # or the queue would be full
        await until(lambda: link.stats().packets_up + link.stats().lost_up == 3000)
        await until(lambda: len(received.data) == link.stats().packets_up)
        came = [int.from_bytes(data, "big") for data in received.data]
        runs = sum(after - before > 1 for before, after in pairwise(came))
        # 600 losses in 120 runs: three standard errors of the runs' number are 27 %.
        assert 3000 - len(came) == pytest.approx(600, rel=0.35)
        assert runs == pytest.approx(120, rel=0.35)


async def test_tcp_survives_loss_with_every_byte() -> None:
    sent = bytes(range(256)) * 400
    lossy = LinkProfile("lossy", 40.0, 40.0, 4.0, loss=GilbertElliott.of(0.03), seed=2)
    async with PacketLink(lossy) as link, echo(link), connected(link) as (reader, writer):
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
        assert link.stats().lost_up + link.stats().lost_down > 0


async def test_jitter_delays_packets_and_keeps_their_order() -> None:
    jittery = LinkProfile("jittery", 100.0, 100.0, 20.0, jitter_ms=30.0)
    async with PacketLink(jittery) as link, udp(link.cloud, link.device) as (received, source):
        start_s = time.perf_counter()
        for number in range(50):
            source.send(bytes([number]))
        await until(lambda: len(received.data) == 50)
        assert [data[0] for data in received.data] == list(range(50))
        assert_lasted(start_s, 0.01)
        assert received.times_s[0] - start_s >= 0.01


async def test_a_trace_that_starts_with_an_outage_delivers_nothing_until_it_ends() -> None:
    trace = RateTrace("tunnel", (0.0, 0.4, 5.0), (0.0, 100.0))
    start_s = time.perf_counter()
    async with PacketLink(LinkProfile.from_trace(trace, rtt_ms=0.0)) as link:
        started_s = time.perf_counter()
        async with udp(link.cloud, link.device) as (received, source):
            source.send(b"-")
            await until(lambda: len(received.data) == 1)
            # Its time begins somewhere while it starts.
            assert received.times_s[0] - start_s >= 0.4
            assert received.times_s[0] - started_s <= 0.4 + LATE_S


async def test_a_black_hole_loses_what_is_sent_and_tcp_sends_it_again() -> None:
    async with PacketLink(FAST) as link, echo(link), connected(link) as streams:
        await round_trip(streams)
        link.inject(Fault("blackhole", for_s=0.3))
        assert link.stats().state == "silent"
        start_s = time.perf_counter()
        await round_trip(streams)
        # Sent again 0.2 s after the first time, or sooner, then later and later.
        assert 0.3 <= time.perf_counter() - start_s < 2.0
        assert link.stats().blocked_up >= 2


async def test_a_black_hole_of_the_replies_lets_requests_through() -> None:
    async with PacketLink(FAST) as link:
        link.inject(Fault("blackhole", direction="down"))
        async with udp(link.cloud, link.device) as (received, source):
            source.send(b"-")
            await until(lambda: len(received.data) == 1)
        async with udp(link.device, link.cloud) as (received, source):
            source.send(b"-")
            await until(lambda: link.stats().blocked_down == 1)
            assert not received.data


async def test_a_cut_makes_the_network_unreachable_for_the_device_until_it_is_healed() -> None:
    async with PacketLink(FAST) as link, echo(link):
        async with connected(link) as streams:
            await round_trip(streams)
        link.inject(Fault("cut"))
        assert link.stats().state == "cut"
        with pytest.raises(OSError, match="unreachable"):
            async with connected(link):
                pass
        link.heal()
        async with connected(link) as streams:
            await round_trip(streams)


async def test_a_stall_holds_packets_and_at_its_end_all_come_at_once() -> None:
    async with PacketLink(FAST) as link, udp(link.cloud, link.device) as (received, source):
        number = link.inject(Fault("stall", direction="up"))
        for _ in range(20):
            source.send(b"-")
        await asyncio.sleep(0.1)
        assert not received.data
        link.heal(number)
        await until(lambda: len(received.data) == 20)
        assert received.times_s[-1] - received.times_s[0] < 0.1


async def test_delay_rate_and_loss_change_on_command() -> None:
    async with PacketLink(FAST) as link, udp(link.cloud, link.device) as (received, source):
        link.inject(Fault("delay", ms=100.0, direction="up"))
        start_s = time.perf_counter()
        source.send(b"-")
        await until(lambda: len(received.data) == 1)
        assert_lasted(start_s, 0.1)
        link.heal()
        link.inject(Fault("rate", factor=0.002))  # 0.8 Mbit/s
        start_s = time.perf_counter()
        for _ in range(10):
            source.send(bytes(1000 - UDP_HEADERS_NBYTES))
        await until(lambda: len(received.data) == 11)
        assert_lasted(start_s, 0.1)
        link.heal()
        link.inject(Fault("loss", loss=GilbertElliott.of(0.999)))
        source.send(b"-")
        await until(lambda: link.stats().lost_up == 1)


async def test_a_corrupt_packet_fails_its_checksum_and_is_not_delivered() -> None:
    async with PacketLink(FAST) as link, udp(link.cloud, link.device) as (received, source):
        link.inject(Fault("corrupt", nbytes=50, direction="up"))
        source.send(bytes(200))
        await until(lambda: link.stats().corrupted_bytes_up == 4)
        link.heal()
        source.send(b"-")
        await until(lambda: len(received.data) == 1)
        assert received.data == [b"-"]


async def test_two_links_do_not_know_of_each_other() -> None:
    async with PacketLink(FAST) as one, PacketLink(FAST) as other:
        assert one.device.address == other.device.address
        async with (
            udp(one.cloud, one.device) as (here, source),
            udp(other.cloud, other.device) as (there, _),
        ):
            source.send(b"-")
            await until(lambda: len(here.data) == 1)
            assert not there.data


async def test_closing_leaves_no_namespace_and_no_descriptor_and_may_be_repeated() -> None:
    descriptors = os.listdir("/proc/self/fd")
    async with PacketLink(FAST) as link:
        names = [Path("/run/netns", end.namespace) for end in (link.device, link.cloud)]
        assert all(name.exists() for name in names)
        await link.close()
        await link.close()
        assert not any(name.exists() for name in names)
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


async def test_a_reset_is_left_to_the_tcp_proxy() -> None:
    with pytest.raises(ConfigError, match="only the TCP proxy"):
        PacketLink(FAST, faults=[Fault("reset")])
