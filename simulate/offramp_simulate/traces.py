"""Recorded rates over time, integrated exactly; `trace_readers` has the forms of their files.

A sample holds until the next one; zero means that nothing is delivered. At its end a trace starts
again.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path

from offramp_common.errors import ConfigError, DataError
from offramp_simulate.trace_readers import BadLine, read_traces

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

    def bits_by(self, time_s: float) -> float:
        """What could be sent from 0 to `time_s` (0 or later), bits."""
        periods, offset_s = divmod(time_s, self.period_s)
        here = min(bisect_right(self.edges_s, offset_s), len(self.mbps)) - 1
        within = self._bits[here] + self.mbps[here] * 1e6 * (offset_s - self.edges_s[here])
        return periods * self._bits[-1] + within

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
    try:
        for recorded in read_traces(text, path.name):
            try:
                trace = RateTrace(recorded.name, recorded.edges_s, recorded.mbps)
                if trace.name in traces:
                    raise ConfigError(f"the trace {trace.name!r} is there twice: rename one")
            except ConfigError as error:
                raise BadLine(recorded.line, str(error)) from error
            traces[trace.name] = trace
    except BadLine as bad:
        raise DataError(f"{path}:{bad.line}: {bad}") from bad
    if not traces:
        raise DataError(f"{path}: no trace in it: `offramp link --help` has the forms it may have")
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
