"""What `offramp cloud serve` does: bind, start a backend, serve until told to stop, leave nothing."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, TextIO

from offramp_cloud.admission import Admission
from offramp_cloud.backends import Backend, LocalBackend
from offramp_cloud.gateway import Gateway, GatewaySettings
from offramp_cloud.outside import Outside, seen
from offramp_cloud.placement import check_address, limits_of, placement_of, secure_own_ray
from offramp_cloud.quotas import Quota
from offramp_cloud.served import JsonFormatter, LineFormatter
from offramp_cloud.stdout import stdout_alone
from offramp_common.bundle import Bundle
from offramp_common.certs import pair_of
from offramp_common.cli import INTERRUPTED, OK
from offramp_common.errors import ConfigError
from offramp_common.revocation import FILE_NAME, Revocations
from offramp_common.tracing import Tracer

if TYPE_CHECKING:
    import grpc

log = logging.getLogger("offramp_cloud")


def serve(args: argparse.Namespace) -> int:
    """Returns the exit code; raises ConfigError for a set-up that cannot work."""
    _configure_log(args.json_log)
    bundles = [Bundle.read(path) for path in args.bundle]
    names = [bundle.manifest.name for bundle in bundles]
    if len(set(names)) != len(names):
        raise ConfigError(f"bundles {names}: two share a name; devices ask for bundles by name")
    for bundle in bundles:
        bundle.verify()  # a replica that finds the damage tells it late and at length
    with stdout_alone() as ready_line:
        return asyncio.run(_serve(args, ready_line))


async def _serve(args: argparse.Namespace, ready_line: TextIO) -> int:
    stop = _Stop()
    gateway = Gateway(_settings(args), _credentials(args), revocations=_revocations(args))
    backend: Backend | None = None
    stop.listen()
    async with seen(args, gateway) as outside:
        try:
            listening = gateway.bind()  # before anything slow
            outside.listen()
            backend = await _backend(args, stop, outside.tracer)
            if not stop.told_while_starting():
                await gateway.start(backend)
                await outside.ready()
                _announce(gateway, listening, outside, ready_line)
                await stop.told.wait()
                log.info("stopping: no new requests, up to %g s for those at work", args.drain_s)
        except Exception:
            if backend is not None or not stop.told.is_set():
                raise
        finally:
            in_time = await gateway.drain(stop.again)
            if backend is not None:
                await backend.close()
    log.info("stopped" if in_time else "stopped; some requests were cut off")
    return stop.exit_code


async def _backend(args: argparse.Namespace, stop: _Stop, tracer: Tracer) -> Backend:
    """In threads, so that signals are heard meanwhile."""
    started_s = time.monotonic()
    backend: Backend
    if args.local:
        backend = await _local_backend(args, tracer)
    else:
        if args.address is None:
            secure_own_ray()
        else:
            await asyncio.to_thread(check_address, args.address)
        from offramp_cloud import app, cluster

        owned = cluster.Owned()
        if args.attach:
            await asyncio.to_thread(cluster.join_ray, args.address)
        else:
            log.info("%s Ray (about 15 s)", "joining" if args.address else "starting")
            owned = await asyncio.to_thread(
                app.start,
                args.bundle,
                placement_of(args),
                address=args.address,
                stopped=stop.told_while_starting,
            )
        backend = await app.backend(owned.close, args.attach or owned.apps)
    log.info("%s ready after %.1f s", ", ".join(backend.bundles), time.monotonic() - started_s)
    return backend


async def _local_backend(args: argparse.Namespace, tracer: Tracer) -> LocalBackend:
    from offramp_cloud.engine import load_engine
    from offramp_cloud.host import Host

    placement = placement_of(args)
    engines = [
        await asyncio.to_thread(
            load_engine,
            path,
            threads=placement.threads,
            limits=placement.limits,
            load=placement.load,
            device=placement.device,
            precision=placement.precision,
        )
        for path in args.bundle
    ]
    for engine in engines:
        engine.tracer = tracer
    return LocalBackend(Host(engines))


def _settings(args: argparse.Namespace) -> GatewaySettings:
    quota = Quota(args.device_requests, args.device_layers)
    return GatewaySettings(
        listen=args.listen,
        limits=limits_of(args),
        admission=Admission(
            stall_timeout_s=args.stall_timeout_s, idle_timeout_s=args.idle_timeout_s, quota=quota
        ),
        max_rpcs=args.max_rpcs,
        max_connections=args.max_connections,
        drain_s=args.drain_s,
    )


def _credentials(args: argparse.Namespace) -> grpc.ServerCredentials | None:
    if args.tls_dir is None:
        return None
    from offramp_common.certs import server_credentials

    return server_credentials(args.tls_dir, require_client=not args.anonymous)


def _revocations(args: argparse.Namespace) -> Revocations | None:
    if args.tls_dir is None:
        return None
    listed = args.revoked or args.tls_dir / FILE_NAME
    return Revocations(listed, pair_of(args.tls_dir, "ca").cert)


def _announce(gateway: Gateway, listening: str, outside: Outside, ready_line: TextIO) -> None:
    """The one line on standard output, and the same for people."""
    bundles = sorted({bundle for bundle, _ in gateway.replicas})
    ready = {
        "listening": listening,
        "bundles": bundles,
        "pid": os.getpid(),
        "replica_pids": sorted({replica.pid for replica in gateway.replicas.values()}),
        "metrics": outside.metrics_at,
        "health": outside.health_at,
    }
    print(json.dumps(ready), file=ready_line, flush=True)
    log.info("listening on %s for %s", listening, ", ".join(bundles))


def _configure_log(as_json: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else LineFormatter())
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


class _Stop:
    """SIGINT and SIGTERM as events: once means drain, twice means now."""

    def __init__(self) -> None:
        self.told, self.again = asyncio.Event(), asyncio.Event()
        self.exit_code = OK
        self._loop = asyncio.get_running_loop()

    def listen(self) -> None:
        """Until the event loop ends."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._on_signal, number)

    def told_while_starting(self) -> bool:
        """For the thread that starts things to ask between two steps.

        Ray puts a handler for SIGTERM of its own in place, which ends in an abort: ours is put back.
        """
        self._loop.call_soon_threadsafe(self.listen)
        return self.told.is_set()

    def _on_signal(self, number: signal.Signals) -> None:
        if self.told.is_set():
            self.again.set()
        self.told.set()
        if number == signal.SIGINT:
            self.exit_code = INTERRUPTED
