"""How many engines there are to be: a rule over what the farm shows.

The live rule, offramp_cloud.scaling, also forecasts arrivals. benchmarks/burst.py runs that rule itself, and
Serve's own, in this farm: a scaler may be handed in.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from offramp_simulate.scenario_parts import Cloud

if TYPE_CHECKING:
    from offramp_simulate.farm import Farm

_TICK_S = 1.0
_KEPT = 0.2  # weight of the newest rate of arrivals


class Scaler(Protocol):
    """Asked every `every_s`; what it has said stands until it says something else."""

    every_s: float

    def wanted(self, farm: Farm, now_s: float) -> int: ...


class WorkScaler:
    """As many as get what waits done in time and keep up with what comes, once that has been so for long
    enough."""

    every_s = _TICK_S

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._over_s = self._under_s = 0.0
        self._came = self._arriving = 0.0
        self._target = cloud.replicas

    def wanted(self, farm: Farm, now_s: float) -> int:
        c = self._cloud
        self._arriving += _KEPT * ((farm.came - self._came) / _TICK_S - self._arriving)
        self._came = farm.came
        work, busy_s = sum(engine.work for engine in farm.engines), farm.busy_s
        needed = self._target
        if busy_s:
            need = self._arriving / c.busy + work / c.done_in_s
            needed = min(
                max(math.ceil(need / (farm.done_work / busy_s)), c.replicas), c.max_replicas
            )
        self._over_s = self._over_s + _TICK_S if needed > self._target else 0.0
        self._under_s = self._under_s + _TICK_S if needed < self._target else 0.0
        if self._over_s >= c.up_s or self._under_s >= c.down_s:
            self._target = needed
            self._over_s = self._under_s = 0.0
        return self._target
