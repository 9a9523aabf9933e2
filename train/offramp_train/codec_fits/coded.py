"""What a codec makes of activations, row by row, as a device sends them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from offramp_common.activations import Activations, NumpyArray, pack, unpack
from offramp_common.codecs import Codec
from offramp_common.codecs.fitted import Fitted, places


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """acts     after encoding and decoding: fewer tokens where the codec leaves some out
    nbytes_B  of each row's hidden states, as encoded
    error_B   |x - y| / |x| of each row; None where tokens were left out or pooled in any
    """

    acts: Activations[NumpyArray]
    nbytes_B: NumpyArray
    error_B: NumpyArray | None


def coded(codec: Codec, acts: Activations[NumpyArray]) -> Coded:
    """Every row alone through the codec. State crosses as it is; there must be none for each token."""
    assert not acts.token_state, "codecs are measured on methods that carry no state for each token"
    if isinstance(codec, Fitted):
        return _through_fitted(codec, acts)
    rows = np.split(pack(acts.hidden_BTD, acts.lengths_B), np.cumsum(acts.lengths_B)[:-1])
    encoded = [codec.encode(row) for row in rows]
    decoded = [codec.decode(data, *row.shape) for data, row in zip(encoded, rows, strict=True)]
    out = replace(acts, hidden_BTD=unpack(np.concatenate(decoded), acts.lengths_B))
    return Coded(out, np.array([len(data) for data in encoded]), _error(rows, decoded))


def _through_fitted(codec: Fitted, acts: Activations[NumpyArray]) -> Coded:
    lengths_B = acts.lengths_B
    rows = np.split(pack(acts.hidden_BTD, lengths_B), np.cumsum(lengths_B)[:-1])
    encoded = [codec.encode(row) for row in rows]
    parts = [
        codec.decode_rows(data, np.array([len(row)]))
        for data, row in zip(encoded, rows, strict=True)
    ]
    left_B = np.concatenate([part.lengths_B for part in parts])
    whole = [part.positions_M is None for part in parts]
    positions_BT = None
    if not all(whole):
        packed = [
            places(part.lengths_B) if part.positions_M is None else part.positions_M
            for part in parts
        ]
        positions_BT = unpack(np.concatenate(packed), left_B)
    out = Activations(
        unpack(np.concatenate([part.hidden_MD for part in parts]), left_B),
        left_B,
        acts.depth,
        acts.state,
        {},
        positions_BT,
    )
    error_B = _error(rows, [part.hidden_MD for part in parts]) if all(whole) else None
    return Coded(out, np.array([len(data) for data in encoded]), error_B)


def _error(rows: list[NumpyArray], decoded: list[NumpyArray]) -> NumpyArray:
    pairs = zip(rows, decoded, strict=True)
    return np.array(
        [np.linalg.norm(x - y) / max(float(np.linalg.norm(x)), 1e-30) for x, y in pairs]
    )
