"""What `offramp cloud serve` does: bind, start a backend, serve until told to stop, leave nothing."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from offramp_cloud.backends import Backend, LocalBackend
from offramp_cloud.gateway import Gateway, GatewaySettings
from offramp_cloud.host import Host
from offramp_cloud.metrics import Metrics
from offramp_cloud.placement import Placement, check_address, secure_own_ray
from offramp_cloud.served import JsonFormatter, LineFormatter
from offramp_cloud.waiting import Load
from offramp_common.bundle import Bundle
from offramp_common.cli import INTERRUPTED, OK
from offramp_common.errors import ConfigError
from offramp_common.frames import Limits

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
    with _stdout_alone() as ready_line:
        return asyncio.run(_serve(args, ready_line))


@contextlib.contextmanager
def _stdout_alone() -> Iterator[TextIO]:
    """Standard output for our one line; what else writes there, Ray's processes too, goes to
    standard error meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with open(kept, "w", closefd=False) as stdout:
            yield stdout
    finally:
        os.dup2(kept, 1)
        os.close(kept)


async def _serve(args: argparse.Namespace, ready_line: TextIO) -> int:
    stop = _Stop()
    gateway = Gateway(_settings(args), _credentials(args))
    metrics = Metrics(lambda: gateway.replicas)
    gateway.observers.append(metrics.observe)
    backend: Backend | None = None
    stop.listen()
    with contextlib.closing(metrics):
        try:
            listening = gateway.bind()  # before anything slow
            metrics_at = metrics.listen(args.metrics) if args.metrics else None
            backend = await _backend(args, stop)
            if not stop.told_while_starting():
                await gateway.start(backend)
                _announce(gateway, listening, metrics_at, ready_line)
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


async def _backend(args: argparse.Namespace, stop: _Stop) -> Backend:
    """In threads, so that signals are heard meanwhile."""
    limits = Limits(max_frame_bytes=args.max_frame_bytes, max_rows=args.max_rows)
    load = Load(max_batch=args.max_batch, max_waiting_rows=args.max_waiting)
    started_s = time.monotonic()
    backend: Backend
    if args.local:
        from offramp_cloud.engine import load_engine

        engines = [
            await asyncio.to_thread(
                load_engine, path, threads=args.threads, limits=limits, load=load
            )
            for path in args.bundle
        ]
        backend = LocalBackend(Host(engines))
    else:
        if args.address is None:
            secure_own_ray()
        else:
            await asyncio.to_thread(check_address, args.address)
        from offramp_cloud import app

        if args.attach:
            backend = await app.attach(args.attach, args.address)
        else:
            log.info("%s Ray (about 15 s)", "joining" if args.address else "starting")
            placement = Placement(args.replicas, args.threads, args.drain_s, limits, load)
            backend = await asyncio.to_thread(
                app.start,
                args.bundle,
                placement,
                address=args.address,
                stopped=stop.told_while_starting,
            )
    log.info("%s ready after %.1f s", ", ".join(backend.bundles), time.monotonic() - started_s)
    return backend


def _settings(args: argparse.Namespace) -> GatewaySettings:
    return GatewaySettings(
        listen=args.listen,
        limits=Limits(max_frame_bytes=args.max_frame_bytes, max_rows=args.max_rows),
        max_rpcs=args.max_rpcs,
        drain_s=args.drain_s,
    )


def _credentials(args: argparse.Namespace) -> grpc.ServerCredentials | None:
    if args.tls_dir is None:
        return None
    from offramp_common.certs import server_credentials

    return server_credentials(args.tls_dir, require_client=args.require_client_cert)


def _announce(gateway: Gateway, listening: str, metrics_at: str | None, ready_line: TextIO) -> None:
    """The one line on standard output, and the same for people."""
    bundles = sorted({bundle for bundle, _ in gateway.replicas})
    ready = {
        "listening": listening,
        "bundles": bundles,
        "pid": os.getpid(),
        "replica_pids": sorted({pid for _, pid in gateway.replicas}),
        "metrics": metrics_at,
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
