"""The live planners on the kernel's clock: the same objects, told by what happens in the simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from offramp_edge.baselines import SplitBandit, static_rule
from offramp_edge.device import LayerTimes
from offramp_edge.forecast import Foreseen, foreseen
from offramp_edge.menu import EncodeTimes, Menu, within
from offramp_edge.planner import AutoPlanner
from offramp_edge.planner import World as Believed
from offramp_edge.planning import Planner
from offramp_edge.plans import objective_of
from offramp_edge.settings import NEUROSURGEON, SPINN, SPLITEE, EdgeSettings, plan_for
from offramp_simulate.device_model import Resolved
from offramp_simulate.record import NEVER, OWN, Record
from offramp_simulate.scenario import Scenario
from offramp_simulate.scenario_parts import Plan
from offramp_simulate.world import MakePlanner, World
from offramp_simulate.world_parts import Side


def maker(plan: Plan, scenario: Scenario, record: Record, resolved: Resolved) -> MakePlanner:
    """A function that makes each device's planner. ConfigError for what this bundle cannot do."""
    settings = _settings(plan, scenario, record, resolved)
    bundle = record.bundle
    live = plan_for(bundle, settings)
    if plan.planner == SPLITEE:
        arms = (*live.depths, bundle.n_layers)
        return lambda world, side: SplitBandit(arms, "", bundle.n_layers, seed=side.number)
    rule = plan.planner in (NEUROSURGEON, SPINN)
    only = live.codecs[0] if rule else settings.codec
    allowed, times = within(bundle, settings.max_codec_cost, only), _encode_times(record, scenario)
    # The recorded codecs are those whose bytes and answers are known.
    menu = Menu(bundle, live.depths, allowed, times, {} if resolved.point == OWN else live.knobs)
    menu.share((*record.header.codecs, "tokens"))

    def make(world: World, side: Side) -> Planner:
        def layer_times() -> LayerTimes:
            assert side.times is not None
            return side.times

        believed = Believed(layer_times, side.link, side.cloud_times)
        seen: Foreseen = foreseen(bundle, live, settings)
        if rule:
            planner: AutoPlanner = static_rule(plan.planner, menu, seen, believed)
        else:
            planner = AutoPlanner(menu, seen, believed, objective_of(settings))
        planner.on_asked = _Attention(world, side, settings.probe_ms / 1e3).asked
        return planner

    return make


_FIRST_PROBES = 4  # as of offramp_edge.plans


class _Attention:
    """As offramp_edge.plans.Attention: a link that is new, or was silent for too long, is probed."""

    def __init__(self, world: World, side: Side, probe_s: float) -> None:
        self._world, self._side, self._probe_s = world, side, probe_s
        self._next_s = float("-inf")

    def asked(self) -> None:
        now_s, side = self._world.clock.now_s, self._side
        if not self._probe_s or now_s < self._next_s:
            return
        assert side.breaker is not None
        if side.link.transfers < _FIRST_PROBES:
            if not side.breaker.refusal():
                self._world.cloud.handshakes.probe(side)
            return
        age_s = side.link.age_s()
        if age_s < self._probe_s:
            self._next_s = now_s + self._probe_s - age_s
            return
        if not side.breaker.refusal():
            self._next_s = now_s + self._probe_s
            self._world.cloud.handshakes.probe(side)


def _settings(plan: Plan, scenario: Scenario, record: Record, resolved: Resolved) -> EdgeSettings:
    point = record.header.points[record.point(resolved.point)]
    knobs = None
    if resolved.point not in (OWN, NEVER):
        knobs = dict(point.knobs[resolved.precision])
    return replace(
        scenario.agent,
        plan=plan.planner,
        min_split=plan.min_split,
        precision=resolved.precision,
        codec=plan.codec or None,
        exits=resolved.point != NEVER,
        knobs=knobs,
    )


def _encode_times(record: Record, scenario: Scenario) -> EncodeTimes:
    """(a start, so much a token) of each codec, a line through what was measured."""
    slow, found = scenario.devices.slowdown, {}
    for name, ms_G in zip(record.header.codecs, record.encode_ms_OG, strict=True):
        per_token, start = np.polyfit(record.lengths_G, ms_G, 1)
        found[name] = (max(float(start), 0.0) * slow, max(float(per_token), 0.0) * slow)
    return EncodeTimes(found)
