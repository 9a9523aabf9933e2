"""The bundle's weight file as ONNX external data: graphs name its bytes and hold no copy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import onnx

from offramp_common.bundle import WEIGHTS, Bundle
from offramp_common.weights import Stored

_LENGTH_BYTES = 8
_DTYPES = {
    "F32": onnx.TensorProto.FLOAT,
    "I8": onnx.TensorProto.INT8,
    "I64": onnx.TensorProto.INT64,
}
_PREFIXES = ("model.", "backbone.")  # of a parameter inside the exported module


@dataclass(frozen=True, slots=True)
class Weights:
    """What a bundle's weight file holds, and where.

    header    safetensors' header: name -> dtype, shape and data_offsets
    start     byte at which the data begins
    stored    how the int8 matrices are stored
    aliases   names that share another name's tensor
    """

    header: dict[str, Any]
    start: int
    stored: dict[str, Stored]
    aliases: dict[str, str]

    @classmethod
    def of(cls, bundle: Bundle) -> Weights:
        with (bundle.path / WEIGHTS).open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        m = bundle.manifest
        return cls(header, _LENGTH_BYTES + length, dict(m.stored), dict(m.aliases))

    def name(self, parameter: str) -> str | None:
        """The bundle's name of a parameter of the exported module; None where the bundle has none."""
        for prefix in _PREFIXES:
            parameter = parameter.removeprefix(prefix)
        name = self.aliases.get(parameter, parameter)
        return name if name in self.header else None

    def tensor(self, name: str) -> onnx.TensorProto:
        """The initializer that points at a stored tensor; its location is relative to the bundle."""
        entry = self.header[name]
        first, last = entry["data_offsets"]
        tensor = onnx.TensorProto(name=name, data_type=_DTYPES[entry["dtype"]], dims=entry["shape"])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": WEIGHTS, "offset": self.start + first, "length": last - first}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor
