"""A device and a cloud in one process and in virtual time: the real agent, session, breaker and
frames around toy layers (toy.py), with a cloud that fails as it is told."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from toy import CLASSES, NEVER, ToyLayers, inputs
from virtual_time import VirtualLoop, VirtualThread, run_virtual

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.errors import (
    BundleMismatch,
    CloudBusy,
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    RequestError,
    UnknownCodec,
)
from offramp_common.frames import Limits, decode_frame
from offramp_common.manifest import Manifest
from offramp_common.runner import Knobs, Step, run
from offramp_common.spec import KnobSpec, TaskSpec
from offramp_common.text import Text
from offramp_common.transport import Completion, Hello, Offload, Welcome
from offramp_edge.agent import Agent
from offramp_edge.answers import Answer, Failed, Sample
from offramp_edge.device import Device
from offramp_edge.planning import FixedPlan, Planner
from offramp_edge.resend import Resender
from offramp_edge.session import CloudSession
from offramp_edge.settings import EdgeSettings, plan_for
from offramp_edge.spool import Spool
from offramp_edge.stream import Result, Stream

LAYERS = ToyLayers()
N = LAYERS.n_layers
LAYER_S = 0.010
"""What a layer takes on the device."""
RTT_S = 0.040
CODECS = ("int8", "fp16", "fp32", "tokens")
DIGEST = b"the toy's digest"
SILENT = 1e9


class ToyBundle(Bundle):
    """The toy's manifest without files."""

    def digest(self, depth: int) -> bytes:
        return DIGEST


def toy_bundle(split: int = 3, knob: float = 0.25) -> ToyBundle:
    manifest = Manifest(
        name="toy",
        task=TaskSpec("classification", tuple(f"class {i}" for i in range(CLASSES))),
        family="toy",
        n_layers=N,
        max_tokens=64,
        cuts=tuple(LAYERS.cuts.values()),
        method="threshold",
        settings={},
        exits=LAYERS.exits,
        knobs=(KnobSpec("threshold", 0.0, 1.0, NEVER, ""),),
        operating_points={"fp32": LAYERS.knobs(knob)},
        split=split,
        codec="fp32",
    )
    return ToyBundle(Path("toy"), manifest)


def encode(given: Sequence[Text]) -> Activations[NumpyArray]:
    """ "3 14 15" -> its token ids; words that are no numbers (the warm-up's) count by their length."""
    rows = []
    for text in given:
        if not isinstance(text, str):
            raise ConfigError(f"input {text!r}: this bundle takes one sentence")
        rows.append([int(w) if w.isdigit() else len(w) for w in text.split()] or [0])
    return inputs(rows)


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    rows = (rng.integers(0, 97, rng.integers(1, 9)) for _ in range(count))
    return [" ".join(map(str, row)) for row in rows]


def local(text: str, knobs: Knobs, start: int = 0) -> tuple[int, bytes]:
    """(exit depth, logits) of the whole model in one piece."""
    (left,) = run(LAYERS, encode([text]), N, knobs).left
    return left.depth, left.answer[0].tobytes()


@dataclass
class FakeCloud:
    """A `Transport`. `mode` says what goes wrong, now or from the next call on.

    up         works, after RTT_S
    gone       refuses connections; work in flight fails
    silent     swallows everything
    slow       answers after `slow_s`
    greets     greets, but swallows work
    """

    loop: VirtualLoop
    mode: str = "up"
    slow_s: float = 5.0
    retry_after_ms: float = 0.0
    knobs: Knobs = field(default_factory=lambda: LAYERS.knobs())
    codecs: tuple[str, ...] = CODECS
    limits: Limits = field(default_factory=Limits)
    protocol: int = 1
    hellos: list[tuple[float, Hello]] = field(default_factory=list)
    works: list[tuple[float, Offload]] = field(default_factory=list)
    in_air: int = 0
    most_in_air: int = 0
    closed: bool = False

    async def hello(self, hello: Hello, *, timeout_s: float) -> Welcome:
        self.hellos.append((self.loop.time(), hello))
        await self._pass(at_hello=True)
        return Welcome(self.codecs, self.limits, self.knobs, self.protocol)

    async def complete(self, work: Offload, *, timeout_s: float) -> Completion:
        self.works.append((self.loop.time(), work))
        self.in_air += 1
        self.most_in_air = max(self.most_in_air, self.in_air)
        try:
            await self._pass(at_hello=False)
        finally:
            self.in_air -= 1
        acts = decode_frame(work.frame, LAYERS.cuts, self.limits)
        (left,) = run(LAYERS, acts, N, work.knobs or self.knobs).left
        depths = np.array([left.depth], np.int64)
        request_id = "another" if self.mode == "malformed" else work.request_id
        return Completion(request_id, left.answer, depths, left.confidence_B, 1.0, 2.0)

    async def close(self) -> None:
        self.closed = True

    async def _pass(self, at_hello: bool) -> None:
        mode = self.mode
        if mode == "gone":
            raise CloudUnavailable("connection refused")
        if mode == "silent" or (mode == "greets" and not at_hello):
            await asyncio.sleep(SILENT)
        if not at_hello:
            errors: dict[str, Exception] = {
                "busy": CloudBusy("full", self.retry_after_ms),
                "mismatch": BundleMismatch("another model: update one"),
                "codec": UnknownCodec("no such codec"),
                "refused": RequestError("not like this"),
                "expired": DeadlineExceeded("passed"),
                "bug": RuntimeError("oops"),
                "setup": ConfigError("no certificate"),
            }
            if mode in errors:
                raise errors[mode]
        elif mode == "mismatch":
            raise BundleMismatch("another model: update one")
        elif mode == "setup":
            raise ConfigError("no certificate")
        await asyncio.sleep(self.slow_s if mode == "slow" else RTT_S)
        if self.mode == "gone":
            raise CloudUnavailable("connection reset")


class TimedLayers:
    """Toy layers that take time on the loop's clock."""

    n_layers = N

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.runs, self.factor = 0, 1.0

    def step(self, acts: Activations[NumpyArray], knobs: Knobs) -> Step[NumpyArray]:
        self._loop.work(self.factor * LAYER_S)
        self.runs += 1
        return LAYERS.step(acts, knobs)


@dataclass
class World:
    """One device, one cloud, one clock."""

    loop: VirtualLoop
    cloud: FakeCloud
    agent: Agent
    layers: TimedLayers
    settings: EdgeSettings

    @property
    def resender(self) -> Resender:
        assert self.agent.resender is not None
        return self.agent.resender

    @property
    def breaker(self) -> Any:
        assert self.agent.session is not None
        return self.agent.session.breaker

    async def answer(self, text: Text, **sample: Any) -> Any:
        return await self.agent.answer(Sample(text, **sample))

    def stream(
        self, given: Iterable[Any] | AsyncGenerator[Any, None], ordered: bool = True
    ) -> Stream:
        source = given if isinstance(given, AsyncGenerator) else _source(given)
        return Stream(self.agent, source, ordered, self.settings.max_in_flight)

    async def all(
        self, given: Iterable[Any] | AsyncGenerator[Any, None], ordered: bool = True
    ) -> list[Result]:
        stream, results = self.stream(given, ordered), []
        while (result := await stream.following()) is not None:
            results.append(result)
        return results


async def _source(given: Iterable[Any]) -> AsyncGenerator[Sample | Failed, None]:
    for item in given:
        yield item if isinstance(item, Sample | Failed) else Sample(item)


def in_world(
    scenario: Any,
    *,
    split: int | None = 3,
    knob: float = 0.25,
    mode: str = "up",
    cloud: Mapping[str, Any] | None = None,
    choose: Callable[[], Knobs] | None = None,
    planner: Planner | None = None,
    spool: Path | None = None,
    on_final: Callable[[Answer], None] | None = None,
    **settings: Any,
) -> World:
    """Run `scenario(world)` on a virtual clock, after the first handshake if that is going to end
    well; `cloud` are fields of FakeCloud, `settings` of EdgeSettings (no
    deadline, no hedges), `choose` and `planner` are the agent's."""
    loop = VirtualLoop()
    chosen = EdgeSettings(
        **{"split": split, "deadline_ms": None, "hedge_after": math.inf, **settings}
    )
    bundle = toy_bundle(knob=knob)
    plan = plan_for(bundle, chosen)
    fake = FakeCloud(loop, mode, **{"knobs": LAYERS.knobs(knob), **(cloud or {})})
    layers = TimedLayers(loop)

    async def main() -> World:
        device = Device(layers, encode, plan.knobs, loop, VirtualThread(loop))
        session = None
        if plan.depths:
            session = CloudSession(fake, bundle, plan, chosen, loop, random.Random(0))
        way = planner or FixedPlan(plan.split, "")
        resender = None
        if spool is not None and session is not None:
            kept = Spool(spool, 2**20)
            resender = Resender(
                kept, session.breaker, random.Random(1), on_final, VirtualThread(loop)
            )
        rng = random.Random(2)
        agent = Agent(bundle, device, session, way, chosen, loop, choose, rng, resender)
        world = World(loop, fake, agent, layers, chosen)
        await agent.start()
        if mode == "up" and session is not None:
            await session.breaker.settled.wait()
        try:
            await scenario(world)
        finally:
            await agent.close()
        return world

    return run_virtual(main(), loop)
