"""What one writes first to send samples to a cloud: the rival of chaos.py, without the deadline contract."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from offramp_common.bundle import Bundle
from offramp_common.frames import encode_frame
from offramp_common.messages import completion_from_pb, offload_to_pb
from offramp_common.runner import run
from offramp_common.spec import never_exit
from offramp_common.text import TextEncoder
from offramp_common.transport import Offload
from offramp_common.wire import offload_pb2_grpc as pb_grpc
from offramp_edge.runtime import OnnxLayers


class PlainClient:
    """Layers up to the cut, then a call with the deadline as its time-out, and no plan for its failure."""

    def __init__(self, bundle: Bundle, target: str, deadline_ms: float) -> None:
        self._deadline_ms = deadline_ms
        self._bundle, manifest = bundle, bundle.manifest
        self._layers = OnnxLayers(bundle, manifest.precision)
        self._encode, self._knobs = TextEncoder(bundle), never_exit(manifest.knobs, bundle.n_layers)
        self._channel = grpc.aio.insecure_channel(target)
        self._stub: Any = pb_grpc.OffloadServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._turn, self._number = asyncio.Lock(), 0

    async def ask(self, text: str) -> None:
        until_s = time.perf_counter() + self._deadline_ms / 1000
        async with self._turn:
            frame = await asyncio.to_thread(self._frame, text)
        self._number += 1
        manifest, split = self._bundle.manifest, self._bundle.manifest.split
        digest, left_s = self._bundle.digest(split), until_s - time.perf_counter()
        work = Offload(
            f"plain-{self._number}", manifest.name, digest, frame, self._knobs, 1000 * left_s
        )
        completion_from_pb(await self._stub.Complete(offload_to_pb(work), timeout=left_s))

    def _frame(self, text: str) -> bytes:
        split, codec = self._bundle.manifest.split, self._bundle.manifest.codec
        rest = run(self._layers, self._encode([text]), split, self._knobs).rest
        assert rest is not None, "no sample leaves early"
        return encode_frame(rest, self._bundle.cuts[split], codec)

    async def close(self) -> None:
        await self._channel.close(None)
