"""The cells of the live comparison: links, loads, models and the plans that meet in each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from offramp_common.bundle import Bundle
from offramp_edge.menu import EncodeTimes, Menu, within

DATA = Path(os.environ.get("OFFRAMP_DATA", "../shared/data"))


_TOKENS = 16  # at which codecs are compared


@dataclass(frozen=True)
class LinkCell:
    """Arguments of `offramp link`; with `trace` the rate is a recorded uplink, from its beginning in every
    block."""

    name: str
    mbps: float = 0.0
    rtt_ms: float = 40.0
    trace: str = ""

    def arguments(self) -> list[str]:
        rtt = ["--rtt-ms", str(self.rtt_ms)]
        if self.trace:
            file = DATA / "network_traces" / "mahimahi_cellular.jsonl"
            return [
                "--trace",
                str(file),
                "--trace-name",
                self.trace,
                "--downlink-factor",
                "4",
                *rtt,
            ]
        return ["--uplink-mbps", str(self.mbps), "--downlink-mbps", str(4 * self.mbps), *rtt]


LINKS = (
    LinkCell("0.5 Mbit/s, 150 ms", 0.5, 150),
    LinkCell("1 Mbit/s, 100 ms", 1, 100),
    LinkCell("3 Mbit/s, 60 ms", 3, 60),
    LinkCell("10 Mbit/s, 40 ms", 10, 40),
    LinkCell("30 Mbit/s, 15 ms", 30, 15),
    LinkCell("100 Mbit/s, 5 ms", 100, 5),
    LinkCell("trace ATT-LTE-driving-2016.up", trace="ATT-LTE-driving-2016.up"),
    LinkCell("trace TMobile-UMTS-driving.up", trace="TMobile-UMTS-driving.up"),
    LinkCell("trace Verizon-EVDO-driving.up", trace="Verizon-EVDO-driving.up"),
)


@dataclass(frozen=True)
class Load:
    """`busy`: arrivals as a share of what the device alone could answer; 0: one at a time, each as soon as
    the one before it is answered."""

    name: str
    busy: float


LOADS = (Load("one at a time", 0.0), Load("half", 0.5), Load("over", 1.3))


@dataclass(frozen=True)
class Model:
    """layer_ms   what a layer of 16 tokens or fewer takes on the device, sleeping included; longer in
    proportion
    texts      a file of the data folder, its first column
    """

    name: str
    bundle: Path
    layer_ms: float
    texts: str


@dataclass(frozen=True)
class PlanCell:
    """A plan: settings of the worker."""

    name: str
    settings: dict[str, Any]


def plans(bundle: Bundle, min_split: int, rules: bool) -> Iterator[PlanCell]:
    """The planner first; then every fixed split (of a deep model those around its exits) by every codec that
    is on the planner's menu and that no other beats in both bytes and time; `rules`: published ones as well,
    for the record."""
    n = bundle.n_layers
    base = {"min_split": min_split}
    yield PlanCell("planner", {"plan": "auto", **base})
    yield PlanCell("all local", {"split": n})
    if not min_split:
        yield PlanCell("send input", {"split": 0})
    menu = Menu(bundle, range(1, n), within(bundle, 0.5, None), EncodeTimes({}), {}).at(_TOKENS)
    for split in _splits(bundle, max(1, min_split)):
        for option in menu[split]:
            settings = {"split": split, "codec": option.label}
            yield PlanCell(f"split {split}, {option.label}", settings)
    for rule in ("neurosurgeon", "spinn", "splitee") if rules else ():
        yield PlanCell(rule, {"plan": rule, **base})


def _splits(bundle: Bundle, least: int) -> list[int]:
    n, exits = bundle.n_layers, bundle.manifest.exits
    if n <= 6:
        return list(range(least, n))
    chosen = {1, *exits, *((a + b) // 2 for a, b in pairwise((0, *exits)))}
    return sorted(split for split in chosen if least <= split < n)
