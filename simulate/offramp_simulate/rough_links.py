"""Links that lose, flap and wander, by name: a profile and a timetable of faults.

Made up, not recorded: the shapes follow what is published of such links (3G on a train: Riiser et al.,
MMSys 2013, rates that jump within seconds and minutes without any in tunnels; loss in short runs as on a
crowded radio), the figures are round ones of ours. The same name is the same course, every time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from offramp_simulate.faults import Fault, Kind
from offramp_simulate.links import PROFILES, LinkProfile
from offramp_simulate.loss import GilbertElliott
from offramp_simulate.markov import markov_trace

_HOUR_S = 3600.0
_FLAPS: tuple[Kind, ...] = ("blackhole", "stall", "cut")


@dataclass(frozen=True)
class RoughLink:
    """`faults` count from when the link starts, and end after an hour."""

    profile: LinkProfile
    faults: tuple[Fault, ...] = ()


@cache
def _lossy() -> RoughLink:
    """A loaded cell with 4 % of packets lost in runs of three, and jitter."""
    loss = GilbertElliott.of(0.04, 3.0)
    return RoughLink(replace(PROFILES["lte"], name="lossy", jitter_ms=10.0, loss=loss))


@cache
def _flaky() -> RoughLink:
    """Every five seconds or so the network is gone: silence, a stall, or connections that are reset."""
    return RoughLink(replace(PROFILES["lte"], name="flaky"), tuple(_flaps(2)))


def _flaps(seed: int) -> Iterator[Fault]:
    rng = random.Random(seed)
    at_s = 4.0  # a device has connected by then
    while at_s < _HOUR_S:
        for_s = round(rng.uniform(0.5, 2.5), 2)
        yield Fault(rng.choice(_FLAPS), at_s=round(at_s, 2), for_s=for_s)
        at_s += for_s + rng.uniform(1.5, 5.0)


def _moving(
    name: str, mbps: tuple[float, ...], mean_s: tuple[float, ...], rtt_ms: float, down: float
) -> RoughLink:
    """States by their uplink and how long each lasts on average: good, middling, the edge of a cell, and
    a tunnel or what is like one. Downwards it is `down` times as fast."""
    trace = replace(markov_trace(mbps, mean_s, 3), name=name)
    return RoughLink(LinkProfile.from_trace(trace, rtt_ms=rtt_ms, downlink_factor=down))


@cache
def _train_3g() -> RoughLink:
    return _moving("train-3g", (1.2, 0.5, 0.12, 0.0), (6.0, 5.0, 3.0, 1.5), 120.0, 3.0)


@cache
def _car_lte() -> RoughLink:
    return _moving("car-lte", (12.0, 4.0, 0.8, 0.1), (8.0, 6.0, 3.0, 0.7), 50.0, 4.0)


ROUGH_LINKS: dict[str, Callable[[], RoughLink]] = {
    "lossy": _lossy,
    "flaky": _flaky,
    "train-3g": _train_3g,
    "car-lte": _car_lte,
}
"""Made when first asked for: drawing a course takes a moment."""
