"""Event loops that live one after another in one process: gRPC has nothing to say to one that is gone."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
from edge_cloud import cloud_of

from offramp_common.bundle import Bundle

_LIVES = 12  # each worker's end met gRPC's last events in about every second life


def stderr_of(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        # asyncio's debug mode would tell of a slow machine there.
        env={name: value for name, value in os.environ.items() if name != "PYTHONASYNCIODEBUG"},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def deaf() -> Iterator[str]:
    """The address of a cloud that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


async def test_transports_that_are_closed_one_after_another_leave_standard_error_clean(
    bundle: Bundle,
) -> None:
    async with cloud_of(bundle) as cloud:
        program = f"""
            import asyncio, sys, threading
            from offramp_common.errors import RequestError
            from offramp_common.transport import Hello, Offload
            from offramp_edge.grpc_transport import GrpcTransport

            async def life(address):
                transport = GrpcTransport(address)
                for ask in (
                    transport.hello(Hello("other", {{}}, ("fp32",)), timeout_s=20),
                    transport.complete(Offload("r", "other", b"", b""), timeout_s=20),
                ):
                    try:
                        await ask
                    except RequestError:
                        pass  # it is answered, which is all that is wanted
                await transport.close()

            for number in range({_LIVES}):
                thread = threading.Thread(target=lambda: asyncio.run(life(sys.argv[1])))
                thread.start()
                thread.join()
            asyncio.run(life(sys.argv[1]))
        """
        assert await asyncio.to_thread(stderr_of, program, cloud.address) == ""


def test_workers_that_are_closed_while_they_greet_leave_standard_error_clean(
    bundle: Bundle, deaf: str
) -> None:
    program = f"""
        import sys
        from dataclasses import replace
        from offramp_common.runner import Step
        from offramp_edge import EdgeWorker

        class Nothing:
            n_layers = {bundle.n_layers}

            def step(self, acts, knobs):
                return Step(replace(acts, depth=acts.depth + 1), None)

        for number in range({_LIVES}):
            EdgeWorker(sys.argv[1], sys.argv[2], layers=Nothing(), split=2).close()
        with EdgeWorker(sys.argv[1], sys.argv[2], layers=Nothing(), split=2):
            pass  # its loop hears what was meant for those before
    """
    assert stderr_of(program, str(bundle.path), deaf) == ""
