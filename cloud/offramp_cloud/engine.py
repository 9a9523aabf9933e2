"""The engine: finishes the deep layers for many devices. A plain object without ray.

An asyncio front (decode, check, queue, answer) and one compute thread. The queue is touched by the
event loop alone, so nothing here takes a lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offramp_cloud.counters import Counters
from offramp_cloud.statuses import ProtocolMismatch
from offramp_cloud.waiting import (
    House,
    KnobKey,
    Load,
    Waiting,
    WaitingRoom,
    knob_key,
    nbytes_of,
)
from offramp_common import __version__
from offramp_common.activations import Activations, NumpyArray, join
from offramp_common.bundle import Bundle
from offramp_common.codecs import CODECS
from offramp_common.errors import (
    BundleMismatch,
    CloudUnavailable,
    DeadlineExceeded,
    UnknownCodec,
    WireError,
)
from offramp_common.exit_classes import ExitClasses
from offramp_common.frames import Limits, decode_frame
from offramp_common.runner import Knobs, Layers, Look, run
from offramp_common.spec import KnobSpec
from offramp_common.transport import PROTOCOL_VERSION, Completion, Hello, Offload, Welcome
from offramp_model.exits import check_knobs
from offramp_model.split_model import TorchLayers, to_torch

log = logging.getLogger(__name__)

_PRECISION = "fp32"  # of the torch runner: whose operating point is the cloud's own
_DECODE_IN_LOOP = 256 * 2**10  # bytes; larger frames are decoded in a thread: milliseconds


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
    ) -> None:
        """Raises BundleError where the bundle has no operating point for fp32."""
        limits = limits or Limits()
        manifest = bundle.manifest
        self.limits = replace(limits, max_tokens=min(limits.max_tokens, manifest.max_tokens))
        self.load = load or Load()
        self.counters = Counters()
        self.bundle = bundle
        self._layers, self._device = layers, device
        self._cuts = bundle.cuts
        self._depths = {bundle.digest(depth): depth for depth in self._cuts}
        self._knob_specs = tuple(_as_float32(spec) for spec in manifest.knobs)
        self._own_knobs = self._checked(bundle.knobs(_PRECISION))
        self._room = WaitingRoom(self.load)
        self._house = House(self.load)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offramp-engine")
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def name(self) -> str:
        return self.bundle.manifest.name

    def welcome(self, hello: Hello) -> Welcome:
        """What this side accepts; raises ProtocolMismatch, BundleMismatch or UnknownCodec."""
        if hello.protocol != PROTOCOL_VERSION:
            older = "device" if hello.protocol < PROTOCOL_VERSION else "cloud"
            raise ProtocolMismatch(
                f"the device speaks protocol {hello.protocol}, this cloud {PROTOCOL_VERSION}; "
                f"update offramp on the {older}"
            )
        if hello.bundle != self.name:
            raise BundleMismatch(f"bundle {hello.bundle!r:.80}: this engine holds {self.name!r}")
        for depth, digest in sorted(hello.digests.items()):
            self._compare(depth, digest)
        if hello.codecs and not any(codec in CODECS for codec in hello.codecs):
            raise UnknownCodec(
                f"none of the device's codecs {list(hello.codecs)!r:.200} is known here; this cloud "
                f"decodes {', '.join(CODECS)}; choose one of them or update offramp on the cloud"
            )
        software = f"offramp {__version__}"
        return Welcome(tuple(CODECS), self.limits, dict(self._own_knobs), software=software)

    async def complete(self, work: Offload) -> Completion:
        """The answers to `work`'s rows.

        Raises BundleMismatch, WireError or UnknownCodec for what cannot be run, CloudBusy when the
        house is full, DeadlineExceeded the moment the deadline passes. Cancelling drops the work.
        """
        if self._closed:
            raise CloudUnavailable("the engine is shutting down; try again on another replica")
        patience_s = None if work.deadline_ms is None else work.deadline_ms / 1e3
        arrived_s = time.monotonic()  # Ray's event loop has a clock of whole milliseconds
        deadline_s = None if patience_s is None else arrived_s + patience_s
        depth = self._depth_of(work)
        knobs = self._checked(work.knobs) if work.knobs else self._own_knobs
        try:
            async with asyncio.timeout(patience_s):
                acts = await self._decoded(work.frame, depth)
                with self._house.room_for(acts.batch_size, nbytes_of(acts)):
                    done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
                    self._queue(Waiting(work.request_id, acts, knobs, arrived_s, deadline_s, done))
                    return await done
        except TimeoutError:
            raise DeadlineExceeded(
                f"{work.deadline_ms:.0f} ms passed before the answer was ready; give it more time"
            ) from None

    async def close(self) -> None:
        """Refuse new work, fail what waits as CloudUnavailable, finish what runs."""
        self._closed = True
        for request in self._room.empty():
            if not request.done.done():
                request.done.set_exception(
                    CloudUnavailable("the engine is shutting down; try again on another replica")
                )
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    def _compare(self, depth: int, digest: bytes) -> None:
        if depth not in self._cuts:
            raise BundleMismatch(
                f"depth {depth}: {self.name!r} can be cut here at depths {sorted(self._cuts)}; the "
                "device holds another model (`offramp bundle digest` shows both)"
            )
        if digest != self.bundle.digest(depth):
            raise BundleMismatch(
                f"{self.name!r} differs from depth {depth} on: the device's digest is "
                f"{digest.hex()[:32]}, the cloud's {self.bundle.digest(depth).hex()}; copy the newer "
                "bundle to the older side (`offramp bundle digest` shows both)"
            )

    def _depth_of(self, work: Offload) -> int:
        depth = self._depths.get(work.digest)
        if depth is None:
            raise BundleMismatch(
                f"digest {work.digest.hex()[:32] or '(empty)'} is of no part of {self.name!r} here: "
                "the device holds another model, or the cloud's was replaced since the device said "
                "Hello; say Hello again (`offramp bundle digest` shows both sides)"
            )
        return depth

    def _checked(self, knobs: Knobs) -> KnobKey:
        rounded = {n: tuple(float(np.float32(v)) for v in values) for n, values in knobs.items()}
        try:
            check_knobs(rounded, self._knob_specs, self._layers.n_layers)
        except ValueError as error:
            raise WireError(f"{error}") from None
        return knob_key(rounded)

    async def _decoded(self, frame: bytes, depth: int) -> Activations[NumpyArray]:
        cuts = {depth: self._cuts[depth]}
        with self._house.room_for(0, len(frame)):
            if len(frame) <= _DECODE_IN_LOOP:
                return decode_frame(frame, cuts, self.limits)
            return await asyncio.to_thread(decode_frame, frame, cuts, self.limits)

    def _queue(self, request: Waiting) -> None:
        if self._closed:
            raise CloudUnavailable("the engine is shutting down; try again on another replica")
        self._room.add(request)
        if self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        """Runs while anything waits. It never raises: a batch's failure goes to its requests."""
        try:
            while batch := self._room.take(time.monotonic()):
                await self._finish(batch)
        finally:
            self._worker = None

    async def _finish(self, batch: list[Waiting]) -> None:
        loop = asyncio.get_running_loop()
        started_s = time.monotonic()
        try:
            answers = await loop.run_in_executor(self._thread, self._run, batch)
        except Exception as error:
            if len(batch) == 1:
                self.counters.failed += 1
                log.exception("request %r failed in the engine", batch[0].request_id)
                if not batch[0].done.done():
                    batch[0].done.set_exception(error)
                return
            # One of them may have poisoned the others: each gets a run of its own.
            for request in batch:
                if request.wanted(time.monotonic()):
                    await self._finish([request])
            return
        compute_ms = (time.monotonic() - started_s) * 1e3
        for request, answer in zip(batch, answers, strict=True):
            if not request.done.done():
                queue_ms = (started_s - request.arrived_s) * 1e3
                timed = replace(answer, queue_ms=queue_ms, compute_ms=compute_ms)
                request.done.set_result(timed)

    def _run(self, batch: list[Waiting]) -> list[Completion]:
        """In the compute thread: the batch's answers, request by request."""
        acts = join([request.acts for request in batch])
        knobs = dict(batch[0].knobs)
        step = self.load.max_batch
        pieces = [
            self._run_rows(acts if acts.batch_size <= step else acts.take(rows), knobs)
            for rows in np.split(np.arange(acts.batch_size), range(step, acts.batch_size, step))
        ]
        whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        self.counters.add(len(batch), acts, whole["exit_depth_B"])
        starts = np.cumsum([request.rows for request in batch])[:-1]
        split: dict[str, Any] = {n: np.split(column, starts) for n, column in whole.items()}
        return [
            Completion(request.request_id, **{name: parts[i] for name, parts in split.items()})
            for i, request in enumerate(batch)
        ]

    def _run_rows(self, acts: Activations[NumpyArray], knobs: Knobs) -> dict[str, Any]:
        """A Completion's arrays for the rows, in their order."""
        n, rows, manifest = self._layers.n_layers, acts.batch_size, self.bundle.manifest
        observe = seen = None
        if manifest.online:
            seen = ExitClasses(rows, [depth for depth in manifest.exits if depth > acts.depth])
            observe = partial(_tell, seen)
        left = run(self._layers, to_torch(acts, self._device), n, knobs, observe).left
        answers = np.zeros((rows, *left[0].answer.shape[1:]), np.float32)
        depth_B, confidence_B = np.zeros(rows, np.int64), np.zeros(rows, np.float32)
        for leaving in left:
            answers[leaving.rows] = leaving.answer.float().cpu().numpy()
            depth_B[leaving.rows] = leaving.depth
            confidence_B[leaving.rows] = leaving.confidence_B
        done = {"answers": answers, "exit_depth_B": depth_B, "confidence_B": confidence_B}
        return done if seen is None else done | {"exit_classes_BE": seen.classes_BE}


def _tell(seen: ExitClasses, depth: int, rows: NDArray[np.int64], look: Look[Tensor]) -> None:
    seen.add(depth, rows, look.answer.float().cpu().numpy())


def load_engine(
    path: str | Path,
    *,
    threads: int = 1,
    limits: Limits | None = None,
    load: Load | None = None,
) -> Engine:
    """The engine of the bundle in a directory, on the CPU, warm. Raises BundleError.

    `threads` is torch's, for this whole process.
    """
    import torch

    from offramp_model.store import load_model

    torch.set_num_threads(threads)
    bundle = Bundle.read(path)
    layers = TorchLayers(load_model(bundle))
    engine = Engine(bundle, layers, limits=limits, load=load)
    cut = bundle.cuts[0]
    # The first run of each layer sets up its kernels: not at the first device's expense.
    sample = Activations(np.zeros((1, 8, cut.width), np.int64), np.array([8]), depth=0)
    never = {spec.name: (spec.never,) * bundle.n_layers for spec in bundle.manifest.knobs}
    run(layers, to_torch(sample), bundle.n_layers, never)
    return engine


def _as_float32(spec: KnobSpec) -> KnobSpec:
    """Knobs travel as float32; rounding a bound as well keeps a value on it within it."""
    low, high, never = (float(np.float32(v)) for v in (spec.low, spec.high, spec.never))
    return replace(spec, low=low, high=high, never=never)
