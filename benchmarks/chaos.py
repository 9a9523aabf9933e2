"""The deadline contract under faults: a real worker, a real cloud over gRPC, a link that breaks in between.

    python benchmarks/chaos.py --bundle DIR [--case NAME ...] [--plain] [--quick] [--json FILE]

Requests come 20 a second in an open loop. A case runs well, then has its fault, then is well again. A request
is answered by its deadline or it is not; one that raises has failed its caller. `--plain` sends the same work
by a plain gRPC client: layers up to the cut, then one call with the deadline as its time-out. Without exits
(`exits = false`), so that every sample needs the cloud. With `--json` cases are added to those in the file,
if these are of the same commit and settings: a long run can be made in pieces.

"back" is the time from the fault's end until a sample that was asked for afterwards has the cloud's answer.
"cloud differs" counts labels that the device's own layers do not give: the codec's doing, or that of
corrupted bytes which nobody noticed. Losses are those of the link emulator: a lost segment keeps its
connection waiting for TCP's recovery, by a round trip or by its retransmission timer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import report
from chaos_plain import PlainClient
from chaos_world import Do, World, fault, heal, kill, restart

from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_edge import Answer, EdgeSettings, EdgeWorker

RATE_HZ = 20.0
DEADLINE_MS = 500.0
LINK = "lte"
WELL_S, FAULT_S, AFTER_S = 4.0, 8.0, 5.0

_TEXT = (
    "please wake me up at seven tomorrow and tell what the weather is going to be like in town "
    "because there is a meeting with some people from the bank about money for our new house"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Case:
    """One fault, from its begin to its end."""

    begin: Do
    end: Do = heal


CASES: dict[str, Case] = {
    "none": Case(heal),
    "black hole": Case(fault("kind=blackhole")),
    "loss 10 %": Case(fault("kind=loss rate=0.1")),
    "stalls of 5 s": Case(fault("kind=stall for=5")),
    "resets each second": Case(fault("kind=reset every=1")),
    "cloud killed": Case(kill, restart),
    "replies delayed": Case(fault(f"kind=delay ms={2 * DEADLINE_MS:g} direction=down")),
    "bytes corrupted": Case(fault("kind=corrupt bytes=3000")),
}

_ALONE = "GRPC_ENABLE_FORK_SUPPORT"
"""Each case runs in a process with this turned off: gRPC's Python likes neither one event loop after another,
nor that its process starts others (here a second cloud) while it has connections."""

Ask = Callable[[str], Awaitable[Answer | None]]


@dataclass
class Seen:
    """What became of one case's requests; times in seconds since its begin."""

    ms: list[float] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    complete: int = 0
    cloud: list[tuple[float, float]] = field(default_factory=list)  # asked, answered
    said: list[tuple[str, Any]] = field(default_factory=list)  # by the cloud: text, label

    async def ask(self, ask: Ask, text: str, began_s: float) -> None:
        asked_s = time.perf_counter()
        try:
            answer = await ask(text)
        except Exception as error:  # noqa: BLE001 - what reaches the caller is what is measured
            name = (
                error.code().name
                if isinstance(error, grpc.aio.AioRpcError)
                else type(error).__name__
            )
            self.errors[name] += 1
            return
        done_s = time.perf_counter()
        self.ms.append(1000 * (done_s - asked_s))
        where = "cloud" if answer is None else answer.where
        reason = answer.reason if answer is not None else ""
        hedge = f" (hedge: {answer.hedge})" if answer is not None and answer.hedge else ""
        self.labels[f"{where}{': ' + reason if reason else ''}{hedge}"] += 1
        self.complete += answer is None or answer.complete
        if where == "cloud":
            self.cloud.append((asked_s - began_s, done_s - began_s))
            if answer is not None:
                self.said.append((text, answer.label))


async def played(
    world: World, case: Case, ask: Ask, times: tuple[float, float, float]
) -> tuple[Seen, float]:
    """(what was seen, when the fault ended): an open loop through all three phases."""
    seen, tasks, began_s = Seen(), [], time.perf_counter()
    well_s, fault_s, after_s = times

    async def steer() -> float:
        await asyncio.sleep(well_s)
        await case.begin(world)
        await asyncio.sleep(well_s + fault_s - (time.perf_counter() - began_s))
        await case.end(world)
        return time.perf_counter() - began_s

    steering, number = asyncio.create_task(steer()), 0
    while not steering.done() or time.perf_counter() - began_s < steering.result() + after_s:
        words = [_WORDS[(7 * number + k) % len(_WORDS)] for k in range(6 + number % 9)]
        tasks.append(asyncio.create_task(seen.ask(ask, " ".join(words), began_s)))
        number += 1
        await asyncio.sleep(max(0.0, began_s + number / RATE_HZ - time.perf_counter()))
    ended_s = await steering
    await asyncio.gather(*tasks)
    return seen, ended_s


def summary(name: str, seen: Seen, ended_s: float) -> dict[str, Any]:
    answered, failed = len(seen.ms), seen.errors.total()
    back = [done_s - ended_s for asked_s, done_s in seen.cloud if asked_s >= ended_s]
    ordered = sorted(seen.ms)
    return {
        "case": name,
        "requests": answered + failed,
        "answered": answered / (answered + failed),
        "complete": seen.complete / (answered + failed),
        "in_time": sum(ms <= DEADLINE_MS for ms in ordered) / (answered + failed),
        "p50_ms": statistics.median(ordered) if ordered else None,
        "p99_over_deadline_ms": ordered[int(0.99 * (answered - 1))] - DEADLINE_MS
        if ordered
        else None,
        "worst_over_deadline_ms": ordered[-1] - DEADLINE_MS if ordered else None,
        "back_s": min(back) if back else None,
        "errors": dict(seen.errors),
        "labels": dict(seen.labels.most_common()),
    }


async def measured(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One case with processes of its own, so that none inherits the state that another left."""
    bundle, times = Bundle.read(args.bundle), (WELL_S, FAULT_S, AFTER_S)
    if args.quick:
        times = (1.5, 3.0, 3.0)
    async with AsyncExitStack() as stack:
        world = World(bundle, LINK, stack)
        await world.start()
        if args.plain:
            client = PlainClient(bundle, world.link_address, DEADLINE_MS)
            stack.push_async_callback(client.close)
            for _ in range(20):  # connects, and warms both sides up, as the worker is
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await client.ask("wake me at seven")
            return summary(name, *await played(world, CASES[name], client.ask, times))
        settings = EdgeSettings(plan="fixed", exits=False, deadline_ms=DEADLINE_MS)
        settings = settings.changed(dict(args.set))
        worker = EdgeWorker(bundle, world.link_address, settings=settings)
        await stack.enter_async_context(worker)
        for _ in range(20):
            await worker.answer_async("wake me at seven")
        seen, ended_s = await played(world, CASES[name], worker.answer_async, times)
        row = summary(name, seen, ended_s)
        agent = worker.agent
        assert agent.session is not None
        assert agent.offloads is not None
        hedges = agent.hedges
        return row | {
            "cloud_differs": await asyncio.to_thread(differing, bundle, settings, seen),
            "late_replies": agent.session.late_replies,
            "retries": agent.offloads.budget.retries,
            "hedges": {
                name: getattr(hedges, name) for name in ("begun", "won", "layers", "wasted")
            },
        }


HEAD = f"{'fault':20}" + "".join(
    f"{name:>{width}}"
    for name, width in zip(
        ("answered", "complete", "p99 over", "raised", "back"), (9, 9, 10, 8, 9), strict=True
    )
)


def differing(bundle: Bundle, settings: EdgeSettings, seen: Seen) -> int:
    """How many of the cloud's labels are not those of the device's own layers: by the codec, or by bytes
    that were corrupted and not noticed."""
    with EdgeWorker(bundle, settings=settings.changed({"deadline_ms": None})) as alone:
        own = {text: alone.answer(text).label for text in {text for text, _ in seen.said}}
    return sum(own[text] != label for text, label in seen.said)


def shown(row: dict[str, Any]) -> str:
    over, back = row["p99_over_deadline_ms"], row["back_s"]
    labels = ", ".join(f"{label} {count}" for label, count in row["labels"].items())
    errors = ", ".join(f"{label} {count}" for label, count in row["errors"].items())
    cells = (
        f"{row['case']:20}{row['answered']:9.1%}{row['complete']:9.1%}",
        f"{'-' if over is None else f'{over:+.0f} ms':>10}{sum(row['errors'].values()):>8}",
        f"{'-' if back is None else f'{back:.2f} s':>9}  {labels}",
        f"; raised: {errors}" if errors else "",
    )
    differs = (
        f"; cloud differs from device {row['cloud_differs']}" if "cloud_differs" in row else ""
    )
    return "".join(cells) + differs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", required=True, type=Path, metavar="DIR")
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--plain", action="store_true", help="a plain gRPC client, for contrast")
    parser.add_argument("--quick", action="store_true", help="shorter phases")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="of the worker",
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    names = args.case or list(CASES)
    if os.environ.get(_ALONE) != "0":
        print(HEAD, file=sys.stderr, flush=True)
        once = [sys.executable, __file__, *_without_cases(sys.argv[1:])]
        env = {**os.environ, _ALONE: "0", "GRPC_VERBOSITY": "NONE"}
        runs = [subprocess.run([*once, "--case", name], check=False, env=env) for name in names]
        return max(run.returncode for run in runs)
    row = asyncio.run(measured(args, names[0]))
    print(shown(row), file=sys.stderr, flush=True)
    if args.json:
        write_json(_recorded(args, row), args.json)
    return 0


def _without_cases(words: list[str]) -> list[str]:
    """The command line without its choice of cases."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--case":
            kept.append(word)
        skip = word == "--case"
    return kept


def _recorded(args: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    """With what the file has of other cases, or of the other client, at this commit."""
    about: dict[str, Any] = {
        "commit": report.commit(),
        "bundle": args.bundle.name,
        "link": LINK,
        "rate_hz": RATE_HZ,
        "deadline_ms": DEADLINE_MS,
        "quick": args.quick,
    }
    path, key = Path(args.json), "plain" if args.plain else "contract"
    kept = json.loads(path.read_text()) if args.json != "-" and path.exists() else {}
    if any(kept.get(name) != value for name, value in about.items()):
        kept = {}
    have = {row["case"]: row for row in (*kept.get(key, []), row)}
    kept[key] = [have[name] for name in CASES if name in have]
    rows = {name: kept[name] for name in ("contract", "plain") if name in kept}
    return {**report.about(), **about, **rows}


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


if __name__ == "__main__":
    sys.exit(main())
