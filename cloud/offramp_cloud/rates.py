"""What an engine has before it, and what it gets done: for gateways that choose among replicas or refuse
what would be late, and for whoever decides how many replicas there are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offramp_cloud.costs import Group
from offramp_common.errors import CloudBusy

if TYPE_CHECKING:
    from offramp_cloud.engine import Engine  # with torch, which a gateway needs not

_SAMPLE_S = 0.25  # the least time between two measurements
_KEPT = 0.2  # the weight of the newest one,
_KEPT_FREE = 0.02  # and of what it says of the capacity where the engine was not always at work


@dataclass(frozen=True, slots=True)
class Work:
    """In layers x tokens: what waits or runs, what comes each second, and what an engine gets done in a
    second when it is full. The last two are 0 while nothing is known."""

    left: int = 0
    arriving: float = 0.0
    capacity: float = 0.0


class Rates:
    """Of one engine; measured whenever somebody asks."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._before = (clock(), 0, 0.0, 0)
        self._arriving = self._capacity = 0.0

    def now(self) -> Work:
        left = self._engine.queued_layer_tokens
        self._sample(left)
        return Work(left, self._arriving, self._capacity)

    def _sample(self, left: int) -> None:
        counters, now_s = self._engine.counters, self._clock()
        done, busy_s = counters.layer_tokens, counters.compute_s + counters.overhead_s
        at_s, done_before, busy_before_s, left_before = self._before
        if now_s - at_s < _SAMPLE_S:
            return
        arrived = max(0, done - done_before + left - left_before)
        self._arriving += _KEPT * (arrived / (now_s - at_s) - self._arriving)
        if done > done_before and busy_s > busy_before_s:
            if left_before > done - done_before:
                # It was never idle: so much it gets done, also where something other than layers holds it
                # up (frames to decode, another process on its core).
                rate, kept = (done - done_before) / (now_s - at_s), _KEPT
            else:
                # What one request at a time gets done says little of what many together would.
                rate = max((done - done_before) / (busy_s - busy_before_s), self._full_batch())
                kept = _KEPT_FREE
            self._capacity += (kept if self._capacity else 1.0) * (rate - self._capacity)
        self._before = (now_s, done, busy_s, left)

    def _full_batch(self) -> float:
        """Layers x tokens a second where rows of the usual length fill the batch."""
        counters, load = self._engine.counters, self._engine.load
        length = counters.tokens / max(1, counters.rows)
        rows = max(1, min(load.max_batch, int(load.max_batch_tokens / max(1.0, length))))
        tokens = max(1, round(rows * length))
        return tokens / self._engine.cost.seconds(Group(rows, tokens))


def refuse_late(work: float, capacity: float, left_ms: float) -> None:
    """Raises CloudBusy where `work` cannot be done at `capacity` in the time left. An answer that
    would come too late costs those behind it as much as one in time."""
    expected_ms = work / capacity * 1e3 if capacity > 0 else 0.0
    if expected_ms > left_ms:
        raise CloudBusy(
            f"there is work for about {expected_ms:.0f} ms before it, and {left_ms:.0f} ms are left; "
            "retry later, or give it more time",
            retry_after_ms=expected_ms - left_ms,
        )
