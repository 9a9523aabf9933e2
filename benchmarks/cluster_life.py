"""What do devices notice of a roll-out, and of the deaths of a replica, a node, Serve's controller and a
gateway? In a real Ray cluster of three nodes, under load.

    python benchmarks/cluster_life.py [--requests N] [--settle-s S] [--stages NAME ...] [--json FILE|-]

A head without replicas and two nodes of two CPUs each, every one in processes of its own with a loopback
address of its own; two gateways (`offramp cloud serve --attach`); a toy bundle of three layers, four
replicas. Devices of two versions send requests, one after another each, through either gateway, and check
every answer against their own version's. A request that is UNAVAILABLE or RESOURCE_EXHAUSTED, or whose
gateway is gone, is sent again through the other gateway, for 20 s at most: then it has failed.

    roll        `offramp cloud deploy` puts version 2 beside version 1, during N requests
    bad         the same with a bundle whose weights are no numbers: it is to be taken back
    replica, controller, node, gateway     are killed with SIGKILL; "recovered" when as many replicas
                answer as before (controller: when it runs again; gateway: when the other one has answered)

What a stage counts: requests, failed, wrong answers, those sent again, the longest that any took, and
the longest time without an answer to anybody.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from device_load import DEVICES, Load, Tally, version_of
from ray_nodes import Nodes, descendants, named, ray_nodes, tiny_bundle

from offramp_common.bundle import Bundle
from offramp_common.cli import write_json

STAGES = ("roll", "bad", "replica", "controller", "node", "gateway")
REPLICAS = 2  # of each version
_RECOVERS_S = 90.0


@dataclass
class Gateway:
    """`offramp cloud serve --attach` as a process."""

    process: subprocess.Popen[bytes]
    ready: dict[str, Any]

    def replicas(self) -> set[str]:
        """Those that answered it lately and live: process ids, as labels."""
        url = f"http://{self.ready['metrics']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as page:
            lines = page.read().decode().splitlines()
        found = {
            line.partition('replica="')[2].partition("@")[0]
            for line in lines
            if line.startswith("offramp_engine_requests_total{")
        }
        return {pid for pid in found if named("ray::", [int(pid)])}


def start_gateway(nodes: Nodes, log: Path) -> Gateway:
    arguments = ["cloud", "serve", "--attach", "tiny", "--address", nodes.address, "--insecure"]
    arguments += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "offramp_common", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=nodes.environment,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a gateway did not start: {log.read_text()[-2000:]}")
    return Gateway(process, json.loads(line))


async def deploy(nodes: Nodes, bundle: Bundle, *arguments: str) -> tuple[int, dict[str, Any]]:
    """`offramp cloud deploy`: its exit code and what it says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "offramp_common", "cloud", "deploy", str(bundle.path)),
        *("--address", nodes.address, "--replicas", str(REPLICAS), "--cpus", "0.5"),
        *("--json", "-", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=nodes.environment,
    )
    out, said = await process.communicate()
    if not out:
        raise SystemExit(f"deploy said nothing: {said.decode()[-2000:]}")
    return process.returncode or 0, json.loads(out)


@dataclass
class World:
    """Everything that a stage may need."""

    nodes: Nodes
    gateways: list[Gateway]
    load: Load
    bundles: dict[str, Bundle]
    requests: int
    settle_s: float

    async def roll(self) -> dict[str, Any]:
        second = await version_of(self.bundles["2"])
        rolling = asyncio.create_task(
            deploy(self.nodes, self.bundles["2"], "--watch-s", "3", "--keep", "2")
        )
        # Its devices come as soon as anybody answers them, in the middle of the roll.
        while not (rolling.done() or await self.load.is_served(second)):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        self.load.versions.append(second)
        code, said = await rolling
        await until(lambda: self.load.tally.requests >= self.requests, 10 * _RECOVERS_S)
        return {"exit_code": code, "deploy": said}

    async def bad(self) -> dict[str, Any]:
        code, said = await deploy(self.nodes, self.bundles["bad"])
        return {"exit_code": code, "deploy": said}

    async def replica(self) -> dict[str, Any]:
        before = self.gateways[0].replicas()
        killed = min(before)
        os.kill(int(killed), signal.SIGKILL)
        return await self._recovered(lambda: len(self.gateways[0].replicas() - {killed}), before)

    async def node(self) -> dict[str, Any]:
        before = self.gateways[0].replicas()
        there = {str(pid) for pid in descendants(self.nodes.running["127.0.0.3"].pid)}
        self.nodes.kill("127.0.0.3")
        await asyncio.to_thread(self.nodes.join, "127.0.0.3", REPLICAS)
        found = await self._recovered(lambda: len(self.gateways[0].replicas() - there), before)
        return {"replicas_lost": len(before & there), **found}

    async def controller(self) -> dict[str, Any]:
        def running() -> list[int]:
            everywhere = [
                pid for each in self.nodes.running.values() for pid in descendants(each.pid)
            ]
            return named("ray::ServeController", everywhere)

        (old,) = running()
        os.kill(old, signal.SIGKILL)
        return await self._recovered(lambda: len(set(running()) - {old}), {"one"})

    async def gateway(self) -> dict[str, Any]:
        self.gateways[1].process.kill()
        self.gateways[1].process.wait()
        answered = self.load.tally.requests + 10 * DEVICES
        return await self._recovered(lambda: int(self.load.tally.requests > answered), {"one"})

    async def _recovered(self, count: Callable[[], int], before: set[str]) -> dict[str, Any]:
        started_s = time.monotonic()
        ok = await until(lambda: count() >= len(before), _RECOVERS_S)
        return {"recovered": ok, "recovery_s": round(time.monotonic() - started_s, 1)}

    async def run(self, stage: str) -> dict[str, Any]:
        print(f"{stage} ...", file=sys.stderr)
        await until(lambda: self.load.tally.requests > 4 * DEVICES, _RECOVERS_S)
        tally = self.load.tally = Tally()
        what: Callable[[], Awaitable[dict[str, Any]]] = getattr(self, stage)
        found = await what()
        await asyncio.sleep(self.settle_s)
        found = {"stage": stage, **found, **tally.to_json()}
        print(json.dumps(found), file=sys.stderr)
        return found


async def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether it came true in time."""
    until_s = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        if time.monotonic() > until_s:
            return False
        await asyncio.sleep(0.1)
    return True


async def live(nodes: Nodes, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    bundles = {
        name: tiny_bundle(folder / name / "tiny", seed, broken=name == "bad")
        for seed, name in enumerate(("1", "2", "bad"))
    }
    code, said = await deploy(nodes, bundles["1"], "--watch-s", "1")
    if code:
        raise SystemExit(f"version 1 is not up: {said}")
    gateways = [start_gateway(nodes, folder / f"gateway-{number}.log") for number in range(2)]
    try:
        first = await version_of(bundles["1"])
        load = Load([each.ready["listening"] for each in gateways], [first])
        world = World(nodes, gateways, load, bundles, args.requests, args.settle_s)
        try:
            return [await world.run(stage) for stage in args.stages]
        finally:
            await load.close()
    finally:
        for each in gateways:
            each.process.terminate()
            each.process.wait()


def _told_to_stop(number: int, frame: Any) -> None:
    """Once: the cluster is taken down first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000, metavar="N", help="of the roll")
    parser.add_argument("--settle-s", type=float, default=5.0, metavar="S", help="after each stage")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _told_to_stop)
    about = report.about("Ray 2.60")
    with (
        tempfile.TemporaryDirectory(prefix="offramp-life-") as folder,
        ray_nodes(workers=2, cpus=REPLICAS) as nodes,
    ):
        stages = asyncio.run(live(nodes, args, Path(folder)))
    for each in stages:
        print(json.dumps(each), file=sys.stderr)
    if args.json:
        write_json({**about, "stages": stages}, args.json)


if __name__ == "__main__":
    main()
