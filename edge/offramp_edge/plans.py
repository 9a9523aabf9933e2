"""The planner that the settings ask for, made for one device and its session with the cloud."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Protocol

from offramp_common.bundle import Bundle
from offramp_common.clock import Clock
from offramp_edge.baselines import SplitBandit, static_rule
from offramp_edge.device import Device
from offramp_edge.forecast import foreseen
from offramp_edge.link import Link
from offramp_edge.menu import EncodeTimes, Menu, time_codecs, within
from offramp_edge.planner import AutoPlanner, World
from offramp_edge.planning import FixedPlan, Planner
from offramp_edge.session import CloudSession
from offramp_edge.settings import FIXED, NEUROSURGEON, SPINN, SPLITEE, EdgeSettings, Plan
from offramp_edge.solve import Objective


def planner_for(
    bundle: Bundle,
    plan: Plan,
    settings: EdgeSettings,
    device: Device,
    session: CloudSession,
    clock: Clock,
    call_soon: Callable[[Callable[[], None]], object] | None = None,
) -> Planner:
    """`call_soon` runs something in the session's event loop from any thread (its own, by default)."""
    if plan.kind == FIXED:
        return FixedPlan(plan.split, "")
    if plan.kind == SPLITEE:
        return SplitBandit((*plan.depths, bundle.n_layers), "", bundle.n_layers)
    rule = plan.kind in (NEUROSURGEON, SPINN)
    # The published rules know one way to send hidden states.
    only = plan.codecs[0] if rule else settings.codec
    menu = _menu(bundle, plan, settings, only)
    world = World(lambda: device.times, session.link, session.cloud_times)
    seen = foreseen(bundle, plan, settings)
    planner = (
        static_rule(plan.kind, menu, seen, world)
        if rule
        else AutoPlanner(menu, seen, world, objective_of(settings))
    )
    soon = call_soon or asyncio.get_running_loop().call_soon_threadsafe
    planner.on_asked = Attention(session, menu, settings.probe_ms / 1000, clock, soon).asked
    return planner


def objective_of(settings: EdgeSettings) -> Objective:
    return Objective(
        settings.weight_energy, settings.weight_cloud, settings.device_watts, settings.radio_watts
    )


def _menu(bundle: Bundle, plan: Plan, settings: EdgeSettings, only: str | None) -> Menu:
    allowed = within(bundle, settings.max_codec_cost, only)
    unpriced = Menu(bundle, plan.depths, allowed, EncodeTimes({}), {})
    widths = {depth: bundle.cuts[depth].width for depth in plan.depths}
    times = time_codecs(unpriced.codecs, widths, time.perf_counter)
    return Menu(bundle, plan.depths, allowed, times, plan.knobs)


_FIRST_PROBES = 4
"""Before so many transfers a guess is all there is, and a bad guess would keep every sample here."""


class Probed(Protocol):
    """What is asked of a session with the cloud: the live one, and the simulator's."""

    @property
    def link(self) -> Link: ...

    def codecs(self) -> tuple[str, ...]: ...

    def worth_asking(self) -> bool: ...

    def probe(self) -> None:
        """Nothing while another is in the air, or where the cloud may not be asked."""


class Attention:
    """What is done when a planner is asked, which is when samples come: it learns which codecs the cloud has,
    and a link that is new, or has been silent for too long, is probed. `draw`: evenly from 0 to 1."""

    def __init__(
        self,
        session: Probed,
        menu: Menu,
        probe_s: float,
        clock: Clock,
        call_soon: Callable[[Callable[[], None]], object],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._session, self._menu, self._probe_s, self._clock = session, menu, probe_s, clock
        self._call_soon, self._draw = call_soon, draw
        self._codecs: tuple[str, ...] = ()
        self._next_s = float("-inf")

    def asked(self) -> None:
        """In the device's thread."""
        codecs = self._session.codecs()
        if codecs is not self._codecs:
            self._menu.share(codecs)
            self._codecs = codecs
        now_s = self._clock.now()
        if not self._probe_s or now_s < self._next_s:
            return
        if self._session.link.transfers < _FIRST_PROBES:
            self._call_soon(self._session.probe)  # one at a time, whatever is asked of it
            return
        # Not evenly: devices that began together would probe together, and find the queue they make.
        wait_s = self._probe_s * (1 + self._draw() / 2)
        age_s = self._session.link.age_s()
        if age_s < self._probe_s:
            self._next_s = now_s + wait_s - age_s
        elif self._session.worth_asking():
            self._next_s = now_s + wait_s
            self._call_soon(self._session.probe)
