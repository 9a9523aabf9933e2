"""An agent put together from its parts, in the event loop that it is going to run in."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from offramp_common.activations import NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.clock import Clock, MonotonicClock
from offramp_common.errors import ConfigError
from offramp_common.runner import Layers
from offramp_common.text import TextEncoder
from offramp_edge.agent import Agent
from offramp_edge.answers import Answer
from offramp_edge.chooser import Chooser
from offramp_edge.connect import Connect
from offramp_edge.device import Device
from offramp_edge.planning import FixedPlan, Learns, Planner
from offramp_edge.plans import planner_for
from offramp_edge.resend import Resender
from offramp_edge.session import CloudSession
from offramp_edge.settings import EdgeSettings, Plan
from offramp_edge.spool import Spool

MakePlanner = Callable[[Bundle, EdgeSettings, Device, CloudSession], Planner]
"""Makes a worker's planner from what it may look at: `device.times`, `session.link`."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker was given, or has loaded.

    connect    makes the transport; it gives None where there is no cloud
    executor   of one thread, for the layers
    planner    takes the place of the settings' own
    on_final   gets the final answers of what waited in the spool
    """

    bundle: Bundle
    settings: EdgeSettings
    plan: Plan
    layers: Layers[NumpyArray]
    encode: TextEncoder
    connect: Connect
    executor: Executor
    chooser: Chooser | None = None
    planner: MakePlanner | None = None
    on_final: Callable[[Answer], None] | None = None


async def started(parts: Parts) -> Agent:
    """The agent, looking for its cloud, its layers loaded. Raises ConfigError, BundleError."""
    clock, session, resender = MonotonicClock(), None, None
    spool = _spool(parts.settings)
    device = Device(parts.layers, parts.encode, parts.plan.knobs, clock, parts.executor)
    transport = parts.connect() if parts.plan.depths else None
    if transport is not None:
        rng = random.Random()
        session = CloudSession(transport, parts.bundle, parts.plan, parts.settings, clock, rng)
    if spool is not None:
        if session is None:
            spool.close()
            raise ConfigError("spool: final answers come from a cloud, and there is none; drop it")
        resender = Resender(spool, session.breaker, random.Random(), parts.on_final)
    agent = Agent(
        parts.bundle,
        device,
        session,
        _planner(parts, device, session, clock),
        parts.settings,
        clock,
        None if parts.chooser is None else parts.chooser.knobs,
        resender=resender,
    )
    if parts.chooser is not None:
        agent.on_answer.append(parts.chooser.answered)
    if isinstance(agent.planner, Learns):
        agent.on_answer.append(agent.planner.answered)
    try:
        await agent.start()
    except BaseException:
        await agent.close()
        raise
    return agent


def _spool(settings: EdgeSettings) -> Spool | None:
    if settings.spool is None:
        return None
    return Spool(Path(settings.spool), int(1e6 * settings.spool_mb))


def _planner(parts: Parts, device: Device, session: CloudSession | None, clock: Clock) -> Planner:
    if session is None:
        return FixedPlan(parts.bundle.n_layers, "")
    if parts.planner is not None:
        return parts.planner(parts.bundle, parts.settings, device, session)
    return planner_for(parts.bundle, parts.plan, parts.settings, device, session, clock)
