"""A MultiExitModel as the engine runs it: one layer over many batches at once, without padding.

Batches that differ in length, or in their operating point, share the layer's matrix products; each is then
looked at by the exit head on its own. The same answers as TorchLayers, the reference, up to float32 sums
in another order.

Axes: B samples, T tokens, D hidden width, N tokens of all rows packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp_common.activations import Activations, mask_of
from offramp_common.runner import Knobs, Step
from offramp_model.backbones.packed import Packed, Run, can_pack
from offramp_model.split_model import MultiExitModel, TorchLayers

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BIASES = 128  # lengths whose attention bias is kept, for families that have one


class PackedLayers:
    """Layers with `steps`: see offramp_common.runner.JoinedLayers."""

    def __init__(
        self, model: MultiExitModel, device: str | torch.device = "cpu", precision: str = "fp32"
    ) -> None:
        """`precision` is the layers': heads and what crosses between layers stay float32.

        Raises ValueError for an unknown precision, and for one that the family cannot be run in.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r}: must be one of {', '.join(PRECISIONS)}")
        self._whole = TorchLayers(model, device)
        self._backbone = model.backbone
        self._packed: Packed | None = None
        if can_pack(model.backbone):
            self._packed = Packed(model.backbone, PRECISIONS[precision])
        elif precision != "fp32":
            raise ValueError(f"{model.backbone.family} runs in fp32 alone, not in {precision}")
        self._biases: dict[int, Tensor | None] = {}
        self._last: list[_Spots] = []

    @property
    def n_layers(self) -> int:
        return self._whole.n_layers

    @property
    def device(self) -> torch.device:
        return self._whole.device

    def step(self, acts: Activations[Tensor], knobs: Knobs) -> Step[Tensor]:
        return self.steps([(acts, knobs)])[0]

    @torch.inference_mode()
    def steps(self, parts: Sequence[tuple[Activations[Tensor], Knobs]]) -> list[Step[Tensor]]:
        if self._packed is None:
            return [self._whole.step(acts, knobs) for acts, knobs in parts]
        depth = parts[0][0].depth
        batches = [self._embedded(acts) for acts, _ in parts]
        spots = [self._spots_of(acts) for acts in batches]
        self._last = spots
        pieces = [spot.gather(acts.hidden_BTD) for spot, acts in zip(spots, batches, strict=True)]
        hidden_ND = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        hidden_ND = hidden_ND.to(self._packed.dtype)
        runs = [run for spot in spots for run in spot.runs]
        biases = self._biases_of(batches, spots)
        hidden_ND = self._packed.run_layer(depth, hidden_ND, runs, biases.__getitem__).float()
        found: list[Step[Tensor]] = []
        start = 0
        for (_, knobs), acts, spot in zip(parts, batches, spots, strict=True):
            hidden_BTD = spot.scatter(hidden_ND[start : start + spot.tokens])
            start += spot.tokens
            acts = replace(acts, hidden_BTD=hidden_BTD, depth=depth + 1)
            found.append(self._whole.look(acts, knobs))
        return found

    def _spots_of(self, acts: Activations[Tensor]) -> _Spots:
        """Those of the layer before, where its rows have come through unchanged."""
        for spots in self._last:
            if spots.lengths_B is acts.lengths_B:
                return spots
        return _Spots(acts.lengths_B, acts.hidden_BTD.shape[1])

    def _embedded(self, acts: Activations[Tensor]) -> Activations[Tensor]:
        if acts.depth:
            return acts
        return replace(acts, hidden_BTD=self._backbone.embed(acts.hidden_BTD))

    def _biases_of(
        self, batches: Sequence[Activations[Tensor]], spots: Sequence[_Spots]
    ) -> list[Tensor | None]:
        """What each run adds to its attention scores."""
        found: list[Tensor | None] = []
        for acts, spot in zip(batches, spots, strict=True):
            row = 0
            for rows, length in spot.runs:
                places_GT = None
                if acts.positions_BT is not None:
                    places_GT = acts.positions_BT[spot.order[row : row + rows], :length]
                found.append(self._bias(acts.hidden_BTD[:1, :length], places_GT))
                row += rows
        return found

    def _bias(self, hidden_1TD: Tensor, places_GT: Tensor | None) -> Tensor | None:
        length = hidden_1TD.shape[1]
        if places_GT is None and length in self._biases:
            return self._biases[length]
        assert self._packed is not None
        bias = self._backbone.attention_bias(hidden_1TD, places_GT)
        bias = None if bias is None else bias.to(self._packed.dtype)
        if places_GT is None and len(self._biases) < _BIASES:
            self._biases[length] = bias
        return bias


class _Spots:
    """Where the tokens of a batch's rows lie, shortest rows first, so that those of one length are
    neighbours.

    runs    (rows, tokens of each) of neighbouring rows of one length
    order   the batch's rows in that order;  tokens  all of them
    """

    def __init__(self, lengths_B: NDArray[np.int64], longest: int) -> None:
        self.lengths_B = lengths_B
        self.order = np.argsort(lengths_B, kind="stable")
        self.tokens = int(lengths_B.sum())
        self._shape = (lengths_B.size, longest)
        counts = np.bincount(lengths_B)
        sizes = np.flatnonzero(counts)
        self.runs: list[Run] = list(zip(counts[sizes].tolist(), sizes.tolist(), strict=True))
        self._there: Tensor | None = None  # of each packed token, its place in the padded batch
        self._back: Tensor | None = None  # of each place, its packed token
        if self.tokens < lengths_B.size * longest:
            self._map(lengths_B, longest)

    def _map(self, lengths_B: NDArray[np.int64], longest: int) -> None:
        sorted_B = lengths_B[self.order]
        there_N = (self.order[:, None] * longest + np.arange(longest))[mask_of(sorted_B, longest)]
        first_B = np.zeros(lengths_B.size, np.int64)
        first_B[self.order] = np.cumsum(sorted_B) - sorted_B
        # Padding may hold anything, but nothing of another row: that might not be a number.
        back_F = np.repeat(first_B, longest)
        back_F[there_N] = np.arange(self.tokens)
        self._there, self._back = torch.from_numpy(there_N), torch.from_numpy(back_F)

    def gather(self, hidden_BTD: Tensor) -> Tensor:
        """(N, D); a view where no row is padded."""
        hidden_FD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        if self._there is None:
            return hidden_FD
        return hidden_FD.index_select(0, self._there.to(hidden_FD.device))

    def scatter(self, hidden_ND: Tensor) -> Tensor:
        """(B, T, D); padding becomes copies of its row's first token."""
        if self._back is not None:
            hidden_ND = hidden_ND.index_select(0, self._back.to(hidden_ND.device))
        return hidden_ND.reshape(*self._shape, hidden_ND.shape[-1])
