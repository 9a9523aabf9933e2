"""A frame: Activations as bytes, self-describing, decoded within limits.

A frame is one msgpack array

    [version, depth, codec, lengths, hidden, state]

    version   1
    depth     layers that have run
    codec     the codec's name
    lengths   real tokens of each row, uint16 little-endian, as bytes
    hidden    the packed hidden states, as the codec wrote them
    state     map: name -> bytes, the packed entry, little-endian, dtype and shape of the CutSpec

Dtypes and shapes do not travel: both tiers know them from the bundle, whose digest was compared, so
a frame carries nothing but what differs between samples.

A fitted codec (codecs/fitted.py) may send fewer tokens than a row has: `lengths` then are those of the rows
as they were, the codec knows from them how many are left, and state for each token is sent for those.

A stranger's bytes are read in place (frame_reader.py), and all sizes and values are checked on the frame
itself, so that refusing a frame allocates next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import msgpack
import numpy as np
from numpy.typing import NDArray

from offramp_common.activations import Activations, NumpyArray, pack, unpack
from offramp_common.codecs import Codec, get_codec
from offramp_common.codecs.fitted import Fitted
from offramp_common.codecs.tokens import largest_ids
from offramp_common.errors import WireError
from offramp_common.frame_reader import ARRAY, MAP, UINT, Reader
from offramp_common.spec import CutSpec, StateField

FRAME_VERSION = 1
_FIELDS = 6
_MAX_LENGTH = 0xFFFF  # of a sample, in uint16
_MAX_PADDING = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver accepts; announced in the handshake."""

    max_frame_bytes: int = 8 * 2**20  # of one frame
    max_rows: int = 256  # samples in one frame
    max_tokens: int = 512  # of one sample; never above the model's own limit


def padding_fits(lengths_B: NDArray[np.int64], limits: Limits) -> bool:
    """True where rows of these lengths may share a frame.

    A receiver pads to the longest row, and one long row among many short ones must not multiply its
    memory: padded, the rows hold at most four times their own tokens, or four times `max_tokens`.
    Rows none of which is more than four times as long as another always fit.
    """
    padded = lengths_B.size * int(lengths_B.max(initial=0))
    return padded <= _MAX_PADDING * max(int(lengths_B.sum()), limits.max_tokens)


def encode_frame(
    acts: Activations[NumpyArray],
    cut: CutSpec,
    codec_name: str,
    fitted: Mapping[str, Fitted] = MappingProxyType({}),
) -> bytes:
    """The frame of `acts`; token ids go through the codec `tokens`, whatever `codec_name` says.

    fitted   the bundle's own codecs, by name
    Raises UnknownCodec, and ValueError when `acts` is not what `cut` says (our own bug).
    """
    codec = _codec("tokens" if cut.integer else codec_name, fitted)
    if codec.integer != cut.integer or not _fits(codec, cut):
        raise ValueError(f"codec {codec.name} cannot carry floating point hidden states of {cut}")
    _check(acts, cut)
    hidden_ND = pack(acts.hidden_BTD, acts.lengths_B)
    if cut.integer and np.any(hidden_ND >= np.array(cut.vocabulary)):
        raise ValueError(f"token ids up to {hidden_ND.max(axis=0)} of {cut.vocabulary}")
    kept_N = None
    if isinstance(codec, Fitted):
        hidden, kept_N = codec.encode_rows(hidden_ND, acts.lengths_B)
    else:
        hidden = codec.encode(hidden_ND)
    state = {name: _pack_state(name, cut.state[name], acts, kept_N) for name in sorted(cut.state)}
    lengths = acts.lengths_B.astype("<u2").tobytes()
    frame: bytes = msgpack.packb([FRAME_VERSION, acts.depth, codec.name, lengths, hidden, state])
    return frame


def decode_frame(
    frame: bytes,
    cuts: Mapping[int, CutSpec],
    limits: Limits,
    fitted: Mapping[str, Fitted] = MappingProxyType({}),
) -> Activations[NumpyArray]:
    """The activations in `frame`; `cuts` holds the depths at which frames are accepted, `fitted` the bundle's
    own codecs by name.

    Raises WireError or UnknownCodec for anything that is not a well-formed frame within `limits`.
    """
    if len(frame) > limits.max_frame_bytes:
        raise WireError(
            f"a frame of {len(frame)} bytes, at most {limits.max_frame_bytes}; send fewer rows"
        )
    reader = Reader(frame)
    depth = _read_head(reader)
    cut = cuts.get(depth)
    if cut is None:
        raise WireError(f"depth {depth}: this model accepts frames at depths {sorted(cuts)}")
    codec = _codec_for(cut, reader.text("codec"), fitted)
    lengths_B = _lengths(reader.data("lengths"), limits)
    left_B = codec.left(lengths_B) if isinstance(codec, Fitted) else lengths_B
    hidden = reader.data("hidden")
    state = _read_state(reader, cut, left_B.size, int(left_B.sum()))
    reader.end()
    positions_BT = None
    if isinstance(codec, Fitted):
        rows = codec.decode_rows(hidden, lengths_B)
        hidden_ND = rows.hidden_MD
        if rows.positions_M is not None:
            positions_BT = unpack(rows.positions_M, left_B)
    else:
        hidden_ND = _decoded(codec, hidden, int(lengths_B.sum()), cut)
    row_state, token_state = _unpacked(state, cut, left_B)
    return Activations(
        unpack(hidden_ND, left_B), left_B, depth, row_state, token_state, positions_BT
    )


def _decoded(codec: Codec, hidden: memoryview, n_tokens: int, cut: CutSpec) -> NumpyArray:
    if cut.integer:
        _check_ids(hidden, n_tokens, cut)
    return codec.decode(hidden, n_tokens, cut.width)


def _unpacked(
    state: Mapping[str, NumpyArray], cut: CutSpec, lengths_B: NDArray[np.int64]
) -> tuple[dict[str, NumpyArray], dict[str, NumpyArray]]:
    """The state of each row, and of each token: copies in the machine's byte order, in memory of their own,
    for callers may write to them."""
    row_state, token_state = {}, {}
    for name, field in cut.state.items():
        entry = state[name].astype(field.dtype)
        if field.per_token:
            token_state[name] = unpack(entry, lengths_B)
        else:
            row_state[name] = entry
    return row_state, token_state


def _check(acts: Activations[NumpyArray], cut: CutSpec) -> None:
    """Raises ValueError unless `acts` has the depth, state, shape and kind that `cut` says."""
    rows = {name for name, field in cut.state.items() if not field.per_token}
    per_token = set(cut.state) - rows
    if (acts.depth, set(acts.state), set(acts.token_state)) != (cut.depth, rows, per_token):
        raise ValueError(
            f"activations at depth {acts.depth} with state {sorted(acts.state)} and token state "
            f"{sorted(acts.token_state)} do not fit {cut}"
        )
    if acts.positions_BT is not None:
        raise ValueError(
            "tokens were left out of these activations on an earlier way; send them whole"
        )
    lengths_B, hidden_BTD = acts.lengths_B, acts.hidden_BTD
    longest = int(lengths_B.max(initial=0))
    if not 1 <= lengths_B.min(initial=_MAX_LENGTH) <= longest <= _MAX_LENGTH:
        raise ValueError(f"rows of {lengths_B.tolist()} tokens: must be 1 to {_MAX_LENGTH}")
    kinds = "iu" if cut.integer else "f"
    shape = (lengths_B.size, longest, cut.width)
    if hidden_BTD.dtype.kind not in kinds or hidden_BTD.shape != shape:
        raise ValueError(
            f"hidden states {hidden_BTD.dtype} {hidden_BTD.shape}, must be {shape} to fit {cut}"
        )


def _read_head(reader: Reader) -> int:
    """The frame's depth; checks that it is an array of this version's length."""
    fields = reader.number("the frame", ARRAY)
    version = reader.number("version", UINT)
    if version != FRAME_VERSION:
        raise WireError(
            f"frame version {version}: this side reads {FRAME_VERSION}; update the older side"
        )
    if fields != _FIELDS:
        raise WireError(f"not a frame: an array of {fields}, must be {_FIELDS}")
    return reader.number("depth", UINT)


def _codec(name: str, fitted: Mapping[str, Fitted]) -> Codec | Fitted:
    own = fitted.get(name)
    return get_codec(name) if own is None else own


def _fits(codec: Codec | Fitted, cut: CutSpec) -> bool:
    """Whether a fitted codec was fitted for this cut, and leaves tokens where there is state for each."""
    if not isinstance(codec, Fitted):
        return True
    per_token = any(field.per_token for field in cut.state.values())
    here = (codec.depth, codec.width) == (cut.depth, cut.width)
    return here and (codec.carries_tokens or not per_token)


def _codec_for(cut: CutSpec, name: str, fitted: Mapping[str, Fitted]) -> Codec | Fitted:
    codec = _codec(name, fitted)
    if codec.integer != cut.integer:
        kind = "token ids" if cut.integer else "floating point hidden states"
        raise WireError(f"codec {name} at depth {cut.depth}, where {kind} travel; use another")
    if not _fits(codec, cut):
        raise WireError(f"codec {name} at depth {cut.depth}: not fitted for this cut; use another")
    return codec


def _lengths(data: memoryview, limits: Limits) -> NDArray[np.int64]:
    if len(data) % 2:
        raise WireError(f"{len(data)} bytes of lengths: must be two a row")
    rows = len(data) // 2
    if not 1 <= rows <= limits.max_rows:
        raise WireError(
            f"{rows} rows in a frame: must be 1 to {limits.max_rows}; send several frames"
        )
    lengths_B = np.frombuffer(data, dtype="<u2").astype(np.int64)
    shortest, longest = int(lengths_B.min()), int(lengths_B.max())
    if shortest < 1 or longest > limits.max_tokens:
        raise WireError(
            f"rows of {shortest} to {longest} tokens: must be 1 to {limits.max_tokens}; cut the "
            "longer ones"
        )
    if not padding_fits(lengths_B, limits):
        raise WireError(
            f"{rows} rows of {shortest} to {longest} tokens: padding them all to {longest} takes "
            f"more than {_MAX_PADDING} times their tokens; send rows of similar length together"
        )
    return lengths_B


def _check_ids(hidden: memoryview, n_tokens: int, cut: CutSpec) -> None:
    highest = largest_ids(hidden, n_tokens, cut.width)
    if any(top >= size for top, size in zip(highest, cut.vocabulary, strict=True)):
        raise WireError(
            f"token ids up to {highest}: must stay below {cut.vocabulary}; use this model's "
            "tokenizer"
        )


def _read_state(reader: Reader, cut: CutSpec, rows: int, n_tokens: int) -> dict[str, NumpyArray]:
    """The packed entries, where they lie in the frame: exactly those of the cut, once each."""
    known = sorted(cut.state)
    count = reader.number("state", MAP)
    if count != len(known):
        raise WireError(f"{count} state entries at depth {cut.depth}, which carries {known}")
    state: dict[str, NumpyArray] = {}
    for _ in known:
        name = reader.text("state name")
        field = cut.state.get(name)
        if field is None or name in state:
            raise WireError(
                f"state {name!r:.80} is unknown or doubled; depth {cut.depth} carries {known}"
            )
        entries = n_tokens if field.per_token else rows
        state[name] = _state_entry(name, field, reader.data("state"), entries)
    return state


def _state_entry(name: str, field: StateField, data: memoryview, count: int) -> NumpyArray:
    if len(data) != count * field.nbytes:
        raise WireError(f"state {name}: {len(data)} bytes, must be {count * field.nbytes}")
    if field.dtype == "bool" and np.frombuffer(data, dtype=np.uint8).max(initial=0) > 1:
        raise WireError(f"state {name}: a truth value that is neither 0 nor 1")
    little_endian = np.dtype(field.dtype).newbyteorder("<")
    return np.frombuffer(data, dtype=little_endian).reshape(count, *field.shape)


def _pack_state(
    name: str,
    field: StateField,
    acts: Activations[NumpyArray],
    kept_N: NDArray[np.bool_] | None,
) -> bytes:
    value = acts.token_state[name] if field.per_token else acts.state[name]
    axes = acts.hidden_BTD.shape[: 2 if field.per_token else 1]
    if value.dtype != np.dtype(field.dtype) or value.shape != (*axes, *field.shape):
        raise ValueError(f"state {name}: {value.dtype} {value.shape}, must be {axes} of {field}")
    packed = pack(value, acts.lengths_B) if field.per_token else value
    if field.per_token and kept_N is not None:
        packed = packed[kept_N]
    return np.ascontiguousarray(packed, dtype=value.dtype.newbyteorder("<")).tobytes()
