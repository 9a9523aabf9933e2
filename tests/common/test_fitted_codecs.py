"""Codecs with parameters: which tokens travel, what comes back, how many bytes it takes, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from fitted_codecs import random_codecs, random_narrow
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import METHODS, ToyLayers

from offramp_common.activations import Activations, NumpyArray, join, unpack
from offramp_common.codecs import CODECS, tokens_left
from offramp_common.codecs.fitted import Fitted, places
from offramp_common.codecs.kept import Keep
from offramp_common.codecs.measured import Measured, cost, merged
from offramp_common.codecs.narrow import Narrow
from offramp_common.codecs.pooled import Pool, stretches
from offramp_common.errors import UnknownCodec, WireError
from offramp_common.frames import Limits, decode_frame, encode_frame
from offramp_common.spec import CutSpec, StateField

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
WIDTH = 6
LENGTHS = st.lists(st.integers(1, 19), min_size=1, max_size=4)
KINDS = [codec.label for codec in random_codecs(WIDTH)]


def hidden(lengths: Sequence[int], seed: int = 0, width: int = WIDTH) -> NumpyArray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((sum(lengths), width)).astype(np.float32)


def codec_of(label: str, seed: int = 0) -> Fitted:
    (found,) = (codec for codec in random_codecs(WIDTH, seed=seed) if codec.label == label)
    return found


def reduced(codec: Fitted, hidden_ND: NumpyArray, lengths_B: NumpyArray) -> NumpyArray:
    """What the codec would give back if `inner` and the maps were exact."""
    if isinstance(codec.reduce, Keep):
        hidden_ND = hidden_ND[codec.reduce.chosen(hidden_ND, lengths_B)]
    elif codec.reduce is not None:
        hidden_ND = codec.reduce.pooled(hidden_ND, lengths_B)
    if codec.narrow is not None:
        hidden_ND = codec.narrow.up(codec.narrow.down(hidden_ND))
    return hidden_ND


# ---- golden bytes: a change here breaks every device in the field, so FRAME_VERSION must change

GOLDEN = np.array(
    [[1, 0], [-2, 4], [8, 8], [0, 1], [2, 2], [-16, 16], [4, 0], [0, 0], [1, 1], [3, -3]],
    np.float32,
)
_ONES = np.ones(2, np.float32)
_SUM = Narrow(np.zeros(2, np.float32), _ONES[:, None], _ONES[None], np.zeros(2, np.float32))
GOLDEN_BYTES = {
    # The bits of tokens 0, 2, 4 and 6 of 10; four scales of int8; eight values.
    "kept": (Keep(_ONES, most=4), None, "aa000402013c0402813d0402813c0402013d7f007f7f7f7f7f00"),
    # Ten scales, and the sums of ten tokens' channels.
    "narrow": (None, _SUM, "0402013c0402813c0402013e0402013c0402013d000000000402013d00000000"
               "0402813c000000007f7f7f7f7f007f007f00"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(GOLDEN_BYTES))
def test_fitted_codecs_write_the_golden_bytes(kind: str) -> None:
    reduce, narrow, expected = GOLDEN_BYTES[kind]
    assert Fitted(kind, 1, 2, CODECS["int8"], reduce, narrow).encode(GOLDEN).hex() == expected


def test_golden_means_of_stretches() -> None:
    pooled_MD = Pool(np.zeros(2, np.float32), most=4).pooled(GOLDEN, np.array([10]))
    expected = np.array([[1, 0], [2, 13 / 3], [-10 / 3, 6], [4 / 3, -2 / 3]])
    # Means in float32, over three tokens by shares that sum to 1: two roundings.
    np.testing.assert_allclose(pooled_MD, expected, rtol=3e-7)


# ---- sizes and round trips


@SETTINGS
@given(st.sampled_from(KINDS), LENGTHS, st.integers(0, 99))
def test_decoding_gives_back_what_is_left_within_the_inner_codecs_error(
    label: str, lengths: list[int], seed: int
) -> None:
    codec, lengths_B = codec_of(label, seed), np.array(lengths)
    hidden_ND = hidden(lengths, seed)
    data, kept_N = codec.encode_rows(hidden_ND, lengths_B)
    rows = codec.decode_rows(data, lengths_B)
    expected_MD = reduced(codec, hidden_ND, lengths_B)
    assert rows.lengths_B.tolist() == [codec.tokens_left(n) for n in lengths]
    assert rows.hidden_MD.dtype == np.float32
    error_M = np.linalg.norm(rows.hidden_MD - expected_MD, axis=1)
    # The maps are orthogonal, so the inner codec's error stays as long as it was; int4+z errs by half a
    # step of half a root mean square, int4 by an eighth of a group's largest.
    inner_M = np.linalg.norm(expected_MD - codec.narrow.mean_D, axis=1) if codec.narrow else None
    size_M = np.linalg.norm(expected_MD, axis=1) if inner_M is None else inner_M
    assert (error_M <= 0.35 * size_M + 1e-5).all()
    if label == "pruned-fp32":
        assert np.array_equal(rows.hidden_MD, expected_MD)
    assert (kept_N is None) == (not isinstance(codec.reduce, Keep))


@SETTINGS
@given(st.sampled_from(KINDS), st.integers(1, 40), st.integers(0, 99))
def test_the_size_of_a_sample_is_known_from_its_length(label: str, length: int, seed: int) -> None:
    codec = codec_of(label, seed)
    data = codec.encode(hidden([length], seed))
    most = codec.nbytes(length, WIDTH)
    assert len(data) == most if codec.fixed_size else len(data) <= most
    assert codec.expected_nbytes(length, WIDTH) <= most
    assert codec.decode(data, length, WIDTH).shape == (tokens_left(codec, length), WIDTH)


@SETTINGS
@given(LENGTHS, st.integers(0, 99))
def test_kept_tokens_are_the_best_ones_in_their_order_and_the_first(
    lengths: list[int], seed: int
) -> None:
    codec, lengths_B = codec_of("pruned-fp32", seed), np.array(lengths)
    hidden_ND = hidden(lengths, seed)
    rows = codec.decode_rows(codec.encode_rows(hidden_ND, lengths_B)[0], lengths_B)
    assert isinstance(codec.reduce, Keep)
    at = places(lengths_B) if rows.positions_M is None else rows.positions_M
    starts = np.split(np.arange(len(hidden_ND)), np.cumsum(lengths_B)[:-1])
    for row, kept in zip(starts, np.split(at, np.cumsum(rows.lengths_B)[:-1]), strict=True):
        score_T = hidden_ND[row] @ codec.reduce.weight_D
        assert kept[0] == 0
        assert (np.diff(kept) > 0).all()
        out = np.setdiff1d(np.arange(len(row)), kept)
        assert not out.size or score_T[kept[1:]].min(initial=np.inf) >= score_T[out].max()


def test_a_sample_no_longer_than_the_slots_is_not_pooled() -> None:
    pool = Pool(np.ones(WIDTH, np.float32), most=4)
    hidden_ND = hidden([4, 2])
    assert np.array_equal(pool.pooled(hidden_ND, np.array([4, 2])), hidden_ND)
    assert pool.positions(np.array([4, 2])).tolist() == [0, 1, 2, 3, 0, 1]


@SETTINGS
@given(st.integers(1, 300), st.integers(2, 20))
def test_stretches_are_even_and_begin_behind_the_first_token(length: int, most: int) -> None:
    starts = stretches(length, most)
    sizes = np.diff(starts, append=length)
    assert len(starts) == min(length, most)
    assert starts[0] == 0
    assert sizes[0] == 1
    assert sizes.sum() == length
    assert sizes.min() >= 1
    assert len(sizes) == 1 or np.ptp(sizes[1:]) <= 1


def test_a_score_can_make_a_mean_all_but_one_token() -> None:
    hidden_ND = hidden([9])
    hidden_ND[:, 0] = 0
    hidden_ND[[2, 4, 7], 0] = 1
    weight_D = np.zeros(WIDTH, np.float32)
    weight_D[0] = 100
    pooled_MD = Pool(weight_D, most=4).pooled(hidden_ND, np.array([9]))
    np.testing.assert_allclose(pooled_MD[1:], hidden_ND[[2, 4, 7]], rtol=1e-6)


def test_what_is_not_a_number_does_no_harm() -> None:
    hidden_ND = hidden([12])
    hidden_ND[3], hidden_ND[4], hidden_ND[5] = np.nan, np.inf, -np.inf
    for label in KINDS:
        codec = codec_of(label)
        assert codec.decode(codec.encode(hidden_ND), 12, WIDTH).shape[1] == WIDTH


# ---- names


def test_other_parameters_are_another_name_and_the_same_ones_the_same() -> None:
    for label in KINDS:
        codec = codec_of(label)
        assert codec.name.startswith(f"{label}@1.")
        assert codec_of(label).name == codec.name
        assert codec_of(label, seed=1).name != codec.name
        assert replace(codec, depth=2).name != codec.name
        assert len(codec.name.encode()) <= 64


@pytest.mark.parametrize("label", KINDS)
def test_settings_and_tensors_make_the_same_codec_again(label: str) -> None:
    codec = codec_of(label)
    again = Fitted.from_json(codec.to_json(), codec.inner, codec.tensors())
    assert again.name == codec.name
    assert again.encode(hidden([17])) == codec.encode(hidden([17]))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Keep(_ONES, most=3, least=4), "least <= most"),
        (lambda: Keep(_ONES, most=3, share=0.0), "share"),
        (lambda: Pool(_ONES, most=1), "at least 2"),
        (lambda: Fitted("x", 1, 3, CODECS["int8"], Pool(_ONES, 2)), r"widths \[2, 3\]"),
        (lambda: Fitted("x", 1, 2, CODECS["tokens"]), "cannot carry"),
        (lambda: Fitted("x", 1, 2, CODECS["int8"], Pool(_ONES * np.inf, 2)), "not finite"),
        (lambda: Narrow(_ONES, _ONES[:, None], _ONES[:, None], _ONES), "do not fit"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=says):
        make()


# ---- frames


def acts_of(lengths: Sequence[int], cut: CutSpec, seed: int = 0) -> Activations[NumpyArray]:
    lengths_B, rng = np.array(lengths), np.random.default_rng(seed)
    state, token_state = {}, {}
    for name, entry in cut.state.items():
        rows = sum(lengths) if entry.per_token else len(lengths)
        values = rng.integers(0, 2, (rows, *entry.shape)).astype(entry.dtype)
        if entry.per_token:
            token_state[name] = unpack(values, lengths_B)
        else:
            state[name] = values
    hidden_BTD = unpack(hidden(lengths, seed, cut.width), lengths_B)
    return Activations(hidden_BTD, lengths_B, cut.depth, state, token_state)


def sent(acts: Activations[NumpyArray], cut: CutSpec, codec: Fitted) -> Activations[NumpyArray]:
    fitted = {codec.name: codec}
    frame = encode_frame(acts, cut, codec.name, fitted)
    return decode_frame(frame, {cut.depth: cut}, Limits(), fitted)


@SETTINGS
@given(st.sampled_from(KINDS), LENGTHS, st.sampled_from(sorted(METHODS)), st.integers(0, 9))
def test_a_frame_of_several_rows_decodes_to_what_its_rows_decode_to_alone(
    label: str, lengths: list[int], method: str, seed: int
) -> None:
    toy = ToyLayers(METHODS[method]).cuts[3]
    cut = CutSpec(1, False, WIDTH, toy.state)
    codec, acts = codec_of(label, seed), acts_of(lengths, cut, seed)
    if any(entry.per_token for entry in cut.state.values()) and not codec.carries_tokens:
        with pytest.raises(ValueError, match="cannot carry"):
            sent(acts, cut, codec)
        return
    if codec.inner.fixed_size:  # else a frame's values share a table
        alone = [sent(acts.take(np.array([row])), cut, codec) for row in range(len(lengths))]
        together, joined = sent(acts, cut, codec), join(alone)
        assert together.lengths_B.tolist() == joined.lengths_B.tolist()
        # Products of rows of another number are summed in another order.
        np.testing.assert_allclose(together.hidden_BTD, joined.hidden_BTD, atol=0.1)
        for name, value in together.token_state.items():
            assert np.array_equal(value, joined.token_state[name])
        for name, value in together.state.items():
            assert np.array_equal(value, acts.state[name])


def test_state_for_each_token_crosses_for_the_tokens_that_are_kept() -> None:
    cut = CutSpec(1, False, WIDTH, {"index": StateField("int32", per_token=True)})
    lengths_B = np.array([12, 3])
    index_BT = unpack(np.arange(15, dtype=np.int32), lengths_B)
    hidden_BTD = unpack(hidden([12, 3]), lengths_B)
    acts = Activations(hidden_BTD, lengths_B, 1, {}, {"index": index_BT})
    got = sent(acts, cut, codec_of("pruned-fp32"))
    assert got.positions_BT is not None
    for row, first in enumerate((0, 12)):
        left = int(got.lengths_B[row])
        at = got.positions_BT[row, :left]
        assert np.array_equal(got.token_state["index"][row, :left], first + at)
        assert np.array_equal(got.hidden_BTD[row, :left], hidden_BTD[row, at])


def test_no_places_travel_where_every_token_does() -> None:
    cut = CutSpec(1, False, WIDTH)
    assert sent(acts_of([2, 1], cut), cut, codec_of("pruned-int4")).positions_BT is None
    assert sent(acts_of([2, 1], cut), cut, codec_of("bottleneck")).positions_BT is None


def test_what_has_lost_tokens_joins_what_has_not_and_is_not_sent_again() -> None:
    cut = CutSpec(1, False, WIDTH)
    codec = codec_of("pooled-int8")
    short, long = sent(acts_of([3], cut), cut, codec), sent(acts_of([9], cut), cut, codec)
    both = join([short, long])
    assert both.positions_BT is not None
    assert both.positions_BT.tolist() == [[0, 1, 2, 0], [0, 1, 4, 7]]
    assert both.take(np.array([0])).positions_BT.tolist() == [[0, 1, 2]]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="send them whole"):
        sent(long, cut, codec)


def test_a_codec_of_another_depth_or_unknown_parameters_is_refused() -> None:
    cut, codec = CutSpec(1, False, WIDTH), codec_of("bottleneck")
    other = replace(codec, depth=2)
    acts = acts_of([9], cut)
    with pytest.raises(ValueError, match="cannot carry"):
        encode_frame(acts, cut, other.name, {other.name: other})
    frame = encode_frame(acts, cut, codec.name, {codec.name: codec})
    with pytest.raises(UnknownCodec, match="bottleneck@1"):
        decode_frame(frame, {1: cut}, Limits())
    with pytest.raises(WireError, match="not fitted for this cut"):
        decode_frame(frame, {1: CutSpec(1, False, 4)}, Limits(), {codec.name: codec})


# ---- strangers' bytes


@pytest.mark.parametrize("label", KINDS)
def test_bytes_cut_short_or_too_long_are_refused(label: str) -> None:
    codec, lengths_B = codec_of(label), np.array([11, 3])
    data, _ = codec.encode_rows(hidden([11, 3]), lengths_B)
    for wrong in [*(data[:size] for size in range(len(data))), data + b"\0"]:
        with pytest.raises(WireError):
            codec.decode_rows(wrong, lengths_B)


@pytest.mark.parametrize(
    ("bits", "why"),
    [("f8ff", "too many"), ("7e20", "the first left out"), ("f000", "too few"), ("f808", "beyond")],
)
def test_bits_that_no_encoder_writes_are_refused(bits: str, why: str) -> None:
    codec = codec_of("pruned-fp32")  # 5 of 11 tokens
    data = codec.encode(hidden([11]))
    assert codec.decode(bytes.fromhex("f800") + data[2:], 11, WIDTH).shape == (5, WIDTH)
    with pytest.raises(WireError, match="5 of them are kept"):
        codec.decode(bytes.fromhex(bits) + data[2:], 11, WIDTH)


def test_values_that_overflow_on_the_way_up_are_refused() -> None:
    narrow = random_narrow(WIDTH, 3)
    big = replace(narrow, up_RD=narrow.up_RD * np.float32(1e3))
    codec = Fitted("narrow", 1, WIDTH, CODECS["int8"], None, big)
    scale = np.float32(2e36).tobytes()
    with pytest.raises(WireError, match="overflow"):
        codec.decode(scale + b"\x7f\x7f\x7f", 1, WIDTH)


@SETTINGS
@given(st.sampled_from(KINDS), LENGTHS, st.binary(max_size=200))
def test_any_bytes_decode_to_finite_values_or_are_refused(
    label: str, lengths: list[int], data: bytes
) -> None:
    codec = codec_of(label)
    try:
        rows = codec.decode_rows(data, np.array(lengths))
    except WireError:
        return
    assert np.isfinite(rows.hidden_MD).all() or codec.inner.lossless


# ---- costs


def test_the_cost_of_a_codec_is_the_most_that_was_measured_and_newer_numbers_replace_older() -> (
    None
):
    old = [Measured("int4", 2, "a.tsv", 100, 0.5, 0.99, 400.0, 10.0)]
    new = [replace(old[0], points=0.25), replace(old[0], data="b.tsv", points=-0.5)]
    table = merged(old, new)
    assert [one.points for one in table] == [0.25, -0.5]
    assert cost(table, "int4", 2) == 0.25
    assert cost(table, "int4", 1) is None
    assert Measured.from_json(table[0].to_json()) == table[0]
