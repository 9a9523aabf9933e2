"""`offramp link`: the link emulator as a process.

Standard output carries one JSON object a line and nothing else: first where it listens, then an
answer to each command that came on standard input (with --control-stdin). Messages for people go to
standard error. SIGINT, SIGTERM, `quit` and the end of the steering input end it with exit code 0.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from offramp_common.errors import ConfigError
from offramp_simulate.faults import FAULT_HELP, Fault, load_faults, parse_fault
from offramp_simulate.link_control import COMMAND_HELP, SteeredLink, print_line, take_commands
from offramp_simulate.link_shape import add_shape, describe, own_faults, profile_of
from offramp_simulate.links import LinkProfile

_EPILOG = f"""\
commands on standard input (with --control-stdin), one a line, each answered by one line of JSON that
repeats it as "command" and has the counters, or "error":
{COMMAND_HELP}
faults, as KEY=VALUE with commas or blanks between; each has at= and for= (seconds; without for=
until healed) and, but for cut and reset, direction=up|down|both:
{FAULT_HELP}

  offramp link --to HOST:PORT --fault at=5,for=3,kind=blackhole --fault at=10,kind=delay,ms=200,direction=down

--layer3 makes two namespaces and says their names and addresses, and what to put before a command so
that it runs at an end: `ip netns exec NAME COMMAND ...`. TCP is the kernel's, loss is real, rates count
IP packets. Both namespaces go when the link ends; after a kill -9, `offramp link --clean`. A black hole
drops packets, a cut takes the device's interface down, resets are the TCP proxy's alone.
"""


def add_link_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `link` and its options; the parsed arguments carry `run`."""
    parser = subparsers.add_parser(
        "link",
        help="a slow link on this machine, with the rate, delay, queue and faults of a network",
        description=(
            "Pass connections on to another address as if over a slow link (--to). All connections "
            "share its rate; loss is a model and TCP's slow start is not emulated. Or, as root, "
            "carry IP packets between two network namespaces (--layer3)."
        ),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--listen",
        type=_address,
        metavar="HOST:PORT",
        help="with --to: where to accept (default: 127.0.0.1, any free port)",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", type=_address, metavar="HOST:PORT", help="pass connections on to it")
    what.add_argument(
        "--layer3",
        action="store_true",
        help="instead a link for IP packets between two network namespaces (below; needs root)",
    )
    what.add_argument(
        "--clean",
        action="store_true",
        help="only take away namespaces that killed links have left (needs root)",
    )
    add_shape(parser)
    _add_control(parser)
    parser.set_defaults(run=run_link)


def _add_control(parser: argparse.ArgumentParser) -> None:
    """Faults, commands and what is written at the end."""
    parser.add_argument(
        "--stats", metavar="FILE", help="write the counters as JSON at the end; -: standard output"
    )
    parser.add_argument(
        "--control-stdin",
        action="store_true",
        help="take commands as lines on standard input (below); its end means quit",
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="a fault (below), counted from the start of the link; may be repeated",
    )
    parser.add_argument(
        "--faults", type=Path, metavar="FILE", help="a timetable of faults: TOML [[fault]], or JSON"
    )


def run_link(args: argparse.Namespace) -> int:
    """Run the emulator until it is told to end; returns the exit code.

    ConfigError when the arguments do not fit together, or a file or the address is no good.
    """
    if args.clean:
        return _clean()
    from offramp_simulate.live_link import keep_time, precise_loop

    profile = profile_of(args)
    faults = [*map(parse_fault, args.fault), *(load_faults(args.faults) if args.faults else ())]
    faults += own_faults(args)
    if args.stats and args.stats != "-":
        _write(args.stats, "")  # now, rather than after an hour's measurement
    keep_time()
    serve = _serve_packets if args.layer3 else _serve_connections
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(serve(args, profile, faults))
    return 0


def _clean() -> int:
    from offramp_simulate.netns import remove_stale

    removed = remove_stale()
    print(f"offramp link: removed {', '.join(removed) or 'nothing'}", file=sys.stderr)
    print_line({"removed": removed})
    return 0


async def _serve_connections(
    args: argparse.Namespace, profile: LinkProfile, faults: list[Fault]
) -> None:
    from offramp_simulate.link_emulator import LinkEmulator

    listen = args.listen or ("127.0.0.1", 0)
    if not _is_loopback(listen[0]):
        print(
            f"offramp link: warning: {listen[0]} is reachable from outside this machine, and "
            f"whoever reaches it is passed on to {_text(args.to)}: 127.0.0.1 is not",
            file=sys.stderr,
        )
    stop = _stop_on_signals()
    async with LinkEmulator(profile, args.to, listen, faults) as link:
        print_line({"listening": _text(link.address)})
        print(f"offramp link: {describe(profile)}, to {_text(args.to)}", file=sys.stderr)
        await _until_told(args, link, stop)


async def _serve_packets(
    args: argparse.Namespace, profile: LinkProfile, faults: list[Fault]
) -> None:
    from offramp_simulate.packet_link import PacketLink

    if args.listen:
        raise ConfigError("--listen needs --to: a layer-3 link has addresses of its own")
    stop = _stop_on_signals()
    async with PacketLink(profile, faults) as link:
        ends = {"device": link.device, "cloud": link.cloud}
        print_line(
            {
                name: {"namespace": end.namespace, "address": end.address, "enter": end.enter}
                for name, end in ends.items()
            }
        )
        print(f"offramp link: {describe(profile)}, between", file=sys.stderr)
        for name, end in ends.items():
            print(f"  {name:<6} {end.address}: {' '.join(end.enter)} COMMAND", file=sys.stderr)
        await _until_told(args, link, stop)


def _stop_on_signals() -> asyncio.Event:
    """Set by a signal that ends a link; to be had before the link says that it is there."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    return stop


async def _until_told(args: argparse.Namespace, link: SteeredLink, stop: asyncio.Event) -> None:
    """Until a signal or a command ends it; then its counters, if they are asked for."""
    if args.control_stdin:
        take_commands(link, stop)
    await stop.wait()
    if args.stats:
        stats = asdict(link.stats())
        if args.stats == "-":
            print_line(stats)
        else:
            _write(args.stats, json.dumps(stats) + "\n")


def _write(where: str, text: str) -> None:
    try:
        Path(where).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--stats {where}: cannot write: {error}") from error


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
