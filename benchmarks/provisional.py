"""What a provisional answer takes, beside leaving at the same exit: live, over an emulated link.

    python benchmarks/provisional.py --bundle DIR [--link PROFILE] [--rounds N] [--json FILE|-]

The same sentences, which no exit up to the cut lets go, in turns by two workers: one is cut at depth K and
asks for a provisional answer, which is exit K's while the hidden state goes to the cloud; the other has no
cloud, and leaves at exit K whatever it says. Milliseconds from the call until the caller's event loop has the
answer, and until the worker has it. The bar is the local exit's time and 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any

import report
from chaos_world import World

from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_common.runner import run
from offramp_common.text import TextEncoder
from offramp_edge import Answer, EdgeWorker
from offramp_edge.runtime import OnnxLayers

ROOT = Path(__file__).parents[1]
_CUTS = (1, 2, 3)


def hard_texts(bundle: Bundle, most: int) -> list[str]:
    """Shipped sentences that stay beyond the deepest cut."""
    lines = (ROOT / "examples" / "assistant-utterances.jsonl").read_text().splitlines()
    layers, encode = OnnxLayers(bundle, "fp32"), TextEncoder(bundle)
    found = []
    for text in (json.loads(line)["text"] for line in lines):
        (left,) = run(layers, encode([text]), bundle.n_layers, bundle.knobs("fp32")).left
        if left.depth > max(_CUTS):
            found.append(text)
    return found[:most]


def leaving_at(bundle: Bundle, depth: int) -> dict[str, list[float]]:
    """An operating point at which every sample leaves at that exit."""
    (knob,) = bundle.manifest.knobs
    surely = knob.high if knob.never == knob.low else knob.low
    return {knob.name: [knob.never if d < depth else surely for d in bundle.manifest.exits]}


async def provisional(worker: EdgeWorker, text: str) -> tuple[float, float]:
    """(until the caller has it, until the worker has it)."""
    first: asyncio.Future[tuple[float, Answer]] = asyncio.get_running_loop().create_future()
    began_s = time.perf_counter()

    def told(answer: Answer) -> None:
        first.set_result((time.perf_counter(), answer))

    final = asyncio.create_task(worker.answer_async(text, on_provisional=told))
    done_s, answer = await first
    await final
    return 1000 * (done_s - began_s), answer.ms


async def local(worker: EdgeWorker, text: str) -> tuple[float, float]:
    began_s = time.perf_counter()
    answer = await worker.answer_async(text)
    return 1000 * (time.perf_counter() - began_s), answer.ms


async def at_cut(world: World, depth: int, texts: list[str], rounds: int) -> dict[str, Any]:
    same: dict[str, Any] = {"precision": "fp32", "deadline_ms": None}
    sent = EdgeWorker(world.bundle, world.link_address, split=depth, hedge_after=math.inf, **same)
    alone = EdgeWorker(world.bundle, knobs=leaving_at(world.bundle, depth), **same)
    rows: list[tuple[float, ...]] = []
    try:
        for text in texts[:5]:
            await provisional(sent, text)
            assert (await alone.answer_async(text)).exit_depth == depth
        for _ in range(rounds):
            rows += [(*await provisional(sent, t), *await local(alone, t)) for t in texts]
    finally:
        for worker in (sent, alone):
            await asyncio.to_thread(worker.close)
    columns = list(zip(*rows, strict=True))
    return {"cut": depth, "samples": len(rows), **dict(_columns(columns))}


def _columns(columns: list[tuple[float, ...]]) -> Iterator[tuple[str, Any]]:
    for number, who in enumerate(("caller", "worker")):
        first, exit_ = columns[number], columns[number + 2]
        yield f"{who}_provisional_ms", report.spread(first)
        yield f"{who}_exit_ms", report.spread(exit_)
        yield f"{who}_ratio_of_medians", round(median(first) / median(exit_), 3)


async def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    bundle = Bundle.read(args.bundle)
    texts = hard_texts(bundle, args.texts)
    async with AsyncExitStack() as stack:
        world = World(bundle, args.link, stack)
        await world.start()
        return [await at_cut(world, depth, texts, args.rounds) for depth in _CUTS]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", required=True, type=Path, metavar="DIR")
    parser.add_argument("--link", default="wifi", help="profile of `offramp link`")
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = asyncio.run(measured(args))
    for row in rows:
        print(row, file=sys.stderr)
    if args.json:
        about = report.about() | {"bundle": args.bundle.name, "link": args.link}
        write_json({**about, "cuts": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
