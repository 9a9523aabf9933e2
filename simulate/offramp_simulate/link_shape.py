"""The options that say what a link is like, as a profile."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from offramp_common.errors import ConfigError
from offramp_simulate.faults import Fault
from offramp_simulate.links import DEFAULT_PROFILE, PROFILES, LinkProfile
from offramp_simulate.loss import GilbertElliott
from offramp_simulate.rough_links import ROUGH_LINKS
from offramp_simulate.traces import RateTrace, load_trace


def add_shape(parser: argparse.ArgumentParser) -> None:
    """A profile, a trace or Markov states, and what may be changed of them."""
    _add_course(parser)
    _add_changes(parser)


def _add_course(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--profile",
        choices=[*PROFILES, *ROUGH_LINKS],
        default=DEFAULT_PROFILE,
        help="a class of link (round figures; default: %(default)s), or one that loses, flaps or wanders",
    )
    which.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="recorded rates, used in both directions, over and over; JSON lines, mahimahi, HSDPA "
        "or Ghent logs, or columns of seconds and Mbit/s",
    )
    which.add_argument(
        "--markov",
        metavar="MBPS:S,...",
        help="states by rate and how long each lasts on average, at random (seed)",
    )
    parser.add_argument("--trace-name", metavar="NAME", help="which trace of the file (the first)")
    for way in ("uplink", "downlink"):
        parser.add_argument(
            f"--{way}-factor",
            type=float,
            metavar="X",
            help=f"with --trace or --markov: the {way} is that times X (default: 1)",
        )


def _add_changes(parser: argparse.ArgumentParser) -> None:
    for way in ("uplink", "downlink"):
        parser.add_argument(
            f"--{way}-mbps", type=float, metavar="M", help=f"{way}; of a trace, on average"
        )
    parser.add_argument("--rtt-ms", type=float, metavar="MS", help="round trip without queueing")
    parser.add_argument("--jitter-ms", type=float, metavar="MS", help="one-way, 0 to so many more")
    parser.add_argument(
        "--queue-ms", type=float, metavar="MS", help="the queue, as time at the mean rate"
    )
    parser.add_argument("--loss", type=float, metavar="X", help="share of packets lost, each way")
    parser.add_argument(
        "--loss-burst", type=float, metavar="N", help="with --loss: in runs of N on average"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")


def profile_of(args: argparse.Namespace) -> LinkProfile:
    """The link that the options describe. ConfigError where they do not fit together."""
    if args.loss_burst is not None and args.loss is None:
        raise ConfigError("--loss-burst needs --loss X")
    same_name = ("uplink_mbps", "downlink_mbps", "rtt_ms", "jitter_ms", "queue_ms", "seed")
    changes = {name: getattr(args, name) for name in same_name}
    if args.loss is not None:
        changes["loss"] = GilbertElliott.of(args.loss, args.loss_burst)
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(_plain_profile(args), **given)


def own_faults(args: argparse.Namespace) -> tuple[Fault, ...]:
    """What a link of the profile suffers by itself."""
    given = args.trace is not None or args.markov
    rough = None if given else ROUGH_LINKS.get(args.profile)
    return () if rough is None else rough().faults


def _plain_profile(args: argparse.Namespace) -> LinkProfile:
    factors = {
        name: getattr(args, name)
        for name in ("uplink_factor", "downlink_factor")
        if getattr(args, name) is not None
    }
    if args.trace_name and args.trace is None:
        raise ConfigError("--trace-name needs --trace FILE")
    if args.trace is not None:
        trace = load_trace(args.trace, args.trace_name)
    elif args.markov:
        trace = _markov(args.markov, args.seed)
    elif factors:
        raise ConfigError("--uplink-factor and --downlink-factor need --trace or --markov")
    elif args.profile in ROUGH_LINKS:
        return ROUGH_LINKS[args.profile]().profile
    else:
        return PROFILES[args.profile]
    return LinkProfile.from_trace(trace, rtt_ms=PROFILES[DEFAULT_PROFILE].rtt_ms, **factors)


def _markov(text: str, seed: int) -> RateTrace:
    from offramp_simulate.markov import markov_trace

    states = [state.split(":") for state in text.split(",")]
    try:
        mbps, mean_s = zip(*((float(rate), float(span)) for rate, span in states), strict=True)
    except ValueError as error:
        raise ConfigError(f"--markov {text}: write MBPS:SECONDS,MBPS:SECONDS,...") from error
    return markov_trace(mbps, mean_s, seed)


def describe(profile: LinkProfile) -> str:
    """A line for people; a trace that is scaled was not recorded so, hence its factor is said."""
    kind = f"trace {profile.name}, on average" if profile.trace else profile.name
    ways = []
    for mbps, way in ((profile.uplink_mbps, "up"), (profile.downlink_mbps, "down")):
        factor = f"{mbps / profile.trace.mean_mbps:.3g}" if profile.trace else "1"
        ways.append(f"{mbps:g} {way}" + ("" if factor == "1" else f" (the recording x {factor})"))
    more = f", jitter {profile.jitter_ms:g} ms" if profile.jitter_ms else ""
    more += f", {profile.loss.rate:.3g} of packets lost" if profile.loss else ""
    return f"{kind} {' / '.join(ways)} Mbit/s, round trip {profile.rtt_ms:g} ms{more}"
