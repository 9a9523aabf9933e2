"""Layers are run, and rows leave.

The device (ONNX Runtime) and the torch reference give `run` their own `Layers`. The cloud's engine,
whose batches are made anew at each layer, has a loop of its own over `step` or `steps`; who leaves, and
what is carried on, `settle` decides for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from offramp_common.activations import A, Activations, Rows

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


@runtime_checkable
class JoinedLayers(Layers[A], Protocol[A]):
    """Layers that run one layer over many batches at once."""

    def steps(self, parts: Sequence[tuple[Rows[A], Knobs]]) -> list[Step[A]]:
        """`step` for each of `parts` (at least one, all of one depth): their rows share the layer and
        know nothing of each other. The rows of a part come out as one batch, in their order."""
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


@dataclass(frozen=True, slots=True, eq=False)
class Settled(Generic[A]):
    """Rows after a layer: who leaves, and who goes on.

    after   all of them, a layer further
    gone    positions of those that leave, by the step's look;  stay  of those that go on
    """

    after: Activations[A]
    gone: NDArray[np.int64]
    stay: NDArray[np.int64]

    @property
    def acts(self) -> Activations[A]:
        """Of the rows that go on. A copy where some have left."""
        return self.after.take(self.stay) if self.gone.size else self.after


def settle(before: Activations[A] | Rows[A], step: Step[A], n_layers: int) -> Settled[A]:
    """Let rows leave after the layer that `before` was given to: where the method says so, all of them at
    `n_layers`. Nothing else in the project decides who leaves.
    """
    acts, look = step.acts, step.look
    # Our own invariants: a step that stands still would never end.
    assert acts.depth == before.depth + 1, f"a step from {before.depth} to {acts.depth}"
    assert acts.batch_size == before.batch_size, f"{acts.batch_size} rows of {before.batch_size}"
    assert look is not None or acts.depth < n_layers, "no exit head at full depth"
    if look is not None and acts.depth < n_layers:
        return Settled(acts, look.leave_B.nonzero()[0], (~look.leave_B).nonzero()[0])
    every, nobody = np.arange(acts.batch_size), np.zeros(0, np.int64)
    return Settled(acts, nobody, every) if look is None else Settled(acts, every, nobody)


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
        if step.look is not None and observe is not None:
            observe(step.acts.depth, rows, step.look)
        settled = settle(acts, step, layers.n_layers)
        if step.look is not None:
            gone, stay, depth = settled.gone, settled.stay, step.acts.depth
            if gone.size:
                left.append(_leaving(rows, gone, depth, step.look))
            provisional = _leaving(rows, stay, depth, step.look) if stay.size else None
        acts, rows = settled.acts, rows[settled.stay]
    return Run(tuple(left), acts if rows.size else None, rows, provisional)


def _leaving(
    rows: NDArray[np.int64], at: NDArray[np.int64], depth: int, look: Look[A]
) -> Leaving[A]:
    answer: A = look.answer if at.size == rows.size else look.answer[at]  # type: ignore[index]
    return Leaving(rows[at], depth, answer, look.confidence_B[at])
