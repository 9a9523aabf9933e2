"""Recorded rates over time, read from JSON lines and integrated exactly.

One object a line: `trace` (its name), `mbps` (a list, Mbit/s) and either `dt` (seconds between
samples) or `t_s` (the samples' times in seconds, rising). A sample holds until the next one; zero
means that nothing is delivered. At its end a trace starts again.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from offramp_common.errors import ConfigError, DataError

# Rounding must not push a last bit past an outage that begins when it is through.
_SLACK_BITS = 1e-3


@dataclass(frozen=True)
class RateTrace:
    """A rate that is constant from each time in `edges_s` to the next, repeated for ever.

    `edges_s` begins with 0 and has one entry more than `mbps`: the last is where it starts again.
    ConfigError when the lengths or values do not allow that, or when every rate is zero.
    """

    name: str
    edges_s: tuple[float, ...]
    mbps: tuple[float, ...]
    _bits: tuple[float, ...] = field(init=False, repr=False, compare=False)  # sent by each edge

    def __post_init__(self) -> None:
        problem = _problem(self.edges_s, self.mbps)
        if problem:
            raise ConfigError(f"trace {self.name}: {problem}")
        spans = (stop - start for start, stop in pairwise(self.edges_s))
        bits = (mbps * 1e6 * span for mbps, span in zip(self.mbps, spans, strict=True))
        object.__setattr__(self, "_bits", tuple(accumulate(bits, initial=0.0)))

    @property
    def period_s(self) -> float:
        return self.edges_s[-1]

    @property
    def mean_mbps(self) -> float:
        return self._bits[-1] / 1e6 / self.period_s

    @property
    def peak_mbps(self) -> float:
        return max(self.mbps)

    def scaled(self, factor: float) -> RateTrace:
        """The same course, every rate times `factor`."""
        if factor == 1:
            return self
        return RateTrace(self.name, self.edges_s, tuple(mbps * factor for mbps in self.mbps))

    def finish_s(self, start_s: float, nbytes: int) -> float:
        """When `nbytes` that start at `start_s` (0 or later) have been sent, seconds."""
        if nbytes == 0:
            return start_s
        # Counted from the start of the running period, so that precision does not wear off.
        periods, offset_s = divmod(start_s, self.period_s)
        here = min(bisect_right(self.edges_s, offset_s), len(self.mbps)) - 1
        sent = self._bits[here] + self.mbps[here] * 1e6 * (offset_s - self.edges_s[here])
        more, target = divmod(sent + nbytes * 8, self._bits[-1])
        if target <= _SLACK_BITS:  # the last bit of a period, not the first instant of the next
            more, target = more - 1, self._bits[-1]
        # The first edge by which `target` bits are through; the span before it is never at rate 0.
        edge = bisect_left(self._bits, target - _SLACK_BITS)
        back_s = max(0.0, self._bits[edge] - target) / (self.mbps[edge - 1] * 1e6)
        finish_s = (periods + more) * self.period_s + self.edges_s[edge] - back_s
        return max(start_s, finish_s)


def load_traces(path: Path) -> dict[str, RateTrace]:
    """All traces of a file, by name, in order. DataError names the file, the line, the fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the traces: {error}") from error
    traces: dict[str, RateTrace] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            trace = _parse(json.loads(line))
            if trace.name in traces:
                raise ConfigError(f"the trace {trace.name!r} is there twice: rename one")
        except (ValueError, OverflowError, ConfigError) as error:
            raise DataError(f"{path}:{number}: {error}") from error
        traces[trace.name] = trace
    if not traces:
        raise DataError(f"{path}: no trace in it: give one JSON object a line (trace, mbps, dt)")
    return traces


def load_trace(path: Path, name: str | None = None) -> RateTrace:
    """The trace called `name`, or the file's first. DataError when it is not there or malformed."""
    traces = load_traces(path)
    if name is None:
        return next(iter(traces.values()))
    if name not in traces:
        some = ", ".join(list(traces)[:5])
        raise DataError(f"{path}: no trace {name!r} among its {len(traces)}: {some}, ...")
    return traces[name]


def _parse(row: Any) -> RateTrace:
    """One line's object as a trace; ConfigError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ConfigError('not an object: write {"trace": NAME, "mbps": [...], "dt": SECONDS}')
    name = row.get("trace")
    if not isinstance(name, str) or not name:
        raise ConfigError('"trace" is missing or not a name: give a text')
    mbps = _numbers(row, "mbps")
    if ("dt" in row) == ("t_s" in row):
        raise ConfigError('give either "dt" (seconds a sample) or "t_s" (a time for each sample)')
    if "dt" in row:
        (dt_s,) = _numbers({"dt": [row["dt"]]}, "dt")
        return RateTrace(name, tuple(i * dt_s for i in range(len(mbps) + 1)), mbps)
    times_s = _numbers(row, "t_s")
    if len(times_s) != len(mbps) or len(times_s) < 2:
        raise ConfigError(
            f'"t_s" has {len(times_s)} entries and "mbps" {len(mbps)}: as many, and two at least'
        )
    # Nothing says how long the last sample holds: as long as the one before it.
    edges_s = (*times_s, 2 * times_s[-1] - times_s[-2])
    return RateTrace(name, tuple(time_s - times_s[0] for time_s in edges_s), mbps)


def _numbers(row: dict[str, Any], key: str) -> tuple[float, ...]:
    values = row.get(key)
    if not isinstance(values, list) or not values:
        raise ConfigError(f'"{key}" is missing or not a list with an entry: give numbers')
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f'"{key}"[{index}] is {value!r}, not a number')
    return tuple(float(value) for value in values)


def _problem(edges_s: tuple[float, ...], mbps: tuple[float, ...]) -> str:
    """What keeps these samples from being a trace; empty when nothing does."""
    if len(edges_s) != len(mbps) + 1 or not mbps or edges_s[0] != 0:
        return f"{len(mbps)} rates need {len(mbps) + 1} times from 0 on, not {len(edges_s)}"
    for index, (start_s, stop_s) in enumerate(pairwise(edges_s)):
        if not start_s < stop_s < math.inf:
            return f"sample {index} lasts {stop_s - start_s} s: times must rise"
    for index, rate in enumerate(mbps):
        if not 0 <= rate < math.inf:
            return f'"mbps"[{index}] is {rate}: give a finite rate of 0 or more'
    if not any(mbps):
        return "every rate is 0, so nothing would ever be delivered: give one that is not"
    return ""
