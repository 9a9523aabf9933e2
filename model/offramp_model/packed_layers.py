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

from offramp_common.activations import Activations, Rows
from offramp_common.runner import Knobs, Step
from offramp_model.backbones.packed import Packed, Run, can_pack, padded_to
from offramp_model.split_model import MultiExitModel, TorchLayers, join_rows

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

    @property
    def n_layers(self) -> int:
        return self._whole.n_layers

    @property
    def device(self) -> torch.device:
        return self._whole.device

    def step(self, acts: Activations[Tensor], knobs: Knobs) -> Step[Tensor]:
        return self.steps([(Rows.of(acts), knobs)])[0]

    @torch.inference_mode()
    def steps(self, parts: Sequence[tuple[Rows[Tensor], Knobs]]) -> list[Step[Tensor]]:
        if self._packed is None:
            return [self._whole.step(join_rows(rows), knobs) for rows, knobs in parts]
        depth = parts[0][0].depth
        given = [rows if depth else self._embedded(rows) for rows, _ in parts]
        lengths = [rows.lengths_B for rows in given]
        spots = _Spots(np.concatenate(lengths))
        hidden_ND = spots.gather([piece for rows in given for piece in rows.pieces])
        biases = self._biases_of(given, spots)
        hidden_ND = self._packed.run_layer(
            depth, hidden_ND.to(self._packed.dtype), spots.runs, biases.__getitem__
        ).float()
        found: list[Step[Tensor]] = []
        start = 0
        for rows, lengths_B, (_, knobs) in zip(given, lengths, parts, strict=True):
            hidden_BTD = spots.scatter(hidden_ND, start, lengths_B)
            start += lengths_B.size
            acts = replace(join_rows(rows, hidden_BTD), depth=depth + 1)
            found.append(self._whole.look(acts, knobs))
        return found

    def _embedded(self, rows: Rows[Tensor]) -> Rows[Tensor]:
        acts = join_rows(rows)
        return Rows.of(replace(acts, hidden_BTD=self._backbone.embed(acts.hidden_BTD)))

    def _biases_of(self, given: Sequence[Rows[Tensor]], spots: _Spots) -> list[Tensor | None]:
        """What each run adds to its attention scores."""
        pieces = tuple(piece for rows in given for piece in rows.pieces)
        if all(acts.positions_BT is None for acts, _ in pieces):
            return [self._bias(length) for _, length in spots.runs]
        places_BT = join_rows(Rows(pieces)).positions_BT
        assert places_BT is not None
        found: list[Tensor | None] = []
        start = 0
        for rows, length in spots.runs:
            places_GT = places_BT[spots.order[start : start + rows], :length]
            found.append(self._bias_at(length, places_GT))
            start += rows
        return found

    def _bias(self, length: int) -> Tensor | None:
        if length in self._biases:
            return self._biases[length]
        bias = self._bias_at(length, None)
        if len(self._biases) < _BIASES:
            self._biases[length] = bias
        return bias

    def _bias_at(self, length: int, places_GT: Tensor | None) -> Tensor | None:
        assert self._packed is not None
        like_1TD = torch.empty(1, length, 1, device=self.device)  # only its shape counts
        bias = self._backbone.attention_bias(like_1TD, places_GT)
        return None if bias is None else bias.to(self._packed.dtype)


class _Spots:
    """Where the tokens of rows lie when packed: shortest rows first, so that those of one length are
    neighbours.

    runs    (rows, tokens of each) of neighbouring rows of one length
    order   the rows in that order;  tokens  all of them

    Lists, because for a handful of rows they take a fraction of the time that arrays do.
    """

    def __init__(self, lengths_B: NDArray[np.int64]) -> None:
        self._lengths: list[int] = lengths_B.tolist()
        self.order = sorted(range(len(self._lengths)), key=self._lengths.__getitem__)
        self._first = [0] * len(self._lengths)  # of each row, its first packed token
        self.tokens = 0
        counts: dict[int, int] = {}
        for row in self.order:
            length = self._lengths[row]
            self._first[row] = self.tokens
            self.tokens += length
            counts[length] = counts.get(length, 0) + 1
        self.runs: list[Run] = [(rows, length) for length, rows in counts.items()]

    def gather(self, pieces: Sequence[tuple[Activations[Tensor], NDArray[np.int64]]]) -> Tensor:
        """(N, D) with padding at the end; a view where the rows lie so already."""
        first, at = pieces[0]
        rows, longest, width = first.hidden_BTD.shape
        padded = padded_to(self.tokens)
        if len(pieces) == 1 and at.size == rows and padded == self.tokens == rows * longest:
            return first.hidden_BTD.reshape(-1, width)
        each = [acts.hidden_BTD[row] for acts, at in pieces for row in at.tolist()]
        parts = [each[row][: self._lengths[row]] for row in self.order]
        if padded > self.tokens:
            parts.append(first.hidden_BTD.new_zeros(padded - self.tokens, width))
        return torch.cat(parts)

    def scatter(self, hidden_ND: Tensor, start: int, lengths_B: NDArray[np.int64]) -> Tensor:
        """(B, T, D) of the rows from `start` on. Padding, which may hold anything but what is another row's
        (that might not be a number), becomes copies of the row's last token."""
        rows, longest = lengths_B.size, int(lengths_B.max())
        shape = (rows, longest, hidden_ND.shape[-1])
        if rows == len(self.order) and rows * longest == self.tokens:
            return hidden_ND[: self.tokens].view(shape)
        first_B = np.array(self._first[start : start + rows])
        back_BT = first_B[:, None] + np.minimum(np.arange(longest), lengths_B[:, None] - 1)
        back_F = torch.from_numpy(back_BT.reshape(-1)).to(hidden_ND.device)
        return hidden_ND.index_select(0, back_F).view(shape)
