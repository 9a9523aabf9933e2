"""What an engine has done since it started; the metrics read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from offramp_common.activations import NumpyArray


@dataclass
class Counters:
    """Written by the compute thread alone.

    requests, rows, tokens   that were answered;   failed   requests whose layers raised
    dropped                  rows left out on the way, because nobody waited for them any more
    exits                    rows by the depth at which they left
    layer_rows, layer_tokens layers run, times the rows and the tokens in them
    batches                  layers run, by the number of rows that shared them
    compute_s                in layers and exit heads;   overhead_s   in letting in, choosing,
                             joining and letting out
    """

    requests: int = 0
    failed: int = 0
    dropped: int = 0
    rows: int = 0
    tokens: int = 0
    layer_rows: int = 0
    layer_tokens: int = 0
    compute_s: float = 0.0
    overhead_s: float = 0.0
    exits: Counter[int] = field(default_factory=Counter)
    batches: Counter[int] = field(default_factory=Counter)

    def ran(self, rows: int, tokens: int, seconds: float) -> None:
        """One layer, shared by so many rows."""
        self.layer_rows += rows
        self.layer_tokens += tokens
        self.compute_s += seconds
        if rows:
            self.batches[rows] += 1

    def answered(self, tokens: int, exit_depth_B: NumpyArray) -> None:
        """A request: how long its rows were together, and where each left."""
        self.requests += 1
        self.rows += exit_depth_B.size
        self.tokens += tokens
        self.exits.update(exit_depth_B.tolist())

    def to_json(self) -> dict[str, Any]:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return values | {"exits": dict(self.exits), "batches": dict(self.batches)}
