"""The live planners on the kernel's clock: the same objects, told by what happens in the simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from offramp_edge.baselines import SplitBandit, static_rule
from offramp_edge.device import LayerTimes
from offramp_edge.forecast import Foreseen, foreseen
from offramp_edge.menu import EncodeTimes, Menu, within
from offramp_edge.planner import AutoPlanner
from offramp_edge.planner import World as Believed
from offramp_edge.planning import Planner
from offramp_edge.plans import Attention, objective_of
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
    shared = (*record.header.codecs, "tokens")
    menu.share(shared)
    probe_s = settings.probe_ms / 1000

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
        session = _Session(world, side, shared)
        planner.on_asked = Attention(
            session, menu, probe_s, world.clock, _at_once, session.draw
        ).asked
        return planner

    return make


class _Session:
    """A device's session with the cloud, as far as offramp_edge.plans.Attention looks at it."""

    def __init__(self, world: World, side: Side, codecs: tuple[str, ...]) -> None:
        self._world, self._side, self._codecs = world, side, codecs
        self.link = side.link

    def codecs(self) -> tuple[str, ...]:
        return self._codecs

    def worth_asking(self) -> bool:
        assert self._side.breaker is not None
        return not self._side.breaker.refusal()

    def draw(self) -> float:
        return self._world.cloud.handshakes.rng_of(self._side).random()

    def probe(self) -> None:
        self._world.cloud.probes.send(self._side)


def _at_once(call: Callable[[], None]) -> None:
    call()


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
