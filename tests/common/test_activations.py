"""Rows are taken, joined, packed and unpacked without a real token changing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp_common.activations import Activations, join, mask_of, pack, unpack

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
Batch = Activations[np.ndarray]


def batch(lengths: list[int], width: int = 3, seed: int = 0, depth: int = 2) -> Batch:
    """Random activations with a row state and a token state; padding is NaN (-7 in the bytes)."""
    rng = np.random.default_rng(seed)
    lengths_B = np.array(lengths, dtype=np.int64)
    mask_BT = mask_of(lengths_B)
    hidden_BTD = rng.standard_normal((*mask_BT.shape, width)).astype(np.float32)
    hidden_BTD[~mask_BT] = np.nan
    token = rng.integers(-5, 5, (*mask_BT.shape, 2)).astype(np.int16)
    token[~mask_BT] = -7
    row = rng.integers(0, 200, len(lengths)).astype(np.uint8)
    return Activations(hidden_BTD, lengths_B, depth, {"row": row}, {"token": token})


def row_of(acts: Batch, b: int) -> tuple[bytes, ...]:
    """All that row b holds, as bits: what must never change."""
    n = int(acts.lengths_B[b])
    entries = {**acts.state, **{name: value[:, :n] for name, value in acts.token_state.items()}}
    return (
        acts.hidden_BTD[b, :n].tobytes(),
        *(entries[name][b].tobytes() for name in sorted(entries)),
    )


def rows_of(acts: Batch) -> list[tuple[bytes, ...]]:
    return [row_of(acts, b) for b in range(acts.batch_size)]


@SETTINGS
@given(LENGTHS, st.data())
def test_take_gives_the_wanted_rows_in_the_wanted_order(lengths: list[int], data: Any) -> None:
    acts = batch(lengths)
    wanted = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    taken = acts.take(np.array(wanted, dtype=np.int64))
    assert rows_of(taken) == [row_of(acts, b) for b in wanted]
    assert taken.depth == acts.depth


@SETTINGS
@given(LENGTHS, st.data())
def test_take_pads_no_further_than_the_longest_row_taken(lengths: list[int], data: Any) -> None:
    wanted = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    taken = batch(lengths).take(np.array(wanted, dtype=np.int64))
    longest = max((lengths[b] for b in wanted), default=0)
    assert taken.hidden_BTD.shape == (len(wanted), longest, 3)
    assert taken.token_state["token"].shape == (len(wanted), longest, 2)
    assert taken.lengths_B.dtype == np.int64


def test_taking_no_row_leaves_an_empty_batch() -> None:
    none = batch([2, 3]).take(np.array([], dtype=np.int64))
    assert (none.batch_size, none.n_tokens) == (0, 0)
    assert none.state["row"].shape == (0,)


@SETTINGS
@given(LENGTHS, st.integers(0, 3), st.sampled_from(["f4", "f2", "u1", "?"]))
def test_unpack_is_the_inverse_of_pack(lengths: list[int], width: int, dtype: str) -> None:
    acts = batch(lengths, width)
    array = np.nan_to_num(acts.hidden_BTD).astype(dtype)
    packed = pack(array, acts.lengths_B)
    assert packed.shape == (sum(lengths), width)
    back = unpack(packed, acts.lengths_B)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    mask_BT = mask_of(acts.lengths_B)
    assert np.array_equal(back[mask_BT], array[mask_BT])
    assert not back[~mask_BT].any(), "padding is zeros"


@SETTINGS
@given(LENGTHS)
def test_pack_leaves_padding_out_and_keeps_the_order(lengths: list[int]) -> None:
    acts = batch(lengths)
    packed = pack(acts.hidden_BTD, acts.lengths_B)
    assert not np.isnan(packed).any()
    expected = b"".join(row_of(acts, b)[0] for b in range(len(lengths)))
    assert packed.tobytes() == expected


@SETTINGS
@given(LENGTHS)
def test_pack_reads_wider_padding_than_it_needs(lengths: list[int]) -> None:
    acts = batch(lengths)
    wider = np.pad(acts.hidden_BTD, ((0, 0), (0, 2), (0, 0)), constant_values=np.nan)
    assert np.array_equal(pack(wider, acts.lengths_B), pack(acts.hidden_BTD, acts.lengths_B))


@SETTINGS
@given(st.lists(LENGTHS, min_size=1, max_size=4))
def test_join_keeps_every_row(parts: list[list[int]]) -> None:
    batches = [batch(lengths, seed=i) for i, lengths in enumerate(parts)]
    joined = join(batches)
    assert rows_of(joined) == [row for part in batches for row in rows_of(part)]
    assert joined.hidden_BTD.shape[1] == max(max(lengths) for lengths in parts)
    assert joined.depth == 2
    assert joined.hidden_BTD.dtype == np.float32


@SETTINGS
@given(LENGTHS, st.data())
def test_joining_what_was_taken_apart_gives_the_batch_back(lengths: list[int], data: Any) -> None:
    acts = batch(lengths)
    at = data.draw(st.integers(0, len(lengths)))
    rows = np.arange(len(lengths))
    assert rows_of(join([acts.take(rows[:at]), acts.take(rows[at:])])) == rows_of(acts)


def test_one_part_is_joined_without_a_copy() -> None:
    acts = batch([1, 2])
    assert join([acts]) is acts


def test_parts_of_different_depth_are_not_joined() -> None:
    with pytest.raises(ValueError, match=r"depths \[2, 3\]"):
        join([batch([1]), batch([1], depth=3)])


@pytest.mark.parametrize("field", ["state", "token_state"])
def test_state_that_only_some_parts_carry_is_never_lost(field: str) -> None:
    acts = batch([2])
    changes: dict[str, Any] = {field: {}}
    without = replace(acts, **changes)
    for parts in ([acts, without], [without, acts]):
        with pytest.raises(ValueError, match="must not be lost"):
            join(parts)


def test_the_mask_is_true_for_real_tokens_only() -> None:
    lengths_B = np.array([1, 3])
    assert mask_of(lengths_B).tolist() == [[True, False, False], [True, True, True]]
    assert mask_of(lengths_B, 4)[1].tolist() == [True, True, True, False]
    assert mask_of(np.array([], dtype=np.int64)).shape == (0, 0)


def test_packing_reads_only_what_it_may_not_write() -> None:
    acts = batch([2, 1])
    hidden = acts.hidden_BTD
    hidden.flags.writeable = False
    packed = pack(hidden, acts.lengths_B)
    packed.flags.writeable = False
    assert np.array_equal(unpack(packed, acts.lengths_B)[0], hidden[0])
    assert rows_of(acts.take(np.array([1]))) == [row_of(acts, 1)]
