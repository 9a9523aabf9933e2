"""What a codec was measured to cost on real data, kept in the bundle for planners and people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Measured:
    """One codec at one cut on one data file: all rows ran all layers, those beyond the cut on what the codec
    gave back.

    codec    its label;  depth: layers before the cut;  data: folder and name of the file;  rows: how many
    points   quality lost against the uncut model, in hundredths of the task's metric; negative: gained
    same     share of rows with the uncut model's answer (for a regression: None)
    nbytes   hidden states of a row as encoded, on average;  tokens: of a row, on average
    error    root mean square over rows of |x - y| / |x|; None where tokens were left out or pooled
    """

    codec: str
    depth: int
    data: str
    rows: int
    points: float
    same: float | None
    nbytes: float
    tokens: float
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measured:
        return cls(**value)


def cost(measured: Iterable[Measured], codec: str, depth: int) -> float | None:
    """Points that the codec costs at that cut: the most that was measured; None where nothing was."""
    found = [one.points for one in measured if (one.codec, one.depth) == (codec, depth)]
    return max(found, default=None)


def merged(old: Iterable[Measured], new: Iterable[Measured]) -> tuple[Measured, ...]:
    """All of them, in a fixed order; of two of one codec, cut and data file the new one."""
    table = {(one.depth, one.codec, one.data): one for one in (*old, *new)}
    return tuple(table[key] for key in sorted(table))
