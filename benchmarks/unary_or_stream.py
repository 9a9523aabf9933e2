"""One gRPC call for each request, or one stream for all: what each costs the device.

    python benchmarks/unary_or_stream.py --bundle DIR [--requests N] [--rounds N] [--json FILE|-]

Starts `offramp cloud serve --local` with the bundle and sends it one frame again and again, cut one
layer before the end, by unary calls and by the worker's own transport (a stream). The two take
turns. Printed are medians over rounds: milliseconds a request, CPU microseconds of this process a
request (the device's side), and bytes on the wire beside the messages (counted by a relay in a run
of its own: HTTP/2 headers, without TCP and IP).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import report

from offramp_common.activations import Activations
from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_common.frames import encode_frame
from offramp_common.messages import completion_from_pb, completion_to_pb, offload_to_pb
from offramp_common.spec import never_exit
from offramp_common.transport import Offload
from offramp_common.wire import offload_pb2_grpc as pb_grpc
from offramp_edge.grpc_transport import GrpcTransport

_TOKENS = 24
_TIMEOUT_S = 30.0
_CALLERS = (1, 8)
Send = Callable[[Offload], Awaitable[Any]]


def work_of(bundle: Bundle) -> Offload:
    """A made-up sample of 24 tokens before the last layer, so that the cloud has little to do."""
    cut = bundle.cuts[bundle.n_layers - 1]
    hidden = np.random.default_rng(0).standard_normal((1, _TOKENS, cut.width)).astype(np.float32)
    state = {
        name: np.zeros((1, *entry.shape), entry.dtype)
        for name, entry in cut.state.items()
        if not entry.per_token
    }
    acts = Activations(hidden, np.array([_TOKENS]), cut.depth, state)
    frame = encode_frame(acts, cut, "int8")
    knobs = never_exit(bundle.manifest.knobs, bundle.n_layers)
    return Offload("r", bundle.manifest.name, bundle.digest(cut.depth), frame, knobs)


class Unary:
    """A call for each request."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._stub: Any = pb_grpc.OffloadServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def send(self, work: Offload) -> Any:
        reply = await self._stub.Complete(offload_to_pb(work), timeout=_TIMEOUT_S)
        return completion_from_pb(reply)

    async def close(self) -> None:
        await self._channel.close(None)


class Stream:
    """The worker's transport."""

    def __init__(self, target: str) -> None:
        self._transport = GrpcTransport(target)

    async def send(self, work: Offload) -> Any:
        return await self._transport.complete(work, timeout_s=_TIMEOUT_S)

    async def close(self) -> None:
        await self._transport.close()


KINDS: dict[str, type[Unary] | type[Stream]] = {"unary": Unary, "stream": Stream}


async def burst(send: Send, work: Offload, requests: int, callers: int) -> dict[str, float]:
    """`callers` at once, each waiting for its answer before it asks again."""
    ms: list[float] = []

    async def caller(name: int) -> None:
        for number in range(requests // callers):
            began_s = time.perf_counter()
            await send(_named(work, f"{name}-{number}"))
            ms.append(1000 * (time.perf_counter() - began_s))

    cpu_s = time.process_time()
    await asyncio.gather(*map(caller, range(callers)))
    return {
        "ms": statistics.median(ms),
        "cpu_us": 1e6 * (time.process_time() - cpu_s) / len(ms),
    }


def _named(work: Offload, name: str) -> Offload:
    return Offload(name, work.bundle, work.digest, work.frame, work.knobs, 1000.0)


async def timed(target: str, work: Offload, requests: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds, by kind and number of callers."""
    clients = {name: kind(target) for name, kind in KINDS.items()}
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for number in range(rounds + 1):
        for callers in _CALLERS:
            for name, client in clients.items():
                result = await burst(client.send, work, requests, callers)
                if number:  # the first round warms up
                    found.setdefault((name, callers), []).append(result)
    for client in clients.values():
        await client.close()
    return {
        f"{name}, {callers} at once": {
            key: statistics.median(result[key] for result in results) for key in ("ms", "cpu_us")
        }
        for (name, callers), results in found.items()
    }


async def overheads(target: str, work: Offload, requests: int) -> dict[str, dict[str, float]]:
    """Bytes on the wire a request, beside the messages, on a connection that has been used."""
    return {name: await _overhead(kind, target, work, requests) for name, kind in KINDS.items()}


async def _overhead(
    kind: type[Unary] | type[Stream], target: str, work: Offload, requests: int
) -> dict[str, float]:
    host, _, port = target.rpartition(":")
    counts = {"up": 0, "down": 0}

    async def relay(way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            counts[way] += len(data)
            writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(relay("up", reader, far_writer), relay("down", far_reader, writer))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        near = server.sockets[0].getsockname()[1]
        client = kind(f"127.0.0.1:{near}")
        await burst(client.send, work, 10, 1)
        before, messages = dict(counts), {"up": 0, "down": 0}
        for number in range(requests):
            named = _named(work, f"0-{number}")
            reply = await client.send(named)
            messages["up"] += offload_to_pb(named).ByteSize()
            messages["down"] += completion_to_pb(reply).ByteSize()
        await client.close()
        return {way: (counts[way] - before[way] - messages[way]) / requests for way in counts}


async def measured(args: argparse.Namespace) -> dict[str, Any]:
    command = ["cloud", "serve", "--local", "--insecure", "--listen", "127.0.0.1:0", "--bundle"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "offramp_common", *command, str(args.bundle)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        target = json.loads(await process.stdout.readline())["listening"]
        work = work_of(Bundle.read(args.bundle))
        rows = await timed(target, work, args.requests, args.rounds)
        beside = await overheads(target, work, args.requests)
        return {"frame_bytes": len(work.frame), "rows": rows, "bytes_beside_messages": beside}
    finally:
        process.terminate()
        await process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", required=True, type=Path, metavar="DIR")
    parser.add_argument("--requests", type=int, default=200, metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    found = {
        **report.about(f"grpcio {grpc.__version__}"),
        **asyncio.run(measured(args)),
    }
    out = sys.stderr if args.json == "-" else sys.stdout
    for name, row in found["rows"].items():
        print(f"{name:20} p50 {row['ms']:7.2f} ms   CPU {row['cpu_us']:6.0f} us", file=out)
    for name, row in found["bytes_beside_messages"].items():
        print(
            f"{name:20} bytes beside the messages: up {row['up']:.0f}, down {row['down']:.0f}",
            file=out,
        )
    print(
        f"a frame of {found['frame_bytes']} bytes; {found['hardware']}; {found['commit']}", file=out
    )
    if args.json:
        write_json(found, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
