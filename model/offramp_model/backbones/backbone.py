"""What a pretrained family looks like once it is taken apart.

Axes: B samples, T tokens, F input channels (token ids, segment ids), D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """Embeddings and layers of one model; the base class fits the BERT-like families.

    embeddings   (ids_BT, segments_BT or None) -> hidden_BTD
    layers       one module per layer; a module may stand in several places (ALBERT)
    shared       what every layer needs (MPNet's relative positions), or an empty module
    config       the transformers configuration, to build the same model again
    segments     number of segment ids the family knows (0: none)

    pretrained_pooler   (weight, bias) of the checkpoint's own pooler, where it has one: what training
                        starts exit heads from. Plain tensors, no part of the module's weights.
    """

    family = "bert"

    def __init__(
        self,
        embeddings: nn.Module,
        layers: nn.ModuleList,
        config: Any,
        *,
        width: int,
        max_tokens: int,
        segments: int = 0,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embeddings, self.layers = embeddings, layers
        self.shared = nn.Module() if shared is None else shared
        self.config, self.width, self.max_tokens, self.segments = (
            config,
            width,
            max_tokens,
            segments,
        )
        self.pretrained_pooler: tuple[Tensor, Tensor] | None = None

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    def embed(self, inputs_BTF: Tensor) -> Tensor:
        """hidden_BTD at depth 0 from token ids (channel 0) and segment ids (channel 1, if there)."""
        segments_BT = inputs_BTF[..., 1] if inputs_BTF.shape[-1] > 1 else None
        return self.embed_ids(inputs_BTF[..., 0], segments_BT)

    def embed_ids(self, ids_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
        if segments_BT is None:
            # Named outright: some families would look up a buffer that shapes the exported graph.
            segments_BT = torch.zeros_like(ids_BT)
        hidden: Tensor = self.embeddings(input_ids=ids_BT, token_type_ids=segments_BT)
        return hidden

    def run_layers(
        self,
        hidden_BTD: Tensor,
        mask_BT: Tensor | None,
        start: int,
        stop: int,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """Run [start, stop). mask_BT None means that every token is real; positions_BT None that tokens
        stand at 0, 1, 2, ... (families that read positions in their layers want to know)."""
        bias_B11T = None
        if mask_BT is not None:
            lowest = torch.finfo(hidden_BTD.dtype).min
            bias_B11T = torch.zeros_like(mask_BT, dtype=hidden_BTD.dtype)
            bias_B11T = bias_B11T.masked_fill(~mask_BT, lowest)[:, None, None, :]
        for index in range(start, stop):
            hidden_BTD = self.run_layer(self.layers[index], hidden_BTD, bias_B11T, positions_BT)
        return hidden_BTD

    def run_layer(
        self,
        layer: nn.Module,
        hidden_BTD: Tensor,
        bias_B11T: Tensor | None,
        positions_BT: Tensor | None,
    ) -> Tensor:
        hidden: Tensor = layer(hidden_BTD, bias_B11T)
        return hidden

    def attention_bias(self, hidden_BTD: Tensor, positions_BT: Tensor | None) -> Tensor | None:
        """What every layer adds to its attention scores, (1 or B, heads, T, T), where the family has it;
        of `hidden_BTD` only the shape and the place count."""
        return None
