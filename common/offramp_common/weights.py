"""How a bundle stores weights: one copy that torch and ONNX Runtime read.

Matrices are stored as int8 with float32 scales; everything small stays float32. A linear layer's matrix is
stored as the device multiplies it, (in, out), with one scale an output; an embedding table (rows, width)
with one scale a row. Linear weights use 7 bits, [-63, 63]: on processors without VNNI the int8 kernels
add two products in 16 bits, and 2 * 255 * 63 is the largest sum that cannot overflow them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LINEAR_LEVELS = 63
TABLE_LEVELS = 127


@dataclass(frozen=True, slots=True)
class Stored:
    """How one matrix is stored.

    kind    "linear": int8 (in, out), transposed from torch's (out, in), a scale for each output;
            "table": int8 (rows, width), a scale for each row
    scale   name of the scales' tensor
    """

    kind: str
    scale: str

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "table"):
            raise ValueError(f"stored matrix of kind {self.kind!r}: must be linear or table")


def quantise_linear(weight_OI: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """torch's (out, in) -> int8 (in, out) and the scale of each output."""
    values_OI, scale_O = _quantise_rows(weight_OI, LINEAR_LEVELS)
    return np.ascontiguousarray(values_OI.T), scale_O


def quantise_table(table_RD: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(rows, width) -> int8 of the same shape and the scale of each row."""
    return _quantise_rows(table_RD, TABLE_LEVELS)


def dequantise(
    values: NDArray[np.int8], scale: NDArray[np.float32], kind: str
) -> NDArray[np.float32]:
    """Float32 in torch's layout: (out, in) for a linear matrix, (rows, width) for a table.

    One multiplication in float32: ONNX's DequantizeLinear gives the same bits.
    """
    if kind == "linear":
        return np.ascontiguousarray((values.astype(np.float32) * scale[None, :]).T)
    return values.astype(np.float32) * scale[:, None]


def unpack_weights(
    tensors: Mapping[str, NDArray[Any]], stored: Mapping[str, Stored]
) -> dict[str, NDArray[Any]]:
    """All logical tensors of a bundle in torch's layout, matrices dequantised, scales left out."""
    scales = {entry.scale for entry in stored.values()}
    out: dict[str, NDArray[Any]] = {}
    for name, value in tensors.items():
        if name in scales:
            continue
        entry = stored.get(name)
        out[name] = dequantise(value, tensors[entry.scale], entry.kind) if entry else value
    return out


def _quantise_rows(
    matrix: NDArray[np.float32], levels: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    largest = np.abs(matrix).max(axis=1, initial=0.0)
    scale = np.where(largest > 0, largest / levels, 1.0).astype(np.float32)
    values = np.clip(np.rint(matrix / scale[:, None]), -levels, levels).astype(np.int8)
    return values, scale
