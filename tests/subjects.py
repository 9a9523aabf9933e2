"""Every exit method on every task it can decide on, as toy models: what the contract's tests run over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from law import Outcome
from toy_models import LABELS, toy_model

from offramp_common.activations import Activations, NumpyArray, unpack
from offramp_common.spec import TaskSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel

N, WIDTH = 3, 32
BATCHES = (1, 8, 64)
# Float32 sums in another order: other batch shapes, or another runtime. Toy logits are of size 1 to
# 3, and were seen to differ by up to 2e-6.
TOLERANCE = 1e-4
SUBJECTS = [(method.name, kind) for method in METHODS.values() for kind in method.tasks]


@dataclass(frozen=True)
class Subject:
    method: str
    kind: str

    def model(self, seed: int = 7) -> MultiExitModel:
        task = TaskSpec(self.kind, LABELS if self.kind == "classification" else ())
        return toy_model(self.method, n_layers=N, width=WIDTH, task=task, seed=seed)


def inputs(rows: int, seed: int = 0, below: int = 20) -> Activations[NumpyArray]:
    """Random rows of 1 to `below` - 1 tokens for toy models, at depth 0."""
    rng = np.random.default_rng(seed)
    lengths_B = rng.integers(1, below, rows)
    return Activations(unpack(rng.integers(0, 100, (lengths_B.sum(), 1)), lengths_B), lengths_B, 0)


def close(a: Outcome, b: Outcome) -> None:
    np.testing.assert_array_equal(a.depth_B, b.depth_B)
    np.testing.assert_allclose(a.answers, b.answers, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(a.confidence_B, b.confidence_B, rtol=0, atol=TOLERANCE)
