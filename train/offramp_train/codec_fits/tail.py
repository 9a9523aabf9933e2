"""The layers beyond a cut, with gradients: what a codec that is to be learned is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offramp_common.activations import Activations, mask_of
from offramp_model.backbones import Backbone
from offramp_model.split_model import MultiExitModel


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """Layers [depth, n) of a model whose weights stay as they are; no row leaves.

    bf16   run them in bfloat16, which is fast where the processor has it
    """

    model: MultiExitModel
    bf16: bool = False

    def answer(self, acts: Activations[Tensor], bias_B11T: Tensor | None = None) -> Tensor:
        """The last exit's answer, (B, C), by way of whatever state the method carries.

        bias_B11T   added to all scores of attention to a token, in every layer: in place of the mask
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            answer_BC: Tensor = self._answer(acts, bias_B11T).float()
        return answer_BC

    def _answer(self, acts: Activations[Tensor], bias_B11T: Tensor | None) -> Tensor:
        model, n = self.model, self.model.n_layers
        mask_BT = torch.from_numpy(mask_of(acts.lengths_B, acts.hidden_BTD.shape[1]))
        state: Mapping[str, Tensor] = {**acts.state, **acts.token_state}
        knobs = {knob.name: torch.tensor(float(knob.never)) for knob in model.knobs}
        answer: Tensor | None = None
        for depth in range(acts.depth + 1, n + 1):
            acts = replace(acts, hidden_BTD=self._layer(acts, mask_BT, bias_B11T), depth=depth)
            head = model.head(depth)
            if head is not None and (depth == n or model.policy.state_fields(depth)):
                decision, _ = head(acts.hidden_BTD, mask_BT, state, knobs)
                state, answer = decision.state, decision.answer
        assert answer is not None, "no exit head at full depth"
        return answer

    def _layer(
        self, acts: Activations[Tensor], mask_BT: Tensor, bias_B11T: Tensor | None
    ) -> Tensor:
        backbone: Backbone = self.model.backbone
        hidden_BTD, depth = acts.hidden_BTD, acts.depth
        if bias_B11T is None:
            return backbone.run_layers(hidden_BTD, mask_BT, depth, depth + 1, acts.positions_BT)
        layer = backbone.layers[depth]
        return backbone.run_layer(layer, hidden_BTD, bias_B11T, acts.positions_BT)
