"""The engine's elevator against other ways to serve the same requests.

    python benchmarks/engine/throughput.py --model minilm|mpnet --data clinc150 [--clients 1 4 16 64]
        [--rounds N] [--seconds S] [--bundle DIR] [--folder FOLDER] [--json FILE|-]

One process, one thread, no network. Time is the thread's own (--clock cpu), which on an idle machine is the
time that passes and on a busy one leaves out the waiting for a processor; --clock wall is the other.

Closed-loop clients enter at four depths with real sentences and the bundle's real exits (workload.py). All
servers take turns, N rounds of A B C ..., each with the same requests. Layers are either transformers' own
("torch"), or packed ones with weights laid out beforehand ("packed").
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from closed_loop import closed_loop
from rivals import Clock, LowestFirst, Maker, PerDepth, Riding, Server, perfect_batch
from workload import Workload, of_bundle, of_mpnet

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_model.packed_layers import PackedLayers
from offramp_model.split_model import TorchLayers

ROWS = 400
FILES = {
    "clinc150": "clinc150/test.tsv",
    "sst2": "sst2/test.tsv",
    "ag_news": "ag_news/test.tsv",
    "movie_reviews_long": "movie_reviews_long/test.tsv",
}


def contenders(work: Workload, clock: Clock) -> dict[str, Maker]:
    """Name -> a fresh server."""
    torch_layers, packed = TorchLayers(work.model), PackedLayers(work.model)

    def per_depth(layers: Any, lead: str, most: int, padding: float) -> Maker:
        return lambda: PerDepth(work, layers, lead, most, padding)

    inf = float("inf")
    return {
        "one by one, torch": per_depth(torch_layers, "oldest", 1, inf),
        "one by one, packed": per_depth(packed, "oldest", 1, inf),
        "per depth, padded, lowest, torch": per_depth(torch_layers, "lowest", 32, 1.25),
        "per depth, padded, most, torch": per_depth(torch_layers, "most", 32, 1.25),
        "per depth, padded without bound, most, torch": per_depth(torch_layers, "most", 32, inf),
        "per depth, packed, lowest": per_depth(packed, "lowest", 32, inf),
        "per depth, packed, most": per_depth(packed, "most", 32, inf),
        "elevator, always fetching": lambda: Riding(work, packed, clock, LowestFirst),
        "elevator": lambda: Riding(work, packed, clock),
    }


def measured(
    work: Workload,
    makers: dict[str, Maker],
    clients: int,
    rounds: int,
    seconds: float,
    clock: Clock,
) -> dict[str, Any]:
    """Every contender's numbers round by round, and the elevator's own accounts."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
    perfect: list[float] = []
    for turn in range(rounds):
        for name, make in makers.items():
            server = make()
            numbers = asdict(closed_loop(server, work.stream(turn), clients, seconds, clock))
            found[name].append(numbers | accounts(server))
            print(f"{clients:4} clients, {name}: {numbers['rate']:.0f}/s", file=sys.stderr)
        perfect.append(perfect_rate(work, clients, turn, seconds, clock))
    return {"clients": clients, "perfect_batch_rate": perfect, "servers": found}


def accounts(server: Server) -> dict[str, float]:
    if not isinstance(server, Riding):
        return {}
    counters = server.counters
    layers = sum(counters.batches.values())
    return {
        "overhead_over_compute": counters.overhead_s / counters.compute_s,
        "rows_per_layer": counters.layer_rows / layers,
    }


def perfect_rate(work: Workload, clients: int, seed: int, seconds: float, clock: Clock) -> float:
    """Requests/s of whole batches of the same stream's requests, one after another."""
    layers, stream = PackedLayers(work.model), work.stream(seed)
    batches = [[next(stream) for _ in range(clients)] for _ in range(64)]
    perfect_batch(work, layers, batches[0])
    done, began_s = 0, clock()
    while clock() - began_s < seconds:
        done += len(perfect_batch(work, layers, batches[done // clients % 64]))
    return done / (clock() - began_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("minilm", "mpnet"), default="minilm")
    parser.add_argument("--data", choices=tuple(FILES), default="clinc150")
    parser.add_argument("--clients", type=int, nargs="+", default=[16])
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/assistant-intents"))
    folder = Path(os.environ.get("OFFRAMP_DATA", "../shared/data"))
    parser.add_argument("--folder", type=Path, default=folder, help="of data sets")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    make: Callable[..., Workload] = of_bundle if args.model == "minilm" else of_mpnet
    work = make(Bundle.read(args.bundle), args.folder / FILES[args.data], args.rows)
    clock = time.thread_time if args.clock == "cpu" else time.perf_counter
    makers = contenders(work, clock)
    if args.only:
        makers = {name: makers[name] for name in args.only}
    result = {
        **report.about(f"torch {torch.__version__}, one thread"),
        "model": args.model,
        "data": args.data,
        "clock": args.clock,
        "workload": work.described(),
        "results": [
            measured(work, makers, clients, args.rounds, args.seconds, clock)
            for clients in args.clients
        ],
    }
    if args.json:
        write_json(result, args.json)
    else:
        print(json.dumps(result["workload"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
