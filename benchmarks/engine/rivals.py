"""Who is measured: servers that take requests one by one and finish them, in one thread, without a clock
that anybody waits for.

    work() runs something and says which requests are over; everything else is the server's own choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor
from workload import Item, Workload

from offramp_cloud.counters import Counters
from offramp_cloud.elevator import Elevator
from offramp_cloud.waiting import Load, Request
from offramp_common.activations import Activations, join
from offramp_common.runner import Layers, run, settle
from offramp_common.transport import Completion
from offramp_model.split_model import to_numpy, to_torch

Clock = Callable[[], float]

Over = list[tuple[int, int]]
"""(number of the request, depth at which it left)."""


class Server(Protocol):
    def submit(self, number: int, item: Item) -> None: ...

    def work(self) -> Over: ...


class LowestFirst(Elevator):
    """As the elevator, but that whoever comes in below is always fetched first."""

    def _fetch(self, below: list[int], above: list[int], now_s: float) -> bool:
        return True


class Riding:
    """The engine's elevator, or one of its kind."""

    def __init__(
        self,
        work: Workload,
        layers: Layers[Tensor],
        clock: Clock,
        kind: type[Elevator] = Elevator,
    ) -> None:
        self.counters = Counters()
        self.elevator = kind(layers, Load(), self.counters, clock=clock)
        self._knobs, self._clock = work.knobs, clock

    def submit(self, number: int, item: Item) -> None:
        self.elevator.board(Request(str(number), item.acts, self._knobs, self._clock()))

    def work(self) -> Over:
        over: Over = []
        for done in self.elevator.run():
            assert isinstance(done.outcome, Completion), done.outcome
            over.append((int(done.request.request_id), int(done.outcome.exit_depth_B[0])))
        return over


@dataclass
class PerDepth:
    """Requests of one depth are joined, and run until the last of them has left.

    lead         the depth that goes next: of the "oldest" request, the "lowest", or the one with "most"
    max_batch    requests joined; 1: no batching
    max_padding  padded over real tokens; what is longer waits. Infinite where layers see no padding
    """

    work_load: Workload
    layers: Layers[Tensor]
    lead: str = "lowest"
    max_batch: int = 32
    max_padding: float = float("inf")
    waiting: list[tuple[int, Item]] = field(default_factory=list)

    def submit(self, number: int, item: Item) -> None:
        self.waiting.append((number, item))

    def work(self) -> Over:
        batch = self._take()
        acts = to_torch(join([item.acts for _, item in batch]))
        over: Over = []
        for left in run(self.layers, acts, self.layers.n_layers, dict(self.work_load.knobs)).left:
            over += [(batch[row][0], left.depth) for row in left.rows.tolist()]
        return over

    def _take(self) -> list[tuple[int, Item]]:
        depths = [item.acts.depth for _, item in self.waiting]
        depth = {"oldest": depths[0], "lowest": min(depths)}.get(
            self.lead, max(set(depths), key=depths.count)
        )
        here = [entry for entry in self.waiting if entry[1].acts.depth == depth]
        batch, real, longest = [here[0]], _tokens(here[0]), _tokens(here[0])
        for entry in sorted(here[1:], key=lambda entry: abs(_tokens(entry) - _tokens(here[0]))):
            tokens, most = real + _tokens(entry), max(longest, _tokens(entry))
            fits = (len(batch) + 1) * most <= self.max_padding * tokens
            if len(batch) < self.max_batch and fits:
                batch.append(entry)
                real, longest = tokens, most
        taken = {number for number, _ in batch}
        self.waiting = [entry for entry in self.waiting if entry[0] not in taken]
        return batch


def _tokens(entry: tuple[int, Item]) -> int:
    return int(entry[1].acts.lengths_B[0])


def perfect_batch(work: Workload, layers: Layers[Tensor], items: Sequence[Item]) -> list[int]:
    """All of `items` in one pass, each joining at its depth, with nothing to decide; where each left."""
    depth_of = np.zeros(len(items), np.int64)
    rows = np.zeros(0, np.int64)
    acts: Activations[Tensor] | None = None
    for depth in range(layers.n_layers):
        new = [i for i, item in enumerate(items) if item.acts.depth == depth]
        parts = [] if acts is None else [to_numpy(acts)]
        parts += [items[i].acts for i in new]
        if not parts:
            continue
        rows = np.concatenate([rows, np.array(new, np.int64)])
        before = to_torch(join(parts))
        step = layers.step(before, dict(work.knobs))
        settled = settle(before, step, layers.n_layers)
        depth_of[rows[settled.gone]] = depth + 1
        rows = rows[settled.stay]
        acts = settled.acts if rows.size else None
    found: list[int] = depth_of.tolist()
    return found


Maker = Callable[[], Server]
