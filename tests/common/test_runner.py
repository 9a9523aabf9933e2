"""The project's first law: cut anywhere, same answer, same exit depth; and the loop's edge cases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import (
    METHODS,
    NEVER,
    VOCABULARY,
    Outcome,
    Patience,
    Threshold,
    ToyLayers,
    inputs,
    outcomes,
    run_with_cuts,
)

from offramp_common.activations import Activations, join
from offramp_common.frames import Limits, decode_frame, encode_frame
from offramp_common.runner import Knobs, Look, Step, run
from offramp_common.spec import KnobSpec, never_exit

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
ALL_METHODS = pytest.mark.parametrize("name", list(METHODS))
BATCHES = st.lists(
    st.lists(st.integers(0, VOCABULARY[0] - 1), min_size=1, max_size=7), min_size=1, max_size=6
)
KNOBS = st.sampled_from([0.0, 0.06, 0.125, 0.25, 0.5, NEVER])
EXITS = st.sampled_from([(6,), (1, 6), (2, 3, 5, 6), (1, 2, 3, 4, 5, 6)])


def a_batch(rows: int = 12, seed: int = 0) -> Activations[np.ndarray]:
    rng = np.random.default_rng(seed)
    return inputs(
        [rng.integers(0, VOCABULARY[0], rng.integers(1, 9)).tolist() for _ in range(rows)]
    )


def whole(layers: ToyLayers, acts: Activations[np.ndarray], knobs: Knobs) -> dict[int, Outcome]:
    result = run(layers, acts, layers.n_layers, knobs)
    assert result.rest is None
    return outcomes(result.left, np.arange(acts.batch_size))


# ---- the first law


@ALL_METHODS
@SETTINGS
@given(BATCHES, KNOBS, EXITS)
def test_a_cut_anywhere_changes_no_bit_of_any_answer(
    name: str, rows: Sequence[Sequence[int]], knob: float, exits: tuple[int, ...]
) -> None:
    layers = ToyLayers(METHODS[name], exits=exits)
    acts, knobs = inputs(rows), layers.knobs(knob)
    expected = whole(layers, acts, knobs)
    assert sorted(expected) == list(range(len(rows)))
    for k in range(layers.n_layers + 1):
        assert run_with_cuts(layers, acts, knobs, [k]) == expected, f"cut at {k}"


@ALL_METHODS
@SETTINGS
@given(BATCHES, KNOBS, st.sets(st.integers(0, 6)))
def test_any_number_of_cuts_changes_no_bit_of_any_answer(
    name: str, rows: Sequence[Sequence[int]], knob: float, cuts: set[int]
) -> None:
    layers = ToyLayers(METHODS[name])
    acts, knobs = inputs(rows), layers.knobs(knob)
    assert run_with_cuts(layers, acts, knobs, sorted(cuts)) == whole(layers, acts, knobs)


@ALL_METHODS
@SETTINGS
@given(BATCHES, KNOBS, st.integers(0, 5))
def test_rows_sent_one_by_one_and_joined_again_give_the_same_answers(
    name: str, rows: Sequence[Sequence[int]], knob: float, k: int
) -> None:
    layers = ToyLayers(METHODS[name])
    acts, knobs = inputs(rows), layers.knobs(knob)
    first = run(layers, acts, k, knobs)
    found = outcomes(first.left, np.arange(len(rows)))
    if first.rest is not None:
        order = np.arange(first.rest.batch_size)[::-1]
        parts = [first.rest.take(np.array([i])) for i in order]
        frames = [encode_frame(part, layers.cuts[k], "fp32") for part in parts]
        joined = join([decode_frame(frame, layers.cuts, Limits()) for frame in frames])
        second = run(layers, joined, layers.n_layers, knobs)
        found |= outcomes(second.left, first.rest_rows[order])
    assert found == whole(layers, acts, knobs)


@ALL_METHODS
@SETTINGS
@given(BATCHES, KNOBS)
def test_a_row_alone_leaves_as_it_does_in_a_batch(
    name: str, rows: Sequence[Sequence[int]], knob: float
) -> None:
    layers = ToyLayers(METHODS[name])
    together = whole(layers, inputs(rows), layers.knobs(knob))
    for i, row in enumerate(rows):
        assert whole(layers, inputs([row]), layers.knobs(knob)) == {0: together[i]}


@ALL_METHODS
def test_the_toys_put_the_law_to_the_test(name: str) -> None:
    """Rows leave at every exit that the method can use, and the state matters where there is one."""
    layers = ToyLayers(METHODS[name])
    depths = {o.depth for o in whole(layers, a_batch(200), layers.knobs(0.25)).values()}
    first = 3 if name == "patience" else 2
    assert depths == {d for d in layers.exits if d >= first}


@pytest.mark.parametrize("name", ["patience", "history", "halting tokens"])
def test_a_state_that_is_lost_at_the_cut_changes_answers(name: str) -> None:
    """Otherwise the tests above would prove nothing."""
    layers = ToyLayers(METHODS[name])
    acts, knobs = a_batch(60), layers.knobs(0.25)
    first = run(layers, acts, 3, knobs)
    assert first.rest is not None
    forgetful = replace(first.rest, state={}, token_state={})
    if name == "halting tokens":
        lost = {n: np.zeros_like(v) for n, v in first.rest.token_state.items()}
        forgetful = replace(first.rest, token_state=lost)
    second = run(layers, forgetful, layers.n_layers, knobs)
    found = outcomes(first.left, np.arange(60)) | outcomes(second.left, first.rest_rows)
    assert found != whole(layers, acts, knobs)


@pytest.mark.parametrize("codec", ["fp16", "int8"])
@ALL_METHODS
def test_every_row_is_answered_once_whatever_the_codec(name: str, codec: str) -> None:
    layers = ToyLayers(METHODS[name])
    acts = a_batch(30)
    for k in range(layers.n_layers + 1):
        found = run_with_cuts(layers, acts, layers.knobs(), [k], codec)
        assert sorted(found) == list(range(30))


# ---- no exit, all exit, one row, none


@ALL_METHODS
def test_with_the_knob_at_never_all_rows_run_to_full_depth(name: str) -> None:
    layers = ToyLayers(METHODS[name])
    acts = a_batch()
    for k in range(layers.n_layers + 1):
        found = run_with_cuts(layers, acts, layers.knobs(NEVER), [k])
        assert {outcome.depth for outcome in found.values()} == {6}


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"patience"}))
def test_all_rows_leave_at_the_first_exit_and_nothing_is_left_to_send(name: str) -> None:
    layers = ToyLayers(METHODS[name])
    result = run(layers, a_batch(), 4, layers.knobs(0.0))
    assert [leaving.depth for leaving in result.left] == [2]
    assert result.rest is None
    assert result.provisional is None
    assert result.rest_rows.size == 0
    assert result.left[0].rows.tolist() == list(range(12))


@ALL_METHODS
def test_a_batch_of_one_is_a_batch(name: str) -> None:
    layers = ToyLayers(METHODS[name])
    result = run(layers, a_batch(1), 6, layers.knobs())
    assert [leaving.rows.tolist() for leaving in result.left] == [[0]]


def test_an_empty_batch_runs_to_nothing() -> None:
    layers = ToyLayers()
    none = a_batch().take(np.array([], dtype=np.int64))
    result = run(layers, none, 6, layers.knobs())
    assert (result.left, result.rest, result.provisional) == ((), None, None)


@pytest.mark.parametrize("exits", [(6,), (4, 6)])
def test_before_the_first_exit_no_row_leaves_and_there_is_no_provisional_answer(
    exits: tuple[int, ...],
) -> None:
    layers = ToyLayers(exits=exits)
    result = run(layers, a_batch(), 3, layers.knobs(0.0))
    assert result.left == ()
    assert result.provisional is None
    assert result.rest is not None
    assert (result.rest.depth, result.rest.batch_size) == (3, 12)
    assert result.rest_rows.tolist() == list(range(12))


# ---- what is left, and the provisional answer


@ALL_METHODS
def test_the_provisional_answer_is_that_of_the_deepest_look(name: str) -> None:
    layers = ToyLayers(METHODS[name])
    acts, knobs = a_batch(40), layers.knobs(0.25)
    for stop in range(2, 6):
        result = run(layers, acts, stop, knobs)
        deepest = max(depth for depth in layers.exits if depth <= stop)
        assert result.rest is not None
        assert result.provisional is not None
        assert result.provisional.depth == deepest
        assert result.provisional.rows.tolist() == result.rest_rows.tolist()
        # The same rows, never allowed to leave before, are told the same there.
        free = layers.knobs(NEVER)
        free = {"threshold": (*free["threshold"][: deepest - 1], 0.0, *free["threshold"][deepest:])}
        if name not in ("patience", "history", "halting tokens"):
            looked = outcomes(run(layers, acts, deepest, free).left, np.arange(40))
            provisional = outcomes([result.provisional], np.arange(40))
            assert provisional == {row: looked[row] for row in provisional}


@ALL_METHODS
def test_rows_leave_shallowest_first_each_once_and_the_rest_are_the_others(name: str) -> None:
    layers = ToyLayers(METHODS[name])
    result = run(layers, a_batch(40), 5, layers.knobs(0.25))
    depths = [leaving.depth for leaving in result.left]
    assert depths == sorted(set(depths))
    rows = np.concatenate([*(leaving.rows for leaving in result.left), result.rest_rows])
    assert sorted(rows.tolist()) == list(range(40))
    for leaving in result.left:
        assert leaving.answer.shape == (leaving.rows.size, 3)
        assert leaving.confidence_B.shape == leaving.rows.shape


def test_run_changes_neither_the_batch_nor_its_state() -> None:
    layers = ToyLayers(Patience())
    acts = run(layers, a_batch(), 3, layers.knobs()).rest
    assert acts is not None
    for array in (acts.hidden_BTD, acts.lengths_B, *acts.state.values()):
        array.flags.writeable = False
    first = run(layers, acts, 6, layers.knobs())
    second = run(layers, acts, 6, layers.knobs())
    rows = np.arange(acts.batch_size)
    assert outcomes(first.left, rows) == outcomes(second.left, rows)


@pytest.mark.parametrize("stop", [1, 7])
def test_a_range_that_does_not_exist_is_refused(stop: int) -> None:
    layers = ToyLayers()
    acts = run(layers, a_batch(), 2, layers.knobs(NEVER)).rest
    assert acts is not None
    with pytest.raises(ValueError, match=f"from depth 2 to {stop} of 6"):
        run(layers, acts, stop, layers.knobs())


def test_running_no_layer_is_not_a_special_case() -> None:
    layers, acts = ToyLayers(), a_batch()
    result = run(layers, acts, 0, layers.knobs())
    assert result.rest is acts
    assert result.rest_rows.tolist() == list(range(12))


# ---- NaN


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"cascade"}))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_with_a_nan_run_to_full_depth_and_leave_the_others_alone(
    name: str, value: float
) -> None:
    layers = ToyLayers(METHODS[name])
    clean = run(layers, a_batch(), 1, layers.knobs()).rest
    assert clean is not None
    hidden_BTD = clean.hidden_BTD.copy()
    hidden_BTD[[3, 8], 0] = value
    expected = whole(layers, clean, layers.knobs())
    for k in range(1, 7):
        found = run_with_cuts(layers, replace(clean, hidden_BTD=hidden_BTD), layers.knobs(), [k])
        assert {row for row in found if found[row] != expected[row]} <= {3, 8}
        assert found[3].depth == found[8].depth == 6
        assert np.isnan(np.frombuffer(found[3].answer, np.float32)).any()


# ---- layers that break the contract


class _Broken(ToyLayers):
    def step(self, acts: Activations[np.ndarray], knobs: Knobs) -> Step[np.ndarray]:
        step = super().step(acts, knobs)
        if self.seed == 1:
            return replace(step, acts=replace(step.acts, depth=acts.depth))
        if self.seed == 2:
            return replace(step, acts=step.acts.take(np.arange(3)))
        return replace(step, look=None)


@pytest.mark.parametrize(
    ("seed", "message"), [(1, "from 0 to 0"), (2, "3 rows of 12"), (3, "no exit head")]
)
def test_layers_that_stand_still_lose_rows_or_have_no_last_exit_are_a_bug(
    seed: int, message: str
) -> None:
    layers = _Broken(Threshold(), seed=seed)
    with pytest.raises(AssertionError, match=message):
        run(layers, a_batch(), 6, layers.knobs())


def test_never_exit_gives_each_knob_its_never_at_every_depth() -> None:
    knobs = (KnobSpec("a", 0, 1, 2.0, ""), KnobSpec("b", 0, 1, -1.0, ""))
    assert never_exit(knobs, 3) == {"a": (2.0,) * 3, "b": (-1.0,) * 3}


def test_the_knobs_of_each_depth_are_used_at_that_depth() -> None:
    layers = ToyLayers()
    for depth in layers.exits:
        values: list[Any] = [NEVER] * 6
        values[depth - 1] = 0.0
        found = whole(layers, a_batch(), {"threshold": tuple(values)})
        assert {outcome.depth for outcome in found.values()} == {depth}


def test_an_observer_is_told_of_every_look_with_the_rows_that_are_still_there() -> None:
    layers, acts = ToyLayers(), a_batch(200)
    seen: list[tuple[int, list[int]]] = []

    def observe(depth: int, rows: np.ndarray, look: Look[np.ndarray]) -> None:
        assert len(look.answer) == rows.size
        seen.append((depth, rows.tolist()))

    result = run(layers, acts, 6, layers.knobs(), observe)
    assert [depth for depth, _ in seen] == [2, 3, 5, 6]
    depth_of = {int(row): left.depth for left in result.left for row in left.rows}
    for depth, rows in seen:
        assert rows == [row for row in range(200) if depth_of[row] >= depth]
    assert outcomes(result.left, np.arange(200)) == whole(layers, acts, layers.knobs())


def test_every_pair_of_cuts_changes_no_bit() -> None:
    for method, (j, k) in itertools.product(METHODS.values(), itertools.combinations(range(7), 2)):
        layers = ToyLayers(method)
        acts = a_batch(8, seed=j * 7 + k)
        expected = whole(layers, acts, layers.knobs())
        assert run_with_cuts(layers, acts, layers.knobs(), [j, k]) == expected
