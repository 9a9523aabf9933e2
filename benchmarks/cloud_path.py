"""What does the way to a replica cost beside a bare gRPC echo, and beside Ray Serve's own gRPC ingress?

    python benchmarks/cloud_path.py [--rounds N] [--quick] [--json FILE|-]

One request, 100 KB, with a reply of 400 bytes, over four ways that stand at the same time and are
measured in turns:

    echo      a grpc.aio server in a process of its own: what gRPC in Python costs
    offramp   gateway (own process) -> one replica's port (own process, TLS both ways), through the gateway's
              whole servicer: parsing the header, admission, quotas, balance
    handle    the same gateway -> Serve handle with its throughput switches (what 0003 used)
    ingress   Serve's own gRPC proxy, defaults

The replica answers at once: the path is what is measured. Devices speak without TLS on all four, since
Serve's ingress has none. Callers send the next request when the last is answered. Clients, gateways and
replicas share the machine's cores. The bars (issue 5): added p50 over the echo at most 3 ms and a third of
what the ingress adds, throughput at 8 callers at least 2.5 times the ingress's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from statistics import median
from typing import Any

import grpc
from cloud_ways import (
    BUNDLE,
    DIGEST,
    OPTIONS,
    echo,
    handle_gateway,
    in_process,
    offramp_gateway,
    replica,
    serve_ray,
)
from report import about

from offramp_cloud.placement import secure_own_ray
from offramp_common.cli import write_json
from offramp_common.wire import offload_pb2 as pb
from offramp_common.wire import offload_pb2_grpc as pb_grpc

FRAME = 100_000
CALLERS = {1: 400, 8: 1600}  # callers -> requests of a turn
WARM_UP = 100


async def measure(address: str, callers: int, requests: int, metadata: Any) -> dict[str, float]:
    """p50 and p95 in ms, and requests/s."""
    request = pb.OffloadRequest(
        request_id="r", bundle=BUNDLE, digest=DIGEST, frame=os.urandom(FRAME)
    )
    latencies_ms: list[float] = []
    left = requests
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = pb_grpc.OffloadServiceStub(channel)  # type: ignore[no-untyped-call]
        for _ in range(WARM_UP):
            await stub.Complete(request, metadata=metadata)

        async def caller() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                started_s = time.perf_counter()
                await stub.Complete(request, metadata=metadata)
                latencies_ms.append((time.perf_counter() - started_s) * 1e3)

        started_s = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        taken_s = time.perf_counter() - started_s
    ordered = sorted(latencies_ms)
    return {
        "p50_ms": median(ordered),
        "p95_ms": ordered[int(0.95 * len(ordered))],
        "requests_per_s": requests / taken_s,
    }


def rounds_of(ways: dict[str, tuple[str, Any]], rounds: int, scale: float) -> list[dict[str, Any]]:
    runs = []
    for round_ in range(rounds):
        for callers, requests in CALLERS.items():
            for way, (address, metadata) in ways.items():
                got = asyncio.run(measure(address, callers, int(requests * scale), metadata))
                runs.append({"round": round_, "way": way, "callers": callers} | got)
                print(json.dumps(runs[-1]), file=sys.stderr)
    return runs


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds of each way, and of what is compared within a round."""
    found: dict[str, Any] = {}
    for callers in CALLERS:
        turns = [
            {run["way"]: run for run in runs if (run["round"], run["callers"]) == (turn, callers)}
            for turn in range(1 + max(run["round"] for run in runs))
        ]
        added = [
            {way: turn[way]["p50_ms"] - turn["echo"]["p50_ms"] for way in turn} for turn in turns
        ]
        names = turns[0].keys()
        found[str(callers)] = {
            "p50_ms": {way: median(t[way]["p50_ms"] for t in turns) for way in names},
            "requests_per_s": {
                way: median(t[way]["requests_per_s"] for t in turns) for way in names
            },
            "added_p50_ms": {way: median(each[way] for each in added) for way in names},
            "added_share_of_ingress": median(each["offramp"] / each["ingress"] for each in added),
            "throughput_over_ingress": median(
                t["offramp"]["requests_per_s"] / t["ingress"]["requests_per_s"] for t in turns
            ),
        }
    return found


def report(found: dict[str, Any]) -> None:
    print("| way | callers | p50 ms | added to the echo, ms | requests/s |")
    print("| --- | --- | --- | --- | --- |")
    for callers, at in found.items():
        for way in at["p50_ms"]:
            print(
                f"| {way} | {callers} | {at['p50_ms'][way]:.1f} | {at['added_p50_ms'][way]:.1f} | "
                f"{at['requests_per_s'][way]:.0f} |"
            )
    for callers, at in found.items():
        print(
            f"\n{callers} callers: adds {at['added_share_of_ingress']:.2f} of what Serve's ingress "
            f"adds, at {at['throughput_over_ingress']:.1f} times its requests"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests, one round")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    here = about("grpc.aio, loopback, frames of 100 KB")
    secure_own_ray()  # for the processes that are started now
    started = [in_process(echo), in_process(replica), in_process(serve_ray)]
    try:
        (ray_address, ingress) = started[2][2]
        started.append(in_process(offramp_gateway, started[1][2]))
        started.append(in_process(handle_gateway, ray_address))
        ways = {
            "echo": (started[0][2], None),
            "offramp": (started[3][2], None),
            "handle": (started[4][2], None),
            "ingress": (ingress, (("application", "ingress"),)),
        }
        runs = rounds_of(ways, 1 if args.quick else args.rounds, 0.1 if args.quick else 1.0)
    finally:
        for process, say, _ in started:
            if process is started[2][0]:
                say.send(None)
                process.join(30)
            process.terminate()
            process.join()
    found = summary(runs)
    report(found)
    if args.json:
        write_json({**here, "summary": found, "runs": runs}, args.json)


if __name__ == "__main__":
    main()
