"""The engine: finishes the deep layers for many devices. A plain object without ray.

An asyncio front (decode, check, queue, answer) over an elevator in a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from offramp_cloud.acceptance import Acceptance
from offramp_cloud.costs import Group, LayerCost
from offramp_cloud.counters import Counters
from offramp_cloud.elevator import Done, Elevator
from offramp_cloud.shaft import Shaft
from offramp_cloud.traces import note_run
from offramp_cloud.waiting import House, Load, Request, nbytes_of
from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.errors import CloudUnavailable, ConfigError, DeadlineExceeded
from offramp_common.frames import Limits, decode_frame
from offramp_common.runner import Layers
from offramp_common.tracing import OFF, Tracer
from offramp_common.transport import Completion, Hello, Offload, Welcome
from offramp_model.packed_layers import PackedLayers
from offramp_model.split_model import to_torch

log = logging.getLogger(__name__)

_DECODE_IN_LOOP = 256 * 2**10  # bytes; larger frames are decoded in a thread: milliseconds
_WARM_SIZES = ((1, 8), (1, 8), (1, 32), (8, 8), (4, 32))  # (rows, tokens of each)
_CLOSING = "the engine is shutting down; try again on another replica"


class Engine:
    """Runs [depth, n) of one bundle for whoever asks. Use it from one event loop."""

    def __init__(
        self,
        bundle: Bundle,
        layers: Layers[Tensor],
        *,
        limits: Limits | None = None,
        load: Load | None = None,
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        """`precision`: of `layers`, whose operating point is the engine's own.

        Raises BundleError where the bundle has no operating point for it, nor for fp32.
        """
        limits = limits or Limits()
        manifest = bundle.manifest
        self.limits = replace(limits, max_tokens=min(limits.max_tokens, manifest.max_tokens))
        self.load = load or Load()
        self.counters = Counters()
        self.bundle = bundle
        self._accepts = Acceptance(bundle, self.limits, precision)
        self._cuts = bundle.cuts
        self._house = House(self.load)
        self._open: dict[Request, asyncio.Future[Completion]] = {}
        exits = manifest.exits if manifest.online else None
        self._elevator = Elevator(layers, self.load, self.counters, exits=exits, device=device)
        self._shaft = Shaft(self._elevator, layers.n_layers, self._deliver)
        self._closed = False
        self.tracer: Tracer = OFF  # whoever wants spans brings another

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    @property
    def queued_layer_tokens(self) -> int:
        """Layers x tokens that wait or run, as far as rows are expected to go."""
        return self._shaft.work_left

    @property
    def cost(self) -> LayerCost:
        """What a layer costs here, as far as it is known."""
        return self._elevator.cost

    def welcome(self, hello: Hello) -> Welcome:
        """What this side accepts; raises ProtocolMismatch, BundleMismatch or UnknownCodec."""
        return self._accepts.welcome(hello)

    async def complete(self, work: Offload) -> Completion:
        """The answers to `work`'s rows.

        Raises BundleMismatch, WireError or UnknownCodec for what cannot be run, CloudBusy when the
        house is full, DeadlineExceeded the moment the deadline passes. Cancelling drops the work.
        """
        if self._closed:
            raise CloudUnavailable(_CLOSING)
        patience_s = None if work.deadline_ms is None else work.deadline_ms / 1e3
        arrived_s = time.monotonic()  # Ray's event loop has a clock of whole milliseconds
        deadline_s = None if patience_s is None else arrived_s + patience_s
        depth, knobs = self._accepts.depth_of(work), self._accepts.knobs_of(work)
        try:
            async with asyncio.timeout(patience_s):
                acts = await self._decoded(work.frame, depth)
                decoded_s = time.monotonic()
                with self._house.room_for(acts.batch_size, nbytes_of(acts)):
                    request = Request(
                        work.request_id, acts, knobs, arrived_s, deadline_s, work.priority
                    )
                    done = await self._answer(request)
                if self.tracer.on:
                    note_run(self.tracer, work.traceparent, arrived_s, decoded_s, done)
                return done
        except TimeoutError:
            raise DeadlineExceeded(
                f"{work.deadline_ms:.0f} ms passed before the answer was ready; give it more time"
            ) from None

    async def close(self) -> None:
        """Refuse new work, fail what waits as CloudUnavailable, finish what runs."""
        self._closed = True
        for request, done in self._open.items():
            if not request.started and not done.done():
                done.set_exception(CloudUnavailable(_CLOSING))
                request.unwanted = True
        await self._shaft.close()

    async def _decoded(self, frame: bytes, depth: int) -> Activations[NumpyArray]:
        cuts, fitted = {depth: self._cuts[depth]}, self.bundle.fitted
        with self._house.room_for(0, len(frame)):
            if len(frame) <= _DECODE_IN_LOOP:
                return decode_frame(frame, cuts, self.limits, fitted)
            return await asyncio.to_thread(decode_frame, frame, cuts, self.limits, fitted)

    async def _answer(self, request: Request) -> Completion:
        if self._closed:
            raise CloudUnavailable(_CLOSING)
        done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._open[request] = done
        try:
            self._shaft.post(request)
            return await done
        finally:
            request.unwanted = True
            del self._open[request]

    def _deliver(self, over: list[Done]) -> None:
        for request, outcome in ((done.request, done.outcome) for done in over):
            if isinstance(outcome, Exception):
                log.error("request %r failed in the engine", request.request_id, exc_info=outcome)
            done = self._open.get(request)
            if done is None or done.done():
                continue
            if isinstance(outcome, Exception):
                done.set_exception(outcome)
            else:
                done.set_result(outcome)


def load_engine(
    path: str | Path,
    *,
    threads: int = 1,
    limits: Limits | None = None,
    load: Load | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> Engine:
    """The engine of the bundle in a directory, warm. Raises BundleError, and ConfigError for a device that
    is not here or a precision that the model cannot be run in.

    `threads` is torch's, for this whole process;  `precision` "fp32" or "bf16", of the layers
    """
    import torch

    from offramp_model.store import load_model

    torch.set_num_threads(threads)
    bundle = Bundle.read(path)
    try:
        layers = PackedLayers(load_model(bundle), device, precision)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"engine of {bundle.manifest.name!r} on {device}: {error}") from error
    engine = Engine(bundle, layers, limits=limits, load=load, device=device, precision=precision)
    _warm_up(engine, layers)
    return engine


def _warm_up(engine: Engine, layers: PackedLayers) -> None:
    """Set up every layer's kernels, not at the first device's expense, and learn what a layer costs."""
    bundle, limits = engine.bundle, engine.limits
    never = {spec.name: (spec.never,) * bundle.n_layers for spec in bundle.manifest.knobs}
    for rows, length in _WARM_SIZES:
        length = min(length, limits.max_tokens)
        ids = np.zeros((rows, length, bundle.cuts[0].width), np.int64)
        acts = to_torch(Activations(ids, np.full(rows, length), depth=0), layers.device)
        for _ in range(bundle.n_layers):
            began_s = time.perf_counter()
            acts = layers.step(acts, never).acts
            engine.cost.saw(Group(rows, rows * length), time.perf_counter() - began_s)
