"""The one type that flows: the samples in flight between two layers.

Model, exit runner, codec, wire, engine and simulator all handle `Activations`; no tier has a type
of its own for it. The arrays are numpy arrays on the device and on the wire and torch tensors
inside the torch runner (on the CPU they share memory); nothing here depends on which.

Axes: B samples, T tokens, D hidden width (at depth 0: input channels).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

A = TypeVar("A")
"""The array type: numpy.ndarray or torch.Tensor."""

NumpyArray = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Activations(Generic[A]):
    """Samples that have run `depth` layers and have not left.

    hidden_BTD   hidden states, floating point. Where the model's hidden state is the input itself
                 (depth 0; every depth of a cascade of whole models) integers: channel 0 holds token
                 ids, channel 1, if there, segment ids.
    lengths_B    real tokens of each row, int64, always numpy: row b's tokens are
                 hidden_BTD[b, :lengths_B[b]] and the rest is padding without meaning, at the end.
                 The longest row fills T exactly.
    depth        how many layers have run
    state        what the exit method carries, by name, one row a sample: (B, ...)
    token_state  what it carries for each token: (B, T, ...)
    positions_BT original places of the tokens in their samples, int64, where some were left out on the way;
                 None: 0, 1, 2, ... Padding has place 0.

    State is data here, never hidden in an object: that lets any method be cut at any layer.
    """

    hidden_BTD: A
    lengths_B: NDArray[np.int64]
    depth: int
    state: Mapping[str, A] = field(default_factory=dict)
    token_state: Mapping[str, A] = field(default_factory=dict)
    positions_BT: A | None = None

    @property
    def batch_size(self) -> int:
        return int(self.lengths_B.shape[0])

    @property
    def n_tokens(self) -> int:
        """Real tokens in all rows."""
        return int(self.lengths_B.sum())

    def take(self, rows: NDArray[np.int64]) -> Activations[A]:
        """The given rows, in that order, padded no further than the longest of them."""
        lengths = self.lengths_B[rows]
        longest = int(lengths.max(initial=0))

        def tokens(array: Any) -> Any:
            # Cut before rows are picked, so that the result lies in one piece: kernels that are given rows
            # which lie apart round differently, and a frame's content never lies apart. (In one step,
            # array[rows, :longest], torch takes five times as long.)
            return array[:, :longest][rows]

        return replace(
            self,
            hidden_BTD=tokens(self.hidden_BTD),
            lengths_B=lengths,
            state={name: value[rows] for name, value in self.state.items()},  # type: ignore[index]
            token_state={name: tokens(value) for name, value in self.token_state.items()},
            positions_BT=None if self.positions_BT is None else tokens(self.positions_BT),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Generic[A]):
    """Rows of several batches of one depth, not copied together yet: of each batch those at the places `at`,
    which ascend."""

    pieces: tuple[tuple[Activations[A], NDArray[np.int64]], ...]

    @property
    def depth(self) -> int:
        return self.pieces[0][0].depth

    @property
    def lengths_B(self) -> NDArray[np.int64]:
        if len(self.pieces) == 1:
            ((acts, at),) = self.pieces
            return acts.lengths_B[at]
        return np.concatenate([acts.lengths_B[at] for acts, at in self.pieces])

    @property
    def batch_size(self) -> int:
        return sum(at.size for _, at in self.pieces)

    @property
    def n_tokens(self) -> int:
        """Real tokens in all rows."""
        return int(self.lengths_B.sum())

    @classmethod
    def of(cls, acts: Activations[A]) -> Rows[A]:
        """All of one batch."""
        return cls(((acts, np.arange(acts.batch_size)),))

    def take(self, rows: NDArray[np.int64]) -> Rows[A]:
        """The given rows, ascending."""
        found: list[tuple[Activations[A], NDArray[np.int64]]] = []
        start = 0
        for acts, at in self.pieces:
            mine = rows[(rows >= start) & (rows < start + at.size)] - start
            start += at.size
            if mine.size:
                found.append((acts, at[mine]))
        return Rows(tuple(found))


def mask_of(lengths_B: NDArray[np.int64], width: int | None = None) -> NDArray[np.bool_]:
    """mask_BT: True where a token is real; `width` is T (the longest row by default)."""
    width = int(lengths_B.max(initial=0)) if width is None else width
    return np.arange(width) < lengths_B[:, None]


def pack(array_BT: NumpyArray, lengths_B: NDArray[np.int64]) -> NumpyArray:
    """(B, T, ...) -> (N, ...): the real tokens of all rows one after another, padding left out.

    A view of `array_BT` where that costs nothing: do not write to it.
    """
    if array_BT.shape[0] == 1:
        return array_BT[0, : int(lengths_B[0])]
    packed: NumpyArray = array_BT[mask_of(lengths_B, array_BT.shape[1])]
    return packed


def unpack(array_N: NumpyArray, lengths_B: NDArray[np.int64]) -> NumpyArray:
    """The inverse of `pack`; padding becomes zeros. A view of `array_N` where there is none."""
    mask_BT = mask_of(lengths_B)
    if mask_BT.all():
        return array_N.reshape(*mask_BT.shape, *array_N.shape[1:])
    out = np.zeros((*mask_BT.shape, *array_N.shape[1:]), dtype=array_N.dtype)
    out[mask_BT] = array_N
    return out


def join(parts: Sequence[Activations[NumpyArray]]) -> Activations[NumpyArray]:
    """All rows of `parts` (at least one; equal depth and equally named state) in one batch.

    Raises ValueError for parts that do not fit each other. A single part is returned as it is.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.depth != first.depth for part in parts):
        raise ValueError(f"cannot join depths {sorted({part.depth for part in parts})}")
    names = [(sorted(part.state), sorted(part.token_state)) for part in parts]
    if any(other != names[0] for other in names):
        raise ValueError(f"cannot join parts with state {names}: a row's state must not be lost")
    lengths = np.concatenate([part.lengths_B for part in parts])

    def tokens(arrays: Sequence[NumpyArray]) -> NumpyArray:
        packed = [pack(array, part.lengths_B) for array, part in zip(arrays, parts, strict=True)]
        return unpack(np.concatenate(packed), lengths)

    return Activations(
        hidden_BTD=tokens([part.hidden_BTD for part in parts]),
        lengths_B=lengths,
        depth=first.depth,
        state={n: np.concatenate([part.state[n] for part in parts]) for n in first.state},
        token_state={n: tokens([part.token_state[n] for part in parts]) for n in first.token_state},
        positions_BT=_positions(parts, tokens),
    )


def _positions(
    parts: Sequence[Activations[NumpyArray]],
    joined: Callable[[Sequence[NumpyArray]], NumpyArray],
) -> NumpyArray | None:
    """None where no part has lost tokens; else 0, 1, 2, ... for those that have not."""
    if all(part.positions_BT is None for part in parts):
        return None

    def of(part: Activations[NumpyArray]) -> NumpyArray:
        if part.positions_BT is not None:
            return part.positions_BT
        rows, longest = part.hidden_BTD.shape[:2]
        return np.broadcast_to(np.arange(longest), (rows, longest))

    return joined([of(part) for part in parts])
