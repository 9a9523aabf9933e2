"""Layers, branches and policies -> the ONNX graphs that the device runs.

A graph is one layer for one row: at layer 0 the embeddings, then the layer, and where an exit head
stands behind it the branch, the policy's decision and the state for the next exit. It takes no mask:
all its tokens are real.

    inputs    in.hidden (1, T, D) float32; at layer 0 the ids (1, T, F) int64
              in.state.NAME, where an exit head reads what earlier ones left;  knob.NAME, scalars
    outputs   hidden (1, T, D); with an exit head also leave (1,), answer (1, ...), confidence (1,),
              state.NAME for the next exit, and out.NAME, the branch's outputs, for calibration;
              where a method reads a layer without an exit, state.NAME alone
    metadata  same: JSON of the outputs left out for being one of the others: name -> that other

Weights are bytes of the bundle's model.safetensors, and named relative to the bundle: a runtime must
be told that folder, for it is not the graph's.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript import opset20 as op
from torch import Tensor, nn

from offramp_common.bundle import GRAPHS, Bundle, write_manifest
from offramp_common.spec import CutSpec, StateField
from offramp_model.onnx_graph import LINEAR_DOMAIN, OPSET, PRECISIONS, LayerGraph, drop_mask
from offramp_model.onnx_weights import Weights
from offramp_model.split_model import MultiExitModel
from offramp_model.store import load_model

_EXAMPLE_TOKENS = 7  # any length that is no size of a model: the traced axis must stay free


def add_graphs(bundle: Bundle, precisions: Sequence[str] = PRECISIONS) -> Bundle:
    """Write graphs/PRECISION/layer_II.onnx for every layer, in place of what is there, and the manifest.

    Raises ValueError for an unknown precision or a policy whose state is not what its cuts declare.
    """
    model, weights = load_model(bundle), Weights.of(bundle)
    for precision in precisions:
        LayerGraph(weights, precision)  # raises before the slow part
    captured = [capture(model, index) for index in range(model.n_layers)]
    for precision in precisions:
        graphs = [layer.graph(weights, precision).SerializeToString() for layer in captured]
        folder = bundle.path / GRAPHS / precision
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for index, graph in enumerate(graphs):
            (folder / f"layer_{index:02d}.onnx").write_bytes(graph)
    write_manifest(bundle.path, bundle.manifest)
    return Bundle.read(bundle.path)


@dataclass(frozen=True, slots=True)
class Captured:
    """A layer as ONNX operators over torch's parameters; `same` as in the graph's metadata."""

    operators: ir.Graph
    same: dict[str, str]

    def graph(self, weights: Weights, precision: str) -> onnx.ModelProto:
        """The graph of a precision, its weights in the bundle's file."""
        return LayerGraph(weights, precision).write(self.operators, {"same": json.dumps(self.same)})


@torch.no_grad()
def capture(model: MultiExitModel, index: int, heads: bool = True) -> Captured:
    """Trace layer `index`; `heads` False leaves its exit head out (to measure what it costs)."""
    segment = _Segment(model, index, heads).eval()
    hidden, mask, rest = segment.example()
    named = segment.named(hidden, mask, rest)
    same = _same(named)
    segment.kept = [name for name in named if name not in same]
    per_token = [field.per_token for field in segment.fields.values()]
    free, fixed = {1: torch.export.Dim.DYNAMIC}, None
    dims = [free if flag else fixed for flag in per_token] + [fixed] * len(segment.knobs)
    with _quiet():
        program = torch.export.export(
            segment, (hidden, mask, rest), dynamic_shapes=(free, free, dims), strict=False
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            custom_translation_table=_TABLE,
        )
    assert exported is not None
    graph = exported.model.graph
    drop_mask(graph, graph.inputs[1])
    for value, name in zip(graph.inputs, segment.input_names, strict=True):
        value.name = name
    _name_outputs(graph, segment.kept)
    return Captured(graph, same)


class _Segment(nn.Module):
    """What one graph computes."""

    def __init__(self, model: MultiExitModel, index: int, heads: bool) -> None:
        super().__init__()
        self.model, self.index = model, index
        self.head = [model.head(index + 1) if heads else None]  # listed: not a submodule, not twice
        head = self.head[0]
        before: CutSpec = model.cut(index)
        self.fields: dict[str, StateField] = {} if head is None else dict(before.state)
        self.knobs = [knob.name for knob in model.knobs] if head is not None and head.exit else []
        self.kept: list[str] = []

    @property
    def input_names(self) -> list[str]:
        states = [f"in.state.{name}" for name in self.fields]
        return ["in.hidden", *states, *(f"knob.{name}" for name in self.knobs)]

    def example(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        cut, t = self.model.cut(self.index), _EXAMPLE_TOKENS
        dtype = torch.int64 if cut.integer else torch.float32
        states = [
            torch.zeros((1, t, *f.shape) if f.per_token else (1, *f.shape), dtype=_dtype(f))
            for f in self.fields.values()
        ]
        # A tensor for each knob: the exporter takes one that is given twice for a single input.
        mask, knobs = torch.ones((1, t), dtype=torch.bool), [torch.zeros(()) for _ in self.knobs]
        return torch.ones((1, t, cut.width), dtype=dtype), mask, states + knobs

    def forward(self, hidden: Tensor, mask: Tensor, rest: list[Tensor]) -> tuple[Tensor, ...]:
        named = self.named(hidden, mask, rest)
        return tuple(named[name] for name in self.kept)

    def named(self, hidden: Tensor, mask: Tensor, rest: list[Tensor]) -> dict[str, Tensor]:
        """All outputs by name, in the graph's order."""
        backbone, head = self.model.backbone, self.head[0]
        hidden_BTD = hidden if self.index else backbone.embed(hidden)
        hidden_BTD = backbone.run_layers(hidden_BTD, None, self.index, self.index + 1)
        if head is None:
            return {"hidden": hidden_BTD}
        state = dict(zip(self.fields, rest, strict=False))
        never = {knob.name: torch.tensor(float(knob.never)) for knob in self.model.knobs}
        knobs = never | dict(zip(self.knobs, rest[len(state) :], strict=True))
        decision, outputs = head(hidden_BTD, mask, state, knobs)
        after = {f"state.{name}": value for name, value in self._after(decision.state).items()}
        if not head.exit:
            return {"hidden": hidden_BTD, **after}
        return {
            "hidden": hidden_BTD,
            "leave": decision.leave_B,
            "answer": decision.answer,
            "confidence": decision.confidence_B,
            **after,
            **{f"out.{name}": value for name, value in outputs.items()},
        }

    def _after(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What crosses behind this layer; nothing does behind the last."""
        depth = self.index + 1
        fields = self.model.cut(depth).state if depth < self.model.n_layers else {}
        for name, f in fields.items():
            if state[name].dtype != _dtype(f):
                raise ValueError(
                    f"state {name} at depth {depth} is {state[name].dtype}, not {f.dtype}"
                )
        return {name: state[name] for name in fields}


def _dtype(field: StateField) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, field.dtype)
    return dtype


def _same(named: dict[str, Tensor]) -> dict[str, str]:
    """Outputs that are the same tensor as an earlier one, and which."""
    first: dict[int, str] = {}
    for name, tensor in named.items():
        first.setdefault(id(tensor), name)
    return {name: first[id(t)] for name, t in named.items() if first[id(t)] != name}


def _name_outputs(graph: ir.Graph, names: list[str]) -> None:
    """Name the outputs; one that no node computes, or that is listed twice, gets a node of its own."""
    seen: set[int] = set()
    for position, name in enumerate(names):
        value = graph.outputs[position]
        if value.producer() is None or id(value) in seen:
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[position] = value = node.outputs[0]
        seen.add(id(value))
        value.name = name


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own deprecations and of operators of packages that are not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _linear_placeholder() -> Any:
    """The operator Linear(x, weight_OI, bias), which LayerGraph replaces."""
    parameter, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    bias = parameter("bias", "T", param_option=optional)
    schema = OpSchema(
        "Linear",
        LINEAR_DOMAIN,
        1,
        inputs=[parameter("x", "T"), parameter("weight", "T"), bias],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
    )
    operator = onnxscript.values.Op(onnxscript.values.Opset(LINEAR_DOMAIN, 1), "Linear", schema)

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        return operator(x, weight) if bias is None else operator(x, weight, bias)

    return linear


def _attention(
    q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Scaled dot products of (1, heads, T, size). The exporter's own turns the keys by way of three shapes
    worked out in every run; this the runtime folds into its matrix product."""
    if mask is not None or dropout or is_causal or enable_gqa:
        raise NotImplementedError(
            "attention with a mask, dropout, causal or grouped: not on the device"
        )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), factor)
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def _any(x: Any, dim: int, keepdim: bool = False) -> Any:
    """Truth values reduced as such; the exporter's own makes numbers of them and back."""
    axes: Any = op.Constant(value_ints=[dim])
    return op.ReduceMax(x, axes, keepdims=int(keepdim))


def _all(x: Any, dim: int, keepdim: bool = False) -> Any:
    axes: Any = op.Constant(value_ints=[dim])
    return op.ReduceMin(x, axes, keepdims=int(keepdim))


def _isfinite(x: Any) -> Any:
    """0 times infinity is NaN, as 0 times NaN is: two operators where the exporter has five."""
    return op.Equal(op.Mul(x, 0.0), 0.0)


_TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.linear.default: _linear_placeholder(),
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    torch.ops.aten.any.dim: _any,
    torch.ops.aten.all.dim: _all,
    torch.ops.aten.isfinite.default: _isfinite,
}
