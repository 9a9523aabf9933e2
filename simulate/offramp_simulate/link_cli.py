"""`offramp link`: the link emulator as a process.

Standard output carries one JSON object a line and nothing else: first where it listens, then an
answer to each command that came on standard input (with --control-stdin). Messages for people go to
standard error. SIGINT, SIGTERM, `quit` and the end of the steering input end it with exit code 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from offramp_common.errors import ConfigError
from offramp_simulate.links import DEFAULT_PROFILE, PROFILES, LinkProfile
from offramp_simulate.traces import load_trace

if TYPE_CHECKING:
    from offramp_simulate.link_emulator import LinkEmulator

_COMMANDS = "stats, cut, cut silent, restore, quit"


def add_link_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `link` and its options; the parsed arguments carry `run`."""
    parser = subparsers.add_parser(
        "link",
        help="a slow link on this machine: a TCP proxy with the rate, delay and queue of a network",
        description=(
            "Pass connections on to another address as if over a slow link. All connections "
            "share its rate. Loss and TCP's slow start are not emulated."
        ),
    )
    parser.add_argument(
        "--listen",
        type=_address,
        default=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="where to accept (default: 127.0.0.1, any free port)",
    )
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT", help="target")
    _add_shape(parser)
    parser.add_argument(
        "--stats", metavar="FILE", help="write the counters as JSON at the end; -: standard output"
    )
    parser.add_argument(
        "--control-stdin",
        action="store_true",
        help=f"take commands as lines on standard input ({_COMMANDS}); its end means quit",
    )
    parser.set_defaults(run=run_link)


def _add_shape(parser: argparse.ArgumentParser) -> None:
    """A profile, or a trace and what it leaves open."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--profile",
        choices=list(PROFILES),
        default=DEFAULT_PROFILE,
        help="a class of link (round figures; default: %(default)s)",
    )
    which.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="rates over time, JSON lines; used as the uplink, over and over",
    )
    parser.add_argument("--trace-name", metavar="NAME", help="which trace of the file (the first)")
    parser.add_argument(
        "--downlink-factor",
        type=float,
        default=1.0,
        metavar="X",
        help="with --trace: the downlink is the trace times X (default: %(default)s)",
    )
    parser.add_argument(
        "--rtt-ms",
        type=float,
        metavar="MS",
        help=f"with --trace: round trip (default: that of {DEFAULT_PROFILE})",
    )


def run_link(args: argparse.Namespace) -> int:
    """Run the emulator until it is told to end; returns the exit code.

    ConfigError when the arguments do not fit together, or a file or the address is no good.
    """
    from offramp_simulate.live_link import precise_loop

    profile = _profile(args)
    if args.stats and args.stats != "-":
        _write(args.stats, "")  # now, rather than after an hour's measurement
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(_serve(args, profile))
    return 0


def _profile(args: argparse.Namespace) -> LinkProfile:
    if args.trace is None:
        if args.trace_name or args.rtt_ms is not None or args.downlink_factor != 1.0:
            raise ConfigError("--trace-name, --rtt-ms and --downlink-factor need --trace FILE")
        return PROFILES[args.profile]
    rtt_ms = PROFILES[DEFAULT_PROFILE].rtt_ms if args.rtt_ms is None else args.rtt_ms
    return LinkProfile.from_trace(
        load_trace(args.trace, args.trace_name),
        rtt_ms=rtt_ms,
        downlink_factor=args.downlink_factor,
    )


async def _serve(args: argparse.Namespace, profile: LinkProfile) -> None:
    from offramp_simulate.link_emulator import LinkEmulator

    if not _is_loopback(args.listen[0]):
        print(
            f"offramp link: warning: {args.listen[0]} is reachable from outside this machine, and "
            f"whoever reaches it is passed on to {_text(args.to)}: 127.0.0.1 is not",
            file=sys.stderr,
        )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with LinkEmulator(profile, args.to, args.listen) as emulator:
        _print_line({"listening": _text(emulator.address)})
        print(f"offramp link: {_describe(profile)}, to {_text(args.to)}", file=sys.stderr)
        if args.control_stdin:
            _take_commands(emulator, stop)
        await stop.wait()
        if args.stats:
            stats = asdict(emulator.stats())
            if args.stats == "-":
                _print_line(stats)
            else:
                _write(args.stats, json.dumps(stats) + "\n")


def _take_commands(emulator: LinkEmulator, stop: asyncio.Event) -> None:
    """Answer each line of standard input in the event loop; its end stops the emulator."""
    loop = asyncio.get_running_loop()

    def answer(line: str) -> None:
        command = " ".join(line.split())
        if command == "quit":
            stop.set()
        elif command in ("cut", "cut silent"):
            emulator.cut(silent=command == "cut silent")
        elif command == "restore":
            emulator.restore()
        elif command != "stats":
            _print_line({"command": command, "error": f"unknown command: one of {_COMMANDS}"})
            return
        _print_line({"command": command} | asdict(emulator.stats()))

    def read() -> None:
        # Any kind of standard input, a file too, hence a thread. Not sys.stdin: its lock, held by a
        # thread that waits, would keep the process from ending.
        rest = b""
        with contextlib.suppress(RuntimeError, OSError):  # the loop has ended, or there is no input
            while data := os.read(0, 4096):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    loop.call_soon_threadsafe(answer, line.decode(errors="replace"))
            if rest:
                loop.call_soon_threadsafe(answer, rest.decode(errors="replace"))
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=read, name="link commands", daemon=True).start()


def _write(where: str, text: str) -> None:
    try:
        Path(where).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--stats {where}: cannot write: {error}") from error


def _print_line(answer: dict[str, object]) -> None:
    print(json.dumps(answer), flush=True)


def _address(text: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 host in brackets."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:50051")
    return host, int(port)


def _text(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _describe(profile: LinkProfile) -> str:
    kind = f"trace {profile.name}, on average" if profile.trace else profile.name
    return (
        f"{kind} {profile.uplink_mbps:g} up / {profile.downlink_mbps:g} down Mbit/s, "
        f"round trip {profile.rtt_ms:g} ms"
    )
