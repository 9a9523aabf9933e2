"""Who answers for the gateway: engines in its own process, or Serve replicas (app.py)."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from offramp_cloud.host import Host
from offramp_cloud.statuses import Outcome
from offramp_common.errors import CloudBusy, CloudUnavailable

log = logging.getLogger(__name__)

_RETRY_S = 2.0  # how long another replica is waited for when one has died with a request


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica that has just answered: its process, and its engine's counters (Counters.to_json)."""

    pid: int
    counters: dict[str, Any]


class Backend(Protocol):
    """Calls for a bundle not in `bundles` are never made. Cancelling a call cancels the work."""

    @property
    def bundles(self) -> tuple[str, ...]: ...

    @property
    def replicas(self) -> int:
        """How many each bundle should have, as far as is known."""
        ...

    async def complete(self, bundle: str, request: bytes, budget_ms: float) -> Outcome:
        """An OffloadRequest's bytes in, an OffloadReply's bytes or a status out."""
        ...

    async def hello(self, bundle: str, request: bytes) -> Outcome:
        """A HelloRequest's bytes in, a HelloReply's bytes or a status out."""
        ...

    async def probe(self, bundle: str) -> Replica:
        """Any replica of the bundle; raises CloudUnavailable when none answers."""
        ...

    async def close(self) -> None: ...


class LocalBackend:
    """Engines in this process: no Ray, starts in seconds, one machine."""

    replicas = 1

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def bundles(self) -> tuple[str, ...]:
        return self._host.bundles

    async def complete(self, bundle: str, request: bytes, budget_ms: float) -> Outcome:
        return await self._host.complete(request, budget_ms)

    async def hello(self, bundle: str, request: bytes) -> Outcome:
        return self._host.hello(request)

    async def probe(self, bundle: str) -> Replica:
        return Replica(os.getpid(), self._host.counters()[bundle])

    async def close(self) -> None:
        await self._host.close()


class Replicas(Protocol):
    """A bundle's replicas in other processes (app.Handle), as one that can be called."""

    async def call(self, method: str, *args: Any) -> Any:
        """What a method of app.Tail returns, from any of them.

        Raises CloudUnavailable when the one that was asked is gone, CloudBusy when all are full."""
        ...


class ReplicatedBackend:
    """Replicas that may die, and are replaced by whoever placed them."""

    def __init__(
        self,
        bundles: Mapping[str, Replicas],
        replicas: int,
        on_close: Callable[[], Awaitable[None]],
        retry_s: float = _RETRY_S,
    ) -> None:
        self._bundles, self.replicas = bundles, replicas
        self._on_close, self._retry_s = on_close, retry_s

    @property
    def bundles(self) -> tuple[str, ...]:
        return tuple(self._bundles)

    async def complete(self, bundle: str, request: bytes, budget_ms: float) -> Outcome:
        """A request whose replica dies is repeated once on another: it changes nothing there."""
        replicas, started_s = self._bundles[bundle], time.monotonic()
        outcome: Outcome
        try:
            outcome = await replicas.call("complete", request, budget_ms)
            return outcome
        except CloudBusy:
            raise
        except CloudUnavailable as error:
            log.warning("a replica of %s died under a request: %s", bundle, error)
        left_ms = budget_ms - (time.monotonic() - started_s) * 1e3
        try:
            async with asyncio.timeout(self._retry_s):
                outcome = await replicas.call("complete", request, left_ms)
                return outcome
        except TimeoutError:
            raise CloudUnavailable(
                f"a replica of {bundle!r} died, and no other answered within {self._retry_s:g} s; "
                "retry later"
            ) from None

    async def hello(self, bundle: str, request: bytes) -> Outcome:
        outcome: Outcome = await self._bundles[bundle].call("hello", request)
        return outcome

    async def probe(self, bundle: str) -> Replica:
        pid, counters = await self._bundles[bundle].call("probe")
        return Replica(pid, counters[bundle])

    async def close(self) -> None:
        await self._on_close()
