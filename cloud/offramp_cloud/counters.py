"""What an engine has done since it started; the metrics read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from offramp_common.activations import Activations, NumpyArray


@dataclass
class Counters:
    """Written by the compute thread alone.

    requests, rows, tokens   that were run;   failed   requests whose run raised
    layer_rows               layers run, summed over rows
    exits                    rows by the depth at which they left
    batches                  batches by their number of rows
    """

    requests: int = 0
    failed: int = 0
    rows: int = 0
    tokens: int = 0
    layer_rows: int = 0
    exits: Counter[int] = field(default_factory=Counter)
    batches: Counter[int] = field(default_factory=Counter)

    def add(self, requests: int, acts: Activations[NumpyArray], exit_depth_B: NumpyArray) -> None:
        """A batch that has run: what went in, and where each row left."""
        self.requests += requests
        self.rows += acts.batch_size
        self.tokens += acts.n_tokens
        self.layer_rows += int(exit_depth_B.sum()) - acts.depth * acts.batch_size
        self.exits.update(exit_depth_B.tolist())
        self.batches[acts.batch_size] += 1

    def to_json(self) -> dict[str, Any]:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return values | {"exits": dict(self.exits), "batches": dict(self.batches)}
