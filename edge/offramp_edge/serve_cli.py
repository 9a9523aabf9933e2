"""`offramp edge serve`: the local service as a process."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal

from offramp_common.cli import OK
from offramp_common.errors import ConfigError
from offramp_edge.cli import log_to_stderr, traced, worker_from
from offramp_edge.connect import is_loopback, split_address

log = logging.getLogger("offramp.edge")


def serve(args: argparse.Namespace) -> int:
    """Serve until interrupted or asked to end. One JSON line on standard output says where."""
    log_to_stderr(args.verbose)
    host, port = split_address(args.listen)
    if not is_loopback(host):
        log.warning(
            "listening on %s: whoever reaches this address can ask, without TLS or a password; "
            "use 127.0.0.1 unless that is meant",
            args.listen,
        )
    args.logits = True  # a request may ask for them
    return asyncio.run(_serve(args, host, port))


async def _serve(args: argparse.Namespace, host: str, port: int) -> int:
    from aiohttp import web

    from offramp_edge.service import Service

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with worker_from(args) as worker:
        files = {name: getattr(args, name) for name in ("ca", "cert") if getattr(args, name)}
        runner = web.AppRunner(Service(worker, files).app(), access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            try:
                await site.start()
            except OSError as error:
                raise ConfigError(f"--listen {args.listen}: {error.strerror}") from error
            name, bound = runner.addresses[0][:2]
            listening = f"[{name}]:{bound}" if ":" in name else f"{name}:{bound}"
            about = {
                "listening": listening,
                "model": worker.bundle.manifest.name,
                "pid": os.getpid(),
            }
            with traced(worker, args.trace):
                print(json.dumps(about), flush=True)
                await stop.wait()
        finally:
            await runner.cleanup()
    return OK
