"""A real gateway in the test's own loop, a link that can be cut, and torch layers for the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from offramp_cloud.admission import Admission
from offramp_cloud.backends import LocalBackend
from offramp_cloud.engine import Engine, load_engine
from offramp_cloud.gateway import Gateway, GatewaySettings
from offramp_cloud.host import Host
from offramp_cloud.served import Served
from offramp_cloud.statuses import Outcome
from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.runner import Knobs, Step
from offramp_model.split_model import TorchLayers, to_numpy, to_torch


class TorchAsNumpy:
    """The torch reference as the device's layers: the same bits on both sides of the cut."""

    def __init__(self, layers: TorchLayers) -> None:
        self._layers = layers
        self.n_layers = layers.n_layers

    def step(self, acts: Activations[NumpyArray], knobs: Knobs) -> Step[NumpyArray]:
        step = self._layers.step(to_torch(acts), knobs)
        look: Any = step.look
        if look is not None:
            look = replace(look, answer=look.answer.numpy())
        return Step(to_numpy(step.acts), look)


class Holding(LocalBackend):
    """Does no work while `free` is cleared."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.free = asyncio.Event()
        self.free.set()

    async def complete(self, *work: Any, **how: Any) -> Outcome:
        await self.free.wait()
        return await super().complete(*work, **how)


@dataclass
class Cloud:
    """A gateway over engines in this process."""

    address: str
    gateway: Gateway
    engine: Engine
    backend: Holding
    served: list[Served] = field(default_factory=list)

    async def stop(self) -> None:
        """At once: connections are cut, work in flight is lost."""
        hurry = asyncio.Event()
        hurry.set()
        await self.gateway.drain(hurry)


@asynccontextmanager
async def cloud_of(
    bundle: Bundle,
    *,
    listen: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
    admission: Admission | None = None,
) -> AsyncIterator[Cloud]:
    engine = load_engine(bundle.path)
    backend = Holding(Host([engine]))
    served: list[Served] = []
    settings = GatewaySettings(listen=listen, admission=admission or Admission())
    gateway = Gateway(settings, credentials, [served.append])
    cloud = Cloud(gateway.bind(), gateway, engine, backend, served)
    try:
        await gateway.start(backend)
        yield cloud
    finally:
        await cloud.stop()
        await backend.close()


class Link:
    """A TCP relay to an address; `swallow` makes a black hole of it, `cut` breaks its connections
    and refuses new ones."""

    def __init__(self, to: str) -> None:
        host, _, port = to.rpartition(":")
        self._to = host, int(port)
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._broken = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def __aenter__(self) -> Link:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def swallow(self) -> None:
        self._flowing.clear()

    def cut(self) -> None:
        self._broken = True
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        self._broken = False
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._broken:
            writer.transport.abort()
            return
        self._writers.add(writer)
        with suppress(OSError, asyncio.CancelledError):
            await self._flowing.wait()
            far_reader, far_writer = await asyncio.open_connection(*self._to)
            self._writers.add(far_writer)
            ways = ((reader, far_writer), (far_reader, writer))
            await asyncio.gather(*(self._relay(*way) for way in ways))
        for one in (writer, *([far_writer] if "far_writer" in locals() else [])):
            self._writers.discard(one)
            one.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        writer.transport.abort()
