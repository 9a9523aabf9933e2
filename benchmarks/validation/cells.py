"""The cells: what is asked over which link, by which policy, at which load; once live, once simulated.

A cell is a scenario of the simulator, and the live run takes all it needs from that: requests and their
times, the agent's settings, the link. So there is one description, not two that may differ.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from offramp_simulate.scenario import Scenario, scenario_of

LAYER_MS = 20.0
"""What a layer of 16 tokens or fewer takes on the device, by sleeping; longer ones in proportion."""
LEAD_S = 2.5
"""From the link's start to the first request: the agent connects meanwhile."""
SETTLE_S = 0.4
"""After the last answer, until bytes are counted: the last acknowledgements are through."""
REQUESTS, WARM_UP = 150, 10
POINT = "depth 3.4"
"""The operating point: half of the samples pass layer 2 without leaving, so that both sides count."""
_TRACES = "data:network_traces/mahimahi_cellular.jsonl"
_SEED = 14


@dataclass(frozen=True)
class Link:
    """`table` is [link] of the scenario."""

    name: str
    table: dict[str, Any]


LINKS = (
    Link("wifi", {"profile": "wifi"}),
    Link("lte", {"profile": "lte"}),
    Link(
        "trace ATT-LTE",
        {"trace": _TRACES, "trace_name": "ATT-LTE-driving-2016.up", "rtt_ms": 40.0},
    ),
    Link(
        "trace Verizon-EVDO",
        {"trace": _TRACES, "trace_name": "Verizon-EVDO-driving.up", "rtt_ms": 100.0},
    ),
)
POLICIES: dict[str, dict[str, Any]] = {
    "split 2": {"split": 2, "point": POINT},
    "auto": {"planner": "auto", "point": POINT},
}
LOADS: dict[str, dict[str, Any]] = {
    "one at a time": {"kind": "closed"},
    "Poisson 8/s": {"kind": "poisson", "rate_per_s": 8.0},
}
FAULT = {"what": "link", "how": "silent", "at_s": 6.0, "for_s": 4.0}


@dataclass(frozen=True)
class Cell:
    """`held_out`: not looked at while the model was tuned."""

    link: Link
    policy: str
    load: str
    faults: tuple[dict[str, Any], ...] = ()
    held_out: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        return ", ".join(
            [self.link.name, self.policy, self.load, *(["black hole"] * len(self.faults))]
        )

    @property
    def file(self) -> str:
        return self.name.replace("/s", " a second").replace(", ", "--").replace(" ", "-") + ".json"

    def scenario(self, requests: int = REQUESTS) -> Scenario:
        """Time 0 is LEAD_S after the link's start. Which samples come when does not depend on link or
        policy."""
        return scenario_of(
            {
                "title": self.name,
                "seed": _SEED,
                "requests": requests,
                "arrivals": LOADS[self.load],
                "link": {**self.link.table, "trace_start_s": LEAD_S},
                "plans": [{"name": self.policy, **POLICIES[self.policy]}],
                "faults": list(self.faults),
            }
        )


def _all() -> list[Cell]:
    cells = [Cell(link, p, load) for link in LINKS for p in POLICIES for load in LOADS]
    return [*cells, Cell(LINKS[1], "split 2", "Poisson 8/s", (FAULT,))]


def _drawn(cells: list[Cell], seed: int = 2026) -> tuple[Cell, ...]:
    """A third of those without a fault is held out, drawn before anything was run."""
    chosen = set(random.Random(seed).sample(range(len(cells) - 1), 5))
    return tuple(
        Cell(c.link, c.policy, c.load, c.faults, number in chosen) for number, c in enumerate(cells)
    )


CELLS = _drawn(_all())
