"""What a model and its exit method look like from outside: all that wire, worker and engine know.

Read from a bundle's bundle.json; plain data, so that a device validates frames without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offramp_common.runner import Knobs

STATE_DTYPES = ("bool", "uint8", "int16", "int32", "int64", "float16", "float32")
"""What carried state may be made of: the types that numpy, torch and ONNX share."""

MAX_NAME_BYTES = 64
"""Of the names that travel: state entries and codecs."""


@dataclass(frozen=True, slots=True)
class StateField:
    """One entry of the state that an exit method carries: (B, *shape), or (B, T, *shape) per token.

    No axis is empty: an entry that holds nothing yet at some depth is left out of that depth's cut.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    per_token: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in STATE_DTYPES or any(size < 1 for size in self.shape):
            raise ValueError(
                f"state of dtype {self.dtype} and shape {self.shape}: dtypes are {STATE_DTYPES}, "
                "sizes at least 1"
            )

    @property
    def nbytes(self) -> int:
        """Bytes for one row (for one token, where per_token)."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))

    def to_json(self) -> list[Any]:
        return [self.dtype, list(self.shape), self.per_token]

    @classmethod
    def from_json(cls, value: list[Any]) -> StateField:
        dtype, shape, per_token = value
        return cls(str(dtype), tuple(int(size) for size in shape), bool(per_token))


@dataclass(frozen=True, slots=True)
class CutSpec:
    """What crosses when the model is cut after `depth` layers.

    integer      the hidden state is token ids (depth 0) rather than floating point
    width        D; at depth 0 the number of input channels (1: ids, 2: ids and segments)
    state        the method's state by name; empty before the first exit has been looked at
    vocabulary   for integer hidden states, each channel's number of values: ids must stay below
    """

    depth: int
    integer: bool
    width: int
    state: Mapping[str, StateField] = field(default_factory=dict)
    vocabulary: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.depth < 0 or self.width < 1:
            raise ValueError(f"depth {self.depth} and width {self.width}: at least 0 and 1")
        if len(self.vocabulary) != (self.width if self.integer else 0):
            raise ValueError(f"vocabulary {self.vocabulary} for {self.width} channels")
        if not all(1 <= len(name.encode()) <= MAX_NAME_BYTES for name in self.state):
            raise ValueError(f"state {sorted(self.state)}: names have 1 to {MAX_NAME_BYTES} bytes")

    def to_json(self) -> dict[str, Any]:
        state = {name: entry.to_json() for name, entry in self.state.items()}
        return {"width": self.width, "state": state, "vocabulary": list(self.vocabulary)}

    @classmethod
    def from_json(cls, depth: int, value: Mapping[str, Any]) -> CutSpec:
        state = {str(name): StateField.from_json(entry) for name, entry in value["state"].items()}
        vocabulary = tuple(int(size) for size in value["vocabulary"])
        return cls(depth, bool(vocabulary), int(value["width"]), state, vocabulary)


@dataclass(frozen=True, slots=True)
class KnobSpec:
    """One setting of an exit method that calibration moves and a request may override.

    never    the value at which no sample ever leaves early, whatever the model says
    low, high  the closed interval of values that make sense
    integer  only whole numbers make sense: calibration tries them all
    """

    name: str
    low: float
    high: float
    never: float
    meaning: str
    integer: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "low": self.low,
            "high": self.high,
            "never": self.never,
            "meaning": self.meaning,
            "integer": self.integer,
        }


def never_exit(knobs: tuple[KnobSpec, ...], n_layers: int) -> Knobs:
    """The operating point at which every sample runs to full depth."""
    return {knob.name: (knob.never,) * n_layers for knob in knobs}


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What an answer means.

    kind     "classification": the answer is logits (B, C) over `labels`;
             "regression": one number a row, (B, 1), and `labels` is empty
    pair     the input is two sentences
    """

    kind: str
    labels: tuple[str, ...] = ()
    pair: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("classification", "regression"):
            raise ValueError(f"task kind {self.kind!r}: must be classification or regression")
        if (self.kind == "classification") != (len(self.labels) >= 2):
            raise ValueError(f"{self.kind} with {len(self.labels)} labels")

    @property
    def answer_width(self) -> int:
        return len(self.labels) or 1
