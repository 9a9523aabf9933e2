"""What a method needs beside its recipe: numbers fitted once the weights are trained and fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Example


@dataclass(frozen=True, slots=True)
class Fitting:
    """model in evaluation mode, its matrices as the bundle will store them; the examples to fit on; the
    run's seed."""

    model: MultiExitModel
    examples: Sequence[Example]
    seed: int


@dataclass(frozen=True, slots=True)
class Fit:
    """One step after training. Fits of a method run in order.

    part    the rows it is fitted on: "train", "dev", or a name of its own: then `share` of the training rows
            is set apart under it before training
    run     changes the model (buffers, small modules) and returns what to put on record (JSON)
    tasks   the task kinds that need it
    """

    name: str
    part: str
    run: Callable[[Fitting], dict[str, Any]]
    share: float = 0.0
    tasks: tuple[str, ...] = ("classification", "regression")
