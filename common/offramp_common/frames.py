"""A frame: Activations as bytes, self-describing, decoded within limits.

A frame is one msgpack array

    [version, depth, codec, lengths, hidden, state]

    version   1
    depth     layers that have run
    codec     the codec's name
    lengths   real tokens of each row, uint16 little-endian, as bytes
    hidden    the packed hidden states, as the codec wrote them
    state     map: name -> bytes, the packed entry, little-endian, in the dtype and shape of the CutSpec

Dtypes and shapes do not travel: both tiers know them from the bundle, whose digest was compared, so a
frame carries nothing but what differs between samples. Nothing is allocated before the declared sizes
agree with the bytes that are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from offramp_common.activations import Activations, NumpyArray, pack, unpack
from offramp_common.codecs import get_codec
from offramp_common.errors import WireError
from offramp_common.spec import CutSpec, StateField

FRAME_VERSION = 1
_FIELDS = 6
_MAX_NAME = 64
_MAX_STATE = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver accepts; announced in the handshake."""

    max_frame_bytes: int = 8 * 2**20  # of one frame
    max_rows: int = 256  # samples in one frame
    max_tokens: int = 512  # of one sample; never above the model's own limit


def encode_frame(acts: Activations[NumpyArray], cut: CutSpec, codec_name: str) -> bytes:
    """The frame of `acts`. Raises ValueError when `acts` is not what `cut` says (our own bug)."""
    codec = get_codec("tokens" if cut.integer else codec_name)
    if codec.integer != cut.integer:
        raise ValueError(f"codec {codec.name} cannot carry floating point hidden states")
    if acts.depth != cut.depth or set(acts.state) | set(acts.token_state) != set(cut.state):
        raise ValueError(
            f"activations at depth {acts.depth} with state {sorted({*acts.state, *acts.token_state})} "
            f"do not fit the cut at depth {cut.depth} with {sorted(cut.state)}"
        )
    if acts.lengths_B.max(initial=0) > 0xFFFF:
        raise ValueError(f"a sample of {acts.lengths_B.max()} tokens; frames carry at most 65535")
    state = {
        name: _pack_state(name, field, acts).tobytes() for name, field in sorted(cut.state.items())
    }
    hidden = codec.encode(pack(acts.hidden_BTD, acts.lengths_B))
    lengths = acts.lengths_B.astype("<u2").tobytes()
    frame: bytes = msgpack.packb([FRAME_VERSION, acts.depth, codec.name, lengths, hidden, state])
    return frame


def decode_frame(
    frame: bytes, cuts: Mapping[int, CutSpec], limits: Limits
) -> Activations[NumpyArray]:
    """The activations in `frame`; `cuts` holds the depths at which frames are accepted.

    Raises WireError or UnknownCodec for anything that is not a well-formed frame within `limits`.
    """
    depth, codec_name, lengths_data, hidden, state = _open(frame, limits)
    cut = cuts.get(depth)
    if cut is None:
        raise WireError(f"depth {depth}: this model accepts frames at depths {sorted(cuts)}")
    codec = get_codec(codec_name)
    if codec.integer != cut.integer:
        kind = "token ids" if cut.integer else "floating point hidden states"
        raise WireError(f"codec {codec_name} at depth {depth}, which takes {kind}")
    if len(lengths_data) % 2:
        raise WireError(f"{len(lengths_data)} bytes of lengths: must be two a row")
    rows = len(lengths_data) // 2
    if not 1 <= rows <= limits.max_rows:
        raise WireError(f"{rows} rows in a frame: must be 1 to {limits.max_rows}; send several frames")
    lengths_B = np.frombuffer(lengths_data, dtype="<u2").astype(np.int64)
    if lengths_B.min() < 1 or lengths_B.max() > limits.max_tokens:
        raise WireError(
            f"rows of {lengths_B.min()} to {lengths_B.max()} tokens: must be 1 to {limits.max_tokens}"
        )
    n_tokens = int(lengths_B.sum())
    # Unpacking pads to the longest row: one long row among many short ones must not multiply memory.
    if rows * int(lengths_B.max()) > max(4 * n_tokens, limits.max_tokens):
        raise WireError("rows of too different lengths in one frame; group rows of similar length")
    if set(state) != set(cut.state):
        raise WireError(f"state {sorted(state)} at depth {depth}, which carries {sorted(cut.state)}")
    row_state, token_state = {}, {}
    for name, field in cut.state.items():
        count = n_tokens if field.per_token else rows
        entry = _unpack_state(name, field, state[name], count)
        if field.per_token:
            token_state[name] = unpack(entry, lengths_B)
        else:
            row_state[name] = entry
    hidden_ND = codec.decode(hidden, n_tokens, cut.width)
    if cut.integer and np.any(hidden_ND >= np.array(cut.vocabulary)):
        raise WireError(f"token ids up to {hidden_ND.max(axis=0)}: must stay below {cut.vocabulary}")
    return Activations(unpack(hidden_ND, lengths_B), lengths_B, depth, row_state, token_state)


def _open(frame: bytes, limits: Limits) -> tuple[int, str, bytes, bytes, dict[str, bytes]]:
    """The frame's five fields after the version, each of its type."""
    if len(frame) > limits.max_frame_bytes:
        raise WireError(f"a frame of {len(frame)} bytes: the limit is {limits.max_frame_bytes}")
    try:
        fields: Any = msgpack.unpackb(
            frame,
            max_array_len=_FIELDS,
            max_map_len=_MAX_STATE,
            max_str_len=_MAX_NAME,
            max_ext_len=0,
            strict_map_key=True,
        )
    # msgpack raises ValueError and its subclasses, and its own bases, for anything it cannot read.
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise WireError(f"not a frame: {type(error).__name__}") from None
    if not isinstance(fields, list) or len(fields) != _FIELDS:
        raise WireError(f"not a frame: must be an array of {_FIELDS}")
    version, depth, codec, lengths, hidden, state = fields
    if type(version) is not int or version != FRAME_VERSION:
        raise WireError(f"frame version {version!r:.40}: this side reads {FRAME_VERSION}; update the older side")
    if type(depth) is not int or type(codec) is not str:
        raise WireError("not a frame: depth must be an integer and codec a name")
    if type(lengths) is not bytes or type(hidden) is not bytes or type(state) is not dict:
        raise WireError("not a frame: lengths and hidden must be bytes and state a map")
    if not all(type(name) is str and type(value) is bytes for name, value in state.items()):
        raise WireError("not a frame: state must map names to bytes")
    return depth, codec, lengths, hidden, state


def _pack_state(name: str, field: StateField, acts: Activations[NumpyArray]) -> NumpyArray:
    if field.per_token:
        value = pack(acts.token_state[name], acts.lengths_B)
    else:
        value = acts.state[name]
    if value.dtype != np.dtype(field.dtype) or value.shape[1:] != field.shape:
        raise ValueError(f"state {name}: {value.dtype} {value.shape[1:]}, must be {field}")
    little_endian = np.dtype(field.dtype).newbyteorder("<")
    return np.ascontiguousarray(value, dtype=little_endian)


def _unpack_state(name: str, field: StateField, data: bytes, count: int) -> NumpyArray:
    expected = count * field.nbytes
    if len(data) != expected:
        raise WireError(f"state {name}: {len(data)} bytes, must be {expected}")
    little_endian = np.dtype(field.dtype).newbyteorder("<")
    value = np.frombuffer(data, dtype=little_endian).reshape(count, *field.shape)
    if field.dtype == "bool" and value.view(np.uint8).max(initial=0) > 1:
        raise WireError(f"state {name}: a truth value that is neither 0 nor 1")
    return value.astype(field.dtype)  # in memory of its own: callers may write to it
