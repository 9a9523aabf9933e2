"""Layers over packed rows: the tokens of all rows one after another, no padding between them.

The matrix products see only tokens; attention runs once for each run of neighbouring rows of one length.
That reads the modules' weights and not their code, so a family is here only when its layer is the
post-norm encoder layer below; any other is run padded, by Backbone.run_layers.

Measured on a CPU (docs/decisions/0011-elevator.md): attention over nested tensors took 40 times as long
as this loop, over one masked block 11 times.

Axes: N tokens of all rows, G rows of one length T, H attention heads, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp_model.backbones.backbone import Backbone

Run = tuple[int, int]
"""(rows, tokens of each): neighbouring rows of one length."""

Bias = Callable[[int], "Tensor | None"]
"""The place of a run -> what is added to its attention scores, (1 or G, H, T, T)."""


_EXACT = 32  # up to so many tokens no padding: lone rows
_STEPS = (
    16  # sizes from there to each doubling: at most 1/16 of the rows are padding, 1.6 % on average
)


def padded_to(tokens: int) -> int:
    """How many rows the matrix products are given for so many tokens. oneDNN keeps some 2 MiB of code and
    scratch for each number of rows that it ever saw, so there must be few."""
    step = 1 if tokens <= _EXACT else (1 << (tokens - 1).bit_length()) // (2 * _STEPS)
    return -(-tokens // step) * step


class Packed:
    """A backbone's layers, their weights laid out for packed rows.

    The weights are copies: changing the backbone afterwards changes nothing here.
    """

    def __init__(self, backbone: Backbone, dtype: torch.dtype = torch.float32) -> None:
        """Raises KeyError where the family's layers are of another make: ask `can_pack`."""
        take_apart = _FAMILIES[backbone.family]
        made: dict[int, list[_Layer]] = {}  # a module may stand in several places
        for module in backbone.layers:
            if id(module) not in made:
                made[id(module)] = [_Layer(parts, dtype) for parts in take_apart(module)]
        self._layers = [made[id(module)] for module in backbone.layers]
        self.dtype = dtype

    def run_layer(self, index: int, hidden_ND: Tensor, runs: Sequence[Run], bias: Bias) -> Tensor:
        """Layer `index` over the rows that `runs` tells apart. What is beyond them is padding: let
        `padded_to` say how much."""
        for layer in self._layers[index]:
            hidden_ND = layer(hidden_ND, runs, bias)
        return hidden_ND


def can_pack(backbone: Backbone) -> bool:
    return backbone.family in _FAMILIES and not getattr(backbone.config, "is_decoder", False)


@dataclass(frozen=True)
class _Parts:
    """The modules of one post-norm encoder layer."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    norm_attention: nn.LayerNorm
    up: nn.Linear
    activation: Callable[[Tensor], Tensor]
    down: nn.Linear
    norm_out: nn.LayerNorm
    heads: int


class _Layer:
    def __init__(self, parts: _Parts, dtype: torch.dtype) -> None:
        three = (parts.query, parts.key, parts.value)
        weight = torch.cat([linear.weight for linear in three])
        bias = torch.cat([linear.bias for linear in three])
        self._qkv = _linear(weight, bias, dtype)
        self._out = _linear(parts.out.weight, parts.out.bias, dtype)
        self._up = _linear(parts.up.weight, parts.up.bias, dtype)
        self._down = _linear(parts.down.weight, parts.down.bias, dtype)
        self._norm_attention = _norm(parts.norm_attention, dtype)
        self._norm_out = _norm(parts.norm_out, dtype)
        self._activation, self._heads = parts.activation, parts.heads

    def __call__(self, hidden_ND: Tensor, runs: Sequence[Run], bias: Bias) -> Tensor:
        mixed_ND = self._attend(self._qkv(hidden_ND), runs, bias)
        hidden_ND = self._norm_attention(self._out(mixed_ND).add_(hidden_ND))
        inner_NE = self._activation(self._up(hidden_ND))
        return self._norm_out(self._down(inner_NE).add_(hidden_ND))

    def _attend(self, qkv_N3D: Tensor, runs: Sequence[Run], bias: Bias) -> Tensor:
        tokens, width = qkv_N3D.shape[0], qkv_N3D.shape[1] // 3
        out_ND = qkv_N3D.new_empty(tokens, width)
        start = 0
        for place, (rows, length) in enumerate(runs):
            stop = start + rows * length
            shape = (rows, length, 3, self._heads, width // self._heads)
            q, k, v = qkv_N3D[start:stop].view(shape).permute(2, 0, 3, 1, 4)
            mixed_GHTd = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias(place))
            out_ND[start:stop].view(rows, length, *shape[3:]).copy_(mixed_GHTd.transpose(1, 2))
            start = stop
        out_ND[start:] = 0.0
        return out_ND


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """x -> x W' + b. On the CPU with W laid out by oneDNN beforehand: torch's own call leaves it to another
    library, which is slower for few tokens (1.3 to 2 times at 6 to 24)."""
    weight, bias = (t.detach().to(dtype, copy=True).contiguous() for t in (weight, bias))
    prepack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    here = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if here and prepack is not None:
        ordered, run = prepack(weight, None), torch.ops.mkldnn._linear_pointwise

        def prepacked(x: Tensor) -> Tensor:
            y: Tensor = run(x, ordered, bias, "none", [], "")
            return y

        return prepacked
    return lambda x: nn.functional.linear(x, weight, bias)


def _norm(module: nn.LayerNorm, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    shape, eps = tuple(module.normalized_shape), module.eps
    weight, bias = (t.detach().to(dtype, copy=True) for t in (module.weight, module.bias))
    return lambda x: nn.functional.layer_norm(x, shape, weight, bias, eps)


def _bert(layer: Any) -> list[_Parts]:
    self_attention, output = layer.attention.self, layer.attention.output
    return [
        _Parts(
            self_attention.query,
            self_attention.key,
            self_attention.value,
            output.dense,
            output.LayerNorm,
            layer.intermediate.dense,
            layer.intermediate.intermediate_act_fn,
            layer.output.dense,
            layer.output.LayerNorm,
            self_attention.num_attention_heads,
        )
    ]


def _distilbert(layer: Any) -> list[_Parts]:
    attention, ffn = layer.attention, layer.ffn
    return [
        _Parts(
            attention.q_lin,
            attention.k_lin,
            attention.v_lin,
            attention.out_lin,
            layer.sa_layer_norm,
            ffn.lin1,
            ffn.activation,
            ffn.lin2,
            layer.output_layer_norm,
            attention.n_heads,
        )
    ]


def _albert(group: Any) -> list[_Parts]:
    return [
        _Parts(
            layer.attention.query,
            layer.attention.key,
            layer.attention.value,
            layer.attention.dense,
            layer.attention.LayerNorm,
            layer.ffn,
            layer.activation,
            layer.ffn_output,
            layer.full_layer_layer_norm,
            layer.attention.num_attention_heads,
        )
        for layer in group.albert_layers
    ]


def _mpnet(layer: Any) -> list[_Parts]:
    attention = layer.attention.attn
    return [
        _Parts(
            attention.q,
            attention.k,
            attention.v,
            attention.o,
            layer.attention.LayerNorm,
            layer.intermediate.dense,
            layer.intermediate.intermediate_act_fn,
            layer.output.dense,
            layer.output.LayerNorm,
            attention.num_attention_heads,
        )
    ]


_FAMILIES: dict[str, Callable[[Any], list[_Parts]]] = {
    "bert": _bert,
    "roberta": _bert,
    "distilbert": _distilbert,
    "albert": _albert,
    "electra": _bert,
    "mpnet": _mpnet,
}
