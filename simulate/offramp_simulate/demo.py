"""The demo: a cloud, a link and a device as separate processes on one machine, with real input.

The same sentences go, one at a time (a closed loop, so that latencies do not queue), through offramp and
through its rivals. All is measured: latency by the device, bytes by the link emulator.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offramp_common import certs
from offramp_common.bundle import Bundle
from offramp_simulate.processes import Child

Record = dict[str, Any]

_CLOUD_START_S = 120.0
_DEVICE_START_S = 60.0
_ANSWER_S = 60.0
_WARM_UP = 3
DEVICE = "demo-device"
FALLBACK = "fallback: "  # how such a choice begins


@dataclass(frozen=True, slots=True)
class Sentence:
    """One input with its right answer; `kind` says what it tries (easy, hard, misspelt, ...)."""

    id: str
    text: str
    label: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to answer: where the model is cut (None: the planner decides for each sample), and whether
    samples may leave early."""

    key: str
    title: str
    split: int | None
    exits: bool

    def arguments(self) -> list[str]:
        cut = ["--plan", "auto"] if self.split is None else ["--split", str(self.split)]
        return [*cut, *([] if self.exits else ["--no-exits"])]

    def needs_cloud(self, n_layers: int) -> bool:
        return self.split is None or self.split < n_layers


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user chose. Link names are those of `offramp link --profile`."""

    bundle: Path
    link: str = "lte"
    local: bool = False  # the cloud tier without Ray
    cut_link_at: int | None = None  # the link dies before this sentence (counted from 1) ...
    restore_after: int = 10  # ... and comes back after so many
    extra: tuple[str, ...] = ()  # further arguments for `offramp edge run`


@dataclass(slots=True)
class Outcome:
    """What one strategy did: the device's record of each sentence, and the link's counters."""

    strategy: Strategy
    records: list[Record] = field(default_factory=list)
    link_bytes_up: int = 0
    link_bytes_down: int = 0


def strategies(bundle: Bundle, split: int | None = None) -> list[Strategy]:
    """offramp and its rivals; the last is the full model, which the others are compared with."""
    n = bundle.n_layers
    split = bundle.manifest.split if split is None else split
    return [
        Strategy("offramp", "offramp: exits, the planner", None, True),
        Strategy("cut", f"exits, always split {split}", split, True),
        Strategy("device", "all on the device, exits", n, True),
        Strategy("input", "send the input, cloud runs all", 0, True),
        Strategy("split", f"split {split} without exits", split, False),
        Strategy("full", "full model on the device", n, False),
    ]


@asynccontextmanager
async def cloud_tier(settings: Settings) -> AsyncIterator[tuple[Path, Record]]:
    """Start the cloud; yields the folder of the certificates (the device's is called DEVICE) and the cloud's
    own words. It is ended however the block ends."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="offramp-demo-")))
        certs.init(folder)
        certs.issue(folder, DEVICE)
        cloud = await Child.start(
            "cloud",
            *("cloud", "serve", "--bundle", str(settings.bundle), "--listen", "127.0.0.1:0"),
            *("--tls-dir", str(folder), *(["--local"] if settings.local else [])),
        )
        stack.push_async_callback(cloud.stop)
        yield folder, await cloud.read(_CLOUD_START_S)


@asynccontextmanager
async def link_to(address: str, settings: Settings) -> AsyncIterator[tuple[Child, str]]:
    """A link at the beginning of its course, and where it listens."""
    link = await Child.start(
        "link", *("link", "--to", address, "--profile", settings.link, "--control-stdin")
    )
    try:
        yield link, (await link.read(_DEVICE_START_S))["listening"]
    finally:
        await link.stop()


async def run_strategy(
    strategy: Strategy,
    sentences: Sequence[Sentence],
    settings: Settings,
    bundle: Bundle,
    cloud: tuple[Path, Record],
    on_answer: Callable[[Sentence, Record], None],
) -> Outcome:
    """Answer every sentence, one at a time, by a device worker in a process of its own, over a link of its
    own: of one that wanders or flaps each strategy sees the same course."""
    folder, ready = cloud
    async with link_to(ready["listening"], settings) as (link, address):
        device = await Child.start(
            "device", *_device_arguments(strategy, settings, bundle, folder, address)
        )
        try:
            return await _answered(strategy, sentences, settings, device, link, on_answer)
        finally:
            await device.stop()


def _device_arguments(
    strategy: Strategy, settings: Settings, bundle: Bundle, folder: Path, address: str
) -> list[str]:
    arguments = ["edge", "run", "--bundle", str(settings.bundle), "--input", "-", "--output", "-"]
    arguments += [*strategy.arguments(), *settings.extra]
    if strategy.needs_cloud(bundle.n_layers):
        pair = certs.pair_of(folder, DEVICE)
        arguments += ["--cloud", address, "--ca", str(certs.pair_of(folder, "ca").cert)]
        arguments += ["--cert", str(pair.cert), "--key", str(pair.key)]
    return arguments


async def _answered(
    strategy: Strategy,
    sentences: Sequence[Sentence],
    settings: Settings,
    device: Child,
    link: Child,
    on_answer: Callable[[Sentence, Record], None],
) -> Outcome:
    outcome = Outcome(strategy)
    # Loading, the handshake and first runs are start-up, not latency.
    for sentence in sentences[:_WARM_UP]:
        await _answer(device, sentence, _DEVICE_START_S)
    before = await link.ask("stats")
    for number, sentence in enumerate(sentences, start=1):
        if strategy.key == "offramp" and settings.cut_link_at is not None:
            if number == settings.cut_link_at:
                await link.ask("cut silent")
            elif number == settings.cut_link_at + settings.restore_after:
                await link.ask("restore")
        record = await _answer(device, sentence, _ANSWER_S)
        outcome.records.append(record)
        on_answer(sentence, record)
    after = await link.ask("stats")
    for name in ("bytes_up", "bytes_down"):
        headers = after[f"header_{name}"] - before[f"header_{name}"]
        setattr(outcome, f"link_{name}", after[name] - before[name] + headers)
    return outcome


async def _answer(device: Child, sentence: Sentence, timeout_s: float) -> Record:
    await device.write(json.dumps({"id": sentence.id, "text": sentence.text}))
    record = await device.read(timeout_s)
    return {**record, "expected": sentence.label, "kind": sentence.kind}


def summarise(outcomes: Sequence[Outcome]) -> list[Record]:
    """The table's rows: one a strategy, every number measured in this run."""
    full = next(outcome for outcome in outcomes if outcome.strategy.key == "full")
    reference = {record["id"]: record["label"] for record in full.records}
    n_layers = full.strategy.split
    assert n_layers is not None
    return [_row(outcome, reference, n_layers) for outcome in outcomes]


def _row(outcome: Outcome, reference: dict[str, str], n_layers: int) -> Record:
    records, n = outcome.records, len(outcome.records)
    ms = sorted(record["ms"] for record in records)

    def share(count: int) -> float:
        return count / n

    def layers_in_cloud(record: Record) -> int:
        return int(record["exit_depth"] - record["split"]) if record["where"] == "cloud" else 0

    cloud_layers = [layers_in_cloud(record) for record in records]
    depths = [int(record["exit_depth"]) for record in records]
    return {
        "strategy": outcome.strategy.key,
        "title": outcome.strategy.title,
        "n": n,
        "accuracy": share(sum(r["label"] == r["expected"] for r in records)),
        "agreement": share(sum(r["label"] == reference[r["id"]] for r in records)),
        "p50_ms": percentile(ms, 0.50),
        "p95_ms": percentile(ms, 0.95),
        "bytes_up": outcome.link_bytes_up / n,
        "bytes_down": outcome.link_bytes_down / n,
        "on_device": share(sum(r["where"] != "cloud" for r in records)),
        "fallback": share(sum(r["where"] == "fallback" for r in records)),
        "device_layers": (sum(depths) - sum(cloud_layers)) / n,
        "cloud_layers": sum(cloud_layers) / n,
        "exit_depths": {str(d): depths.count(d) for d in sorted(set(depths))},
        "choices": dict(Counter(choice(record, n_layers) for record in records).most_common()),
    }


def choice(record: Record, n_layers: int) -> str:
    """What became of a sample, in words: where it left or by what it was sent, or why it fell back."""
    depth, split = record["exit_depth"], record["split"]
    if record["where"] == "fallback":
        return f"{FALLBACK}{record['reason']}"
    if record.get("hedge") == "device":
        return "sent, but the device was first"
    if record["where"] == "device":
        return "all layers here" if depth == n_layers else f"left at exit {depth}"
    if split == 0:
        return "sent the input"
    return f"sent after layer {split} as {record['codec']}"


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank of sorted values."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def to_json(
    outcomes: Sequence[Outcome], rows: Sequence[Record], settings: Settings, about: Record
) -> Record:
    """All of the run, for scripts."""
    return {
        **about,
        "bundle": str(settings.bundle.name),
        "link": settings.link,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "table": list(rows),
        "records": {outcome.strategy.key: outcome.records for outcome in outcomes},
        "strategies": [asdict(outcome.strategy) for outcome in outcomes],
    }
