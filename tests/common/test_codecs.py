"""Each codec: its bytes, its stated error, its exact size, and what it does with strange values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from offramp_common.codecs import CODECS, get_codec
from offramp_common.codecs.tokens import largest_ids
from offramp_common.errors import UnknownCodec, WireError

SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)
FLOAT_CODECS = sorted(name for name, codec in CODECS.items() if not codec.integer)
FIXED_SIZE = sorted(name for name, codec in CODECS.items() if codec.fixed_size)
F32 = np.finfo(np.float32)
SHAPES = st.tuples(st.integers(0, 6), st.integers(0, 9))


def floats(**options: bool) -> st.SearchStrategy[np.ndarray]:
    """Float32 of any finite value, denormals and the largest included, unless told otherwise."""
    options = {"allow_nan": False, "allow_infinity": False, **options}
    return SHAPES.flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(width=32, **options))
    )


IDS = st.tuples(st.integers(0, 6), st.integers(1, 3)).flatmap(
    lambda shape: hnp.arrays(np.int64, shape, elements=st.integers(0, 255))
)


def round_trip(name: str, hidden_ND: np.ndarray) -> np.ndarray:
    codec = get_codec(name)
    data = codec.encode(hidden_ND)
    assert type(data) is bytes
    most = codec.nbytes(*hidden_ND.shape)
    assert len(data) == most if codec.fixed_size else len(data) <= most, "nbytes is honest"
    assert codec.expected_nbytes(*hidden_ND.shape) <= most
    out = codec.decode(data, *hidden_ND.shape)
    assert out.shape == hidden_ND.shape
    assert out.dtype == (np.int64 if codec.integer else np.float32)
    return out


# ---- golden bytes: a change here breaks every device in the field, so FRAME_VERSION must change

GOLDEN = np.array([[0.875, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-3, 127.0, -126.6]], dtype=np.float32)
GOLDEN_BYTES = {
    "fp32": "0000603f000000c00000003f0000000000000000000000006f12833a0000fe423333fdc2",
    "fp16": "003b00c000380000000000001914f057ead7",
    "int8": "0402813c000000000000803f388120000000007f81",
    "bf16": "603f00c0003f000000000000833afe42fdc2",
    "int4": "88838138000000008180803bff00ff0c7a7777f770",
    "int8+z": "6f3d0000964028b52ffd200949000002fc010000000003fd3f00c100a180",
    "int4+z": "303f00005c4228b52ffd200949000001fd010000000002fe",
}


@pytest.mark.parametrize("name", FLOAT_CODECS)
def test_floating_point_codecs_write_the_golden_bytes(name: str) -> None:
    assert get_codec(name).encode(GOLDEN).hex() == GOLDEN_BYTES[name]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([[101, 0], [65535, 1]], "026500ffff0001"),
        ([[101, 0], [65536, 255]], "04650000000000010000ff"),
        ([[7], [8]], "0207000800"),
    ],
)
def test_token_ids_write_the_golden_bytes(ids: list[list[int]], expected: str) -> None:
    assert get_codec("tokens").encode(np.array(ids)).hex() == expected


# ---- stated errors


@SETTINGS
@given(floats(allow_nan=True, allow_infinity=True))
def test_fp32_is_lossless_bit_for_bit(hidden_ND: np.ndarray) -> None:
    assert round_trip("fp32", hidden_ND).tobytes() == hidden_ND.tobytes()


@SETTINGS
@given(floats())
def test_fp16_errs_by_a_rounding_and_saturates(hidden_ND: np.ndarray) -> None:
    out = round_trip("fp16", hidden_ND).astype(np.float64)
    wanted = np.clip(hidden_ND.astype(np.float64), -65504, 65504)
    bound = np.maximum(np.abs(wanted) * 2.0**-11, 2.0**-25)
    assert (np.abs(out - wanted) <= bound).all()


@SETTINGS
@given(floats())
def test_bf16_errs_by_a_rounding_and_saturates(hidden_ND: np.ndarray) -> None:
    out = round_trip("bf16", hidden_ND).astype(np.float64)
    largest = 2.0**127 * (2 - 2.0**-7)
    wanted = np.clip(hidden_ND.astype(np.float64), -largest, largest)
    bound = np.maximum(np.abs(wanted) * 2.0**-8, 2.0**-134)
    assert (np.abs(out - wanted) <= bound).all()
    assert round_trip("bf16", round_trip("bf16", hidden_ND)).tobytes() == out.astype("f4").tobytes()


@SETTINGS
@given(floats())
def test_int8_errs_by_at_most_half_a_step_and_rounding(hidden_ND: np.ndarray) -> None:
    out = round_trip("int8", hidden_ND).astype(np.float64)
    wanted = hidden_ND.astype(np.float64)
    peak_N1 = np.abs(wanted).max(axis=1, initial=0, keepdims=True)
    # Rounding: of the scale, of the quotient and of the product, 2**-24 each, on up to 127 steps.
    half_step = peak_N1 / 254 + 127 * 3 * 2.0**-24 * (peak_N1 / 127)
    # Below the smallest scale that is a normal number a token becomes zeros.
    tiny = 127 * float(F32.smallest_normal)
    assert (np.abs(out - wanted) <= np.where(peak_N1 <= tiny, tiny, half_step)).all()


def test_int8_reaches_its_stated_error_and_no_more_on_random_data() -> None:
    hidden = np.random.default_rng(0).standard_normal((64, 768)).astype(np.float32)
    error = np.abs(round_trip("int8", hidden) - hidden) / np.abs(hidden).max(axis=1, keepdims=True)
    assert 0.9 / 254 < error.max() <= 1.0001 / 254


@SETTINGS
@given(IDS)
def test_token_ids_are_lossless(ids_NC: np.ndarray) -> None:
    assert np.array_equal(round_trip("tokens", ids_NC), ids_NC)


@SETTINGS
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6))
def test_large_vocabularies_cost_two_bytes_a_token_more(ids: list[int]) -> None:
    ids_N1 = np.array(ids, dtype=np.int64)[:, None]
    codec = get_codec("tokens")
    data = codec.encode(ids_N1)
    assert len(data) == codec.nbytes(len(ids), 1) + (2 * len(ids) if max(ids) > 65535 else 0)
    assert np.array_equal(codec.decode(data, len(ids), 1), ids_N1)


@SETTINGS
@given(IDS)
def test_the_largest_ids_are_known_without_decoding(ids_NC: np.ndarray) -> None:
    data = get_codec("tokens").encode(ids_NC)
    assert largest_ids(data, *ids_NC.shape) == tuple(ids_NC.max(axis=0, initial=0).tolist())


# ---- shapes, buffers, memory


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (1, 1), (1, 384)])
@pytest.mark.parametrize("name", FLOAT_CODECS)
def test_empty_one_row_and_one_value_arrays_pass(name: str, shape: tuple[int, int]) -> None:
    # int4 by a rounding; the others by half a step: int4+z has two to the root mean square.
    error = {"int4": 1e-6, "int8+z": 0.024, "int4+z": 0.27}.get(name, 0)
    assert np.abs(round_trip(name, np.ones(shape, np.float32)) - 1).max(initial=0) <= error


@pytest.mark.parametrize("shape", [(0, 1), (0, 2), (1, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_token_ids_pass_in_any_shape_and_integer_type(shape: tuple[int, int], dtype: type) -> None:
    assert np.array_equal(round_trip("tokens", np.ones(shape, dtype)), np.ones(shape))


@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_decoded_arrays_are_writable_and_share_no_memory_with_the_bytes(
    name: str, n_tokens: int
) -> None:
    codec = get_codec(name)
    given = np.full((n_tokens, 4), 3, dtype=np.int64 if codec.integer else np.float32)
    given.flags.writeable = False
    data = codec.encode(given)
    hidden = codec.decode(data, n_tokens, 4)
    assert np.allclose(hidden, given, rtol=0.27)
    for buffer in (data, memoryview(data), memoryview(b"x" + data)[1:]):
        out = codec.decode(buffer, n_tokens, 4)
        assert np.array_equal(out, hidden)
        assert out.flags.writeable
        assert out.flags.c_contiguous
        assert not np.shares_memory(out, np.frombuffer(buffer, np.uint8))
        out[:] = 0
    assert np.array_equal(codec.decode(data, n_tokens, 4), hidden)


@pytest.mark.parametrize("name", FLOAT_CODECS)
def test_encoding_reads_strided_and_half_precision_input_and_changes_nothing(name: str) -> None:
    wide = np.random.default_rng(1).standard_normal((6, 10)).astype(np.float32)
    before = wide.copy()
    strided = wide[::2, 1::3]
    codec = get_codec(name)
    assert codec.encode(strided) == codec.encode(np.ascontiguousarray(strided))
    assert np.array_equal(wide, before)
    half = wide.astype(np.float16)
    assert codec.encode(half) == codec.encode(half.astype(np.float32))


# ---- saturated, denormal, NaN, infinite


def test_fp32_passes_nan_and_infinity() -> None:
    hidden = np.array([[np.nan, np.inf, -np.inf, -0.0]], dtype=np.float32)
    assert round_trip("fp32", hidden).tobytes() == hidden.tobytes()


def test_fp16_saturates_infinities_and_keeps_nan() -> None:
    hidden = np.array([[np.inf, -np.inf, 1e30, np.nan, 1e-8, 2.0**-24]], dtype=np.float32)
    expected = np.array([[65504, -65504, 65504, np.nan, 0, 2.0**-24]])
    assert np.array_equal(round_trip("fp16", hidden), expected, equal_nan=True)


def test_bf16_saturates_infinities_keeps_nan_and_rounds_ties_to_even() -> None:
    odd_nan = np.uint32(0x7F800001).view(np.float32)  # its lower half says that it is one
    hidden = np.array([[np.inf, -3.4e38, np.nan, odd_nan, 1 + 2.0**-8, 1 + 3 * 2.0**-8]], "f4")
    largest = 2.0**127 * (2 - 2.0**-7)
    expected = np.array([[largest, -largest, np.nan, np.nan, 1, 1 + 2.0**-6]])
    assert np.array_equal(round_trip("bf16", hidden), expected, equal_nan=True)


def test_int8_makes_nan_zero_and_infinity_the_largest_float() -> None:
    out = round_trip("int8", np.array([[np.nan, 1.0, -1.0], [np.inf, -np.inf, 1.0]], np.float32))
    assert out[0].tolist() == [0, 1, -1]
    assert np.isfinite(out).all()
    assert out[1] == pytest.approx([F32.max, -F32.max, 0], rel=1e-6)


def test_int8_survives_the_largest_float() -> None:
    out = round_trip("int8", np.array([[F32.max, -F32.max, F32.max / 2]], np.float32))
    assert np.isfinite(out).all()
    assert out[0, :2] == pytest.approx([F32.max, -F32.max], rel=1e-6)


def test_int8_makes_tokens_of_denormals_zeros_and_leaves_other_tokens_alone() -> None:
    tiny = F32.smallest_subnormal
    hidden = np.array([[189 * tiny, tiny], [0, 0], [1, 0.5], [2e-36, -1e-36]], np.float32)
    out = round_trip("int8", hidden)
    assert not out[:2].any()
    assert np.allclose(out[2:], hidden[2:], rtol=0.01, atol=0)


# ---- what decoders and encoders refuse


@pytest.mark.parametrize("name", FIXED_SIZE)
def test_every_other_size_is_refused_and_the_message_names_both(name: str) -> None:
    codec = get_codec(name)
    data = codec.encode(np.ones((3, 4), dtype=np.int64 if codec.integer else np.float32))
    for wrong in (*(data[:size] for size in range(1, len(data))), data + b"\0"):
        with pytest.raises(WireError, match=f"{len(wrong)} bytes.* need {len(data)}"):
            codec.decode(wrong, 3, 4)
    with pytest.raises(WireError):
        codec.decode(b"", 3, 4)


@pytest.mark.parametrize("scale", [-1.0, np.nan, np.inf, 2.6793887e36])
def test_int8_refuses_scales_that_would_not_decode_to_finite_numbers(scale: float) -> None:
    data = np.array([scale], "<f4").tobytes() + b"\x81"
    with pytest.raises(WireError, match=r"scale outside 0 to 2\.679"):
        get_codec("int8").decode(data, 1, 1)


def test_int8_refuses_the_value_that_no_encoder_writes() -> None:
    with pytest.raises(WireError, match="below -127"):
        get_codec("int8").decode(np.float32(1).tobytes() + b"\x80", 1, 1)


@pytest.mark.parametrize("size", [0, 1, 3, 8, 255])
def test_token_ids_refuse_a_wrong_id_size(size: int) -> None:
    with pytest.raises(WireError, match=f"ids of {size} bytes, must be 2 or 4"):
        get_codec("tokens").decode(bytes([size, 0, 0]), 1, 1)


@pytest.mark.parametrize(
    "ids",
    [[[-1, 0]], [[0, -1]], [[2**32, 0]], [[0, 256]], [[0.5, 0.5]]],
    ids=["negative", "negative segment", "too large", "too large segment", "floating point"],
)
def test_token_ids_that_do_not_fit_are_our_own_bug(ids: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="token ids"):
        get_codec("tokens").encode(np.array(ids))


def test_token_ids_without_a_channel_are_our_own_bug() -> None:
    with pytest.raises(ValueError, match="0 channels"):
        get_codec("tokens").encode(np.zeros((2, 0), np.int64))


@pytest.mark.parametrize("name", ["", "INT8", "zip", "x" * 500])
def test_an_unknown_codec_is_named_beside_those_there_are(name: str) -> None:
    with pytest.raises(
        UnknownCodec, match=r"use one of fp32, fp16, bf16, int8, int4, int8\+z, int4\+z"
    ) as caught:
        get_codec(name)
    assert len(str(caught.value)) < 200
