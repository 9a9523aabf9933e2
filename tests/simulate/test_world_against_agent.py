"""The event kernel against the live agent: the same requests, the same record, both in virtual time.

The agent is all of it: Agent, Device, Turn, Hedge, Offloads, CloudSession, breaker, frames. Its layers look
answers up in the record, and its transport is the simulator's own link and engines.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_record import (
    EXITS,
    N_LAYERS,
    Rows,
    made_manifest,
    made_record,
    made_scenario,
)
from virtual_time import VirtualLoop, VirtualThread, run_virtual

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.errors import CloudBusy, CloudUnavailable, DeadlineExceeded
from offramp_common.frames import Limits, decode_frame
from offramp_common.runner import Knobs, Look, Step
from offramp_common.text import Text
from offramp_common.transport import Completion, Hello, Offload, Welcome
from offramp_edge.agent import Agent
from offramp_edge.answers import Answer, Sample
from offramp_edge.device import Device
from offramp_edge.greetings import DOUBTS_APART_S
from offramp_edge.planning import FixedPlan
from offramp_edge.session import CloudSession
from offramp_edge.settings import plan_for
from offramp_simulate.arrivals import requests
from offramp_simulate.beside import CANCEL_NBYTES, CONNECTING, GREETING
from offramp_simulate.device_model import cut, resolve, samples
from offramp_simulate.engine_model import Job
from offramp_simulate.engine_times import EngineTimes
from offramp_simulate.farm import Busy, Farm
from offramp_simulate.results import WHERE
from offramp_simulate.scenario import Scenario
from offramp_simulate.world import World

# Both add the same floats, in another order, up to times of some 1e4 ms.
CLOSE_MS = 1e-6

RECORD = made_record(60)
DIGEST = b"made"


class MadeBundle(Bundle):
    def digest(self, depth: int) -> bytes:
        return DIGEST + bytes([depth])


class SameDraws(random.Random):
    """Gives names away without a draw, so that waits are drawn as in the kernel."""

    def getrandbits(self, bits: int) -> int:
        return 1


class LookedUp:
    """Layers whose hidden state is the sample's number, and whose time passes on the loop's clock."""

    n_layers = N_LAYERS

    def __init__(self, loop: VirtualLoop, layer_s: float, leaves: np.ndarray) -> None:
        self._loop, self._layer_s, self._leaves = loop, layer_s, leaves

    def step(self, acts: Activations[NumpyArray], knobs: Knobs) -> Step[NumpyArray]:
        self._loop.work(self._layer_s)
        depth, number = acts.depth + 1, int(acts.hidden_BTD[0, 0, 0])
        further = Activations(acts.hidden_BTD.astype(np.float32), acts.lengths_B, depth)
        if depth not in EXITS:
            return Step(further, None)
        column = EXITS.index(depth)
        logits = np.zeros((1, 2), np.float32)
        logits[0, RECORD.predicted_PNE[0, number, column]] = 1.0
        sure = RECORD.confidence_PNE[0, number, column].reshape(1)
        leave = np.array([depth >= self._leaves[number]])
        return Step(further, Look(leave, logits, sure))


class SimulatedCloud:
    """A `Transport` made of the simulator's link and engines, on the agent's loop."""

    def __init__(self, loop: VirtualLoop, scenario: Scenario) -> None:
        profile, plan = scenario.profile(), resolve(scenario.plans[0], scenario, RECORD)
        self._loop = loop
        self._up, self._down = profile.shaper("up"), profile.shaper("down")
        self._farm = Farm(EngineTimes(RECORD, scenario.cloud), scenario.cloud, scenario.seed)
        self._cut = cut(RECORD, scenario, samples(RECORD, scenario, plan), plan.split, plan.codec)
        self._rtt_s = profile.rtt_ms / 1e3
        self._hop_s = RECORD.header.gateway_ms / 2e3 + self._farm.times.fixed_s / 2
        self._futures: dict[int, asyncio.Future[Job]] = {}
        self._jobs = 0
        self._connected, self._greetings = False, 0
        self.began_s = 0.0
        self.fault = scenario.faults[0] if scenario.faults else None

    async def hello(self, hello: Hello, *, timeout_s: float) -> Welcome:
        if self._broken():
            self._connected = False
            raise CloudUnavailable("refused")
        fresh, self._greetings = self._greetings > 0 or not self._connected, self._greetings + 1
        try:
            async with asyncio.timeout(timeout_s):
                await self._greeted(CONNECTING if fresh else GREETING)
            self._connected = True
        except TimeoutError:
            self._connected = False
            raise DeadlineExceeded("no answer") from None
        finally:
            self._greetings -= 1
        knobs = made_manifest().operating_points["fp32"]
        return Welcome(("fp32", "tokens"), Limits(), knobs)

    async def complete(self, work: Offload, *, timeout_s: float) -> Completion:
        if self._broken():
            raise CloudUnavailable("refused")
        acts = decode_frame(work.frame, made_manifest_cuts(), Limits())
        number = int(acts.hidden_BTD[0, 0, 0])
        now_s = self._loop.time()
        arrives_s = self._up.send(int(self._cut.up_N[number]), now_s).arrives_s
        try:
            await self._until(arrives_s + self._hop_s)
        except asyncio.CancelledError:
            self._cancels(None)
            raise
        job = await self._engine(number, now_s + timeout_s)
        leaves_s = self._loop.time() + self._hop_s
        try:
            await self._until(self._down.send(self._cut.down_nbytes, leaves_s).arrives_s)
        except asyncio.CancelledError:
            self._cancels(None)
            raise
        exit = int(self._cut.exit_N[number])
        logits = np.zeros((1, 2), np.float32)
        logits[0, RECORD.predicted_PNE[0, number, EXITS.index(exit)]] = 1.0
        one = np.ones(1, np.float32)
        return Completion(work.request_id, logits, np.array([exit]), one, *job.reports_ms)

    async def close(self) -> None:
        """Nothing to close."""

    async def _greeted(self, legs: tuple[tuple[int, int], ...]) -> None:
        for left, (up, down) in reversed(list(enumerate(reversed(legs)))):
            await self._until(self._up.send(up, self._loop.time()).arrives_s)
            leaves_s = self._loop.time() + (0.0 if left else 2 * self._hop_s)
            await self._until(self._down.send(down, leaves_s).arrives_s)

    async def _until(self, when_s: float) -> None:
        """Sleep; a fault that begins meanwhile resets the connection."""
        fault, now_s = self.fault, self._loop.time()
        if fault is not None:
            begins_s = self.began_s + fault.at_s
            if now_s < begins_s <= when_s:
                await asyncio.sleep(begins_s - now_s)
                raise CloudUnavailable("reset")
        await asyncio.sleep(when_s - now_s)

    async def _engine(self, number: int, wanted_s: float) -> Job:
        tokens, exit = int(RECORD.tokens_N[number]), int(self._cut.exit_N[number])
        self._jobs += 1
        job = Job(self._jobs, self._cut.depth, exit, tokens, 1.0, wanted_s)
        self._futures[self._jobs] = self._loop.create_future()
        try:
            self._turn()
            self._farm.offer(job, self._loop.time())
        except Busy as busy:
            raise CloudBusy(str(busy)) from None
        self._call()
        try:
            return await self._futures[int(str(job.key))]
        except asyncio.CancelledError:
            self._cancels(job)
            raise

    def _cancels(self, job: Job | None) -> None:
        """Tell the cloud, over the link, that nobody waits for it any more."""
        arrives_s = self._up.send(CANCEL_NBYTES, self._loop.time()).arrives_s
        if job is not None:
            self._loop.call_at(arrives_s + self._hop_s, job.unwanted)

    def _call(self) -> None:
        if self._farm.next_s < math.inf:
            self._loop.call_at(self._farm.next_s, self._turn)

    def _turn(self) -> None:
        for when_s, batch in self._farm.advance(self._loop.time()):
            for job in batch:
                job.reports_ms = job.queue_ms(when_s), 1e3 * job.ran_s
                future = self._futures.pop(int(str(job.key)))
                if not future.done():
                    future.set_result(job)
                elif (
                    job.wanted_s > -math.inf
                ):  # its reply is late, and goes over the link all the same
                    self._down.send(self._cut.down_nbytes, when_s + self._hop_s)
        self._call()

    def _broken(self) -> bool:
        fault, now_s = self.fault, self._loop.time() - self.began_s
        return fault is not None and fault.at_s <= now_s < fault.at_s + fault.for_s


def made_manifest_cuts() -> dict[int, Any]:
    return {c.depth: c for c in made_manifest().cuts}


def live(scenario: Scenario) -> list[Answer]:
    """The answers of one live device, in order of asking."""
    loop = VirtualLoop()
    plan = resolve(scenario.plans[0], scenario, RECORD)
    of = samples(RECORD, scenario, plan)
    layer_s = float(of.layer_ms_NL[0, 0]) / 1e3
    settings = scenario.agent.changed({"split": plan.split})
    bundle = MadeBundle(Path("made"), made_manifest())
    chosen = plan_for(bundle, settings)
    cloud = SimulatedCloud(loop, scenario)

    def encode(texts: Sequence[Text]) -> Activations[NumpyArray]:
        number = 0 if isinstance(texts[0], tuple) or not texts[0].isdigit() else int(texts[0])
        tokens = int(RECORD.tokens_N[number])
        loop.work(of.before_ms / 1e3)
        ids = np.full((1, tokens, 1), number, np.int64)
        return Activations(ids, np.array([tokens]), depth=0)

    async def main() -> list[Answer]:
        layers = LookedUp(loop, layer_s, of.leaves_N)
        device = Device(layers, encode, chosen.knobs, loop, VirtualThread(loop))
        rng = SameDraws(f"{scenario.seed}/0")
        session = CloudSession(cloud, bundle, chosen, settings, loop, rng)
        retries = random.Random(f"{scenario.seed}/retry/0")
        way = FixedPlan(plan.split, "")
        agent = Agent(bundle, device, session, way, settings, loop, rng=retries)
        await agent.start()
        await session.breaker.settled.wait()
        await asyncio.sleep(DOUBTS_APART_S)  # the first greeting lies well before the run
        # World's clock starts at 0: the same sums of floats need the same start.
        cloud.began_s = loop.time()
        try:
            return await _asked(agent, scenario, loop)
        finally:
            await agent.close()

    return run_virtual(main(), loop)


async def _asked(agent: Agent, scenario: Scenario, loop: VirtualLoop) -> list[Answer]:
    began_s, tasks = loop.time(), []
    for chunk in requests(scenario, RECORD):
        for when_s, number in zip(chunk.when_N.tolist(), chunk.sample_N.tolist(), strict=True):
            await asyncio.sleep(began_s + when_s - loop.time())
            tasks.append(asyncio.create_task(agent.answer(Sample(str(number)))))
    return list(await asyncio.gather(*tasks))


def simulated(scenario: Scenario) -> Rows:
    rows: Any = Rows()
    plan = resolve(scenario.plans[0], scenario, RECORD)
    World(scenario, RECORD, scenario.profile(), plan, rows).run()
    found: Rows = rows
    return found


def one_device(**tables: Any) -> Scenario:
    values = {"devices": {"count": 1, "jitter": False}, "requests": 300}
    return made_scenario(**{**values, **tables})


SCENARIOS = {
    "light load": one_device(),
    "the input, heavy load": one_device(
        arrivals={"rate_per_s": 60.0}, plans=[{"name": "p", "split": 0, "point": "never"}]
    ),
    "few in the air": one_device(
        arrivals={"rate_per_s": 25.0}, agent={"max_in_flight": 1, "hedge_after": math.inf}
    ),
    "hedges at once": one_device(
        # So rarely that no sample comes while a hedge runs: in virtual time a stretch is run at once.
        arrivals={"rate_per_s": 0.1},
        agent={"hedge_after": 0.0},
        plans=[{"name": "p", "split": 1, "point": "never"}],
    ),
    "hedges of several samples": one_device(
        arrivals={
            "kind": "bursts",
            "rate_per_s": 3.0,
            "busy_rate_per_s": 30.0,
            "quiet_s": 3.0,
            "busy_s": 1.0,
        },
        agent={"hedge_after": 0.0},
        link={"uplink_mbps": 0.4, "downlink_mbps": 2.0, "rtt_ms": 90.0},
        plans=[{"name": "p", "split": 1, "point": "never"}],
    ),
    "hedges when late": one_device(
        arrivals={"rate_per_s": 20.0}, agent={"hedge_after": 1.0}, plans=[{"name": "p", "split": 1}]
    ),
    "deadlines, a slow link": one_device(
        arrivals={"rate_per_s": 12.0},
        agent={"deadline_ms": 120.0, "hedge_after": math.inf},
        link={"uplink_mbps": 0.6, "downlink_mbps": 2.0, "rtt_ms": 90.0},
    ),
    "deadlines, the input": one_device(
        # Seldom three in a row: whom the live session wakes first, when it puts the cloud aside, is the
        # order of a set.
        arrivals={"rate_per_s": 8.0},
        agent={"deadline_ms": 75.0, "hedge_after": math.inf},
        plans=[{"name": "p", "split": 0, "point": "never"}],
        link={"uplink_mbps": 0.1, "downlink_mbps": 2.0, "rtt_ms": 30.0},
    ),
    "an exit answers": one_device(
        arrivals={"rate_per_s": 20.0},
        agent={"fallback": "exit", "deadline_ms": 80.0, "hedge_after": math.inf},
        link={"uplink_mbps": 0.6, "downlink_mbps": 2.0, "rtt_ms": 60.0},
        plans=[{"name": "p", "split": 1, "point": "never"}],
    ),
    "the cloud is gone for a while": one_device(
        arrivals={"rate_per_s": 6.0},
        agent={"hedge_after": math.inf},
        plans=[{"name": "p", "split": 2, "point": "never"}],
        faults=[{"what": "link", "at_s": 10.0, "for_s": 8.0}],
    ),
    "time-outs": one_device(
        agent={"offload_timeout_ms": 60.0, "hedge_after": math.inf},
        link={"uplink_mbps": 1.5, "downlink_mbps": 2.0, "rtt_ms": 30.0},
        plans=[{"name": "p", "split": 2, "point": "never"}],
        arrivals={"rate_per_s": 4.0},
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_answer_is_the_live_agents(name: str) -> None:
    scenario = SCENARIOS[name]
    answers, rows = live(scenario), simulated(scenario)
    assert [answer.where for answer in answers] == [WHERE[w] for w in rows.column("where_N")]
    assert [answer.exit_depth for answer in answers] == rows.column("exit_N").tolist()
    np.testing.assert_allclose(rows.ms, [answer.ms for answer in answers], atol=CLOSE_MS)
