"""The cloud's front door: a gRPC server with TLS, health and reflection before a Backend."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from offramp_cloud.admission import Admission
from offramp_cloud.backends import Backend, Replica
from offramp_cloud.served import Observer, Served, log_served
from offramp_cloud.servicer import SERVICE, Servicer
from offramp_common.errors import CloudUnavailable, ConfigError
from offramp_common.frames import Limits
from offramp_common.revocation import Revocations

log = logging.getLogger(__name__)

_HEADER_BYTES = 64 * 2**10  # of a request, beside its frame
_LAST_WRITES_S = 1.0
_FIRST_PROBE_S = 10.0
_FORGET_S = 30.0  # a replica that has not answered for so long is gone


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Where to listen and how much to let in.

    listen            HOST:PORT; port 0 takes a free one
    limits            bound the size of a message
    max_rpcs          calls at once, open streams and health watches included
    max_connections   at once, to each of the addresses that the host's name has
    max_calls_per_connection   calls and streams on one of them
    drain_s           how long a stopping gateway waits for requests at work
    probe_every_s     how often each bundle's replicas are asked whether they live
    probe_timeout_s   how long such a question may take
    """

    listen: str = "127.0.0.1:7443"
    limits: Limits = field(default_factory=Limits)
    admission: Admission = field(default_factory=Admission)
    max_rpcs: int = 1000
    max_connections: int = 1000
    max_calls_per_connection: int = 100
    drain_s: float = 20.0
    probe_every_s: float = 1.0
    probe_timeout_s: float = 1.5


class Gateway:
    """bind(), start(backend), ... drain(). One event loop."""

    def __init__(
        self,
        settings: GatewaySettings,
        credentials: grpc.ServerCredentials | None = None,
        observers: Sequence[Observer] = (),
        revocations: Revocations | None = None,
    ) -> None:
        self.settings = settings
        self._revocations = revocations
        self.replicas: dict[tuple[str, str], Replica] = {}  # by bundle and name
        self._heard_s: dict[tuple[str, str], float] = {}
        self._answered_s: dict[str, float] = {}
        self._unserved: set[str] = set()
        self._doubt = asyncio.Event()
        self.observers: list[Observer] = [log_served, self._note, *observers]
        self._credentials = credentials
        self.health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in the stubs
        self._server = grpc.aio.server(
            options=_options(settings), maximum_concurrent_rpcs=settings.max_rpcs
        )
        self._backend: Backend | None = None
        self._servicer: Servicer | None = None
        self._probing: asyncio.Task[None] | None = None

    def bind(self) -> str:
        """Take the port, before anything slow is started; returns HOST:PORT. Raises ConfigError."""
        listen = self.settings.listen
        host, _ = split_address(listen)
        try:
            if self._credentials is None:
                bound = self._server.add_insecure_port(listen)
            else:
                bound = self._server.add_secure_port(listen, self._credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {listen}: the port is in use, or the address is not this machine's"
            ) from error
        return f"{host}:{bound}"

    async def start(self, backend: Backend) -> None:
        """Serve. Raises CloudUnavailable when a bundle has no replica that answers."""
        self._backend = backend
        self._servicer = Servicer(
            backend,
            self.settings.admission,
            self.observers,
            lambda: self._unserved,
            self._revocations,
        )
        self._server.add_generic_rpc_handlers((self._servicer.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self.probe(_FIRST_PROBE_S)
        if self._unserved:
            raise CloudUnavailable(f"no replica of {', '.join(self._unserved)} answers")
        await self._server.start()
        self._probing = asyncio.create_task(self._keep_probing())

    async def drain(self, hurry: asyncio.Event | None = None) -> bool:
        """Stop: refuse what is new, finish what is at work; True when all of it was in time.

        `hurry`, once set, ends the waiting."""
        if self._probing is not None:
            self._probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probing
        await self.health.enter_graceful_shutdown()
        in_time = True
        if self._servicer is not None:
            draining = asyncio.create_task(self._servicer.drain(self.settings.drain_s))
            hurrying = asyncio.create_task((hurry or asyncio.Event()).wait())
            await asyncio.wait((draining, hurrying), return_when=asyncio.FIRST_COMPLETED)
            in_time = draining.done() and draining.result()
            for task in (draining, hurrying):
                task.cancel()
        await self._server.stop(_LAST_WRITES_S if in_time else 0)
        return in_time

    async def _keep_probing(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.probe_every_s):
                    await self._doubt.wait()
            self._doubt.clear()
            before = self._unserved
            await self.probe()
            for bundle in self._unserved - before:
                log.error("no replica of %s answers; devices are told to come later", bundle)
            for bundle in before - self._unserved:
                log.info("%s is answered again", bundle)

    @property
    def bundles(self) -> tuple[str, ...]:
        """Those that are served, whether or not a replica answers at the moment."""
        return self._backend.bundles if self._backend else ()

    @property
    def at_work(self) -> int:
        """Requests that are being served."""
        return self._servicer.at_work if self._servicer else 0

    @property
    def stalled(self) -> dict[str, int]:
        """Calls that were ended because their device stopped in the middle, by stalls.REQUEST and REPLY, and
        streams that nothing was asked on, as stalls.IDLE."""
        return dict(self._servicer.stalls.ended) if self._servicer else {}

    async def probe(self, timeout_s: float | None = None) -> None:
        """Ask each bundle's replicas, and set the health of all names.

        `timeout_s`: probe_timeout_s by default."""
        backend, now_s = self._backend, time.monotonic()
        timeout_s = self.settings.probe_timeout_s if timeout_s is None else timeout_s
        assert backend is not None, "a gateway probes once it has been started"
        for bundle in backend.bundles:
            for replica in await backend.probe(bundle, timeout_s):
                self.replicas[bundle, replica.name] = replica
                self._heard_s[bundle, replica.name] = time.monotonic()
        heard = {bundle for (bundle, _), at_s in self._heard_s.items() if at_s >= now_s}
        # A question may be late where there is much work; answers are a sign of life, too.
        heard |= {bundle for bundle, at_s in self._answered_s.items() if at_s >= now_s}
        self._unserved = set(backend.bundles) - heard
        for key in [key for key, at_s in self._heard_s.items() if now_s - at_s > _FORGET_S]:
            del self._heard_s[key], self.replicas[key]
        for bundle in backend.bundles:
            await self.health.set(bundle, _serving(bundle in heard))
        for name in ("", SERVICE):
            await self.health.set(name, _serving(not self._unserved))

    def _note(self, served: Served) -> None:
        if served.status == grpc.StatusCode.OK.name:
            self._answered_s[served.bundle] = time.monotonic()
        elif served.status == grpc.StatusCode.UNAVAILABLE.name:
            self._doubt.set()  # found no replica: a reason to ask at once


def split_address(listen: str) -> tuple[str, int]:
    """HOST:PORT taken apart; raises ConfigError. An IPv6 host keeps its brackets."""
    host, _, port = listen.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise ConfigError(f"--listen {listen!r}: must be HOST:PORT, such as 127.0.0.1:7443")
    return host, int(port)


def is_loopback(listen: str) -> bool:
    """Whether HOST:PORT can be reached from this machine alone. Raises ConfigError."""
    host = split_address(listen)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _serving(yes: bool) -> Any:
    status = health_pb2.HealthCheckResponse
    return status.SERVING if yes else status.NOT_SERVING


def _options(settings: GatewaySettings) -> list[tuple[str, int]]:
    largest = settings.limits.max_frame_bytes + _HEADER_BYTES
    return [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", largest),
        # Without this a second server on the same port starts happily and takes half the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", settings.max_calls_per_connection),
        # Who connects and then says nothing, or too slowly, is not waited for.
        ("grpc.server_handshake_timeout_ms", 10_000),
        # Devices may ping every 5 s, with no call open: on mobile links that keeps paths open.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # And a device that has gone without a word is found out, and its work cancelled.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
