"""Who asks when: requests in order of time, in chunks of bounded size, the same for the same seed.

Every random number of a request is drawn here, so that plans are compared over the very same requests
and both kernels see the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offramp_common.errors import DataError
from offramp_simulate.record import Record
from offramp_simulate.scenario import Scenario

CHUNK = 65_536
Timed = tuple[NDArray[np.float64], NDArray[np.int64]]
"""Seconds, rising, and the device of each."""


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """A chunk: when, which device, which of the record's samples, and how much longer than the median the
    device's and the engine's runs take. `next_s`: no request of a later chunk comes before."""

    when_N: NDArray[np.float64]
    device_N: NDArray[np.int64]
    sample_N: NDArray[np.int64]
    device_deviation_N: NDArray[np.float64]
    engine_deviation_N: NDArray[np.float64]
    next_s: float

    def __len__(self) -> int:
        return len(self.when_N)


class Draws:
    """What is drawn for each request besides its time."""

    def __init__(self, scenario: Scenario, record: Record) -> None:
        self._samples = _generator(scenario, 1)
        self._deviations = _generator(scenario, 2)
        self._n = record.n_samples
        jitter = np.stack([record.deviation_J, record.engine_deviation_J])
        self._deviation_SJ = jitter if scenario.devices.jitter else np.ones((2, 1))

    def take(
        self, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Samples, and the device's and the engine's deviations."""
        places = self._deviations.integers(0, self._deviation_SJ.shape[1], (2, count))
        here, there = self._deviation_SJ
        return self._samples.integers(0, self._n, count), here[places[0]], there[places[1]]


def requests(scenario: Scenario, record: Record) -> Iterator[Requests]:
    """Chunks of at most CHUNK requests, `scenario.requests` in all (fewer where a file ends before).
    Not for closed arrivals, whose times depend on the answers."""
    draws, left = Draws(scenario, record), scenario.requests
    held: Timed | None = None
    for when_N, device_N in _times(scenario):
        if held is not None and len(held[0]):
            yield _chunk(held, draws, float(when_N[0]) if len(when_N) else float(held[0][-1]))
        held = when_N[:left], device_N[:left]
        left -= len(held[0])
        if left <= 0:
            break
    if held is not None and len(held[0]):
        yield _chunk(held, draws, float("inf"))


def _chunk(timed: Timed, draws: Draws, next_s: float) -> Requests:
    when_N, device_N = timed
    sample_N, device_deviation_N, engine_deviation_N = draws.take(len(when_N))
    return Requests(when_N, device_N, sample_N, device_deviation_N, engine_deviation_N, next_s)


def _times(scenario: Scenario) -> Iterator[Timed]:
    kind = scenario.arrivals.kind
    if kind == "poisson":
        return _poisson(scenario)
    if kind == "regular":
        return _regular(scenario)
    if kind == "bursts":
        return _bursts(scenario)
    assert kind == "recorded", kind
    return _recorded(scenario)


def _poisson(scenario: Scenario) -> Iterator[Timed]:
    """Many Poisson processes together are one, each of whose points is any device's."""
    rng, count = _generator(scenario, 0), scenario.devices.count
    rate, now = scenario.arrivals.rate_per_s * count, 0.0
    while True:
        when_N = now + np.cumsum(rng.exponential(1 / rate, CHUNK))
        now = float(when_N[-1])
        yield when_N, rng.integers(0, count, CHUNK)


def _regular(scenario: Scenario) -> Iterator[Timed]:
    rng, count = _generator(scenario, 0), scenario.devices.count
    period_s = 1 / scenario.arrivals.rate_per_s
    phase_D = rng.uniform(0, period_s, count)
    order_D = np.argsort(phase_D, kind="stable")
    rounds, turn = max(CHUNK // count, 1), 0
    while True:
        turns = turn + np.arange(rounds)
        when = turns[:, None] * period_s + phase_D[order_D][None, :]
        for start in range(0, when.size, CHUNK):
            part = slice(start, start + CHUNK)
            yield when.reshape(-1)[part], np.tile(order_D, rounds)[part]
        turn += rounds


def _bursts(scenario: Scenario) -> Iterator[Timed]:
    """Each device flips between quiet and busy; within a sojourn its requests are a Poisson process."""
    rng, count, a = _generator(scenario, 0), scenario.devices.count, scenario.arrivals
    share = a.busy_s / (a.busy_s + a.quiet_s)
    busy_D = rng.random(count) < share
    until_D = rng.exponential(1.0, count) * np.where(busy_D, a.busy_s, a.quiet_s)
    mean = count * (share * a.busy_rate_per_s + (1 - share) * a.rate_per_s)
    span_s, now = CHUNK / 2 / mean, 0.0
    at_D = np.zeros(count)
    while True:
        end_s = now + span_s
        when, device = [], []
        while (going := np.flatnonzero(at_D < end_s)).size:
            stop = np.minimum(until_D[going], end_s)
            rate = np.where(busy_D[going], a.busy_rate_per_s, a.rate_per_s)
            counts = rng.poisson(rate * (stop - at_D[going]))
            times = rng.uniform(np.repeat(at_D[going], counts), np.repeat(stop, counts))
            when.append(times)
            device.append(np.repeat(going, counts))
            at_D[going] = stop
            flips = going[until_D[going] <= end_s]
            busy_D[flips] = ~busy_D[flips]
            mean_s = np.where(busy_D[flips], a.busy_s, a.quiet_s)
            until_D[flips] += rng.exponential(1.0, flips.size) * mean_s
        when_N, device_N = np.concatenate(when), np.concatenate(device)
        order = np.argsort(when_N, kind="stable")
        for start in range(0, len(order), CHUNK):
            part = order[start : start + CHUNK]
            yield when_N[part], device_N[part]
        now = end_s


def _recorded(scenario: Scenario) -> Iterator[Timed]:
    path = scenario.file(scenario.arrivals.file)
    when_N, device_N = read_arrivals(path)
    top = int(device_N.max(initial=0))
    if top >= scenario.devices.count:
        raise DataError(
            f"{path}: device {top}: the scenario has {scenario.devices.count}, counted from 0; "
            f"set count in [devices] to {top + 1}"
        )
    for start in range(0, len(when_N), CHUNK):
        yield when_N[start : start + CHUNK], device_N[start : start + CHUNK]


def read_arrivals(path: Path) -> Timed:
    """Lines `SECONDS` or `SECONDS DEVICE`, rising; DataError names file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    when: list[float] = []
    device: list[int] = []
    for number, line in enumerate(lines, start=1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        try:
            at_s, whose = float(words[0]), int(words[1]) if len(words) > 1 else 0
        except ValueError:
            raise DataError(f"{path}:{number}: {line!r:.60}: must be SECONDS [DEVICE]") from None
        if whose < 0 or not at_s >= (when[-1] if when else 0.0):
            raise DataError(f"{path}:{number}: {line!r:.60}: times rise from 0 on, devices too")
        when.append(at_s)
        device.append(whose)
    if not when:
        raise DataError(f"{path}: no line in it; give SECONDS [DEVICE], one request a line")
    return np.array(when), np.array(device)


def phases(scenario: Scenario, period_s: float) -> NDArray[np.float64]:
    """Where in a trace each device starts, seconds; `trace_start_s` where they all start together."""
    count = 1 if scenario.link.shared else scenario.devices.count
    if scenario.link.same_phase or count == 1:
        return np.full(count, scenario.link.trace_start_s)
    return _generator(scenario, 3).uniform(0, period_s, count)


def _generator(scenario: Scenario, what: int) -> np.random.Generator:
    """Streams that do not depend on each other: changing one thing leaves the other draws."""
    return np.random.default_rng(np.random.SeedSequence([scenario.seed, what]))
