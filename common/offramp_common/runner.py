"""The only loop that runs layers and lets rows leave.

The device (ONNX Runtime), the torch reference and the cloud's engine give it their own `Layers`;
what leaves when, and what is carried on, is decided in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol

import numpy as np
from numpy.typing import NDArray

from offramp_common.activations import A, Activations

Knobs = Mapping[str, tuple[float, ...]]
"""An exit method's operating point: each knob's value at every exit, index d - 1 for depth d."""


@dataclass(frozen=True, slots=True, eq=False)
class Look(Generic[A]):
    """What the exit head at one depth says of each row.

    leave_B       True for rows that may leave here (numpy)
    answer        the answer a row would leave with, (B, ...): logits, a score, logits per token
    confidence_B  how sure the method is, in [0, 1], higher is surer (numpy); the planner reads it
    outputs       the branch's named tensors before the policy: what calibration records
    """

    leave_B: NDArray[np.bool_]
    answer: A
    confidence_B: NDArray[np.float32]
    outputs: Mapping[str, A] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Step(Generic[A]):
    """One layer further: the activations with the method's state brought up to date, and the look
    at them where an exit head stands. Rows keep their number and order; tokens may be fewer."""

    acts: Activations[A]
    look: Look[A] | None


class Layers(Protocol[A]):
    """One model's layers on one runtime. `n_layers` always has an exit head: the final one."""

    @property
    def n_layers(self) -> int: ...

    def step(self, acts: Activations[A], knobs: Knobs) -> Step[A]:
        """Run layer `acts.depth` and look, if an exit head stands behind it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Leaving(Generic[A]):
    """Rows (positions in the batch given to `run`) that left at `depth`, with their answers."""

    rows: NDArray[np.int64]
    depth: int
    answer: A
    confidence_B: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Run(Generic[A]):
    """What became of a batch.

    left          who left where, shallowest first
    rest          the rows that have not left, at depth `stop`; None when all have
    rest_rows     their positions in the batch given to `run`
    provisional   for the rest, the answer of the deepest look they had (its `rows` equal
                  rest_rows); None when no exit head was passed. What a fallback answers with.
    """

    left: tuple[Leaving[A], ...]
    rest: Activations[A] | None
    rest_rows: NDArray[np.int64]
    provisional: Leaving[A] | None


def run(
    layers: Layers[A],
    acts: Activations[A],
    stop: int,
    knobs: Knobs,
    observe: Callable[[int, NDArray[np.int64], Look[A]], None] | None = None,
) -> Run[A]:
    """Run [acts.depth, stop); rows leave where the method says so, all of them at `n_layers`.

    observe   told of every look: its depth, and which rows of the batch given here it is at
    """
    if not acts.depth <= stop <= layers.n_layers:
        raise ValueError(f"cannot run from depth {acts.depth} to {stop} of {layers.n_layers}")
    rows = np.arange(acts.batch_size)
    left: list[Leaving[A]] = []
    provisional: Leaving[A] | None = None
    while acts.depth < stop and rows.size:
        step = layers.step(acts, knobs)
        # Our own invariants: a step that stands still would never end.
        assert step.acts.depth == acts.depth + 1, f"a step from {acts.depth} to {step.acts.depth}"
        acts, look = step.acts, step.look
        assert acts.batch_size == rows.size, f"{acts.batch_size} rows of {rows.size} after a step"
        assert look is not None or acts.depth < layers.n_layers, "no exit head at full depth"
        if look is None:
            continue
        if observe is not None:
            observe(acts.depth, rows, look)
        leave_B = np.ones(rows.size, bool) if acts.depth == layers.n_layers else look.leave_B
        gone, stay = np.flatnonzero(leave_B), np.flatnonzero(~leave_B)
        if gone.size:
            left.append(_leaving(rows, gone, acts.depth, look))
        provisional = _leaving(rows, stay, acts.depth, look) if stay.size else None
        if gone.size:
            rows, acts = rows[stay], acts.take(stay)
    return Run(tuple(left), acts if rows.size else None, rows, provisional)


def _leaving(
    rows: NDArray[np.int64], at: NDArray[np.int64], depth: int, look: Look[A]
) -> Leaving[A]:
    answer: A = look.answer if at.size == rows.size else look.answer[at]  # type: ignore[index]
    return Leaving(rows[at], depth, answer, look.confidence_B[at])
