"""Links that lose, flap and wander: the same course by the same name, and a link that follows it."""

from __future__ import annotations

import asyncio
import itertools
import math

import pytest

from offramp_simulate.faults import Fault
from offramp_simulate.link_cli import add_link_command
from offramp_simulate.link_emulator import LinkEmulator
from offramp_simulate.link_shape import own_faults, profile_of
from offramp_simulate.links import PROFILES
from offramp_simulate.rough_links import ROUGH_LINKS


def parsed(*arguments: str) -> tuple[str, tuple[Fault, ...]]:
    """(the profile's name, its own faults) of such a command."""
    import argparse

    parser = argparse.ArgumentParser()
    add_link_command(parser.add_subparsers())
    args = parser.parse_args(["link", "--to", "127.0.0.1:1", *arguments])
    return profile_of(args).name, own_faults(args)


@pytest.mark.parametrize("name", ROUGH_LINKS)
def test_the_same_name_is_the_same_course_every_time(name: str) -> None:
    one, two = ROUGH_LINKS[name](), ROUGH_LINKS[name]()
    assert one == two
    assert one.profile.name == name
    assert name not in PROFILES
    assert parsed("--profile", name) == (name, one.faults)


def test_a_flaky_link_is_there_more_often_than_not_and_never_away_twice_at_once() -> None:
    faults = ROUGH_LINKS["flaky"]().faults
    assert {fault.kind for fault in faults} == {"blackhole", "stall", "cut"}
    for one, after in itertools.pairwise(faults):
        assert one.at_s + one.for_s < after.at_s
    away_s = sum(fault.for_s for fault in faults)
    assert 0.1 < away_s / faults[-1].at_s < 0.5


def test_a_train_passes_through_tunnels_and_a_lossy_link_loses() -> None:
    train = ROUGH_LINKS["train-3g"]().profile
    assert train.trace is not None
    assert min(train.trace.mbps) == 0
    assert 0.3 < train.uplink_mbps < 1.5
    lossy = ROUGH_LINKS["lossy"]().profile
    assert lossy.loss is not None
    assert math.isclose(lossy.loss.rate, 0.04)


def test_a_steady_profile_has_no_faults_and_a_course_of_ones_own_brings_none() -> None:
    assert parsed("--profile", "lte") == ("lte", ())
    assert parsed("--markov", "1:5,0.1:2")[1] == ()


async def test_an_emulated_link_lives_through_its_own_timetable() -> None:
    """A flap brought forward to now: what is sent meanwhile comes when it is over."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(1))
        writer.close()

    rough = ROUGH_LINKS["flaky"]()
    stall = next(fault for fault in rough.faults if fault.kind == "stall")
    now = Fault("stall", for_s=stall.for_s)
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    began_s = asyncio.get_running_loop().time()
    async with server, LinkEmulator(
        rough.profile, server.sockets[0].getsockname()[:2], faults=[now]
    ) as link:  # fmt: skip
        reader, writer = await asyncio.open_connection(*link.address)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        writer.close()
    assert asyncio.get_running_loop().time() - began_s >= stall.for_s - 0.05  # timers' grain
