"""How many replicas the work needs: Serve's autoscaling policy over what they measure (rates.py).

Work is layers x tokens. Requests would be a poor measure: one may be a thousand times another, and a
replica that is late has the same number of them as one that is idle, once callers hold back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_APART_S = 0.5  # between two arrivals that are remembered: Serve asks ten times a second
_TREND_S = 3.0  # how far back the oldest of them lies
_MOST_GROWTH = 2.0  # a forecast beyond so many times what comes now is not believed


class WorkLeft:
    """A policy of Serve's: as many replicas as get what is there done in time, and keep up with what
    comes, now and by the time that a new one is up.

    done_in_s   how long what waits may take;  ahead_s   how far arrivals are forecast: a replica's start
    busy        the share of its time that a replica should work
    """

    def __init__(self, done_in_s: float = 2.0, ahead_s: float = 5.0, busy: float = 0.7) -> None:
        if min(done_in_s, ahead_s, busy) <= 0 or busy > 1:
            raise ValueError(f"{done_in_s}, {ahead_s}, {busy}: must be above 0, the last at most 1")
        self._done_in_s, self._ahead_s, self._busy = done_in_s, ahead_s, busy

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """(replicas, what to remember), from ray.serve.config.AutoscalingContext."""
        metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics
        left, arriving, capacities = (
            list(metrics.get(name, {}).values()) for name in ("left", "arriving", "capacity")
        )
        known = [capacity for capacity in capacities if capacity > 0]
        state = dict(context.policy_state)
        now_s = context.current_time
        if not known:
            # Work that waits where nothing has been measured yet: one more, and see.
            return context.target_num_replicas + (1 if sum(left) else 0), state
        forecast = self._forecast(state, sum(arriving), now_s)
        need = forecast / self._busy + sum(left) / self._done_in_s
        return max(1, math.ceil(need / (sum(known) / len(known)))), state

    def _forecast(self, state: dict[str, Any], arriving: float, now_s: float) -> float:
        """Arrivals `ahead_s` from now, if they go on growing as they did lately; never less than now."""
        seen: list[tuple[float, float]] = [
            pair for pair in state.get("seen", ()) if now_s - pair[0] <= _TREND_S
        ]
        if not seen or now_s - seen[-1][0] >= _APART_S:
            seen.append((now_s, arriving))
        state["seen"] = seen
        passed_s = now_s - seen[0][0]
        if passed_s < _APART_S:
            return arriving
        grown = max(0.0, arriving - seen[0][1]) / passed_s * self._ahead_s
        return min(arriving + grown, _MOST_GROWTH * arriving)
