"""One captured layer -> one ONNX graph of a precision, its weights left in the bundle's weight file.

Every operator is standard ONNX. What is shaped here is shaped for ONNX Runtime, which folds and fuses it when
it loads the graph (docs/decisions/0002-device-graphs.md has the measurements):

fp32   DequantizeLinear(int8 matrix) -> MatMul; the runtime folds the first into a float matrix.
int8   matrices as they are stored; activations are quantised as they come, with one scale a tensor,
       after each token's row has been divided by its peak (largest magnitude). The runtime's kernels
       know no scale for each token, and without one a few loud tokens cost all others precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.passes.common import RemoveUnusedNodesPass

from offramp_model.onnx_weights import Weights

PRECISIONS = ("fp32", "int8")
OPSET = 20  # the first with Gelu
IR_VERSION = 10  # the newest that the oldest supported onnxruntime reads

LINEAR_DOMAIN = "offramp"
"""Marks the placeholder Linear(x, weight_OI, bias) that the capture leaves for this module."""

TOKENS = "tokens"
_SMALLEST_PEAK = 1e-12  # a row of zeros is divided by this


class LayerGraph:
    """Writes the nodes of one graph. `precision` is one of PRECISIONS."""

    def __init__(self, weights: Weights, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r}: must be one of {', '.join(PRECISIONS)}")
        self._weights, self._int8 = weights, precision == "int8"
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._quantised: dict[str, tuple[str, str, str, str]] = {}
        self._n_names = 0

    def write(self, graph: ir.Graph, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """`graph` as captured: parameters are initializers, linear layers are placeholders."""
        names: dict[str, str] = {}
        for name, value in graph.initializers.items():
            names[name] = self._parameter(name, value)
        for node in graph:
            self._node(node, [names.get(_name(v), _name(v)) for v in node.inputs])
        used = {name for node in self._nodes for name in node.input}
        written = helper.make_graph(
            self._nodes,
            "layer",
            [_info(value) for value in graph.inputs],
            [_info(value) for value in graph.outputs],
            [tensor for name, tensor in self._initializers.items() if name in used],
            # Without shapes of the values between, which would let the runtime fuse into its
            # SkipLayerNormalization: four times as slow as what that replaces.
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            written, opset_imports=opset, ir_version=IR_VERSION, producer_name="offramp"
        )
        helper.set_model_props(model, dict(metadata))
        return model

    def _parameter(self, name: str, value: ir.Value) -> str:
        """Declare an initializer; returns its name, which is the bundle's where the bundle holds it."""
        stored = self._weights.name(name)
        if stored is None:
            assert value.const_value is not None, f"{name} has no value"
            tensor = numpy_helper.from_array(value.const_value.numpy(), name)
            self._initializers[name] = tensor
            return name
        self._initializers[stored] = self._weights.tensor(stored)
        entry = self._weights.stored.get(stored)
        if entry is not None:
            self._initializers[entry.scale] = self._weights.tensor(entry.scale)
        return stored

    def _node(self, node: ir.Node, inputs: list[str]) -> None:
        output = _name(node.outputs[0])
        kinds = [getattr(self._weights.stored.get(name), "kind", None) for name in inputs]
        if node.domain == LINEAR_DOMAIN:
            self._linear(inputs, output, rank=len(node.inputs[0].shape))  # type: ignore[union-attr, arg-type]
        elif node.op_type == "Gather" and kinds == ["table", None] and _axis(node) == 0:
            self._embedding(inputs, output)
        else:
            inputs = [self._float(n) if kind else n for n, kind in zip(inputs, kinds, strict=True)]
            proto = ir.serde.serialize_node(node)
            del proto.input[:], proto.metadata_props[:]
            proto.doc_string = ""
            proto.input.extend(inputs)
            self._nodes.append(proto)

    def _linear(self, inputs: list[str], output: str, rank: int) -> None:
        x, weight, *bias = inputs
        entry = self._weights.stored.get(weight)
        to = self._new() if bias else output
        if entry is None:
            self._add("MatMul", [x, self._add("Transpose", [weight], perm=[1, 0])], to)
        elif self._int8:
            self._int8_product(x, weight, entry.scale, to, by_row=rank > 2)
        else:
            weight_IO = self._add("DequantizeLinear", [weight, entry.scale], axis=1)
            self._add("MatMul", [x, weight_IO], to)
        if bias:
            self._add("Add", [to, bias[0]], output)

    def _int8_product(self, x: str, weight: str, scale: str, output: str, by_row: bool) -> None:
        """x @ weight; the runtime fuses MatMulInteger, Cast and Mul into one kernel."""
        if x not in self._quantised:  # query, key and value share one
            self._quantised[x] = self._quantise(x, by_row)
        values, step, zero, peak = self._quantised[x]
        sums = self._add("Cast", [self._add("MatMulInteger", [values, weight, zero])], to=1)
        to = self._new() if peak else output
        self._add("Mul", [sums, self._add("Mul", [step, scale])], to)
        if peak:
            self._add("Mul", [to, peak], output)

    def _quantise(self, x: str, by_row: bool) -> tuple[str, str, str, str]:
        """(uint8 values, scale, zero point, what each row was divided by or "")."""
        peak = ""
        if by_row:
            last = self._constant(np.array([-1], np.int64))
            peak = self._add("ReduceMax", [self._add("Abs", [x]), last], keepdims=1)
            peak = self._add("Max", [peak, self._constant(np.array(_SMALLEST_PEAK, np.float32))])
            x = self._add("Div", [x, peak])
        outputs = [self._new() for _ in range(3)]
        self._nodes.append(helper.make_node("DynamicQuantizeLinear", [x], outputs))
        return outputs[0], outputs[1], outputs[2], peak

    def _embedding(self, inputs: list[str], output: str) -> None:
        """Rows of an int8 table: gathered first, then dequantised."""
        table, rows = inputs
        values = self._add("Cast", [self._add("Gather", [table, rows])], to=TensorProto.FLOAT)
        scale = self._add("Gather", [self._weights.stored[table].scale, rows])
        last = self._constant(np.array([-1], np.int64))
        self._add("Mul", [values, self._add("Unsqueeze", [scale, last])], output)

    def _float(self, name: str) -> str:
        """A stored matrix in torch's layout, for any other use of it."""
        entry = self._weights.stored[name]
        axis = 1 if entry.kind == "linear" else 0
        value = self._add("DequantizeLinear", [name, entry.scale], axis=axis)
        return self._add("Transpose", [value], perm=[1, 0]) if entry.kind == "linear" else value

    def _add(self, op: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or self._new()
        self._nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def _constant(self, value: Any) -> str:
        name = self._new()
        self._initializers[name] = numpy_helper.from_array(value, name)
        return name

    def _new(self) -> str:
        self._n_names += 1
        return f"_{self._n_names}"


def _name(value: ir.Value | None) -> str:
    return "" if value is None or value.name is None else value.name


def drop_mask(graph: ir.Graph, mask: ir.Value) -> None:
    """Make the input `mask`, (1, T) and all true, no input: a layer's graph has no padding.

    What heads do with a mask, where(mask, x, 0) and the mean over real tokens, costs several times
    less without; any other use is left, and given a mask made from the number of tokens.
    """
    ones, counts = {mask}, set()
    for node in list(graph):
        output, first = node.outputs[0], node.inputs[0] if node.inputs else None
        if node.op_type in ("Unsqueeze", "Cast") and first in ones:
            ones.add(output)
        elif _sums_tokens(node) and first in ones:
            counts.add(output)
        elif node.op_type == "Where" and first in ones:
            x = node.inputs[1]
            if x is not None and x.shape is not None and x.shape == output.shape:
                _replace(output, x)
        elif node.op_type == "Div" and node.inputs[1] in counts and first is not None:
            total = first.producer()
            if total is not None and _sums_tokens(total) and not total.attributes["keepdims"].value:
                mean = ir.node("ReduceMean", total.inputs, {"keepdims": 0})
                graph.insert_before(node, mean)
                _replace(output, mean.outputs[0])
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=IR_VERSION))
    if mask.uses():
        sizes = ir.node("Shape", [graph.inputs[0]], {"start": 0, "end": 2})
        true = ir.node("ConstantOfShape", sizes.outputs, {"value": ir.tensor([True])})
        graph.insert_before(graph[0], [sizes, true])
        _replace(mask, true.outputs[0])
    graph.inputs.remove(mask)


def _sums_tokens(node: ir.Node) -> bool:
    """Whether it is ReduceSum(x, axes=[1])."""
    axes = node.inputs[1] if node.op_type == "ReduceSum" and len(node.inputs) == 2 else None
    if axes is None or axes.const_value is None:
        return False
    return bool(axes.const_value.numpy().tolist() == [1])


def _replace(old: ir.Value, new: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type
    replace_all_uses_with(old, new, replace_graph_outputs=True)


def _axis(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return 0 if attribute is None else attribute.as_int()


def _info(value: ir.Value) -> onnx.ValueInfoProto:
    """The one axis whose size is not known is the tokens'."""
    assert value.dtype is not None, f"{value.name} has no dtype"
    assert value.shape is not None, f"{value.name} has no shape"
    shape = [size if isinstance(size, int) else TOKENS for size in value.shape]
    return helper.make_tensor_value_info(_name(value), int(value.dtype), shape)
