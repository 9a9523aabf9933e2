"""What a sample's confidence at one exit says of the exits behind it: a compact table, fitted on recorded
exits.

Of the samples that pass an exit without leaving, sorted into bins by confidence: the chance to leave at the
next exit, and for those who stay the bin they fall into there. Chained, it gives the chance to leave at each
later exit, and the layers that are still to be run. A planner needs no more; it holds at the operating point
it was fitted at. Stored in a bundle's manifest, one for each precision.

Axes: N samples, E exits (the last leaves nobody over).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BINS = 6
_FEWEST = 25  # samples in a bin; fewer make fewer bins
_PRIOR = 4.0  # samples that a bin borrows from all of its exit


@dataclass(frozen=True, slots=True)
class Outlook:
    """The samples that have passed the exit at `depth` (0: before the first exit) and stay.

    edges   rising confidences between bins; bin b holds edges[b - 1] <= confidence < edges[b]
    leave   for each bin the chance to leave at the next exit
    next    for each bin the shares of the next exit's bins among those who stay there; empty where the next
            exit is the last
    share   of each bin among these samples
    """

    depth: int
    edges: tuple[float, ...]
    leave: tuple[float, ...]
    next: tuple[tuple[float, ...], ...]
    share: tuple[float, ...]

    def bin_of(self, confidence: float | None) -> int:
        """One that is unknown, or not a number, counts as the least sure."""
        if confidence is None or not self.edges or confidence != confidence:
            return 0
        return bisect_right(self.edges, confidence)


@dataclass(frozen=True, slots=True)
class Forecast:
    """`outlooks`: from before the first exit to the last exit but one, by rising depth."""

    exits: tuple[int, ...]
    outlooks: tuple[Outlook, ...]

    def layers_left(self) -> tuple[tuple[float, ...], ...]:
        """Of each outlook and bin: the layers expected from that exit on until the sample leaves."""
        found: list[tuple[float, ...]] = []
        behind: tuple[float, ...] = ()
        for outlook, following in zip(reversed(self.outlooks), reversed(self.exits), strict=True):
            step = float(following - outlook.depth)
            behind = tuple(
                step + (1 - leave) * _mean(shares, behind)
                for leave, shares in zip(
                    outlook.leave, outlook.next or ((),) * len(outlook.leave), strict=True
                )
            )
            found.append(behind)
        return tuple(reversed(found))

    def merged(self) -> Forecast:
        """The same without confidences: one bin an exit."""
        outlooks = []
        for outlook in self.outlooks:
            leave = _mean(outlook.share, outlook.leave)
            outlooks.append(Outlook(outlook.depth, (), (leave,), ((1.0,),), (1.0,)))
        return Forecast(self.exits, _ended(outlooks))

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "depth": outlook.depth,
                "edges": list(outlook.edges),
                "leave": list(outlook.leave),
                "next": [list(shares) for shares in outlook.next],
                "share": list(outlook.share),
            }
            for outlook in self.outlooks
        ]

    @classmethod
    def from_json(cls, exits: Sequence[int], value: Sequence[Mapping[str, Any]]) -> Forecast:
        """Raises ValueError, TypeError or KeyError for what `to_json` never makes."""
        outlooks = tuple(
            Outlook(
                int(row["depth"]),
                tuple(row["edges"]),
                tuple(row["leave"]),
                tuple(tuple(shares) for shares in row["next"]),
                tuple(row["share"]),
            )
            for row in value
        )
        made = cls(tuple(exits), outlooks)
        made.check()
        return made

    def check(self) -> None:
        """Raises ValueError unless the table's parts fit each other and the exits."""
        if [o.depth for o in self.outlooks] != [0, *self.exits[:-1]]:
            raise ValueError(
                f"a forecast from depths {[o.depth for o in self.outlooks]}, exits {self.exits}"
            )
        for outlook, following in zip(self.outlooks, (*self.outlooks[1:], None), strict=True):
            bins = len(outlook.edges) + 1
            widths = {len(shares) for shares in outlook.next}
            right = set() if following is None else {len(following.edges) + 1}
            if len(outlook.leave) != bins or len(outlook.share) != bins or widths != right:
                raise ValueError(f"a forecast at depth {outlook.depth} with bins that do not fit")
            if not all(0 <= leave <= 1 for leave in outlook.leave):
                raise ValueError(f"a chance outside 0 to 1 at depth {outlook.depth}")


def of_rates(exits: Sequence[int], leave: Sequence[float]) -> Forecast:
    """From the chance to leave at each exit for those who come there; one bin an exit."""
    depths = (0, *exits[:-1])
    outlooks = [Outlook(d, (), (p,), ((1.0,),), (1.0,)) for d, p in zip(depths, leave, strict=True)]
    return Forecast(tuple(exits), _ended(outlooks))


def uniform(exits: Sequence[int]) -> Forecast:
    """Nothing is known: a sample leaves at each exit with the same chance."""
    return of_rates(exits, [1 / (len(exits) - i) for i in range(len(exits))])


def never(exits: Sequence[int]) -> Forecast:
    """Nobody leaves before the last exit."""
    return of_rates(exits, [*[0.0] * (len(exits) - 1), 1.0])


def fit(
    exits: Sequence[int], confidence_EN: NDArray[np.floating[Any]], leave_EN: NDArray[np.bool_]
) -> Forecast:
    """From what every exit said of every sample: how sure it was, and whether it may leave there. Bins hold
    equal numbers of the samples that stay."""
    stay_EN = ~leave_EN.copy()
    stay_EN[-1] = False
    passed_EN = np.concatenate([np.ones_like(stay_EN[:1]), np.logical_and.accumulate(stay_EN)[:-1]])
    edges: list[tuple[float, ...]] = [()]
    edges += [_edges(confidence_EN[e][passed_EN[e + 1]]) for e in range(len(exits) - 1)]
    outlooks = []
    for e, depth in enumerate((0, *exits[:-1])):
        here_N = passed_EN[e]
        bin_N = _bins(edges[e], confidence_EN[e - 1][here_N]) if e else np.zeros(here_N.sum(), int)
        leave_N = leave_EN[e][here_N] if e < len(exits) - 1 else np.ones(here_N.sum(), bool)
        last = e == len(exits) - 1
        next_N = None if last else _bins(edges[e + 1], confidence_EN[e][here_N])
        outlooks.append(
            _outlook(depth, edges[e], bin_N, leave_N, next_N, 0 if last else len(edges[e + 1]) + 1)
        )
    return Forecast(tuple(exits), tuple(outlooks))


def _outlook(
    depth: int,
    edges: tuple[float, ...],
    bin_N: NDArray[np.int64],
    leave_N: NDArray[np.bool_],
    next_N: NDArray[np.int64] | None,
    width: int,
) -> Outlook:
    """Shares in each bin, drawn a little towards those of all bins."""
    bins = len(edges) + 1
    rate = float(leave_N.mean()) if leave_N.size else 0.5
    overall = _shares(next_N, ~leave_N, width, None)
    leave, following = [], []
    for b in range(bins):
        mine_N = bin_N == b
        share = (leave_N[mine_N].sum() + _PRIOR * rate) / (mine_N.sum() + _PRIOR)
        leave.append(round(float(share), 4))
        if width:
            following.append(tuple(_shares(next_N, mine_N & ~leave_N, width, overall)))
    share = np.bincount(bin_N, minlength=bins) / max(bin_N.size, 1)
    return Outlook(depth, edges, tuple(leave), tuple(following), tuple(np.round(share, 4).tolist()))


def _shares(
    next_N: NDArray[np.int64] | None,
    mine_N: NDArray[np.bool_],
    width: int,
    prior: list[float] | None,
) -> list[float]:
    if next_N is None:
        return []
    counts = np.bincount(next_N[mine_N], minlength=width).astype(float)
    counts += _PRIOR * np.array(prior if prior is not None else [1 / width] * width)
    shares: list[float] = np.round(counts / counts.sum(), 4).tolist()
    return shares


def _edges(confidence_N: NDArray[np.floating[Any]]) -> tuple[float, ...]:
    finite_N = confidence_N[np.isfinite(confidence_N)]
    bins = max(1, min(_BINS, finite_N.size // _FEWEST))
    if bins == 1:
        return ()
    cuts = np.quantile(finite_N, np.arange(1, bins) / bins)
    return tuple(dict.fromkeys(np.round(cuts, 6).tolist()))


def _bins(edges: tuple[float, ...], confidence_N: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """As Outlook.bin_of."""
    found_N = np.searchsorted(np.array(edges), confidence_N, side="right")
    return np.where(np.isnan(confidence_N), 0, found_N).astype(np.int64)


def _mean(shares: Sequence[float], values: Sequence[float]) -> float:
    return sum(share * value for share, value in zip(shares, values, strict=False))


def _ended(outlooks: list[Outlook]) -> tuple[Outlook, ...]:
    """The last exit takes all, and nothing follows it."""
    last = outlooks[-1]
    return (*outlooks[:-1], Outlook(last.depth, (), (1.0,), (), (1.0,)))
