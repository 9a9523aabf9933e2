"""int4's levels; int8+z and int4+z: their error, size, cuts, and what they refuse."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from offramp_common.codecs import CODECS, Progressive, get_codec
from offramp_common.codecs.entropy import compress, decompress, least, most
from offramp_common.codecs.int4 import LEVELS
from offramp_common.codecs.stepped import Stepped
from offramp_common.errors import WireError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)
F32 = np.finfo(np.float32)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ANY = st.floats(width=32)
STEPPED = [codec for codec in CODECS.values() if isinstance(codec, Stepped)]
NAMES = [codec.name for codec in STEPPED]


def arrays(elements: st.SearchStrategy[float], widest: int = 70) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(0, 5), st.integers(0, widest))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))


def hidden_like(n_tokens: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise with what real hidden states have: channels of other scales and means, large tokens."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((n_tokens, width)) * rng.gamma(4, 0.25, width)
    hidden[:, : max(1, width // 200)] += 8
    return (hidden * rng.uniform(0.5, 3, (n_tokens, 1))).astype(np.float32)


def round_trip(name: str, hidden_ND: np.ndarray) -> np.ndarray:
    codec = get_codec(name)
    return codec.decode(codec.encode(hidden_ND), *hidden_ND.shape)


def relative_error(out: np.ndarray, hidden: np.ndarray) -> float:
    return float(np.linalg.norm(out - hidden) / np.linalg.norm(hidden))


# ---- int4


@SETTINGS
@given(arrays(FLOATS))
def test_int4_errs_by_at_most_half_the_widest_gap_of_its_group(hidden_ND: np.ndarray) -> None:
    out = round_trip("int4", hidden_ND).astype(np.float64)
    assert out.shape == hidden_ND.shape
    wanted = hidden_ND.astype(np.float64)
    peak_N = np.abs(wanted).max(axis=1, initial=0)
    gap = max(np.diff(LEVELS)) / 2 / 127 + 1 / 254  # a level, and rounding before it is chosen
    for at in range(0, hidden_ND.shape[1], 32):
        group = slice(at, at + 32)
        # A group's scale is rounded up to a 255th of the token's peak.
        scale_N = np.abs(wanted[:, group]).max(axis=1, initial=0) + peak_N / 255
        tiny_N = np.where(peak_N < 32400 * float(F32.smallest_normal), peak_N, 0)
        bound_N1 = (scale_N * gap * (1 + 1e-5) + tiny_N)[:, None]
        assert (np.abs(out - wanted)[:, group] <= bound_N1).all()


def test_int4_keeps_zeros_and_each_groups_largest_value() -> None:
    hidden = np.zeros((1, 64), np.float32)
    hidden[0, [3, 40]] = -51.0, 0.2
    out = round_trip("int4", hidden)
    assert out[0, [3, 40]] == pytest.approx([-51, 0.2], rel=1e-6)
    assert np.count_nonzero(out) == 2


def test_int4_has_levels_for_all_nibbles_in_rising_order() -> None:
    assert len(LEVELS) == 16
    assert list(LEVELS) == sorted(set(LEVELS))
    assert (LEVELS[0], LEVELS[-1]) == (-127, 127)
    levels = np.array([LEVELS], np.float32)
    # Other values are on levels already, and so come back as they were.
    assert np.allclose(round_trip("int4", levels), levels, rtol=1e-6)


def test_int4_makes_nan_zero_and_infinity_the_largest_float() -> None:
    out = round_trip("int4", np.array([[np.nan, 1, -1], [np.inf, -np.inf, 1]], np.float32))
    assert out[0] == pytest.approx([0, 1, -1], rel=1e-6)
    assert np.isfinite(out).all()
    assert out[1] == pytest.approx([F32.max, -F32.max, 0], rel=1e-6)


@pytest.mark.parametrize("unit", [-1.0, np.nan, np.inf, 1.06e34])
def test_int4_refuses_scales_that_would_not_decode_to_finite_numbers(unit: float) -> None:
    data = np.array([unit], "<f4").tobytes() + b"\xff\x0f"
    with pytest.raises(WireError, match=r"scale outside 0 to 1\.05"):
        get_codec("int4").decode(data, 1, 1)


# ---- steps


@pytest.mark.parametrize("codec", STEPPED, ids=NAMES)
@SETTINGS
@given(hidden_ND=arrays(FLOATS))
def test_a_value_errs_by_at_most_half_a_step(codec: Stepped, hidden_ND: np.ndarray) -> None:
    data = codec.encode(hidden_ND)
    assert len(data) <= codec.nbytes(*hidden_ND.shape)
    out = codec.decode(data, *hidden_ND.shape).astype(np.float64)
    assert np.isfinite(out).all()
    wanted = np.clip(hidden_ND.astype(np.float64), -(2.0**126), 2.0**126)
    rms_N1 = np.sqrt(np.square(wanted).mean(axis=1, keepdims=True)) if wanted.size else wanted
    # A bf16 rounded up is 1/128 larger at most; the tiniest tokens become zeros.
    bound = rms_N1 * codec.relative / 2 * (1 + 1 / 128) * (1 + 1e-5)
    tiny = float(F32.smallest_normal) / codec.relative * np.sqrt(max(1, hidden_ND.shape[1]))
    assert (np.abs(out - wanted) <= np.where(rms_N1 <= tiny, np.maximum(bound, tiny), bound)).all()


@pytest.mark.parametrize("name", NAMES)
@SETTINGS
@given(hidden_ND=arrays(ANY))
def test_whatever_is_encoded_decodes_to_finite_numbers(name: str, hidden_ND: np.ndarray) -> None:
    codec = get_codec(name)
    data = codec.encode(hidden_ND)
    assert len(data) <= codec.nbytes(*hidden_ND.shape)
    out = codec.decode(data, *hidden_ND.shape)
    assert out.shape == hidden_ND.shape
    assert np.isfinite(out).all()
    assert not out[np.isnan(hidden_ND)].any()


@pytest.mark.parametrize("name", NAMES)
def test_infinities_become_the_largest_number_sent_and_other_tokens_stay(name: str) -> None:
    hidden = hidden_like(3, 64)
    alone = round_trip(name, hidden[:1])
    hidden[1, :2] = np.inf, -np.inf
    hidden[2] = F32.smallest_subnormal
    out = round_trip(name, hidden)
    # Half a step: the root mean square of two such values in 64 is 0.18 of them.
    assert out[1, :2] / 2.0**126 == pytest.approx([1, -1], abs=0.05)
    assert not out[2].any()
    assert np.array_equal(out[:1], alone)


@pytest.mark.parametrize(("name", "error"), [("int8+z", 0.0132), ("int4+z", 0.155)])
def test_the_relative_error_is_the_steps_whatever_the_token(name: str, error: float) -> None:
    hidden = hidden_like(128, 768)
    error_N = np.linalg.norm(round_trip(name, hidden) - hidden, axis=1)
    # A step over the root of 12, as of an even distribution.
    assert (error_N / np.linalg.norm(hidden, axis=1)).max() < error * 1.1
    assert relative_error(round_trip(name, hidden), hidden) < error


@pytest.mark.parametrize(
    ("name", "kilobytes"), [("int8", 99), ("int8+z", 82), ("int4", 53), ("int4+z", 38)]
)
def test_128_tokens_of_bert_base_width_fit_the_sizes_that_are_promised(
    name: str, kilobytes: float
) -> None:
    assert len(get_codec(name).encode(hidden_like(128, 768))) <= 1000 * kilobytes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(8, 384), (32, 384), (128, 768), (512, 768)])
def test_the_expected_size_is_near_and_the_bound_not_far(name: str, shape: tuple[int, int]) -> None:
    codec = get_codec(name)
    size = len(codec.encode(hidden_like(*shape)))
    assert 0.9 < size / codec.expected_nbytes(*shape) < 1.06
    assert codec.nbytes(*shape) < 1.25 * size


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["even", "two values", "one large", "sparse"])
@pytest.mark.parametrize("shape", [(1, 16), (3, 100), (128, 768)])
def test_the_bound_holds_for_values_of_any_kind(
    name: str, kind: str, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(1)
    hidden = rng.uniform(-1, 1, shape).astype(np.float32)
    if kind == "two values":
        hidden = np.sign(hidden)
    elif kind == "one large":
        hidden[:, 0] = 1000
    elif kind == "sparse":
        hidden *= rng.random(shape) < 0.05
    codec = get_codec(name)
    data = codec.encode(hidden)
    assert len(data) <= codec.nbytes(*shape)
    # Never by a coarser step: that is only for data that nobody has seen.
    rms_N1 = np.sqrt(np.square(hidden).mean(axis=1, keepdims=True))
    limit = rms_N1 * get_stepped(name).relative / 2 * 1.01
    assert (np.abs(codec.decode(data, *shape) - hidden) <= limit).all()


def get_stepped(name: str) -> Stepped:
    codec = get_codec(name)
    assert isinstance(codec, Stepped)
    return codec


class Tight(Stepped):
    """Two bits a value, where four-bit steps need three."""

    def _most_coarse(self, size: int) -> int:
        return size // 4


def test_a_bound_that_does_not_hold_makes_the_steps_coarser() -> None:
    hidden, codec = hidden_like(64, 256), Tight("tight", relative=0.53, bits=2.0)
    data = codec.encode(hidden)
    assert len(data) <= codec.nbytes(64, 256) == 64 * 2 + 64 * 256 // 4
    # Twice or four times the step at most: a few large channels lie beside small ones.
    assert 0.2 < relative_error(codec.decode(data, 64, 256), hidden) < 0.6


def test_steps_so_coarse_that_no_bound_could_hold_are_our_own_bug() -> None:
    with pytest.raises(ValueError, match="at most a root mean square"):
        Stepped("coarse", relative=0.2, bits=2.0, planes=3)


# ---- cut short


def test_int8_z_is_progressive() -> None:
    assert all(isinstance(codec, Progressive) for codec in STEPPED)
    hidden = hidden_like(128, 768)
    codec = get_stepped("int8+z")
    data = codec.encode(hidden)
    cuts = codec.cuts(data, 128, 768)
    assert cuts[-1] == len(data)
    assert np.diff(cuts).tolist() == [128 * 768 // 8] * 3
    errors = [relative_error(codec.decode_prefix(data[:c], 128, 768), hidden) for c in cuts]
    # Each plane halves the step, and so the error.
    assert np.array(errors[:-1]) / errors[1:] == pytest.approx([2, 2, 2], rel=0.03)
    assert errors[0] < 0.11
    assert np.array_equal(codec.decode_prefix(data, 128, 768), codec.decode(data, 128, 768))


@pytest.mark.parametrize("name", NAMES)
@SETTINGS
@given(hidden_ND=arrays(FLOATS), cut=st.floats(0, 1))
def test_data_cut_anywhere_decode_to_the_last_cut_or_are_refused(
    name: str, hidden_ND: np.ndarray, cut: float
) -> None:
    codec, shape = get_stepped(name), hidden_ND.shape
    data = codec.encode(hidden_ND)
    at = int(cut * len(data))
    cuts = codec.cuts(data, *shape)
    if at < cuts[0]:
        with pytest.raises(WireError):
            codec.decode_prefix(data[:at], *shape)
        return
    last = max(c for c in cuts if c <= at)
    out = codec.decode_prefix(data[:at], *shape)
    assert np.array_equal(out, codec.decode_prefix(data[:last], *shape))
    assert codec.cuts(data[:at], *shape) == cuts, "the plan is known from the first part on"


def test_a_prefix_errs_by_at_most_half_its_coarser_step() -> None:
    hidden, codec = hidden_like(16, 96), get_stepped("int8+z")
    data = codec.encode(hidden)
    rms_N1 = np.sqrt(np.square(hidden).mean(axis=1, keepdims=True))
    for missing, cut in enumerate(reversed(codec.cuts(data, 16, 96))):
        error = np.abs(codec.decode_prefix(data[:cut], 16, 96) - hidden)
        # Half the cell, whose middle is half a fine step off: 2**missing - 1 fine steps wide.
        assert (error <= rms_N1 * 0.045 * 1.01 * 2**missing / 2).all()


def test_more_than_everything_is_no_prefix() -> None:
    codec = get_stepped("int8+z")
    data = codec.encode(hidden_like(3, 20))
    with pytest.raises(WireError, match="are all there is"):
        codec.decode_prefix(data + b"\0", 3, 20)


# ---- hostile bytes


def frame(values: bytes, **options: int) -> bytes:
    return zstd.compress(
        values, options={getattr(zstd.CompressionParameter, k): v for k, v in options.items()}
    )


def stepped_bytes(coded: bytes, n_tokens: int, step: int = 0x3F80) -> bytes:
    return np.full(n_tokens, step, "<u2").tobytes() + coded


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_and_every_extension_is_refused(name: str) -> None:
    codec, hidden = get_codec(name), hidden_like(3, 100)
    data = codec.encode(hidden)
    for wrong in (*(data[:size] for size in range(len(data))), data + b"\0", data + data):
        with pytest.raises(WireError):
            codec.decode(wrong, 3, 100)


VALUES = bytes(range(100)) * 3
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"


@pytest.mark.parametrize(
    ("coded", "reason"),
    [
        (frame(bytes(10**6)), "a zstd frame of 1000000 values, must be 300"),
        (frame(VALUES[1:]).ljust(40, b"\0"), "of 299 values"),
        (frame(VALUES + b"1").ljust(40, b"\0"), "of 301 values"),
        (frame(VALUES, content_size_flag=0), "of None values"),
        (frame(VALUES) + b"\0", "bytes of hidden states"),
        (frame(VALUES) + frame(VALUES), "bytes of hidden states"),
        (frame(VALUES) + SKIPPABLE, "bytes of hidden states"),
        (SKIPPABLE + frame(VALUES), "must be 300"),
        (frame(VALUES)[:-1], "ends early"),
        (frame(bytes(300)), "at least 37"),
        (frame(bytes(300)).ljust(36, b"\0"), "at least 37"),
        (frame(bytes(300)).ljust(37, b"\1"), "bytes between"),
        (frame(bytes(300)).ljust(38, b"\0"), "need"),
        (bytes(50), "not a zstd frame"),
        (frame(VALUES)[:4] + b"\xff" * 40, "not a zstd frame"),
        (frame(bytes([128]) * 300).ljust(37, b"\0"), "below -127"),
    ],
)
def test_frames_that_no_encoder_writes_are_refused(coded: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        get_codec("int4+z").decode(stepped_bytes(coded, 3), 3, 100)


def test_a_frame_that_wants_a_large_window_is_given_none() -> None:
    # Magic, then a header with a window of 2**27 bytes and a content size of 300; one raw block.
    header = (
        b"\x28\xb5\x2f\xfd"
        + bytes([0b0100_0000, (27 - 10) << 3])
        + (300 - 256).to_bytes(2, "little")
    )
    block = (300 << 3 | 1).to_bytes(3, "little") + VALUES
    # With the whole frame at hand zstd needs no window, and allocates none.
    assert decompress("int4+z", header + block, 300) == (VALUES, len(header + block))
    with pytest.raises(WireError, match="too much memory"):
        decompress("int4+z", header + block[:-1], 300)
    narrow = header[:5] + bytes([0]) + header[6:]
    with pytest.raises(WireError, match="ends early"):
        decompress("int4+z", narrow + block[:-1], 300)


@pytest.mark.parametrize("step", [0x8000, 0x7F80, 0x7FC0, 0xFF80, 0xFFFF])
def test_steps_that_are_negative_or_not_finite_are_refused(step: int) -> None:
    with pytest.raises(WireError, match="negative or not finite"):
        get_codec("int4+z").decode(stepped_bytes(frame(VALUES), 3, step), 3, 100)


def test_steps_that_would_make_values_overflow_are_refused() -> None:
    coded = compress(VALUES)
    with pytest.raises(WireError, match="values overflow"):
        get_codec("int4+z").decode(stepped_bytes(coded, 3, 0x7F7F), 3, 100)
    assert np.isfinite(get_codec("int4+z").decode(stepped_bytes(coded, 3, 0x7B00), 3, 100)).all()


@SETTINGS
@given(st.binary(max_size=400), st.integers(0, 4), st.integers(0, 40))
def test_noise_is_refused_or_decodes_to_finite_numbers(data: bytes, n: int, width: int) -> None:
    for name in (*NAMES, "int4"):
        for read in ("decode", "decode_prefix"):
            _read_safely(getattr(get_codec(name), read, None), data, n, width)


@SETTINGS
@given(arrays(FLOATS, 40), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4))
def test_changed_bytes_are_refused_or_decode_to_finite_numbers(
    hidden_ND: np.ndarray, changes: list[tuple[int, int]]
) -> None:
    for name in (*NAMES, "int4"):
        data = bytearray(get_codec(name).encode(hidden_ND))
        for at, byte in changes:
            if data:
                data[at % len(data)] = byte
        _read_safely(get_codec(name).decode, bytes(data), *hidden_ND.shape)


def _read_safely(decode: Any, data: bytes, n_tokens: int, width: int) -> None:
    if decode is None:
        return
    try:
        out = decode(data, n_tokens, width)
    except WireError:
        return
    assert out.shape == (n_tokens, width)
    assert np.isfinite(out).all()


# ---- zstd


@SETTINGS
@given(st.binary(max_size=3000))
def test_compressed_values_come_back_and_keep_to_the_bound(values: bytes) -> None:
    data = compress(values)
    assert least(len(values)) <= len(data) <= most(len(values))
    assert decompress("x", data + b"more", len(values)) == (values, len(data))


def test_few_bytes_buy_no_memory() -> None:
    """A frame of zeros would be a thousandth of what it decodes to: it is filled up."""
    values = bytes(100_000)
    data = compress(values)
    assert len(data) == 12_500
    assert decompress("x", data, len(values)) == (values, len(data))
