"""The cells of live.py on a virtual clock, in short rounds as they are live: learning counts.

    python benchmarks/planner/short_rounds.py [--min-split K] [--mix natural|hard] [--links N,N] [--loads N,N]
        [--samples N] [--rounds N] [--json FILE|-]

As replay.py, but each round has a device of its own that knows nothing of its link and its load: eight
samples one at a time, then, three seconds after the first of them, as many as a live block has. All of them
count. A round begins seven seconds further on in a trace than the one before it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from live import MODELS
from planner_cells import DATA, LINKS, LOADS, LinkCell, Load, plans
from replay import Device, Recorded, profile_of, record, through, told
from summary import tables

from offramp_common.bundle import Bundle
from offramp_common.cli import write_json
from offramp_edge.settings import EdgeSettings

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

_FIRST = 8  # samples, one at a time
_BEGINS_S = 3.0
_APART_S = 7.0
_MODEL = "minilm"


class Sentences:
    """Recorded ones, drawn anew for each round: natural, or three of four of those that pass the first
    exit."""

    def __init__(self, bundle: Bundle, layer_ms: float, mix: str, texts: int) -> None:
        lines = (DATA / MODELS[_MODEL].texts).read_text(encoding="utf-8").splitlines()[1:]
        chosen = random.Random(0).sample([line.split("\t")[0] for line in lines], texts)
        recorded, first = record(bundle, chosen), bundle.manifest.exits[0]
        self._hard = [s for s in recorded if s.exit_depth > first]
        self._easy = [s for s in recorded if s.exit_depth == first]
        self._share = len(self._hard) / len(recorded) if mix == "natural" else 0.75
        hard = mean(s.exit_depth for s in self._hard)
        self.local_ms = layer_ms * (self._share * hard + (1 - self._share) * first)

    def draw(self, count: int, seed: int) -> list[Recorded]:
        rng = random.Random(seed)
        return [
            rng.choice(self._hard if rng.random() < self._share else self._easy)
            for _ in range(count)
        ]


def rounds(
    bundle: Bundle,
    settings: EdgeSettings,
    link: LinkCell,
    load: Load,
    sentences: Sentences,
    args: Any,
) -> dict[str, Any]:
    """One plan in one cell."""
    rows: list[tuple[float, int]] = []
    for number in range(args.rounds):
        up = profile_of(link).shaper("up")
        device = Device(bundle, MODELS[_MODEL].layer_ms, settings, up, link.rtt_ms)
        device.clock.now_s = _APART_S * number
        through(device, sentences.draw(_FIRST, 7), LOADS[0], sentences.local_ms, 0)
        device.land(_APART_S * number + _BEGINS_S)
        samples = sentences.draw(args.samples, 100 * number)
        rows += through(device, samples, load, sentences.local_ms, number)
    sent = sum(up > 0 for _, up in rows)
    return {
        **told([ms for ms, _ in rows]),
        "bytes_up": round(mean(up for _, up in rows)), "cloud": round(sent / len(rows), 3),
    }  # fmt: skip


def cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    bundle = Bundle.read(MODELS[_MODEL].bundle)
    sentences = Sentences(bundle, MODELS[_MODEL].layer_ms, args.mix, args.texts)
    rows = []
    for link in (LINKS[number] for number in args.links):
        for load in (LOADS[number] for number in args.loads):
            found = {}
            for plan in plans(bundle, args.min_split, rules=False):
                settings = EdgeSettings(precision="fp32", **plan.settings)
                found[plan.name] = rounds(bundle, settings, link, load, sentences, args)
            rows.append({
                "model": _MODEL, "link": link.name, "load": load.name, "mix": args.mix,
                "min_split": args.min_split, "plans": found,
            })  # fmt: skip
    return rows


def _numbers(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--min-split", type=int, default=0)
    parser.add_argument("--mix", choices=["natural", "hard"], default="natural")
    every = ",".join(str(number) for number in range(len(LINKS)))
    parser.add_argument(
        "--links", type=_numbers, default=every, help="by place in planner_cells.py"
    )
    parser.add_argument("--loads", type=_numbers, default="0,1,2")
    parser.add_argument("--samples", type=int, default=50, help="of a round")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--texts", type=int, default=400, help="that are recorded")
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    args = parser.parse_args()
    rows = cells(args)
    out = tables(rows)
    if args.json:
        about = report.about()
        measured = {"samples": args.samples, "rounds": args.rounds}
        write_json({**about, **measured, **out, "all": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
