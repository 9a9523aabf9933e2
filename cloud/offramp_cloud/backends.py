"""Who answers for the gateway: engines in its own process, or replicas elsewhere."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import msgpack

from offramp_cloud.rates import Rates, refuse_late
from offramp_cloud.replica_link import Endpoint, ReplicaLink
from offramp_cloud.routes import Directory, Routes
from offramp_cloud.statuses import Outcome
from offramp_common.bundle import Bundle
from offramp_common.errors import CloudUnavailable
from offramp_common.wire import replica_pb2 as pb

if TYPE_CHECKING:
    from offramp_cloud.host import Host  # with torch, which a gateway needs not

log = logging.getLogger(__name__)

_LOOK_S = 0.5  # how often the directory is looked at
_LEAVES_S = 20.0  # how long a replica that was struck off may finish what it has


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica that has just answered: its process, on which node where there are several, and its
    engine's counters (Counters.to_json). Process ids alone repeat: each pod has a 7 of its own."""

    pid: int
    node: str
    counters: dict[str, Any]

    @property
    def name(self) -> str:
        """Unique among those that live."""
        return f"{self.pid}@{self.node}" if self.node else str(self.pid)


class Backend(Protocol):
    """Calls for a bundle not in `bundles` are never made. Cancelling a call cancels the work.

    `digest` and `digests` are what the device's request names: they choose the version."""

    @property
    def bundles(self) -> tuple[str, ...]: ...

    def depth_of(self, bundle: str, digest: bytes) -> int | None:
        """The layers that had run when a request with this digest was made; None where unknown."""
        ...

    async def complete(
        self, bundle: str, digest: bytes, request: bytes, budget_ms: float
    ) -> Outcome:
        """An OffloadRequest's bytes in, an OffloadReply's bytes or a status out."""
        ...

    async def hello(
        self, bundle: str, digests: Collection[bytes], request: bytes, budget_ms: float
    ) -> Outcome:
        """A HelloRequest's bytes in, a HelloReply's bytes or a status out."""
        ...

    async def probe(self, bundle: str, timeout_s: float) -> list[Replica]:
        """Those replicas of the bundle that answer in time; never raises."""
        ...

    async def close(self) -> None: ...


class LocalBackend:
    """Engines in this process: no Ray, starts in seconds, one machine."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._depths = {engine.name: depths_of(engine.bundle) for engine in host.engines}
        self._rates = {engine.name: Rates(engine) for engine in host.engines}

    @property
    def bundles(self) -> tuple[str, ...]:
        return self._host.bundles

    def depth_of(self, bundle: str, digest: bytes) -> int | None:
        return self._depths[bundle].get(digest)

    async def complete(
        self, bundle: str, digest: bytes, request: bytes, budget_ms: float
    ) -> Outcome:
        work = self._rates[bundle].now()
        refuse_late(work.left, work.capacity, budget_ms)
        return await self._host.complete(request, budget_ms)

    async def hello(
        self, bundle: str, digests: Collection[bytes], request: bytes, budget_ms: float
    ) -> Outcome:
        return self._host.hello(request)

    async def probe(self, bundle: str, timeout_s: float) -> list[Replica]:
        return [Replica(os.getpid(), "", self._host.counters()[bundle])]

    async def close(self) -> None:
        await self._host.close()


class ReplicatedBackend:
    """Replicas that come, go and die; the directory says where they are. One event loop."""

    def __init__(
        self,
        directory: Directory,
        credentials: grpc.ChannelCredentials,
        on_close: Callable[[], Awaitable[None]],
        *,
        only: Collection[str] = (),
        look_s: float = _LOOK_S,
    ) -> None:
        """`only`: bundles or applications to serve, by name; empty for all there are."""
        self._directory, self._credentials, self._on_close = directory, credentials, on_close
        self._only, self._look_s = frozenset(only), look_s
        self._routes = Routes()
        self._closing: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None

    @property
    def bundles(self) -> tuple[str, ...]:
        return self._routes.bundles

    @property
    def links(self) -> Mapping[str, ReplicaLink]:
        """The connections to replicas, by the replicas' names."""
        return self._routes.links

    def depth_of(self, bundle: str, digest: bytes) -> int | None:
        return self._routes.depth_of(bundle, digest)

    async def start(self, timeout_s: float) -> None:
        """Find the replicas and connect to all of them. Raises CloudUnavailable where none answers."""
        await self.look()
        links = self.links.values()
        if links:
            waiting = [asyncio.create_task(link.up.wait()) for link in links]
            _, late = await asyncio.wait(waiting, timeout=timeout_s)
            for task in late:
                task.cancel()
        if not any(link.usable for link in links):
            await self.close()
            raise CloudUnavailable(f"none of {len(links)} replicas answers after {timeout_s:g} s")
        self._looking = asyncio.create_task(self._keep_looking())

    async def look(self) -> None:
        """Follow the directory once: connect to who is new, let go of who is gone."""
        found = {
            name: endpoint
            for name, endpoint in (await self._directory.endpoints()).items()
            if self._wanted(endpoint)
        }
        for name in self.links.keys() - found.keys():
            if (link := self._routes.drop(name)) is not None:
                task = asyncio.create_task(link.close(_LEAVES_S))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        for name in found.keys() - self.links.keys():
            pool = self._routes.pool_for(found[name])
            pool.links[name] = ReplicaLink(found[name], self._credentials, pool.changed)
        self._routes.forget_empty()

    async def complete(
        self, bundle: str, digest: bytes, request: bytes, budget_ms: float
    ) -> Outcome:
        pool = self._routes.find(bundle, (digest,))
        return await pool.ask(pb.METHOD_COMPLETE, request, budget_ms)

    async def hello(
        self, bundle: str, digests: Collection[bytes], request: bytes, budget_ms: float
    ) -> Outcome:
        pool = self._routes.find(bundle, digests)
        return await pool.ask(pb.METHOD_HELLO, request, budget_ms)

    async def probe(self, bundle: str, timeout_s: float) -> list[Replica]:
        links = [link for pool in self._routes.pools(bundle) for link in pool.links.values()]
        answers = await asyncio.gather(*(_probe(link, timeout_s) for link in links))
        return [answer for answer in answers if answer is not None]

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        links = self.links.values()
        await asyncio.gather(*(link.close() for link in links), return_exceptions=True)
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._on_close()

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            try:
                await self.look()
            except CloudUnavailable as error:
                log.warning("no news of replicas: %s", error)  # those we know may live on

    def _wanted(self, endpoint: Endpoint) -> bool:
        names = {endpoint.bundle, endpoint.app, f"offramp-{endpoint.bundle}"}
        return not self._only or bool(names & self._only)


def depths_of(bundle: Bundle) -> dict[bytes, int]:
    """Digest -> depth, of each part of the model that can be asked for."""
    return {bundle.digest(depth): depth for depth in bundle.cuts}


async def _probe(link: ReplicaLink, timeout_s: float) -> Replica | None:
    try:
        async with asyncio.timeout(timeout_s):
            outcome = await link.call(pb.METHOD_PROBE, b"", timeout_s * 1e3)
    except (CloudUnavailable, TimeoutError):
        return None
    answer = msgpack.unpackb(outcome.payload, strict_map_key=False)
    node = link.endpoint.address.rpartition(":")[0]
    return Replica(answer["pid"], node, answer["counters"][link.endpoint.bundle])
