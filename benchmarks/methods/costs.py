"""What exits cost at full depth, and what leaving saves on the device's clock: from timings.py's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comparison import Run
from derived import NOT_RUN, SetNumbers, full_cost
from timings import BAR, TOKENS, path_of

from offramp_model.methods import METHODS

# What in a method's design makes its exits dear, for those that were measured above the bar.
_POOLER = (
    "the pooler and classes of each exit are matrices that one sample has to itself, the pooler a twelfth "
    "of a layer's weights, whatever the number of tokens: short texts feel it most"
)
_REASONS = {
    "dact_bert": "its running mixture and bound are small operators at every exit, whatever the number of "
    "tokens: short texts feel them most",
    "fastbert": "each exit is a classifier with attention of its own: it projects every token to a width of "
    "128 and back, work that grows with the length as a layer's does",
    "past_future": "an exit evaluates a map of the model's width for every layer that it imitates, 15 in all "
    "for six layers, whatever the number of tokens: short texts feel it most",
    "palbert": "its lambda head has three matrices of twice the model's width at every exit, whatever the "
    "number of tokens: short texts feel it most",
}
_POINTS = ("2x", "1.5x", "full depth")

COST_HEAD = (
    "method",
    "heads, % of the model's FLOPs",
    *(f"exits at full depth, {n} tokens" for n in TOKENS),
    f"within {BAR:.2f}",
    *(f"time at {name}" for name in _POINTS),
    "why above",
)


@dataclass(frozen=True, slots=True)
class Costs:
    """timings: method -> its file, for those that were timed on the weights of today's settings."""

    timings: Mapping[str, Mapping[str, Any]]

    def within(self, method: str) -> bool | None:
        """Whether exits cost at most the bar at full depth for all lengths; None where not measured."""
        timed = self.timings.get(method)
        if timed is None:
            return None
        return all(cost["ratio"]["median"] <= BAR for cost in timed["exit_cost"])

    def row(self, method: str, sets: Mapping[str, SetNumbers]) -> list[str]:
        """The cells of COST_HEAD."""
        heads, timed, within = (
            heads_share(method, sets),
            self.timings.get(method),
            self.within(method),
        )
        shown = NOT_RUN if heads is None else f"{heads:.1f}"
        if timed is None:
            return [method, shown, *[NOT_RUN] * len(TOKENS), "-", *["-"] * len(_POINTS), ""]
        ratios = [f"{cost['ratio']['median']:.2f}" for cost in timed["exit_cost"]]
        points = [
            f"{p['ratio']['median']:.2f} (FLOPs {p['flops_share']:.2f})"
            for p in (timed["points"][name] for name in _POINTS)
        ]
        return [
            method,
            shown,
            *ratios,
            "yes" if within else "**no**",
            *points,
            self._why(method),
        ]

    def _why(self, method: str) -> str:
        return _REASONS.get(method, _POOLER) if self.within(method) is False else ""


def read_costs() -> Costs:
    timings = {}
    for method in METHODS:
        path = path_of(method)
        if path.is_file():
            timed = json.loads(path.read_text(encoding="utf-8"))
            if timed["digest"] == Run(timed["set"], method, timed["seed"]).digest():
                timings[method] = timed
    return Costs(timings)


def heads_share(method: str, sets: Mapping[str, SetNumbers]) -> float | None:
    """FLOPs of all exits but the plain last one, in % of the full model's; of the first set that has them."""
    for numbers in sets.values():
        for line in numbers.lines:
            if line.name == method and (cost := full_cost(line)) is not None:
                return 100 * (cost.value - 1)
    return None
