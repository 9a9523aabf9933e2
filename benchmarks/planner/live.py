"""The planner against every fixed plan, live: real gRPC through the link emulator, a real cloud tier beside
it.

    python benchmarks/planner/live.py [--quick] [--model NAME] [--link N] [--load N] [--min-split K]
        [--mix natural|hard] [--seconds N] [--out DIR]

One cell after another: a link, a load, a model. In a cell all plans take turns, several rounds, each round
the same sentences at the same times and, on a trace, the same stretch of it (the link starts anew). A cell's
result is a JSON file in --out; cells that are there are not run again, so a run may be cut off and started
again.

The device is slow on purpose, or no link could beat it: this machine's layers take a millisecond, and every
layer is followed by a sleep up to a stated time (`layer_ms` in cells.py, about a tenth of this core's
speed). Sleeping takes no processor from the cloud. Hedging is off: each plan is what it says.

--mix hard: three of four sentences are of those the first exit would not let go (a fifth of the test split).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from planner_cells import DATA, LINKS, LOADS, LinkCell, Load, Model, PlanCell, plans

from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_common.runner import run
from offramp_common.text import TextEncoder
from offramp_edge import EdgeWorker
from offramp_edge.runtime import OnnxLayers
from offramp_simulate.processes import Child

sys.path.insert(0, str(Path(__file__).parents[1]))
import report
from slowed import Slowed

ROOT = Path(__file__).parents[2]
_LONGEST_S = 60.0  # for one block
_BEGINS_S = 4.0  # of a trace: there every plan's block begins, however long its first samples took


@dataclass
class Place:
    """All that cells of one model share."""

    model: Model
    bundle: Bundle
    layers: Slowed
    easy: list[str]
    hard: list[str]
    mean_layers: dict[str, float]
    cloud: str

    def texts(self, mix: str, count: int, seed: int) -> list[str]:
        rng = random.Random(seed)
        hard = len(self.hard) / (len(self.easy) + len(self.hard)) if mix == "natural" else 0.75
        return [rng.choice(self.hard if rng.random() < hard else self.easy) for _ in range(count)]

    def local_ms(self, mix: str) -> float:
        """What a sample takes on the device alone, on average."""
        return self.mean_layers[mix] * self.model.layer_ms


def sorted_texts(
    model: Model, bundle: Bundle, limit: int
) -> tuple[list[str], list[str], dict[str, float]]:
    """(left at the first exit, did not; mean depth by mix)."""
    lines = (DATA / model.texts).read_text(encoding="utf-8").splitlines()[1:]
    texts = [line.split("\t")[0] for line in lines]
    texts = random.Random(0).sample(texts, min(limit, len(texts)))
    layers, encode = OnnxLayers(bundle, "fp32"), TextEncoder(bundle)
    knobs = bundle.knobs("fp32")
    easy: list[str] = []
    hard: list[str] = []
    depths: list[int] = []
    for text in texts:
        (left,) = run(layers, encode([text]), bundle.n_layers, knobs).left
        (easy if left.depth == bundle.manifest.exits[0] else hard).append(text)
        depths.append(left.depth)
    first = bundle.manifest.exits[0]
    stay = mean(d for d in depths if d > first)
    return easy, hard, {"natural": mean(depths), "hard": 0.25 * first + 0.75 * stay}


async def block(
    worker: EdgeWorker, texts: Sequence[str], load: Load, local_ms: float, seed: int
) -> list[dict[str, float]]:
    """Milliseconds from when each sample came, and bytes."""
    rng, rows = random.Random(seed), []

    async def one(text: str, came_s: float) -> None:
        answer = await worker.answer_async(text)
        ms = 1000 * (time.perf_counter() - came_s)
        rows.append({"ms": ms, "up": answer.bytes_up, "cloud": float(answer.where == "cloud"),
                     "fallback": float(answer.where == "fallback")})  # fmt: skip

    if not load.busy:
        for text in texts:
            await one(text, time.perf_counter())
        return rows
    tasks, next_s = [], time.perf_counter()
    for text in texts:
        next_s += rng.expovariate(load.busy / (local_ms / 1000))
        await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
        tasks.append(asyncio.create_task(one(text, next_s)))
    await asyncio.wait_for(asyncio.gather(*tasks), _LONGEST_S)
    return rows


async def cell(
    place: Place,
    link: LinkCell,
    load: Load,
    min_split: int,
    mix: str,
    count: int,
    rounds: int,
    rules: bool,
) -> dict[str, Any]:
    """All plans in turns; a trace begins anew with every block, a steady link serves the whole cell."""
    listed = list(plans(place.bundle, min_split, rules))
    found: dict[str, list[list[dict[str, float]]]] = {plan.name: [] for plan in listed}
    began_s = time.perf_counter()
    workers: dict[str, EdgeWorker] = {}
    shared = None if link.trace else await start_link(place, link)
    try:
        if shared is not None:
            for plan in listed:
                workers[plan.name] = await open_worker(place, plan, shared[1])
        for number in range(rounds):
            texts = place.texts(mix, count, 100 * number)
            order = listed if number % 2 == 0 else listed[::-1]
            for plan in order:
                if shared is not None:
                    rows = await block(workers[plan.name], texts, load, place.local_ms(mix), number)
                else:
                    rows = await on_new_link(place, link, plan, texts, load, mix, number)
                found[plan.name].append(rows)
    finally:
        for worker in workers.values():
            await asyncio.to_thread(worker.close)
        if shared is not None:
            await shared[0].stop()
    seconds = time.perf_counter() - began_s
    return {
        "model": place.model.name, "layer_ms": place.model.layer_ms, "link": link.name, "load": load.name,
        "min_split": min_split, "mix": mix, "samples": count, "rounds": rounds, "seconds": round(seconds, 1),
        "plans": {name: summary(blocks) for name, blocks in found.items()},
    }  # fmt: skip


async def on_new_link(
    place: Place,
    link: LinkCell,
    plan: PlanCell,
    texts: Sequence[str],
    load: Load,
    mix: str,
    seed: int,
) -> list[dict[str, float]]:
    child, address = await start_link(place, link)
    begins_s, worker = time.perf_counter() + _BEGINS_S, None
    try:
        worker = await open_worker(place, plan, address)
        await asyncio.sleep(max(0.0, begins_s - time.perf_counter()))
        return await block(worker, texts, load, place.local_ms(mix), seed)
    finally:
        if worker is not None:
            await asyncio.to_thread(worker.close)
        await child.stop()


async def start_link(place: Place, link: LinkCell) -> tuple[Child, str]:
    child = await Child.start(
        "link", "link", "--to", place.cloud, *link.arguments(), "--control-stdin"
    )
    return child, (await child.read(20.0))["listening"]


async def open_worker(place: Place, plan: PlanCell, address: str) -> EdgeWorker:
    """Connected, and a few samples old."""

    def make() -> EdgeWorker:
        return EdgeWorker(
            place.bundle, address, layers=place.layers, precision="fp32", offload_timeout_ms=20_000.0,
            deadline_ms=None,
            hedge_after=math.inf, retry_share=0.0, **plan.settings,
        )  # fmt: skip

    worker = await asyncio.to_thread(make)
    for text in place.texts("natural", 8, 7):
        await worker.answer_async(text)
    return worker


def summary(blocks: Sequence[Sequence[dict[str, float]]]) -> dict[str, Any]:
    rows = [row for block in blocks for row in block]
    ms = sorted(row["ms"] for row in rows)
    cuts = quantiles(ms, n=20)
    return {
        "n": len(rows),
        "p50_ms": round(cuts[9], 2),
        "p95_ms": round(cuts[18], 2),
        "mean_ms": round(mean(ms), 2),
        "p50_of_rounds_ms": [
            round(quantiles([r["ms"] for r in block], n=2)[0], 2) for block in blocks
        ],
        "bytes_up": round(mean(row["up"] for row in rows)),
        "cloud": round(mean(row["cloud"] for row in rows), 3),
        "fallback": round(mean(row["fallback"] for row in rows), 3),
    }


async def main_async(args: argparse.Namespace) -> None:
    model = MODELS[args.model]
    bundle = Bundle.read(model.bundle)
    easy, hard, layers = sorted_texts(model, bundle, 100 if args.quick else 400)
    if args.cloud:
        slowed = Slowed(OnnxLayers(bundle, "fp32"), model.layer_ms)
        await all_cells(Place(model, bundle, slowed, easy, hard, layers, args.cloud), args)
        return
    child = await Child.start(
        "cloud",
        "cloud",
        "serve",
        "--bundle",
        str(model.bundle),
        "--listen",
        "127.0.0.1:0",
        "--local",
        "--insecure",
    )
    try:
        address = (await child.read(120.0))["listening"]
        slowed = Slowed(OnnxLayers(bundle, "fp32"), model.layer_ms)
        place = Place(model, bundle, slowed, easy, hard, layers, address)
        await all_cells(place, args)
    finally:
        await child.stop()


async def all_cells(place: Place, args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    ends_s = time.perf_counter() + args.seconds
    for link_number, link in enumerate(LINKS):
        for load_number, load in enumerate(LOADS):
            if args.link not in (None, link_number) or args.load not in (None, load_number):
                continue
            name = (
                f"{place.model.name}-{args.mix}-{args.min_split}-{link_number}-{load_number}.json"
            )
            if (args.out / name).exists() or time.perf_counter() > ends_s:
                continue
            found = await cell(
                place,
                link,
                load,
                args.min_split,
                args.mix,
                args.samples,
                args.rounds,
                args.rules,
            )
            write_json({**report.about(), **found}, str(args.out / name))
            print(
                name,
                round(found["seconds"]),
                "s",
                json.dumps(short(found)),
                file=sys.stderr,
                flush=True,
            )


def short(found: dict[str, Any]) -> dict[str, str]:
    return {
        name: f"{p['p50_ms']:.0f}/{p['mean_ms']:.0f}/{p['p95_ms']:.0f}"
        for name, p in found["plans"].items()
    }


MODELS = {
    "minilm": Model("minilm", ROOT / "bundles" / "assistant-intents", 25.0, "clinc150/test.tsv"),
    # Not in the repository: benchmarks/codec_bundles.py makes it; then `offramp calibrate --forecast-only`.
    "mpnet": Model("mpnet", ROOT / "mpnet-sst2", 60.0, "sst2/test.tsv"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=[*MODELS], default="minilm")
    parser.add_argument("--bundle", type=Path, help="another bundle for the model's name")
    parser.add_argument(
        "--cloud", metavar="HOST:PORT", help="one that runs already, for this bundle"
    )
    parser.add_argument("--layer-ms", type=float, help="of the device")
    parser.add_argument("--link", type=int, help="only this one, by its place in cells.py")
    parser.add_argument("--load", type=int, help="only this one")
    parser.add_argument("--min-split", type=int, default=0)
    parser.add_argument("--mix", choices=["natural", "hard"], default="natural")
    parser.add_argument("--samples", type=int, default=20, help="of a block")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rules", action="store_true", help="published rules as well")
    parser.add_argument("--quick", action="store_true", help="to see that it runs")
    parser.add_argument("--seconds", type=float, default=330.0, help="begin no cell after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "planner")
    args = parser.parse_args()
    if args.bundle or args.layer_ms:
        old = MODELS[args.model]
        MODELS[args.model] = replace(
            old, bundle=args.bundle or old.bundle, layer_ms=args.layer_ms or old.layer_ms
        )
    asyncio.run(main_async(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
