"""How well estimators tell the next transfer's time, on recorded traces and a virtual clock.

    python benchmarks/planner/link_estimate.py [--data DIR] [--seconds N] [--json FILE|-]

A device sends frames of mixed sizes up a link whose rate is a recorded trace (simulate/offramp_simulate's
Shaper, so with a queue and a fixed delay each way); each estimator says beforehand how long the transfer
will take on the network. Printed is the error |ln(said / taken)|: 0.1 is about a tenth off. The folder of
data sets is $OFFRAMP_DATA, or ../shared/data. Traces are those that a device may meet going up: mahimahi's
uplinks as they are, the others (downlinks) as a course of rates only.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

from offramp_common.cli import write_json
from offramp_edge.link import Link
from offramp_simulate.links import LinkProfile
from offramp_simulate.traces import RateTrace, load_traces

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

TRACES = (  # file, name, factor of its rates
    ("mahimahi_cellular.jsonl", "Verizon-EVDO-driving.up", 1.0),
    ("mahimahi_cellular.jsonl", "TMobile-UMTS-driving.up", 1.0),
    ("mahimahi_cellular.jsonl", "ATT-LTE-driving.up", 1.0),
    ("mahimahi_cellular.jsonl", "ATT-LTE-driving-2016.up", 1.0),
    ("mahimahi_cellular.jsonl", "Verizon-LTE-short.up", 1.0),
    ("mahimahi_cellular.jsonl", "TMobile-LTE-short.up", 1.0),
    ("norway_3g_hsdpa.jsonl", None, 1.0),
    ("nyc_lte_2019.jsonl", None, 0.5),
)
SIZES = {  # bytes: what a device of that model sends
    "MiniLM": (90, 130, 1600, 2300, 4300),
    "MPNet": (300, 8_000, 36_000, 52_000, 80_000),
    "states": (4300,),
}
RTT_MS = 40.0


class Clock:
    now_s = 0.0

    def now(self) -> float:
        return self.now_s


class Estimator(Protocol):
    def say(self, nbytes: int) -> float | None:
        """Milliseconds of the transfer that is about to begin."""
        ...

    def sent(self, nbytes: int) -> Any: ...
    def answered(self, transfer: Any, took_ms: float) -> None: ...


class Kalman:
    """The device's own."""

    def __init__(self, clock: Clock) -> None:
        self.link = Link(clock)

    def say(self, nbytes: int) -> float | None:
        rtt_ms, ms_per_byte = self.link.costs()
        return self.link.queue_ms() + rtt_ms + nbytes * ms_per_byte

    def sent(self, nbytes: int) -> Any:
        return self.link.sent(nbytes)

    def answered(self, transfer: Any, took_ms: float) -> None:
        self.link.answered(transfer, 0.0)


class Regression:
    """A line through the transfers so far; older ones count less, by number (`keep`) or by time."""

    def __init__(self, clock: Clock, keep: float = 0.9, half_s: float = math.inf) -> None:
        self._clock, self._keep, self._half_s = clock, keep, half_s
        self._w = self._x = self._y = self._xx = self._xy = self._last_s = 0.0

    def say(self, nbytes: int) -> float | None:
        if not self._w:
            return None
        mean_x, mean_y = self._x / self._w, self._y / self._w
        variance = self._xx / self._w - mean_x**2
        slope = (self._xy / self._w - mean_x * mean_y) / variance if variance > 512**2 else 0.0
        if slope <= 0 or mean_y - slope * mean_x < 0:
            return mean_y
        return mean_y + slope * (nbytes - mean_x)

    def sent(self, nbytes: int) -> Any:
        return nbytes

    def answered(self, transfer: Any, took_ms: float) -> None:
        now_s = self._clock.now()
        keep = self._keep * 0.5 ** ((now_s - self._last_s) / self._half_s)
        self._last_s = now_s
        self._w = self._w * keep + 1
        self._x = self._x * keep + transfer
        self._y = self._y * keep + took_ms
        self._xx = self._xx * keep + transfer**2
        self._xy = self._xy * keep + transfer * took_ms


class LastRate:
    """The round trip is known (an unfair start); goodput is that of the last transfers, smoothed."""

    def __init__(self, new: float = 0.3) -> None:
        self._new = new
        self._s: float | None = None

    def say(self, nbytes: int) -> float | None:
        return None if self._s is None else RTT_MS + nbytes * self._s

    def sent(self, nbytes: int) -> Any:
        return nbytes

    def answered(self, transfer: Any, took_ms: float) -> None:
        s = max(took_ms - RTT_MS, 0.01) / transfer
        self._s = s if self._s is None else self._s + self._new * (s - self._s)


ESTIMATORS: dict[str, Callable[[Clock], Estimator]] = {
    "kalman (ours)": Kalman,
    "regression by number": Regression,
    "regression, half life 2 s": lambda clock: Regression(clock, 1.0, 2.0),
    "last rates, true rtt": lambda clock: LastRate(),
}


@dataclass(frozen=True)
class Way:
    """How samples come: one at a time with pauses, in bursts, or with long silences."""

    name: str
    gap_s: float
    in_air: int = 1
    silence: float = 0.0  # chance of 5 to 30 s of silence before a transfer


WAYS = (
    Way("busy", 0.02),
    Way("calm", 0.5),
    Way("silences", 0.1, silence=0.05),
    Way("four", 0.05, 4),
)


def replay(
    trace: RateTrace, sizes: Sequence[int], way: Way, seconds: float, seed: int
) -> dict[str, list[float]]:
    """Each estimator's errors, the first ten transfers left out."""
    clock, rng = Clock(), random.Random(seed)
    profile = LinkProfile.from_trace(trace, rtt_ms=RTT_MS)
    up = profile.shaper("up")
    estimators = {name: make(clock) for name, make in ESTIMATORS.items()}
    errors: dict[str, list[float]] = {name: [] for name in estimators}
    flying: list[tuple[float, float, dict[str, Any], dict[str, float | None]]] = []
    count, next_s = 0, 0.0

    def land() -> None:
        done_s, sent_s, transfers, said = flying.pop(0)
        clock.now_s = max(clock.now_s, done_s)
        took_ms = 1000 * (done_s - sent_s)
        for name, estimator in estimators.items():
            guess = said[name]
            if count > 10 and guess is not None:
                errors[name].append(abs(math.log(guess / took_ms)))
            estimator.answered(transfers[name], took_ms)

    while clock.now_s < seconds:
        next_s += rng.expovariate(1 / way.gap_s)
        if rng.random() < way.silence:
            next_s += rng.uniform(5, 30)
        while flying and (flying[0][0] <= next_s or len(flying) >= way.in_air):
            land()
        next_s = clock.now_s = max(clock.now_s, next_s)
        nbytes = rng.choice(sizes)
        said = {name: e.say(nbytes) for name, e in estimators.items()}
        transfers = {name: e.sent(nbytes) for name, e in estimators.items()}
        done_s = up.send(nbytes, clock.now_s).arrives_s + RTT_MS / 2000 + rng.uniform(0, 0.002)
        flying.append((done_s, clock.now_s, transfers, said))
        count += 1
    return errors


def measure(data: Path, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for file, name, factor in TRACES:
        traces = load_traces(data / "network_traces" / file)
        trace = (traces[name] if name else next(iter(traces.values()))).scaled(factor)
        for model, sizes in SIZES.items():
            for way in WAYS:
                errors = replay(trace, sizes, way, min(seconds, trace.period_s), seed=1)
                row: dict[str, Any] = {
                    "trace": trace.name,
                    "factor": factor,
                    "sizes": model,
                    "way": way.name,
                }
                for estimator, values in errors.items():
                    row[estimator] = spread(values)
                rows.append(row)
    return rows


def spread(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 20:
        return {}
    return {
        "n": len(values),
        "median": round(median(values), 4),
        "p90": round(quantiles(values, n=10)[-1], 4),
    }


def overall(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over all rows."""
    found = {}
    for name in ESTIMATORS:
        full = [row[name] for row in rows if row[name]]
        found[name] = {key: round(median(r[key] for r in full), 4) for key in ("median", "p90")}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(os.environ.get("OFFRAMP_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--seconds", type=float, default=300.0, help="of each trace")
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    args = parser.parse_args()
    rows = measure(args.data, args.seconds)
    for row in rows:
        words = "  ".join(
            f"{row[n].get('median', math.nan):.3f} {row[n].get('p90', math.nan):.2f}"
            for n in ESTIMATORS
        )
        print(f"{row['trace'][:28]:<28} {row['sizes']:<7} {row['way']:<9} {words}", file=sys.stderr)
    print(overall(rows), file=sys.stderr)
    if args.json:
        write_json(
            {**report.about(), "rtt_ms": RTT_MS, "overall": overall(rows), "rows": rows}, args.json
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
