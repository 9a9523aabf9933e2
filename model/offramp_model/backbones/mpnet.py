"""MPNet: its layers read positions, as a bias by distance on every layer's attention scores.

So where tokens were left out on the way, the others' original places count.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp_model.backbones.backbone import Backbone


class _RelativePositions(nn.Module):
    """The bias of every layer, (B, heads, T, T)."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.relative_attention_bias = encoder.relative_attention_bias
        # Kept out of the module tree: only its functions are wanted, its parameters are listed above.
        self._encoder = [encoder]

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor | None) -> Tensor:
        if positions_BT is None:
            bias: Tensor = self._encoder[0].compute_position_bias(hidden_BTD)
            return bias
        # The library's own function takes positions, and then trips over their batch axis.
        distance_BTT = positions_BT[:, None, :] - positions_BT[:, :, None]
        bucket_BTT = self._encoder[0].relative_position_bucket(distance_BTT)
        values: Tensor = self.relative_attention_bias(bucket_BTT)
        return values.permute(0, 3, 1, 2).contiguous()


class _MPNet(Backbone):
    family = "mpnet"

    def embed_ids(self, ids_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
        hidden: Tensor = self.embeddings(input_ids=ids_BT)
        return hidden

    def run_layer(
        self,
        layer: nn.Module,
        hidden_BTD: Tensor,
        bias_B11T: Tensor | None,
        positions_BT: Tensor | None,
    ) -> Tensor:
        bias_BHTT = self.attention_bias(hidden_BTD, positions_BT)
        hidden: Tensor = layer(hidden_BTD, bias_B11T, bias_BHTT)[0]
        return hidden

    def attention_bias(self, hidden_BTD: Tensor, positions_BT: Tensor | None) -> Tensor | None:
        bias_BHTT: Tensor = self.shared(hidden_BTD, positions_BT)
        return bias_BHTT


def mpnet(model: Any) -> Backbone:
    config = model.config
    return _MPNet(
        model.embeddings,
        model.encoder.layer,
        config,
        width=config.hidden_size,
        max_tokens=config.max_position_embeddings - 2,  # the padding id is 1
        shared=_RelativePositions(model.encoder),
    )
