"""What travels beside the messages: a device's connection, TLS record by TLS record.

    python benchmarks/beside_bytes.py [--json FILE|-]

A relay between device and `offramp link` (profile lte) reads the lengths of TLS records, which are in the
clear. Counted: a connection with its greeting, requests of two sizes one at a time and at random times, a
second greeting, silence, and requests given up. The simulator's `link.beside_nbytes` and
`offramp_simulate/beside.py` have their figures from here. Some two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report
from validation.place import DEVICE

from offramp_common import certs
from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_edge import EdgeWorker
from offramp_edge.answers import Answer, Sample
from offramp_edge.settings import EdgeSettings
from offramp_simulate.processes import Child

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "assistant-intents"
TEXT = "what is the weather going to be like in the city of boston tomorrow"
_HEADER_NBYTES = 5  # of a TLS record: kind, version, length
_START_S = 120.0
_SETTLE_S = 0.5


@dataclass
class Way:
    """One direction of all connections: every TLS record's length with its header, in order."""

    records: list[int] = field(default_factory=list)
    nbytes: int = 0


class Relay:
    """A TCP proxy that reads along."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self.up, self.down, self.connections = Way(), Way(), 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there, back = await asyncio.open_connection(*self._target)
        await asyncio.gather(
            self._carry(reader, back, self.up), self._carry(there, writer, self.down)
        )

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way
    ) -> None:
        held = b""
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(data)
                way.nbytes += len(data)
                held += data
                while len(held) >= _HEADER_NBYTES:
                    whole = _HEADER_NBYTES + int.from_bytes(held[3:5], "big")
                    if len(held) < whole:
                        break
                    way.records.append(whole)
                    held = held[whole:]
        writer.close()


class Counted:
    """Bytes and records of both ways since the last call, beside those of messages."""

    def __init__(self, relay: Relay) -> None:
        self._relay, self._seen, self._began_s = relay, (0, 0, 0, 0), time.perf_counter()

    async def since(self, answers: list[Answer]) -> dict[str, Any]:
        await asyncio.sleep(_SETTLE_S)
        up, down = self._relay.up, self._relay.down
        before, self._seen = (
            self._seen,
            (up.nbytes, down.nbytes, len(up.records), len(down.records)),
        )
        began_s, self._began_s = self._began_s, time.perf_counter()
        messages = len(answers)
        found: dict[str, Any] = {"messages": messages, "seconds": round(self._began_s - began_s, 2)}
        for place, (name, way) in enumerate((("up", up), ("down", down))):
            own = sum(getattr(answer, f"bytes_{name}") for answer in answers)
            beside = way.nbytes - before[place] - own
            found[name] = {
                "nbytes": beside + own,
                "beside_nbytes": beside,
                "records": Counter(way.records[before[2 + place] :]).most_common(12),
            }
            if messages:
                found[name]["beside_each"] = round(beside / messages, 1)
        return found


async def _asked(
    worker: EdgeWorker, requests: int, rate_per_s: float = 0.0, deadline_ms: float | None = None
) -> list[Answer]:
    """One at a time, or at random times where there is a rate."""
    rng, tasks, answers = random.Random(1), [], []
    for number in range(requests):
        asked = worker.answer_async(Sample(TEXT, id=str(number), deadline_ms=deadline_ms))
        if rate_per_s:
            tasks.append(asyncio.ensure_future(asked))
            await asyncio.sleep(rng.expovariate(rate_per_s))
        else:
            answers.append(await asked)
    return answers + list(await asyncio.gather(*tasks))


async def _of_split(bundle: Bundle, cloud: str, folder: Path, split: int, quick: bool) -> Any:
    """Every phase over one connection, cut at `split`."""
    link = await Child.start("link", "link", "--to", cloud, "--profile", "lte")
    try:
        relay = Relay((await link.read(_START_S))["listening"])
        async with relay.listening() as address:
            counted, found = Counted(relay), dict[str, Any]()
            worker = await asyncio.to_thread(_worker, bundle, address, folder, split)
            try:
                await asyncio.sleep(1.5)
                found["connection and greeting"] = await counted.since([])
                found["first request"] = await counted.since(await _asked(worker, 1))
                few = 20 if quick else 100
                found["one at a time"] = await counted.since(await _asked(worker, few))
                found["at random, 8 a second"] = await counted.since(await _asked(worker, few, 8.0))
                session = worker.agent.session
                assert session is not None
                worker._loop.call_soon_threadsafe(session.breaker.ask.set)
                await asyncio.sleep(1.5)
                found["second greeting"] = await counted.since([])
                await asyncio.sleep(5 if quick else 15)
                found["silence"] = await counted.since([])
                given_up = await _asked(worker, 20, deadline_ms=35.0)
                found["given up"] = await counted.since(given_up)
                found["given up"]["in the cloud"] = sum(a.where == "cloud" for a in given_up)
                found["connections"] = relay.connections
            finally:
                await asyncio.to_thread(worker.close)
        return found
    finally:
        await link.stop()


def _worker(bundle: Bundle, address: str, folder: Path, split: int) -> EdgeWorker:
    pair, ca = certs.pair_of(folder, DEVICE), certs.pair_of(folder, "ca").cert
    settings = EdgeSettings(split=split, exits=False)
    return EdgeWorker(bundle, ca=ca, cert=pair.cert, key=pair.key, cloud=address, settings=settings)


async def measured(bundle: Bundle, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="offramp-beside-") as name:
        folder = Path(name)
        certs.init(folder)
        certs.issue(folder, DEVICE)
        arguments = ("--listen", "127.0.0.1:0", "--local", "--tls-dir", name)
        cloud = await Child.start(
            "cloud", "cloud", "serve", "--bundle", str(bundle.path), *arguments
        )
        try:
            target = (await cloud.read(_START_S))["listening"]
            return {
                f"split {split}": await _of_split(bundle, target, folder, split, quick)
                for split in (0, 2)
            }
        finally:
            await cloud.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few requests, to see that it runs")
    parser.add_argument("--json", metavar="FILE", help="what was counted (-: standard output)")
    args = parser.parse_args()
    found = asyncio.run(measured(Bundle.read(BUNDLE), args.quick))
    for split, phases in found.items():
        for phase, value in phases.items():
            print(split, phase, value, sep=" | ", file=sys.stderr)
    if args.json:
        write_json({**report.about(), "phases": found}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
