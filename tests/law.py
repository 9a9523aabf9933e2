"""The project's first law, as functions that tests of any method and runtime share.

run(0, n)  ==  run(0, k) -> encode -> decode -> run(k, n)     same answer, same exit depth
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offramp_common.activations import Activations, NumpyArray
from offramp_common.frames import Limits, decode_frame, encode_frame
from offramp_common.runner import Knobs, Layers, Leaving, run
from offramp_common.spec import CutSpec
from offramp_model.split_model import to_numpy, to_torch


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of each row, in the batch's order: answers (B, ...), depth_B, confidence_B."""

    answers: NDArray[Any]
    depth_B: NDArray[np.int64]
    confidence_B: NDArray[np.float32]

    @classmethod
    def of(cls, left: Iterable[Leaving[Any]]) -> Outcome:
        """From groups that together hold each row once."""
        groups = list(left)
        order = np.argsort(np.concatenate([group.rows for group in groups]))
        answers = np.concatenate([np.asarray(group.answer) for group in groups])
        depths = np.concatenate([np.full(group.rows.size, group.depth) for group in groups])
        confidence = np.concatenate([group.confidence_B for group in groups])
        return cls(answers[order], depths[order], confidence[order])

    def same_as(self, other: Outcome) -> bool:
        """Bit for bit; a NaN equals itself."""
        return (
            np.array_equal(self.depth_B, other.depth_B)
            and np.array_equal(self.answers, other.answers, equal_nan=True)
            and np.array_equal(self.confidence_B, other.confidence_B)
        )


def whole(layers: Layers[Tensor], inputs: Activations[NumpyArray], knobs: Knobs) -> Outcome:
    """run(0, n)"""
    return Outcome.of(run(layers, to_torch(inputs), layers.n_layers, knobs).left)


def cut_at(
    k: int,
    layers: Layers[Tensor],
    inputs: Activations[NumpyArray],
    knobs: Knobs,
    cuts: Mapping[int, CutSpec],
) -> Outcome:
    """run(0, k) -> encode_frame(fp32) -> decode_frame -> run(k, n)"""
    return cut_at_all([k], layers, inputs, knobs, cuts)


def cut_at_all(
    points: Sequence[int],
    layers: Layers[Tensor],
    inputs: Activations[NumpyArray],
    knobs: Knobs,
    cuts: Mapping[int, CutSpec],
) -> Outcome:
    """As `cut_at`, with a frame at each of the ascending `points`."""
    left: list[Leaving[Tensor]] = []
    rest, rows = inputs, np.arange(inputs.batch_size)
    for stop in (*points, layers.n_layers):
        part = run(layers, to_torch(rest), stop, knobs)
        left += [
            Leaving(rows[group.rows], group.depth, group.answer, group.confidence_B)
            for group in part.left
        ]
        if part.rest is None:
            break
        rows = rows[part.rest_rows]
        rest = decode_frame(encode_frame(to_numpy(part.rest), cuts[stop], "fp32"), cuts, Limits())
    return Outcome.of(left)
