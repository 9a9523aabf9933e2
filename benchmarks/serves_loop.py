"""Serve's controller, as far as it scales, over the simulator's farm (burst.py): asked ten times a second,
over the mean of a look-back, told of what replicas count in intervals. Factors and delays are Serve's own
code."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray.serve import autoscaling_policy as serves
from ray.serve.config import AutoscalingConfig

from offramp_cloud.rates import Rates
from offramp_simulate.engine_model import Engine
from offramp_simulate.farm import Farm


@dataclass(frozen=True)
class Settings:
    """Of Serve's loop, in seconds."""

    look_back_s: float = 30.0
    told_s: float = 10.0
    up_s: float = 30.0
    down_s: float = 600.0


Policy = Callable[[Any], tuple[float, dict[str, Any]]]


class ServesLoop:
    """A scaler for the farm. `target` is target_ongoing_requests, which our policy does not look at."""

    every_s = 0.1

    def __init__(self, settings: Settings, policy: Policy, target: float, most: int) -> None:
        self._settings, self._policy = settings, policy
        self._config = AutoscalingConfig(
            min_replicas=1,
            max_replicas=most,
            target_ongoing_requests=target,
            upscale_delay_s=settings.up_s,
            downscale_delay_s=settings.down_s,
        )
        self._target = 1
        self._state: dict[str, Any] = {}
        self._own: dict[str, Any] = {}
        self._noted: list[tuple[float, dict[str, dict[int, float]]]] = []
        self._known: dict[str, dict[int, float]] = {}
        self._note_s = self._tell_s = 0.0
        self._rates: dict[int, Rates] = {}
        self._now_s = 0.0

    def wanted(self, farm: Farm, now_s: float) -> int:
        self._now_s = now_s
        every_s = min(0.2 * self._settings.look_back_s, self._settings.told_s)
        if now_s >= self._note_s:
            self._note_s = now_s + every_s
            self._noted.append((now_s, self._measured(farm)))
        if now_s >= self._tell_s:
            self._tell_s = now_s + self._settings.told_s
            self._known = self._means(now_s)
        context = self._context(farm, now_s)
        asked, self._own = self._policy(context)
        asked = serves._apply_scaling_factors(asked, context.current_num_replicas, self._config)
        chosen, self._state = serves._apply_delay_logic(
            asked, self._target, self._config, self._state, _now=now_s
        )
        self._target = min(max(1, chosen), self._config.max_replicas)
        return self._target

    def _context(self, farm: Farm, now_s: float) -> Any:
        there = {engine.number for engine in farm.engines}
        metrics = {
            name: {number: value for number, value in values.items() if number in there}
            for name, values in self._known.items()
        }
        return SimpleNamespace(
            aggregated_metrics=metrics,
            total_num_requests=sum(metrics.get("held", {}).values()),
            current_num_replicas=len(farm.engines),
            target_num_replicas=self._target,
            current_time=now_s,
            policy_state=dict(self._own),
            config=self._config,
        )

    def _measured(self, farm: Farm) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {
            name: {} for name in ("held", "left", "arriving", "capacity")
        }
        for engine in farm.engines:
            if engine.number not in self._rates:
                seen: Any = Seen(engine, farm)
                self._rates[engine.number] = Rates(seen, lambda: self._now_s)
            work = self._rates[engine.number].now()
            found["held"][engine.number] = engine.held
            found["left"][engine.number] = work.left
            found["arriving"][engine.number] = work.arriving
            found["capacity"][engine.number] = work.capacity
        return found

    def _means(self, now_s: float) -> dict[str, dict[int, float]]:
        self._noted = [n for n in self._noted if now_s - n[0] <= self._settings.look_back_s]
        series: dict[str, dict[int, list[float]]] = {}
        for _, metrics in self._noted:
            for name, values in metrics.items():
                for number, value in values.items():
                    series.setdefault(name, {}).setdefault(number, []).append(value)
        return {
            name: {number: statistics.fmean(found) for number, found in values.items()}
            for name, values in series.items()
        }


class Seen:
    """A simulated engine as `Rates` looks at a live one."""

    def __init__(self, engine: Engine, farm: Farm) -> None:
        self._engine, self._times = engine, farm.times
        self.load, self.cost = farm.cloud, self

    @property
    def queued_layer_tokens(self) -> int:
        return round(self._engine.work)

    @property
    def counters(self) -> Any:
        e = self._engine
        done = {"layer_tokens": e.done_work, "compute_s": e.busy_s, "overhead_s": 0.0}
        return SimpleNamespace(**done, tokens=e.done_work, rows=e.rows)

    def seconds(self, group: tuple[int, int]) -> float:
        return self._times.layer_s(*group)
