"""Training with the weights as the bundle will store them: int8 forward, straight-through backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from offramp_common.weights import LINEAR_LEVELS, TABLE_LEVELS
from offramp_model.split_model import MultiExitModel
from offramp_model.store import named_tensors, stored_kinds


@torch.no_grad()
def as_stored(matrix_RD: Tensor, kind: str) -> Tensor:
    """What reading the matrix back from a bundle gives: quantised by row and multiplied out again.

    The same bits as offramp_common.weights; kind is "linear" or "table".
    """
    levels = LINEAR_LEVELS if kind == "linear" else TABLE_LEVELS
    largest_R1 = matrix_RD.abs().amax(dim=1, keepdim=True)
    scale_R1 = torch.where(largest_R1 > 0, largest_R1 / levels, 1.0)
    return (matrix_RD / scale_R1).round_().clamp_(-levels, levels).mul_(scale_R1)


class StoredWeights:
    """Swaps a model's matrices for what a bundle would hold of them.

    Make a new one when other weights are loaded or another part is frozen: what is frozen is kept.
    """

    def __init__(self, model: MultiExitModel) -> None:
        tensors = named_tensors(model)
        self._matrices = [
            (tensors[name], kind) for name, kind in stored_kinds(model).items() if name in tensors
        ]
        self._frozen: dict[int, Tensor] = {}

    @contextmanager
    def swapped(self, on: bool = True) -> Iterator[None]:
        """Inside, forward and backward see stored weights; gradients reach the float32 ones unchanged."""
        if not on:
            yield
            return
        originals = [(matrix, matrix.data) for matrix, _ in self._matrices]
        try:
            for matrix, kind in self._matrices:
                matrix.data = self._stored(matrix, kind)
            yield
        finally:
            for matrix, data in originals:
                matrix.data = data

    def _stored(self, matrix: Tensor, kind: str) -> Tensor:
        if matrix.requires_grad:
            return as_stored(matrix.data, kind)
        # Frozen tables are the largest matrices, and need it once.
        if id(matrix) not in self._frozen:
            self._frozen[id(matrix)] = as_stored(matrix.data, kind)
        return self._frozen[id(matrix)]
