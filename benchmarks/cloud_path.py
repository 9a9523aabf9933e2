"""What does the way through Ray Serve cost a request, and do Serve's throughput switches pay?

    python benchmarks/cloud_path.py [--rounds N] [--json FILE|-]

Three clouds, one after another, N rounds of A B C: the engine in the gateway's own process (`offramp
cloud serve --local`), behind a Serve handle as shipped, and behind one with Serve's defaults. One
replica, one torch thread. The model is random and nearly nothing (two layers, 384 wide, one of them
run), so that the path is what is measured; frames are float32: 8 tokens for 12 KB, 32 for 49 KB.
Callers send the next request when the last is answered. Latencies are a client's, over gRPC on loopback;
client, gateway and replica share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from offramp_common.activations import Activations
from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_common.frames import encode_frame
from offramp_common.messages import offload_to_pb
from offramp_common.spec import TaskSpec
from offramp_common.transport import Offload
from offramp_common.wire import offload_pb2_grpc as pb_grpc
from offramp_model.backbones import backbone_from_config
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_model.store import About, save_model

WIDTH = 384
TOKENS = {"12 KB": 8, "49 KB": 32}
CALLERS = {1: 400, 8: 1200}  # callers -> requests
WARM_UP = 100
CLOUDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "in process": (["--local"], {}),
    "Serve handle": ([], {}),
    "Serve handle, defaults": ([], {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}),
}


def tiny_bundle(path: Path) -> Bundle:
    """Two random layers without a tokenizer worth the name."""
    torch.manual_seed(0)
    config = {
        "model_type": "bert",
        "vocab_size": 32,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    method = METHODS["deebert"]
    task = TaskSpec("classification", ("no", "yes"))
    spec = HeadSpec(task, WIDTH, 2, (1, 2), method.settings)
    model = MultiExitModel(backbone_from_config(config), method, spec).eval()
    return save_model(path, model, "{}", About("tiny", 64, 1))


def request_of(bundle: Bundle, tokens: int) -> Any:
    hidden_BTD = np.random.default_rng(0).normal(size=(1, tokens, WIDTH)).astype(np.float32)
    acts = Activations(hidden_BTD, np.array([tokens]), depth=1)
    frame = encode_frame(acts, bundle.cuts[1], "fp32")
    return offload_to_pb(Offload("r", "tiny", bundle.digest(1), frame))


@contextlib.contextmanager
def cloud(bundle: Bundle, arguments: list[str], variables: dict[str, str]) -> Iterator[str]:
    """The address of a cloud, until the block ends."""
    command = [sys.executable, "-m", "offramp_common", "cloud", "serve", "--listen", "127.0.0.1:0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--bundle", str(bundle.path), *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **variables},
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                sys.exit(f"the cloud did not start: {log.read()}")
            yield json.loads(line)["listening"]
        finally:
            process.terminate()
            process.wait()


async def measure(address: str, request: Any, callers: int, requests: int) -> dict[str, float]:
    """p50 and p95 in ms, requests/s, and the engine's own part of the median."""
    latencies_ms: list[float] = []
    compute_ms: list[float] = []
    left = requests

    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.OffloadServiceStub(channel)  # type: ignore[no-untyped-call]
        for _ in range(WARM_UP):
            await stub.Complete(request)

        async def caller() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                started_s = time.perf_counter()
                reply = await stub.Complete(request)
                latencies_ms.append((time.perf_counter() - started_s) * 1e3)
                compute_ms.append(reply.compute_ms)

        started_s = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        taken_s = time.perf_counter() - started_s
    return {
        "p50_ms": float(np.percentile(latencies_ms, 50)),
        "p95_ms": float(np.percentile(latencies_ms, 95)),
        "requests_per_s": requests / taken_s,
        "compute_p50_ms": statistics.median(compute_ms),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="offramp-path-") as folder:
        bundle = tiny_bundle(Path(folder) / "tiny")
        requests = {size: request_of(bundle, tokens) for size, tokens in TOKENS.items()}
        for round_ in range(args.rounds):
            for name, (arguments, variables) in CLOUDS.items():
                with cloud(bundle, arguments, variables) as address:
                    for size, request in requests.items():
                        for callers, count in CALLERS.items():
                            got = asyncio.run(measure(address, request, callers, count))
                            runs.append(
                                {"round": round_, "cloud": name, "frame": size, "callers": callers}
                                | got
                            )
    report(runs)
    if args.json:
        write_json(
            {
                "command": " ".join(["python", *sys.argv]),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
                "runs": runs,
            },
            args.json,
        )


def report(runs: list[dict[str, Any]]) -> None:
    """Medians over rounds, with the range of the p50."""
    print("| cloud | frame | callers | p50 ms (range) | p95 ms | requests/s | of it engine, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in CLOUDS:
        for size in TOKENS:
            for callers in CALLERS:
                here = [
                    run
                    for run in runs
                    if (run["cloud"], run["frame"], run["callers"]) == (name, size, callers)
                ]
                p50, p95, rate, engine = (
                    [run[key] for run in here]
                    for key in ("p50_ms", "p95_ms", "requests_per_s", "compute_p50_ms")
                )
                print(
                    f"| {name} | {size} | {callers} | {statistics.median(p50):.1f} "
                    f"({min(p50):.1f}-{max(p50):.1f}) | {statistics.median(p95):.1f} | "
                    f"{statistics.median(rate):.0f} | {statistics.median(engine):.1f} |"
                )


if __name__ == "__main__":
    main()
