"""FLOPs of a multi-exit model, counted on its real modules: what a row costs that leaves at some depth.

Counted is what torch's FlopCounterMode counts: matrix products and convolutions, a multiplication and an
addition each being one. Elementwise work (softmax, norms, activations, entropies) and look-ups are not: a
few per cent of a transformer layer. One counter for all methods; exit heads and whatever else they evaluate
on the way are counted where a row passes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from offramp_common.activations import NumpyArray
from offramp_model.split_model import MultiExitModel


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one row. Index d - 1 belongs to depth d; the embeddings are in the first layer.

    heads   of branch and policy; 0 where nothing looks
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]

    def until(self, depth: int) -> int:
        """Of a row that leaves at `depth`, every exit on the way evaluated."""
        return sum(self.layers[:depth]) + sum(self.heads[:depth])


@torch.no_grad()
def count_flops(model: MultiExitModel, n_tokens: int) -> Flops:
    """For one row of so many tokens, none of them padding. Shapes alone decide."""
    model.eval()
    mask_BT = torch.ones((1, n_tokens), dtype=torch.bool)
    ids_BTF = torch.zeros((1, n_tokens, model.channels), dtype=torch.int64)
    never = {knob.name: torch.tensor(float(knob.never)) for knob in model.knobs}
    state: Mapping[str, Tensor] = {}
    layers, heads = [], []
    hidden_BTD = torch.empty(0)
    for depth in range(1, model.n_layers + 1):
        with _counter() as counter:
            if depth == 1:
                hidden_BTD = model.backbone.embed(ids_BTF)
            hidden_BTD = model.backbone.run_layers(hidden_BTD, None, depth - 1, depth)
        layers.append(counter.get_total_flops())
        head = model.head(depth)
        if head is None:
            heads.append(0)
            continue
        with _counter() as counter:
            decision, _ = head(hidden_BTD, mask_BT, state, never)
        state = decision.state
        heads.append(counter.get_total_flops())
    return Flops(tuple(layers), tuple(heads))


class FlopTable:
    """Counts each length once, and adds up rows."""

    def __init__(self, model: MultiExitModel) -> None:
        self.model = model
        self._known: dict[int, Flops] = {}

    def of(self, n_tokens: int) -> Flops:
        if n_tokens not in self._known:
            self._known[n_tokens] = count_flops(self.model, n_tokens)
        return self._known[n_tokens]

    def rows(self, depth_N: NumpyArray, lengths_N: NumpyArray) -> NumpyArray:
        """float64, one a row: FLOPs of the rows that left at these depths."""
        pairs = zip(depth_N.tolist(), lengths_N.tolist(), strict=True)
        return np.array([self.of(length).until(depth) for depth, length in pairs], dtype=np.float64)


@contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    """Attention as its two matrix products: torch does not count the CPU's fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
