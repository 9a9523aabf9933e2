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

A stranger's bytes are read in place: `_Reader` knows the few msgpack types that a frame is made of
and nothing nested, and all sizes and values are checked on the frame itself, so that refusing a
frame allocates next to nothing (a general msgpack reader made 60 bytes of objects from one byte).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgpack
import numpy as np
from numpy.typing import NDArray

from offramp_common.activations import Activations, NumpyArray, pack, unpack
from offramp_common.codecs import Codec, get_codec
from offramp_common.codecs.tokens import largest_ids
from offramp_common.errors import WireError
from offramp_common.spec import MAX_NAME_BYTES, CutSpec, StateField

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


def encode_frame(acts: Activations[NumpyArray], cut: CutSpec, codec_name: str) -> bytes:
    """The frame of `acts`; token ids go through the codec `tokens`, whatever `codec_name` says.

    Raises UnknownCodec, and ValueError when `acts` is not what `cut` says (our own bug).
    """
    codec = get_codec("tokens" if cut.integer else codec_name)
    if codec.integer != cut.integer:
        raise ValueError(f"codec {codec.name} cannot carry floating point hidden states")
    _check(acts, cut)
    hidden_ND = pack(acts.hidden_BTD, acts.lengths_B)
    if cut.integer and np.any(hidden_ND >= np.array(cut.vocabulary)):
        raise ValueError(f"token ids up to {hidden_ND.max(axis=0)} of {cut.vocabulary}")
    state = {name: _pack_state(name, cut.state[name], acts) for name in sorted(cut.state)}
    lengths = acts.lengths_B.astype("<u2").tobytes()
    frame: bytes = msgpack.packb(
        [FRAME_VERSION, acts.depth, codec.name, lengths, codec.encode(hidden_ND), state]
    )
    return frame


def decode_frame(
    frame: bytes, cuts: Mapping[int, CutSpec], limits: Limits
) -> Activations[NumpyArray]:
    """The activations in `frame`; `cuts` holds the depths at which frames are accepted.

    Raises WireError or UnknownCodec for anything that is not a well-formed frame within `limits`.
    """
    if len(frame) > limits.max_frame_bytes:
        raise WireError(
            f"a frame of {len(frame)} bytes, at most {limits.max_frame_bytes}; send fewer rows"
        )
    reader = _Reader(frame)
    depth = _read_head(reader)
    cut = cuts.get(depth)
    if cut is None:
        raise WireError(f"depth {depth}: this model accepts frames at depths {sorted(cuts)}")
    codec = _codec_for(cut, reader.text("codec"))
    lengths_B = _lengths(reader.data("lengths"), limits)
    n_tokens = int(lengths_B.sum())
    hidden = reader.data("hidden")
    state = _read_state(reader, cut, lengths_B.size, n_tokens)
    reader.end()
    if cut.integer:
        _check_ids(hidden, n_tokens, cut)
    hidden_ND = codec.decode(hidden, n_tokens, cut.width)
    row_state, token_state = {}, {}
    for name, field in cut.state.items():
        # A copy in the machine's byte order, in memory of its own: callers may write to it.
        entry = state[name].astype(field.dtype)
        if field.per_token:
            token_state[name] = unpack(entry, lengths_B)
        else:
            row_state[name] = entry
    return Activations(unpack(hidden_ND, lengths_B), lengths_B, depth, row_state, token_state)


def _check(acts: Activations[NumpyArray], cut: CutSpec) -> None:
    """Raises ValueError unless `acts` has the depth, state, shape and kind that `cut` says."""
    rows = {name for name, field in cut.state.items() if not field.per_token}
    per_token = set(cut.state) - rows
    if (acts.depth, set(acts.state), set(acts.token_state)) != (cut.depth, rows, per_token):
        raise ValueError(
            f"activations at depth {acts.depth} with state {sorted(acts.state)} and token state "
            f"{sorted(acts.token_state)} do not fit {cut}"
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


def _read_head(reader: _Reader) -> int:
    """The frame's depth; checks that it is an array of this version's length."""
    fields = reader.number("the frame", _ARRAY)
    version = reader.number("version", _UINT)
    if version != FRAME_VERSION:
        raise WireError(
            f"frame version {version}: this side reads {FRAME_VERSION}; update the older side"
        )
    if fields != _FIELDS:
        raise WireError(f"not a frame: an array of {fields}, must be {_FIELDS}")
    return reader.number("depth", _UINT)


def _codec_for(cut: CutSpec, name: str) -> Codec:
    codec = get_codec(name)
    if codec.integer != cut.integer:
        kind = "token ids" if cut.integer else "floating point hidden states"
        raise WireError(f"codec {name} at depth {cut.depth}, where {kind} travel; use another")
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


def _read_state(reader: _Reader, cut: CutSpec, rows: int, n_tokens: int) -> dict[str, NumpyArray]:
    """The packed entries, where they lie in the frame: exactly those of the cut, once each."""
    known = sorted(cut.state)
    count = reader.number("state", _MAP)
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


def _pack_state(name: str, field: StateField, acts: Activations[NumpyArray]) -> bytes:
    value = acts.token_state[name] if field.per_token else acts.state[name]
    axes = acts.hidden_BTD.shape[: 2 if field.per_token else 1]
    if value.dtype != np.dtype(field.dtype) or value.shape != (*axes, *field.shape):
        raise ValueError(f"state {name}: {value.dtype} {value.shape}, must be {axes} of {field}")
    packed = pack(value, acts.lengths_B) if field.per_token else value
    return np.ascontiguousarray(packed, dtype=value.dtype.newbyteorder("<")).tobytes()


@dataclass(frozen=True, slots=True)
class _Kind:
    """How msgpack marks one type: `count` first bytes from `first` hold a small number themselves;
    each first byte in `wide` is followed by a number of that many bytes, big-endian."""

    first: int
    count: int
    wide: Mapping[int, int]


_UINT = _Kind(0x00, 128, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8})
_STR = _Kind(0xA0, 32, {0xD9: 1, 0xDA: 2, 0xDB: 4})
_BIN = _Kind(0xC4, 0, {0xC4: 1, 0xC5: 2, 0xC6: 4})
_ARRAY = _Kind(0x90, 16, {0xDC: 2, 0xDD: 4})
_MAP = _Kind(0x80, 16, {0xDE: 2, 0xDF: 4})


class _Reader:
    """Reads a frame's msgpack values one after another, without copying or allocating."""

    def __init__(self, frame: bytes) -> None:
        self._frame = memoryview(frame)
        self._at = 0

    def number(self, what: str, kind: _Kind) -> int:
        """An unsigned integer; or of a value of another kind its length."""
        at = self._at
        mark = self._take(what, 1)[0]
        if kind.first <= mark < kind.first + kind.count:
            return mark - kind.first
        if mark not in kind.wide:
            raise WireError(f"not a frame: byte 0x{mark:02x} at {at}, where {what} must stand")
        return int.from_bytes(self._take(what, kind.wide[mark]), "big")

    def data(self, what: str) -> memoryview:
        return self._take(what, self.number(what, _BIN))

    def text(self, what: str) -> str:
        size = self.number(what, _STR)
        if size > MAX_NAME_BYTES:
            raise WireError(f"{what} of {size} bytes: at most {MAX_NAME_BYTES}")
        try:
            return str(self._take(what, size), "utf-8")
        except UnicodeDecodeError:
            raise WireError(f"not a frame: {what} is not UTF-8") from None

    def end(self) -> None:
        if self._at != len(self._frame):
            raise WireError(f"not a frame: {len(self._frame) - self._at} bytes after its end")

    def _take(self, what: str, size: int) -> memoryview:
        there = len(self._frame) - self._at
        if size > there:
            raise WireError(
                f"not a frame: {what} needs {size} bytes of the {there} left; cut short"
            )
        self._at += size
        return self._frame[self._at - size : self._at]
