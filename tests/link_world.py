"""For the tests of the link emulator: a server behind one, `offramp link` as a process, durations."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from offramp_simulate.faults import Fault
from offramp_simulate.link_emulator import LinkEmulator
from offramp_simulate.links import LinkProfile

LATE_S = 0.3
MB_A_SECOND = LinkProfile("test", 8.0, 8.0, 0.0)
FAR_AWAY = LinkProfile("test", 800.0, 800.0, 60.0)
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


class Far:
    """A server that notes what bytes came; it answers what it got once an end came too."""

    def __init__(self) -> None:
        self.got: list[bytearray] = []
        self.reads = asyncio.Event()  # until it is set, connections are accepted and not read
        self.echoes = False

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = bytearray()
        self.got.append(got)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await self.reads.wait()
            while data := await reader.read(65536):
                got += data
                if self.echoes:
                    writer.write(data)
                    await writer.drain()
            if not self.echoes:
                writer.write(got)
                await writer.drain()
        writer.close()

    async def total(self, nbytes: int) -> None:
        """Wait until so many bytes have come, over all connections."""
        await until(lambda: sum(map(len, self.got)) >= nbytes)


@contextlib.asynccontextmanager
async def far_through(
    profile: LinkProfile, *, echoes: bool = False, reads: bool = True, faults: Sequence[Fault] = ()
) -> AsyncIterator[tuple[Far, LinkEmulator]]:
    far = Far()
    far.echoes = echoes
    if reads:
        far.reads.set()
    server = await asyncio.start_server(far, "127.0.0.1", 0)
    try:
        target = server.sockets[0].getsockname()[:2]
        async with LinkEmulator(profile, target, faults=faults) as link:
            yield far, link
    finally:
        server.close()
        far.reads.set()


@contextlib.asynccontextmanager
async def connected(link: LinkEmulator) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(*link.address)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def assert_lasted(start_s: float, at_least_s: float) -> None:
    lasted_s = time.perf_counter() - start_s
    assert at_least_s <= lasted_s <= 1.5 * at_least_s + LATE_S


# `offramp` with this one command, whatever else is installed.
_MAIN = """
import argparse, sys
from offramp_common import cli
from offramp_simulate.link_cli import add_link_command
def build_parser():
    parser = argparse.ArgumentParser(prog="offramp")
    add_link_command(parser.add_subparsers(dest="command"))
    return parser
cli.build_parser = build_parser
cli.console_main()
"""


def start(*options: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """`offramp link` with these options, steered through pipes; `before` runs in it first."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN, "link", *options],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=before,
        # The packages as this process finds them, installed or not.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def answer(process: subprocess.Popen[str], command: str = "") -> dict[str, Any]:
    """The next line of standard output, after a command if one is given."""
    assert process.stdin is not None
    assert process.stdout is not None
    if command:
        print(command, file=process.stdin, flush=True)
    line: dict[str, Any] = json.loads(process.stdout.readline())
    return line
