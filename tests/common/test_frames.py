"""Frames: golden bytes, round trips, and everything malformed refused, by name and in little memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp_common.activations import Activations, mask_of, pack
from offramp_common.errors import UnknownCodec, WireError
from offramp_common.frames import (
    FRAME_VERSION,
    Limits,
    decode_frame,
    encode_frame,
    padding_fits,
)
from offramp_common.spec import STATE_DTYPES, CutSpec, StateField

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
LIMITS = Limits()
STATE = {
    "count": StateField("uint8"),
    "history": StateField("float32", (2, 3)),
    "halted": StateField("bool", per_token=True),
    "scores": StateField("float16", (2,), per_token=True),
}
CUTS = {
    0: CutSpec(0, True, 2, vocabulary=(30522, 2)),
    1: CutSpec(1, False, 4),
    2: CutSpec(2, False, 4, STATE),
    5: CutSpec(5, True, 1, {"count": StateField("uint8")}, (100,)),
    7: CutSpec(7, False, 768, {"memory": StateField("float32", (64,), per_token=True)}),
}
Batch = Activations[np.ndarray]


def random_state(field: StateField, shape: tuple[int, ...], rng: Any) -> np.ndarray:
    values = rng.integers(0, 2 if field.dtype == "bool" else 100, (*shape, *field.shape))
    state: np.ndarray = values.astype(field.dtype)
    return state


def batch(
    depth: int, lengths: list[int], seed: int = 0, cuts: Mapping[int, CutSpec] = CUTS
) -> Batch:
    """Random activations that fit the cut at `depth`."""
    rng, cut = np.random.default_rng(seed), cuts[depth]
    lengths_B = np.array(lengths, dtype=np.int64)
    shape = mask_of(lengths_B).shape
    hidden: np.ndarray = rng.standard_normal((*shape, cut.width)).astype(np.float32)
    if cut.integer:
        hidden = rng.integers(0, cut.vocabulary, (*shape, cut.width))
    rows = {n: f for n, f in cut.state.items() if not f.per_token}
    tokens = {n: f for n, f in cut.state.items() if f.per_token}
    return Activations(
        hidden,
        lengths_B,
        depth,
        {n: random_state(f, shape[:1], rng) for n, f in rows.items()},
        {n: random_state(f, shape, rng) for n, f in tokens.items()},
    )


def frame_of(depth: int, lengths: list[int], codec: str = "fp32", seed: int = 0) -> bytes:
    return encode_frame(batch(depth, lengths, seed), CUTS[depth], codec)


def fields_of(frame: bytes) -> list[Any]:
    fields: list[Any] = msgpack.unpackb(frame)
    return fields


def assert_same(decoded: Batch, sent: Batch) -> None:
    """Same real tokens, state and lengths bit for bit; padding is zeros."""
    assert decoded.depth == sent.depth
    assert decoded.lengths_B.dtype == np.int64
    assert decoded.lengths_B.tolist() == sent.lengths_B.tolist()
    assert decoded.state.keys() == sent.state.keys()
    assert decoded.token_state.keys() == sent.token_state.keys()
    for name, value in sent.state.items():
        assert decoded.state[name].dtype == value.dtype
        assert decoded.state[name].tobytes() == value.tobytes()
    per_token = [(decoded.hidden_BTD, sent.hidden_BTD)]
    per_token += [(decoded.token_state[n], sent.token_state[n]) for n in sent.token_state]
    mask_BT = mask_of(sent.lengths_B)
    for got, wanted in per_token:
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        assert pack(got, sent.lengths_B).tobytes() == pack(wanted, sent.lengths_B).tobytes()
        assert not got[~mask_BT].any()


# ---- golden bytes: a change here breaks every device in the field, so FRAME_VERSION must change

GOLDEN_BYTES = (
    "960102a466703136c40402000100c418003c00bc003800400042004400450046004700488048004984a5"
    "636f756e74c4020102a668616c746564c403010001a7686973746f7279c430000000000000803f000000"
    "4000004040000080400000a0400000c0400000e04000000041000010410000204100003041a673636f72"
    "6573c40c003c00400042004400450046"
)


def golden() -> Batch:
    """Two rows (2 and 1 tokens) at depth 2, every number different."""
    hidden = np.array([[[1, -1, 0.5, 2], [3, 4, 5, 6]], [[7, 8, 9, 10], [0, 0, 0, 0]]], np.float32)
    state: dict[str, np.ndarray] = {
        "count": np.array([1, 2], np.uint8),
        "history": np.arange(12, dtype=np.float32).reshape(2, 2, 3),
    }
    token_state = {
        "halted": np.array([[True, False], [True, True]]),
        "scores": np.array([[[1, 2], [3, 4]], [[5, 6], [9, 9]]], np.float16),
    }
    return Activations(hidden, np.array([2, 1]), 2, state, token_state)


def test_a_frame_has_the_golden_bytes() -> None:
    assert encode_frame(golden(), CUTS[2], "fp16").hex() == GOLDEN_BYTES


def test_the_golden_bytes_still_decode() -> None:
    decoded = decode_frame(bytes.fromhex(GOLDEN_BYTES), CUTS, LIMITS)
    assert decoded.hidden_BTD[0].tolist() == golden().hidden_BTD[0].tolist()
    assert decoded.hidden_BTD[1, 0].tolist() == [7, 8, 9, 10]
    assert decoded.state["history"].tolist() == golden().state["history"].tolist()
    assert decoded.token_state["scores"][1, 0].tolist() == [5, 6]


# ---- round trips


@SETTINGS
@given(
    st.sampled_from([0, 1, 2, 5]),
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.integers(0),
)
def test_a_lossless_frame_gives_back_every_bit(depth: int, lengths: list[int], seed: int) -> None:
    sent = batch(depth, lengths, seed)
    decoded = decode_frame(encode_frame(sent, CUTS[depth], "fp32"), CUTS, LIMITS)
    zeroed = np.where(mask_of(sent.lengths_B)[..., None], sent.hidden_BTD, 0)
    assert_same(decoded, replace(sent, hidden_BTD=zeroed.astype(sent.hidden_BTD.dtype)))


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_lossy_codecs_touch_the_hidden_states_only(codec: str) -> None:
    sent = batch(2, [3, 1, 9])
    decoded = decode_frame(encode_frame(sent, CUTS[2], codec), CUTS, LIMITS)
    assert np.allclose(
        pack(decoded.hidden_BTD, sent.lengths_B), pack(sent.hidden_BTD, sent.lengths_B), atol=0.02
    )
    assert_same(
        replace(decoded, hidden_BTD=sent.hidden_BTD * 0),
        replace(sent, hidden_BTD=sent.hidden_BTD * 0),
    )


@pytest.mark.parametrize("dtype", STATE_DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_state_of_every_dtype_and_shape_crosses(
    dtype: str, per_token: bool, shape: tuple[int, ...]
) -> None:
    cuts = {1: CutSpec(1, False, 1, {"s": StateField(dtype, shape, per_token)})}
    sent = batch(1, [2, 3], cuts=cuts)
    decoded = decode_frame(encode_frame(sent, cuts[1], "fp32"), cuts, LIMITS)
    for name, value in {**sent.state, **sent.token_state}.items():
        got = {**decoded.state, **decoded.token_state}[name]
        assert (got.dtype, got.shape) == (value.dtype, value.shape)
        assert got.flat[0] == value.flat[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4028235e38])
def test_nan_infinity_denormals_and_the_largest_float_cross_in_hidden_states_and_state(
    value: float,
) -> None:
    sent = batch(2, [2])
    sent.hidden_BTD[0, 1, 2] = value
    sent.state["history"][0, 1, 1] = value
    decoded = decode_frame(encode_frame(sent, CUTS[2], "fp32"), CUTS, LIMITS)
    assert decoded.hidden_BTD.tobytes() == sent.hidden_BTD.tobytes()
    assert decoded.state["history"].tobytes() == sent.state["history"].tobytes()


@pytest.mark.parametrize("depth", list(CUTS))
@pytest.mark.parametrize("lengths", [[1], [4], [2, 3], [2, 2]])
def test_decoded_arrays_are_writable_and_share_no_memory_with_the_frame(
    depth: int, lengths: list[int]
) -> None:
    frame = frame_of(depth, lengths)
    before = bytes(frame)
    decoded = decode_frame(frame, CUTS, LIMITS)
    arrays = [decoded.hidden_BTD, decoded.lengths_B]
    arrays += [*decoded.state.values(), *decoded.token_state.values()]
    for array in arrays:
        assert array.flags.writeable
        assert not np.shares_memory(array, np.frombuffer(frame, np.uint8))
        array.fill(0)
    assert frame == before


def test_encoding_reads_read_only_arrays_and_leaves_padding_at_home() -> None:
    sent = batch(2, [3, 1])
    frame = encode_frame(sent, CUTS[2], "fp32")
    sent.hidden_BTD[1, 1:] = np.nan
    sent.token_state["scores"][1, 1:] = np.nan
    for array in (sent.hidden_BTD, *sent.state.values(), *sent.token_state.values()):
        array.flags.writeable = False
    assert encode_frame(sent, CUTS[2], "fp32") == frame


def test_a_frame_is_plain_msgpack_that_any_library_reads() -> None:
    version, depth, codec, lengths, hidden, state = fields_of(frame_of(2, [3, 1], "int8"))
    assert (version, depth, codec) == (FRAME_VERSION, 2, "int8")
    assert struct.unpack("<2H", lengths) == (3, 1)
    assert len(hidden) == 4 * (4 + 4)
    assert {name: len(data) for name, data in state.items()} == {
        "count": 2, "history": 2 * 24, "halted": 4, "scores": 4 * 4
    }  # fmt: skip


def test_longer_spellings_of_the_same_msgpack_values_are_read() -> None:
    """Other languages' libraries need not choose the shortest form."""
    frame = frame_of(1, [2])
    _, _, codec, lengths, hidden, _ = fields_of(frame)
    array, text, data, mapping = b"\xdd", b"\xdb", b"\xc6", b"\xdf"

    def size(value: bytes) -> bytes:
        return struct.pack(">I", len(value)) + value

    longer = array + struct.pack(">I", 6) + b"\xcf" + struct.pack(">Q", 1) + b"\xcd\x00\x01"
    longer += text + size(codec.encode()) + data + size(lengths) + data + size(hidden)
    longer += mapping + struct.pack(">I", 0)
    assert_same(decode_frame(longer, CUTS, LIMITS), decode_frame(frame, CUTS, LIMITS))


def crosses(sent: Batch, cut: CutSpec) -> bool:
    """A row of one token survives, and our reader agrees with msgpack's about where things lie."""
    frame = encode_frame(sent, cut, "fp32")
    assert fields_of(frame)[1] == cut.depth
    decoded = decode_frame(frame, {cut.depth: cut}, LIMITS)
    return decoded.hidden_BTD.tobytes() == sent.hidden_BTD.tobytes()


@pytest.mark.parametrize("depth", [0, 1, 127, 128, 255, 256, 65535, 65536, 2**32])
def test_depths_of_every_msgpack_size_cross(depth: int) -> None:
    cut = CutSpec(depth, False, 2)
    assert crosses(batch(depth, [1], cuts={depth: cut}), cut)


@pytest.mark.parametrize("size", [1, 31, 32, 64])
def test_names_of_every_msgpack_size_cross(size: int) -> None:
    cut = CutSpec(
        1, False, 2, {"n" * size: StateField("uint8"), "é" * max(1, size // 2): STATE["count"]}
    )
    assert crosses(batch(1, [1], cuts={1: cut}), cut)


@pytest.mark.parametrize("count", [15, 16, 17, 70])
def test_any_number_of_state_entries_crosses(count: int) -> None:
    cut = CutSpec(1, False, 2, {f"s{i}": StateField("uint8") for i in range(count)})
    assert crosses(batch(1, [1], cuts={1: cut}), cut)


@pytest.mark.parametrize("nbytes", [0xFC, 0x100, 0xFFFC, 0x10000])
def test_hidden_states_of_every_msgpack_size_cross(nbytes: int) -> None:
    cut = CutSpec(1, False, nbytes // 4)
    assert crosses(batch(1, [1], cuts={1: cut}), cut)


# ---- everything malformed is refused


def refused(
    frame: bytes, match: str, error: type[Exception] = WireError, limits: Limits = LIMITS
) -> None:
    with pytest.raises(error, match=match) as caught:
        decode_frame(frame, CUTS, limits)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 400, "a stranger does not choose how much is logged"


def edited(at: int = 2, /, **changes: Any) -> bytes:
    """A valid frame of rows of 3 and 1 tokens with some of its fields replaced."""
    names = ("version", "depth", "codec", "lengths", "hidden", "state")
    values = dict(zip(names, fields_of(frame_of(at, [3, 1])), strict=True))
    return bytes(msgpack.packb(list({**values, **changes}.values())))


def test_the_edits_below_start_from_a_frame_that_decodes() -> None:
    for depth in CUTS:
        assert decode_frame(edited(depth), CUTS, LIMITS).batch_size == 2


@pytest.mark.parametrize("depth", [0, 2, 5])
def test_a_frame_cut_short_anywhere_is_refused(depth: int) -> None:
    frame = frame_of(depth, [3, 1], "int8")
    for size in range(len(frame)):
        with pytest.raises(WireError):
            decode_frame(frame[:size], CUTS, LIMITS)


@pytest.mark.parametrize("tail", [b"\0", b"\xc0", b"\xc1", frame_of(1, [1])])
def test_bytes_after_the_end_are_refused(tail: bytes) -> None:
    refused(edited() + tail, f"{len(tail)} bytes after its end")


@pytest.mark.parametrize("name", ["version", "depth", "codec", "lengths", "hidden", "state"])
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -1,
        -(2**40),
        1.5,
        "x",
        b"x",
        [],
        [1],
        {"a": b""},
        msgpack.ExtType(1, b"ab"),
        2**64 - 1,
    ],
    ids=repr,
)
def test_a_field_of_another_type_is_refused(name: str, value: Any) -> None:
    frame = edited(**{name: value})
    with pytest.raises((WireError, UnknownCodec)) as caught:
        decode_frame(frame, CUTS, LIMITS)
    unknown = name == "codec" and isinstance(value, str)
    assert type(caught.value) is (UnknownCodec if unknown else WireError)


@pytest.mark.parametrize("version", [0, 2, 255, 2**63])
def test_another_version_is_refused_before_anything_else(version: int) -> None:
    refused(edited(version=version), f"version {version}: this side reads 1; update the older side")
    refused(msgpack.packb([version]), "update the older side")
    refused(msgpack.packb([version, *"abcdefgh"]), "update the older side")


@pytest.mark.parametrize("fields", [1, 5, 7, 16])
def test_another_number_of_fields_is_refused(fields: int) -> None:
    refused(msgpack.packb([1] * fields), f"an array of {fields}, must be 6")


@pytest.mark.parametrize(
    "frame", [b"", b"\xc0", b"\x90", b"hello", b"\xff" * 40, b"\x80"], ids=repr
)
def test_what_is_no_frame_at_all_is_refused(frame: bytes) -> None:
    refused(frame, "not a frame")


def test_a_frame_beyond_the_size_limit_is_refused() -> None:
    frame = edited()
    limits = Limits(max_frame_bytes=len(frame) - 1)
    refused(frame, f"{len(frame)} bytes, at most {len(frame) - 1}; send fewer rows", limits=limits)
    decode_frame(frame, CUTS, Limits(max_frame_bytes=len(frame)))


@pytest.mark.parametrize("depth", [3, 6, 2**64 - 1])
def test_a_depth_where_nothing_is_accepted_is_refused(depth: int) -> None:
    refused(edited(depth=depth), rf"depth {depth}: .* accepts frames at depths \[0, 1, 2, 5, 7\]")


def test_a_depth_that_exists_with_another_depths_content_is_refused() -> None:
    refused(edited(2, depth=1), "4 state entries at depth 1")
    refused(edited(1, depth=2), "0 state entries at depth 2")
    refused(edited(1, depth=0), "codec fp32 at depth 0, where token ids travel")


@pytest.mark.parametrize("codec", ["", "fp64", "x" * 64, "тест"])
def test_an_unknown_codec_is_refused_as_one(codec: str) -> None:
    refused(edited(codec=codec), "unknown here; use one of fp32", UnknownCodec)


def test_a_codec_name_without_end_or_meaning_is_refused() -> None:
    refused(edited(codec="x" * 65), "codec of 65 bytes: at most 64")
    refused(edited().replace(b"\xa4fp32", b"\xa4\xff\xfe\xfd\xfc"), "codec is not UTF-8")


@pytest.mark.parametrize(("depth", "codec"), [(0, "int8"), (5, "fp32"), (1, "tokens")])
def test_a_codec_of_the_wrong_kind_is_refused(depth: int, codec: str) -> None:
    refused(edited(depth, codec=codec), f"codec {codec} at depth {depth}, where .* travel")


def lengths_bytes(*lengths: int) -> bytes:
    return struct.pack(f"<{len(lengths)}H", *lengths)


@pytest.mark.parametrize(
    ("lengths", "match"),
    [
        (b"", "0 rows in a frame: must be 1 to 256"),
        (b"\0\1\2", "3 bytes of lengths"),
        (lengths_bytes(*[1] * 257), "257 rows .* send several frames"),
        (lengths_bytes(*[1] * 32768), "32768 rows"),
        (lengths_bytes(4, 0), "rows of 0 to 4 tokens: must be 1 to 512"),
        (lengths_bytes(0, 0), "rows of 0 to 0 tokens"),
        (lengths_bytes(1, 513), "rows of 1 to 513 tokens: must be 1 to 512; cut the longer"),
        (lengths_bytes(65535), "rows of 65535"),
        (lengths_bytes(*[1] * 255, 512), "more than 4 times their tokens; send rows of similar"),
        (lengths_bytes(3, 2), "hidden states|bytes, must be"),
        (lengths_bytes(4), "bytes, must be"),
        (lengths_bytes(2, 1, 1), "bytes, must be"),
    ],
    ids=repr,
)
def test_lengths_that_cannot_be_are_refused(lengths: bytes, match: str) -> None:
    refused(edited(lengths=lengths), match)


def test_the_limits_are_those_given() -> None:
    refused(edited(), "rows of 1 to 3 tokens: must be 1 to 2", limits=Limits(max_tokens=2))
    refused(edited(), "2 rows in a frame: must be 1 to 1", limits=Limits(max_rows=1))


@pytest.mark.parametrize("hidden", [b"", b"\0" * 63, b"\0" * 65, b"\0" * 256])
def test_hidden_states_of_another_size_are_refused(hidden: bytes) -> None:
    refused(edited(1, hidden=hidden), f"{len(hidden)} bytes .*4 tokens of width 4 need 64")


@pytest.mark.parametrize(
    ("depth", "ids"),
    [
        (0, b"\2" + struct.pack("<4H", 1, 2, 30522, 3) + b"\0" * 4),
        (0, b"\2" + b"\0" * 8 + b"\0\0\2\0"),
        (0, b"\4" + struct.pack("<4I", 1, 2, 2**32 - 1, 3) + b"\0" * 4),
        (5, b"\2" + struct.pack("<4H", 1, 2, 100, 3)),
    ],
    ids=["id", "segment", "largest id", "one channel"],
)
def test_ids_beyond_the_vocabulary_are_refused(depth: int, ids: bytes) -> None:
    refused(edited(depth, hidden=ids), "token ids up to .* must stay below .* tokenizer")


def state_of(**changes: bytes | None) -> dict[Any, Any]:
    state = {**fields_of(frame_of(2, [3, 1]))[5], **changes}
    return {name: data for name, data in state.items() if data is not None}


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({}, "0 state entries at depth 2, which carries .*'count', 'halted'"),
        (state_of(count=None), "3 state entries"),
        (state_of(more=b"\0\0"), "5 state entries"),
        (state_of(count=None, more=b"\0\0"), "state 'more' is unknown or doubled; depth 2 carries"),
        (state_of(count=b"\0"), "state count: 1 bytes, must be 2"),
        (state_of(count=b"\0\0\0"), "state count: 3 bytes, must be 2"),
        (state_of(history=b""), "state history: 0 bytes, must be 48"),
        (state_of(halted=b"\0\1\2\0"), "state halted: a truth value that is neither 0 nor 1"),
        (state_of(scores=b"\0" * 15), "state scores: 15 bytes, must be 16"),
        ({**state_of(count=None), "n" * 65: b"\0"}, "state name of 65 bytes: at most 64"),
        ({**state_of(count=None), 7: b"\0"}, "byte 0x07 at .* where state name must stand"),
        ({**state_of(), "count": "\0\0"}, "byte 0xa2 at .* where state must stand"),
        ({str(i): b"" for i in range(100_000)}, "100000 state entries"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_state_that_is_missing_unknown_short_or_long_is_refused(state: Any, match: str) -> None:
    refused(edited(state=state), match)


def test_a_state_entry_that_stands_twice_is_refused() -> None:
    frame = edited()
    once, twice = msgpack.packb("halted") + b"\xc4\4", msgpack.packb("scores") + b"\xc4\x10"
    assert frame.count(once) == frame.count(twice) == 1
    # The entry "scores" becomes a second "halted": same number of entries, one of them missing.
    start = frame.index(twice)
    doubled = frame[:start] + once + b"\0\0\0\0" + frame[start + len(twice) + 16 :]
    assert len(doubled) == len(frame) - 12
    refused(doubled, "state 'halted' is unknown or doubled")


def nested(opening: bytes, depth: int = 100_000) -> bytes:
    return opening * depth


@pytest.mark.parametrize(
    "value",
    [nested(b"\x91"), nested(b"\x96"), nested(b"\x81\xa1a"), nested(b"\xdd\xff\xff\xff\xff")],
    ids=["arrays", "wide arrays", "maps", "arrays that declare 2**32 - 1 entries"],
)
@pytest.mark.parametrize("position", range(6))
def test_nesting_is_refused_at_its_first_byte(value: bytes, position: int) -> None:
    fields = [msgpack.packb(field) for field in fields_of(frame_of(2, [3, 1]))]
    frame = b"\x96" + b"".join([*fields[:position], value, *fields[position + 1 :]])
    refused(frame, r"where .* must stand|state entries|state name must stand")


@pytest.mark.parametrize(
    "mark", [b"\xdb", b"\xc6", b"\xdd", b"\xdf", b"\xc9", b"\xda", b"\xc5"], ids=repr
)
@pytest.mark.parametrize("position", range(6))
def test_huge_declared_lengths_are_refused(mark: bytes, position: int) -> None:
    fields = [msgpack.packb(field) for field in fields_of(frame_of(2, [3, 1]))]
    frame = b"\x96" + b"".join([*fields[:position], mark, b"\xff" * 4, *fields[position + 1 :]])
    refused(frame, "must stand|cut short|of 4294967295 bytes|4294967295 state|of 65535 bytes")


# ---- memory


def peak_bytes(frame: bytes, limits: Limits = LIMITS) -> tuple[int, bool]:
    """The most memory that decoding took beside the frame, and whether it was refused."""
    tracemalloc.start()
    try:
        decode_frame(frame, CUTS, limits)
        refused = False
    except (WireError, UnknownCodec):
        refused = True
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, refused


CONSTANT = 64 * 1024
BIG = 4 * 2**20


def tree(depth: int) -> bytes:
    """Arrays of six arrays of six arrays ...: a general reader makes some 60 bytes of each byte."""
    return b"\x96" + 6 * tree(depth - 1) if depth else b"\x90"


@cache
def big_frames() -> dict[str, bytes]:
    """Large malformed frames, each with its bad part as late as it can be."""
    names = ("version", "depth", "codec", "lengths", "hidden", "state")
    rows = [100] * 20
    valid = dict(zip(names, fields_of(frame_of(7, rows, "int8")), strict=True))
    ids = dict(zip(names, fields_of(frame_of(0, [512] * 256)), strict=True))
    memory = valid["state"]["memory"]

    def changed(base: dict[str, Any] = valid, **changes: Any) -> bytes:
        return bytes(msgpack.packb(list({**base, **changes}.values())))

    scales = np.full(2000, np.nan, "<f4").tobytes()
    bad_ids = bytearray(ids["hidden"])
    bad_ids[-1] = 2
    head = b"\x96\x01\x07\xa4int8"
    return {
        "hidden states a byte short": changed(hidden=valid["hidden"][:-1]),
        "state a byte short": changed(state={"memory": memory[:-1]}),
        "state of another name": changed(state={"memori": memory}),
        "a bad scale": changed(hidden=scales + valid["hidden"][8000:]),
        "the value -128": changed(hidden=valid["hidden"][:-1] + b"\x80"),
        "a bad segment at the end": changed(ids, hidden=bytes(bad_ids)),
        "bytes after the end": changed() + b"\0" * BIG,
        "one long row of 256": changed(lengths=lengths_bytes(*[1] * 255, 512), hidden=b"\0" * BIG),
        "lengths of megabytes": changed(lengths=b"\1\0" * (BIG // 2)),
        "a codec name of megabytes": changed(codec="x" * BIG),
        "a state name of megabytes": changed(state={"x" * BIG: b""}),
        "empty arrays": head + b"\xdd" + struct.pack(">I", BIG) + b"\x90" * BIG,
        "empty maps": head + b"\xdd" + struct.pack(">I", BIG) + b"\x80" * BIG,
        "short strings": head + b"\xdd" + struct.pack(">I", BIG // 3) + b"\xa2ab" * (BIG // 3),
        "an array that declares 2**32 - 1 entries": head + b"\xdd" + b"\xff" * 4 + b"\xc0" * BIG,
        "a map that declares 2**32 - 1 entries": head + b"\xc4\0\xc4\0\xdf" + b"\xff" * (BIG + 4),
        "nested arrays": head + b"\x96" * BIG,
        "a tree of empty arrays": head + tree(8) + b"\xc4\0\x80",
        "a text where bytes must stand": head + b"\xdb" + struct.pack(">I", BIG) + b"x" * BIG,
        "an extension": head + b"\xc9" + struct.pack(">I", BIG) + b"x" * BIG,
    }


@pytest.mark.parametrize("name", list(big_frames()))
def test_refusing_a_large_frame_takes_less_than_twice_its_size(name: str) -> None:
    frame = big_frames()[name]
    peak, was_refused = peak_bytes(frame, Limits(max_frame_bytes=2**26))
    assert was_refused
    assert peak < 2 * len(frame) + CONSTANT
    # What is reached in truth: nothing is copied before all is known to be well.
    assert peak < CONSTANT


@pytest.mark.parametrize(
    ("depth", "lengths", "codec"),
    [
        (7, [512] * 8, "int8"),
        (7, [512] + [1] * 3, "int8"),
        (7, [128] + [32] * 39, "int8"),
        (7, [60] + [1] * 33, "int8"),
        (7, [8] + [1] * 255, "int8"),
        (7, [100] * 20, "fp32"),
        (0, [512] * 256, "tokens"),
        (0, [512] + [128] * 255, "tokens"),
        (2, [64] * 256, "int8"),
    ],
)
def test_decoding_a_valid_frame_takes_bounded_memory(
    depth: int, lengths: list[int], codec: str
) -> None:
    frame, cut = frame_of(depth, lengths, codec), CUTS[depth]
    peak, was_refused = peak_bytes(frame)
    assert not was_refused
    # A value in memory, packed, and padded at most four times (or to four of the longest rows).
    per_token = cut.width * (8 if cut.integer else 4)
    per_token += sum(field.nbytes for field in cut.state.values())
    tokens = max(sum(lengths), LIMITS.max_tokens)
    assert peak < (1 + 4) * tokens * per_token + 2**20
    assert peak < 2 * tokens * per_token + len(lengths) * max(lengths) * per_token + 2**18


def test_rows_of_at_most_four_times_the_shortest_always_fit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        shortest = int(rng.integers(1, 129))
        lengths_B = rng.integers(shortest, 4 * shortest + 1, rng.integers(1, 257))
        assert padding_fits(lengths_B, LIMITS)


@pytest.mark.parametrize(
    ("lengths", "fits"),
    [([512, 1, 1, 1], True), ([64] + [1] * 31, True), ([64] + [1] * 32, False), ([512] + [1] * 255, False)],
)  # fmt: skip
def test_one_long_row_among_many_short_ones_does_not_fit(lengths: list[int], fits: bool) -> None:
    assert padding_fits(np.array(lengths), LIMITS) is fits


# ---- our own bugs are ValueErrors


@pytest.mark.parametrize(
    ("depth", "changes", "match"),
    [
        (2, {"depth": 1}, "depth 1 with state"),
        (2, {"state": {}}, "do not fit"),
        (2, {"token_state": {}}, "do not fit"),
        (2, {"lengths_B": np.array([3, 0])}, r"rows of \[3, 0\] tokens"),
        (2, {"lengths_B": np.array([2, 1])}, "hidden states"),
        (2, {"lengths_B": np.array([70000, 1])}, "must be 1 to 65535"),
        (2, {"lengths_B": np.array([], np.int64)}, "rows of|hidden states"),
        (2, {"hidden_BTD": np.zeros((2, 3, 5), np.float32)}, r"must be \(2, 3, 4\)"),
        (2, {"hidden_BTD": np.zeros((2, 3, 4), np.int64)}, "int64"),
        (0, {"hidden_BTD": np.zeros((2, 3, 2), np.float32)}, "float32"),
        (0, {"hidden_BTD": np.full((2, 3, 2), 30522)}, "token ids up to"),
        (0, {"hidden_BTD": np.full((2, 3, 2), -1)}, "token ids"),
    ],
    ids=str,
)
def test_activations_that_do_not_fit_the_cut_are_not_sent(
    depth: int, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        encode_frame(replace(batch(depth, [3, 1]), **changes), CUTS[depth], "fp32")


@pytest.mark.parametrize("name", list(STATE))
def test_state_of_another_dtype_or_shape_is_not_sent(name: str) -> None:
    sent = batch(2, [3, 1])
    changes: list[Callable[[np.ndarray], np.ndarray]]
    changes = [lambda v: v.astype(np.float64), lambda v: v[:1], lambda v: v[..., None]]
    for change in changes:
        state = {n: change(v) if n == name else v for n, v in sent.state.items()}
        tokens = {n: change(v) if n == name else v for n, v in sent.token_state.items()}
        with pytest.raises(ValueError, match=f"state {name}"):
            encode_frame(replace(sent, state=state, token_state=tokens), CUTS[2], "fp32")


def test_state_in_the_wrong_map_is_not_sent() -> None:
    sent = batch(2, [3, 1])
    both = {**sent.state, **sent.token_state}
    with pytest.raises(ValueError, match="do not fit"):
        encode_frame(replace(sent, state=both, token_state={}), CUTS[2], "fp32")


def test_a_codec_of_the_wrong_kind_is_not_used_for_sending() -> None:
    with pytest.raises(ValueError, match="cannot carry floating point"):
        encode_frame(batch(1, [2]), CUTS[1], "tokens")
    with pytest.raises(UnknownCodec):
        encode_frame(batch(1, [2]), CUTS[1], "zip")


@pytest.mark.parametrize(
    "make",
    [
        lambda: StateField("float64"),
        lambda: StateField("object"),
        lambda: StateField("uint8", (0,)),
        lambda: CutSpec(1, False, 0),
        lambda: CutSpec(-1, False, 4),
        lambda: CutSpec(0, True, 2, vocabulary=(5,)),
        lambda: CutSpec(1, False, 2, vocabulary=(5, 5)),
        lambda: CutSpec(1, False, 4, {"n" * 65: StateField("uint8")}),
        lambda: CutSpec(1, False, 4, {"": StateField("uint8")}),
    ],
)
def test_a_cut_that_no_frame_can_carry_is_not_described(make: Any) -> None:
    with pytest.raises(ValueError, match=r"state|width|vocabulary"):
        make()


@pytest.mark.parametrize("depth", list(CUTS))
def test_a_cut_survives_json(depth: int) -> None:
    assert CutSpec.from_json(depth, json.loads(json.dumps(CUTS[depth].to_json()))) == CUTS[depth]
