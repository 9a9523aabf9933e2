"""What an engine takes on, and who goes first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from offramp_common.activations import Activations, NumpyArray
from offramp_common.errors import CloudBusy
from offramp_common.runner import Knobs

KnobKey = tuple[tuple[str, tuple[float, ...]], ...]


@dataclass(frozen=True, slots=True)
class Load:
    """How much an engine takes on, and how it joins it.

    max_batch           rows that share a layer; a frame with more is run in pieces
    max_batch_tokens    the same in tokens: sharing gains nothing beyond some hundred, and nobody gets in
                        or out while a layer runs
    max_waiting_rows    rows in the house, waiting or running; beyond it work is refused as CloudBusy
    max_waiting_bytes   the same in bytes: of the frame while it is decoded, of its arrays afterwards
    max_padding         padded over real tokens of the rows that an exit head looks at together (layers
                        see no padding)
    max_age_s           a request that has been here for so long goes before any other, whatever its
                        depth and priority, and is kept waiting for nobody
    """

    max_batch: int = 64
    max_batch_tokens: int = 1024
    max_waiting_rows: int = 1024
    max_waiting_bytes: int = 256 * 2**20
    max_padding: float = 2.0
    max_age_s: float = 1.0

    def __post_init__(self) -> None:
        counts = (
            self.max_batch,
            self.max_batch_tokens,
            self.max_waiting_rows,
            self.max_waiting_bytes,
        )
        if min(counts) < 1:
            raise ValueError(f"{self}: batch, tokens, rows and bytes must be at least 1")
        if not self.max_padding >= 1 or not self.max_age_s > 0:
            raise ValueError(f"{self}: max_padding must be at least 1, max_age_s above 0")


@dataclass(slots=True, eq=False)
class Request:
    """One request in the house.

    knobs      float32 values, sorted by name: rows with equal keys may be looked at together
    arrived_s  on the elevator's clock;  deadline_s  on the same, None for none
    unwanted   set by whoever asked, once nobody waits for the answer;  started  set with its first layer.
               Each is written by one thread and read by the other
    tokens     of all its rows
    """

    request_id: str
    acts: Activations[NumpyArray]
    knobs: KnobKey
    arrived_s: float
    deadline_s: float | None = None
    priority: int = 0
    unwanted: bool = False
    started: bool = False
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.acts.n_tokens

    def wanted(self, now_s: float) -> bool:
        """False once cancelled or past its deadline."""
        return not self.unwanted and (self.deadline_s is None or now_s < self.deadline_s)

    def work(self, n_layers: int) -> int:
        """Layers x tokens if no row leaves early."""
        return (n_layers - self.acts.depth) * self.tokens

    def rank(self, now_s: float, max_age_s: float) -> tuple[float, float, float]:
        """Lowest goes first: whoever is old, then by priority, then by deadline; the oldest of equals."""
        if now_s - self.arrived_s >= max_age_s:
            return (-math.inf, 0.0, self.arrived_s)
        deadline_s = math.inf if self.deadline_s is None else self.deadline_s
        return (-self.priority, deadline_s, self.arrived_s)


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
