"""First-in-first-out queues worked out for whole arrays at once, exactly.

In a queue that serves in order, request i ends at  f_i = max(r_i, f_(i-1)) + s_i.  Written out,
f_i = S_i + max over j <= i of (r_j - S_(j-1)), S the running sum of the spans: a running maximum. A link
whose rate varies is the same in units of bits: C(t) bits could have passed by time t.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offramp_simulate.traces import RateTrace

Floats = NDArray[np.float64]


def fifo(queue_N: NDArray[np.int64], ready_N: Floats, span_N: Floats, free_Q: Floats) -> Floats:
    """When each ends. Sorted by queue, then by when it is ready; `free_Q`, when each queue's server is
    free, is brought up to date."""
    n = len(queue_N)
    if n == 0:
        return np.zeros(0)
    first_N = np.ones(n, bool)
    first_N[1:] = queue_N[1:] != queue_N[:-1]
    starts = np.flatnonzero(first_N)
    which_N = np.cumsum(first_N) - 1
    ready_N = ready_N.copy()
    ready_N[starts] = np.maximum(ready_N[starts], free_Q[queue_N[starts]])
    total_N = np.cumsum(span_N)
    work_N = total_N - (total_N - span_N)[starts][which_N]
    slack_N = ready_N - (work_N - span_N)
    ends_N: Floats = _running_max(slack_N, starts, which_N) + work_N
    last = np.append(starts[1:], n) - 1
    free_Q[queue_N[last]] = ends_N[last]
    return ends_N


def _running_max(value_N: Floats, starts: NDArray[np.int64], which_N: NDArray[np.int64]) -> Floats:
    """Within each queue, by doubling: after step k each holds the maximum of the 2**k before it."""
    n = len(value_N)
    if len(starts) == 1:
        result: Floats = np.maximum.accumulate(value_N)
        return result
    place_N = np.arange(n) - starts[which_N]
    longest, step = int(place_N.max()) + 1, 1
    while step < longest:
        inside = np.flatnonzero(place_N >= step)
        raised = np.maximum(value_N[inside], value_N[inside - step])
        value_N[inside] = raised
        step *= 2
    return value_N


class Course(Protocol):
    """What a link could have passed by a time, and back: in whatever unit `spans` counts."""

    def passed(self, when_N: Floats) -> Floats: ...
    def spans(self, nbytes_N: NDArray[np.int64]) -> Floats: ...
    def when(self, passed_N: Floats) -> Floats: ...


class ConstantCourse:
    """In seconds: what has passed by t is t."""

    def __init__(self, mbps: float) -> None:
        self._s_per_byte = 8 / (mbps * 1e6)

    def passed(self, when_N: Floats) -> Floats:
        return when_N

    def spans(self, nbytes_N: NDArray[np.int64]) -> Floats:
        return nbytes_N.astype(np.float64) * self._s_per_byte

    def when(self, passed_N: Floats) -> Floats:
        return passed_N


class TraceCourse:
    """In bits of a trace that repeats for ever."""

    def __init__(self, trace: RateTrace) -> None:
        self._edges = np.array(trace.edges_s)
        rates = np.array(trace.mbps) * 1e6
        self._rates = rates
        self._bits = np.concatenate([[0.0], np.cumsum(rates * np.diff(self._edges))])

    def passed(self, when_N: Floats) -> Floats:
        periods, offset = np.divmod(when_N, self._edges[-1])
        passed: Floats = periods * self._bits[-1] + np.interp(offset, self._edges, self._bits)
        return passed

    def spans(self, nbytes_N: NDArray[np.int64]) -> Floats:
        return nbytes_N.astype(np.float64) * 8.0

    def when(self, passed_N: Floats) -> Floats:
        """The first time by which so much is through."""
        periods, target = np.divmod(passed_N, self._bits[-1])
        at_end = (
            target <= 1e-3
        )  # the last bit of a period, not the first of the next (as traces.py)
        periods, target = (
            np.where(at_end, periods - 1, periods),
            np.where(at_end, self._bits[-1], target),
        )
        edge = np.searchsorted(self._bits, target - 1e-3, side="left")
        back = np.maximum(self._bits[edge] - target, 0.0) / self._rates[edge - 1]
        result: Floats = periods * self._edges[-1] + self._edges[edge] - back
        return result
