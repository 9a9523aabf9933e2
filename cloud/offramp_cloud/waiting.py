"""What waits for the engine, and what it takes next.

Lowest depth first: such a batch passes all deeper layers on its way, and in measurements the order
kept the slowest requests fastest. No timed window: whatever waits at the moment is taken, because a
timer would cost a lone request its whole length.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from offramp_common.activations import Activations, NumpyArray
from offramp_common.errors import CloudBusy
from offramp_common.runner import Knobs
from offramp_common.transport import Completion

KnobKey = tuple[tuple[str, tuple[float, ...]], ...]


@dataclass(frozen=True, slots=True)
class Load:
    """How much an engine takes on, and how it joins it.

    max_batch           rows run together; a frame with more is run in pieces
    max_waiting_rows    rows in the house, waiting or running; beyond it work is refused as CloudBusy
    max_waiting_bytes   the same in bytes: of the frame while it is decoded, of its arrays afterwards
    max_padding         padded tokens of a joined batch over those of its requests run alone: mixed
                        lengths padded together were slower than no batch at all
    max_age_s           a request that has waited this long goes first, whatever its depth
    """

    max_batch: int = 32
    max_waiting_rows: int = 1024
    max_waiting_bytes: int = 256 * 2**20
    max_padding: float = 1.25
    max_age_s: float = 0.25

    def __post_init__(self) -> None:
        if min(self.max_batch, self.max_waiting_rows, self.max_waiting_bytes) < 1:
            raise ValueError(f"{self}: batch, rows and bytes must be at least 1")
        if not self.max_padding >= 1 or not self.max_age_s > 0:
            raise ValueError(f"{self}: max_padding must be at least 1, max_age_s above 0")


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """One request in the queue.

    knobs      float32 values, sorted by name: equal keys may share a batch
    arrived_s  on the clock that `take` is asked with;  deadline_s  on the same, None for none
    done       resolved with the answer; done already when nobody wants it any more
    """

    request_id: str
    acts: Activations[NumpyArray]
    knobs: KnobKey
    arrived_s: float
    deadline_s: float | None
    done: asyncio.Future[Completion]

    @property
    def rows(self) -> int:
        return self.acts.batch_size

    @property
    def longest(self) -> int:
        return int(self.acts.hidden_BTD.shape[1])

    def wanted(self, now_s: float) -> bool:
        """False once cancelled, answered or past its deadline."""
        return not self.done.done() and (self.deadline_s is None or now_s < self.deadline_s)


def knob_key(knobs: Knobs) -> KnobKey:
    return tuple(sorted((name, tuple(values)) for name, values in knobs.items()))


def nbytes_of(acts: Activations[NumpyArray]) -> int:
    arrays = (acts.hidden_BTD, *acts.state.values(), *acts.token_state.values())
    return sum(array.nbytes for array in arrays)


class House:
    """What is under the engine's roof at the moment."""

    def __init__(self, load: Load) -> None:
        self._load, self._rows, self._bytes = load, 0, 0

    @contextmanager
    def room_for(self, rows: int, nbytes: int) -> Iterator[None]:
        """Raises CloudBusy when there is none. An empty house takes anything."""
        load = self._load
        if self._rows and self._rows + rows > load.max_waiting_rows:
            raise CloudBusy(f"{self._rows} rows wait, at most {load.max_waiting_rows}; retry later")
        if self._bytes and self._bytes + nbytes > load.max_waiting_bytes:
            raise CloudBusy(
                f"{self._bytes} bytes wait, at most {load.max_waiting_bytes}; retry later"
            )
        self._rows, self._bytes = self._rows + rows, self._bytes + nbytes
        try:
            yield
        finally:
            self._rows, self._bytes = self._rows - rows, self._bytes - nbytes


class WaitingRoom:
    """The queue, in order of arrival. Touched only by the engine's event loop."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._waiting: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Waiting) -> None:
        self._waiting.append(request)

    def take(self, now_s: float) -> list[Waiting]:
        """The next batch, at least one request while any is wanted; unwanted ones are dropped."""
        self._waiting = [request for request in self._waiting if request.wanted(now_s)]
        if not self._waiting:
            return []
        lead = self._waiting[0]
        if now_s - lead.arrived_s < self._load.max_age_s:
            lead = min(self._waiting, key=lambda request: request.acts.depth)  # the oldest of them
        fitting = (
            request
            for request in self._waiting
            if request.acts.depth == lead.acts.depth and request.knobs == lead.knobs
        )
        batch = _similar(lead, fitting, self._load)
        taken = set(map(id, batch))
        self._waiting = [request for request in self._waiting if id(request) not in taken]
        return batch

    def empty(self) -> list[Waiting]:
        """Everything that waits; nothing waits afterwards."""
        waiting, self._waiting = self._waiting, []
        return waiting


def _similar(lead: Waiting, candidates: Iterable[Waiting], load: Load) -> list[Waiting]:
    """`lead` and those nearest to it in length, within `max_batch` rows and `max_padding`."""
    batch, rows, longest = [lead], lead.rows, lead.longest
    alone = rows * longest
    others = (request for request in candidates if request is not lead)
    for request in sorted(others, key=lambda request: abs(request.longest - lead.longest)):
        joined = max(longest, request.longest)
        apart = alone + request.rows * request.longest
        if rows + request.rows > load.max_batch:
            continue
        if (rows + request.rows) * joined > load.max_padding * apart:
            continue
        batch.append(request)
        rows, longest, alone = rows + request.rows, joined, apart
    return batch
