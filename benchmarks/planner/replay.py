"""The cells of live.py on a virtual clock: the same planner, estimator and sizes, a thousand samples a plan.

    python benchmarks/planner/replay.py [--model NAME] [--bundle DIR] [--layer-ms N] [--min-split K]
        [--mix natural|hard] [--samples N] [--json FILE|-]

What live cells have too few samples for: queues in their steady state, without a machine's noise. There is
one device (a layer takes layer_ms for 16 tokens), its uplink (a Shaper, so with a queue that stays), and a
cloud without a queue; recorded are each sentence's exits and confidences, by really running it. No
fallbacks, no hedges, nothing is lost: a model of the plans, not of the network.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import numpy as np
from live import MODELS
from planner_cells import DATA, LINKS, LOADS, LinkCell, Load, plans

from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_common.runner import run
from offramp_common.text import TextEncoder
from offramp_edge.answers import Answer, Stages
from offramp_edge.baselines import SplitBandit, static_rule
from offramp_edge.cloud_times import CloudTimes
from offramp_edge.device import LayerTimes
from offramp_edge.forecast import foreseen
from offramp_edge.link import Link, Transfer
from offramp_edge.menu import EncodeTimes, Menu, within
from offramp_edge.planner import AutoPlanner, World
from offramp_edge.planning import Choice, FixedPlan, Learns, Planner, Standing
from offramp_edge.runtime import OnnxLayers
from offramp_edge.settings import FIXED, SPLITEE, EdgeSettings, plan_for
from offramp_simulate.links import LinkProfile, Shaper
from offramp_simulate.traces import load_trace

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

_CLOUD_LAYER_MS = 2.0  # for 16 tokens
_OVERHEAD_MS = 2.0  # of a round trip, beside the link and the layers
_IN_AIR = 8


@dataclass(frozen=True)
class Recorded:
    """One sentence: what each exit said of it, and where it leaves."""

    n_tokens: int
    exit_depth: int
    confidence: dict[int, float]


def record(bundle: Bundle, texts: Sequence[str]) -> list[Recorded]:
    """Run each to where it leaves."""
    layers, encode, knobs = OnnxLayers(bundle, "fp32"), TextEncoder(bundle), bundle.knobs("fp32")
    found = []
    for text in texts:
        said: dict[int, float] = {}

        def observe(depth: int, _: Any, look: Any, said: dict[int, float] = said) -> None:
            said[depth] = float(look.confidence_B[0])

        acts = encode([text])
        (left,) = run(layers, acts, bundle.n_layers, knobs, observe).left
        found.append(Recorded(acts.n_tokens, left.depth, said))
    return found


@dataclass
class Clock:
    now_s: float = 0.0

    def now(self) -> float:
        return self.now_s


@dataclass
class Device:
    """One device, its link and its cloud, in virtual time."""

    bundle: Bundle
    layer_ms: float
    settings: EdgeSettings
    up: Shaper
    rtt_ms: float
    clock: Clock = field(default_factory=Clock)
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    answers_s: list[float] = field(
        default_factory=list
    )  # when those sent are answered, from then on
    waited: bool = False  # the sample that is on it, for its turn

    def __post_init__(self) -> None:
        self.link, self.cloud, n = Link(self.clock), CloudTimes(self.clock), self.bundle.n_layers
        self.times = LayerTimes(n)
        for depth in range(n):
            self.times.ran(depth, 16, self.layer_ms)
        plan = plan_for(self.bundle, self.settings)
        allowed = within(self.bundle, 0.5, self.settings.codec)
        self.menu = Menu(self.bundle, plan.depths, allowed, EncodeTimes({}), {})
        world = World(lambda: self.times, self.link, self.cloud)
        seen = foreseen(self.bundle, plan, self.settings)
        self.planner: Planner
        if plan.kind == FIXED:
            self.planner = FixedPlan(plan.split, "")
        elif plan.kind == SPLITEE:
            self.planner = SplitBandit((*plan.depths, n), "", n)
        elif plan.kind == "auto":
            self.planner = AutoPlanner(self.menu, seen, world)
        else:
            self.planner = static_rule(plan.kind, self.menu, seen, world)
        self._events, self._probes = 0, itertools.cycle((16, 1))
        self.link.connected(2 * self.rtt_ms)

    def probe(self) -> None:
        """As the live device does when nothing has been sent for long."""
        if (
            isinstance(self.planner, AutoPlanner)
            and not self.answers_s
            and (self.link.transfers < 4 or self.link.age_s() > 5.0)
        ):
            depth = min(d for d in self.menu.depths if d)
            self.send(Recorded(next(self._probes), self.bundle.n_layers, {}), depth, "")

    def land(self, until_s: float) -> None:
        """What happens by then in the air is told."""
        while self.events and self.events[0][0] <= until_s:
            at_s, _, tell = heapq.heappop(self.events)
            self.clock.now_s = max(self.clock.now_s, at_s)
            tell()
        self.clock.now_s = max(self.clock.now_s, until_s)
        del self.answers_s[: bisect.bisect_right(self.answers_s, self.clock.now_s)]

    def send(self, sample: Recorded, depth: int, codec: str) -> tuple[float, int]:
        """(when the answer is here, bytes). With as many in the air as there may be it waits until there is
        room; the device does not."""
        options = self.menu.at(sample.n_tokens)[depth]
        option = next((o for o in options if codec and o.codec == codec), options[0])
        layers = sample.exit_depth - depth
        cloud_ms = layers * _CLOUD_LAYER_MS * max(option.tokens, 16) / 16
        starts_s = self.clock.now_s
        if len(self.answers_s) >= _IN_AIR:
            starts_s = max(starts_s, self.answers_s[-_IN_AIR])
        arrives_s = self.up.send(option.nbytes, starts_s).arrives_s
        done_s = arrives_s + (self.rtt_ms / 2 + cloud_ms + _OVERHEAD_MS) / 1000
        bisect.insort(self.answers_s, done_s)

        def begins() -> None:
            transfer = self.link.sent(option.nbytes, cloud_ms)
            self._at(done_s, lambda: ends(transfer))

        def ends(transfer: Transfer) -> None:
            self.link.answered(transfer, cloud_ms)
            self.cloud.ran(layers, sample.n_tokens, 0.0, cloud_ms)

        if starts_s > self.clock.now_s:
            self._at(starts_s, begins)
        else:
            begins()
        return done_s, option.nbytes

    def _at(self, at_s: float, tell: Callable[[], None]) -> None:
        self._events += 1
        heapq.heappush(self.events, (at_s, self._events, tell))

    def answer(self, sample: Recorded, waiting: Any) -> tuple[float, int, float]:
        """Run one sample from now on: (when it is answered, bytes up, ms on the device)."""
        n, depth, began_s = self.bundle.n_layers, 0, self.clock.now_s
        confidence: float | None = None
        layer_s = self.layer_ms * max(sample.n_tokens, 16) / 16 / 1000
        while True:
            self.land(self.clock.now_s)
            self.probe()
            standing = Standing(
                depth,
                sample.n_tokens,
                confidence,
                waiting=waiting(self.clock.now_s),
                in_flight=len(self.answers_s),
                waited=self.waited,
            )
            choice: Choice = self.planner.choose(standing)
            if choice.stop == depth:
                done_s, nbytes = self.send(sample, depth, choice.codec)
                return done_s, nbytes, 1000 * (self.clock.now_s - began_s)
            while depth < choice.stop:
                self.land(self.clock.now_s + layer_s)
                self.times.ran(depth, sample.n_tokens, 1000 * layer_s)
                depth += 1
                if depth == sample.exit_depth or depth == n:
                    return self.clock.now_s, 0, 1000 * (self.clock.now_s - began_s)
                if depth in sample.confidence:
                    confidence = sample.confidence[depth]
                    break


def play(
    device: Device, samples: Sequence[Recorded], load: Load, local_ms: float, seed: int
) -> dict[str, Any]:
    """All samples through one device; the first twenty are not counted."""
    rows = through(device, samples, load, local_ms, seed)
    sent = sum(up > 0 for _, up in rows)
    return {
        **told([ms for ms, _ in rows[20:]]),
        "bytes_up": round(mean(up for _, up in rows)), "cloud": round(sent / len(samples), 3),
    }  # fmt: skip


def told(took_ms: Sequence[float]) -> dict[str, float]:
    cuts = quantiles(took_ms, n=20)
    return {
        "p50_ms": round(cuts[9], 2), "p95_ms": round(cuts[18], 2), "mean_ms": round(mean(took_ms), 2),
    }  # fmt: skip


def through(
    device: Device, samples: Sequence[Recorded], load: Load, local_ms: float, seed: int
) -> list[tuple[float, int]]:
    """Samples through a device, from its clock on: (milliseconds, bytes up) of each."""
    rng, came_s, next_s = random.Random(seed), [], device.clock.now_s
    for _ in samples:
        next_s += rng.expovariate(load.busy / (local_ms / 1000)) if load.busy else 0.0
        came_s.append(next_s)
    times, rows = np.array(came_s), []
    for number, sample in enumerate(samples):
        start_s = max(device.clock.now_s, came_s[number])
        device.waited = bool(load.busy) and start_s > came_s[number]
        device.land(start_s)

        def waiting(now_s: float, number: int = number) -> int:
            if not load.busy:
                return 0
            return int(np.searchsorted(times, now_s, "right")) - number - 1

        done_s, up, device_ms = device.answer(sample, waiting)
        ms = 1000 * (done_s - (came_s[number] if load.busy else start_s))
        rows.append((ms, up))
        if isinstance(device.planner, Learns):
            device.planner.answered(_answer(sample, ms, device_ms))
        if not load.busy:
            device.land(done_s)
    return rows


def _answer(sample: Recorded, ms: float, device_ms: float) -> Answer:
    stages = Stages(device=device_ms)
    return Answer("", "", "", None, sample.exit_depth, "device", "", 0, True, 0.0, ms, stages)


def profile_of(link: LinkCell) -> LinkProfile:
    if link.trace:
        trace = load_trace(DATA / "network_traces" / "mahimahi_cellular.jsonl", link.trace)
        return LinkProfile.from_trace(trace, rtt_ms=link.rtt_ms)
    return LinkProfile(link.name, link.mbps, 4 * link.mbps, link.rtt_ms)


def cells(args: argparse.Namespace, bundle: Bundle, layer_ms: float) -> list[dict[str, Any]]:
    model = MODELS[args.model]
    lines = (DATA / model.texts).read_text(encoding="utf-8").splitlines()[1:]
    texts = random.Random(0).sample(
        [line.split("\t")[0] for line in lines], min(args.texts, len(lines))
    )
    recorded, first = record(bundle, texts), bundle.manifest.exits[0]
    hard = [s for s in recorded if s.exit_depth > first]
    easy = [s for s in recorded if s.exit_depth == first]
    share = len(hard) / len(recorded) if args.mix == "natural" else 0.75
    rng = random.Random(1)
    samples = [rng.choice(hard if rng.random() < share else easy) for _ in range(args.samples)]
    local_ms = mean(layer_ms * s.exit_depth * max(s.n_tokens, 16) / 16 for s in samples)
    rows = []
    for link in LINKS:
        profile = profile_of(link)
        for load in LOADS:
            found = {}
            for plan in plans(bundle, args.min_split, rules=True):
                settings = EdgeSettings(precision="fp32", **plan.settings)
                up = profile.shaper("up")
                device = Device(bundle, layer_ms, settings, up, link.rtt_ms)
                found[plan.name] = play(device, samples, load, local_ms, 2)
            rows.append({
                "model": args.model, "link": link.name, "load": load.name, "mix": args.mix,
                "min_split": args.min_split, "plans": found,
            })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=[*MODELS], default="minilm")
    parser.add_argument("--bundle", type=Path, help="another bundle for the model's name")
    parser.add_argument("--layer-ms", type=float, help="of the device")
    parser.add_argument("--min-split", type=int, default=0)
    parser.add_argument("--mix", choices=["natural", "hard"], default="natural")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=400, help="that are recorded")
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    args = parser.parse_args()
    from summary import tables

    model = MODELS[args.model]
    bundle = Bundle.read(args.bundle or model.bundle)
    layer_ms = args.layer_ms or model.layer_ms
    rows = cells(args, bundle, layer_ms)
    out = tables(rows)
    if args.json:
        about = report.about()
        write_json(
            {**about, "layer_ms": layer_ms, "samples": args.samples, **out, "all": rows}, args.json
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
