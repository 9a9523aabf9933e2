"""ELBERT against its paper and sheet, and against the sheet's windows written down literally."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from law import Outcome, cut_at, whole
from subjects import close, inputs
from toy_models import LABELS, toy_model, toy_tokenizer

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import Knobs, run
from offramp_common.spec import StateField, TaskSpec
from offramp_edge.runtime import OnnxLayers
from offramp_model.exits import Decision, State
from offramp_model.export import add_graphs
from offramp_model.methods.elbert import WindowPolicy
from offramp_model.methods.pabee import PatiencePolicy
from offramp_model.split_model import MultiExitModel, TorchLayers
from offramp_model.store import About, load_model, save_model

N = 6
BINARY = TaskSpec("classification", ("no", "yes"))
WINDOWS = ("same-side", "monotone", "flat")


@pytest.fixture(scope="module")
def batch() -> Activations[NumpyArray]:
    return inputs(64)


def toy(window: str = "same-side", size: int = 3, **more: Any) -> MultiExitModel:
    settings = {"window": window, "window_size": size, "flat_range": 0.2}
    return toy_model("elbert", n_layers=N, seed=1, settings=settings, **more)


def outcome(model: MultiExitModel, batch: Activations[NumpyArray], delta: float) -> Outcome:
    return whole(TorchLayers(model), batch, at(delta))


def at(delta: float) -> Knobs:
    return {"delta": (delta,) * N}


def policy(
    window: str, size: int, n: int, n_classes: int = 2, margin: float = 0.0, r: float = 0.1
) -> WindowPolicy:
    return WindowPolicy(n_classes, tuple(range(1, n + 1)), window, size, margin, r)


def steps(
    rule: WindowPolicy, looks: Sequence[Sequence[float]], delta: float = 0.0
) -> list[Decision]:
    """What is decided at each exit of a sample with these probabilities of its classes."""
    state: State = rule.start(torch.ones(1, 1, dtype=torch.bool))
    out = []
    for depth, p in enumerate(looks, start=1):
        logits_BC = torch.tensor([p], dtype=torch.float64).log().float()
        out.append(rule.decide({"logits": logits_BC}, state, {"delta": torch.tensor(delta)}, depth))
        state = out[-1].state
    return out


def leaves(rule: WindowPolicy, looks: Sequence[Sequence[float]], delta: float = 0.0) -> list[bool]:
    """Whether the sample may leave at each of the exits."""
    return [bool(decision.leave_B) for decision in steps(rule, looks, delta)]


def binary(xs: Sequence[float]) -> list[tuple[float, float]]:
    return [(x, 1 - x) for x in xs]


def steady(window: str, xs: Sequence[float], size: int, margin: float, r: float) -> list[bool]:
    """The sheet's W1, W2 and W3 at each exit, for two classes, x being the probability of the first."""
    out = []
    for i in range(1, len(xs) + 1):
        last = xs[i - size : i] if i >= size else []
        low = bool(last) and all(x < 0.5 - margin for x in last)
        high = bool(last) and all(x > 0.5 + margin for x in last)
        if window == "monotone" and last:
            low = last[0] < 0.5 - margin and all(b <= a for a, b in itertools.pairwise(last))
            high = last[0] > 0.5 + margin and all(b >= a for a, b in itertools.pairwise(last))
        flat = window != "flat" or (bool(last) and max(last) - min(last) <= r)
        out.append((low or high) and flat)
    return out


def steady_many(window: str, ps: Sequence[Sequence[float]], size: int, r: float) -> list[bool]:
    """The same for more classes, by the class that is on top."""
    out = []
    for i in range(1, len(ps) + 1):
        last = ps[i - size : i] if i >= size else []
        tops = [max(range(len(p)), key=p.__getitem__) for p in last]
        values = [max(p) for p in last]
        rising = all(b >= a for a, b in itertools.pairwise(values))
        fits = {"same-side": True, "monotone": rising}
        fits["flat"] = bool(last) and max(values) - min(values) <= r
        out.append(len(set(tops)) == 1 and fits[window])
    return out


# The windows


@pytest.mark.parametrize("margin", [0.0, 0.08])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", WINDOWS)
def test_with_two_classes_windows_are_the_sheets_word_for_word(
    window: str, size: int, margin: float
) -> None:
    rng, seen = random.Random(f"{window}{size}{margin}"), set()
    rule = policy(window, size, 7, margin=margin, r=0.2505)
    for _ in range(150):
        # Walks, so that windows come about; decimals that meet no limit exactly.
        x, xs = rng.random(), []
        for _ in range(7):
            x = min(max(x + rng.uniform(-0.25, 0.25), 0.02), 0.98)
            xs.append(round(x, 3) + 1e-4)
        expected = steady(window, xs, size, margin, 0.2505)
        assert leaves(rule, binary(xs)) == expected, xs
        seen.update(expected)
    assert seen == ({True} if size == 1 and not margin else {False, True})


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("window", WINDOWS)
def test_with_more_classes_it_is_the_one_on_top_that_is_followed(window: str, size: int) -> None:
    rng, seen = random.Random(f"{window}{size}"), set()
    rule = policy(window, size, 6, n_classes=4, r=0.1)
    for _ in range(150):
        logits, ps = [rng.gauss(0, 1) for _ in range(4)], []
        for _ in range(6):
            logits = [z + rng.gauss(0, 0.3) for z in logits]
            total = sum(map(math.exp, logits))
            ps.append([math.exp(z) / total for z in logits])
        expected = steady_many(window, ps, size, 0.1)
        assert leaves(rule, ps) == expected, ps
        seen.update(expected)
    assert seen == ({True} if size == 1 else {False, True})


def test_windows_worked_out_by_hand() -> None:
    xs = [0.6, 0.55, 0.7, 0.7, 0.4, 0.3, 0.35]
    assert leaves(policy("same-side", 3, 7), binary(xs)) == [False] * 2 + [True] * 2 + [
        False,
        False,
        True,
    ]
    # 0.55, 0.7, 0.7 rises (weakly); 0.4, 0.3 falls to its side, 0.35 comes back.
    assert leaves(policy("monotone", 3, 7), binary(xs)) == [False] * 3 + [True] + [False] * 3
    assert leaves(policy("flat", 3, 7, r=0.11), binary(xs)) == [False] * 6 + [True]


def test_a_value_that_stays_the_same_still_rises() -> None:
    assert leaves(policy("monotone", 3, 3), binary([0.7, 0.7, 0.7]))[-1]
    assert not leaves(policy("monotone", 3, 3), binary([0.7, 0.8, 0.79]))[-1]


def test_a_tie_is_on_no_side() -> None:
    for window in WINDOWS:
        assert leaves(policy(window, 2, 3), binary([0.5, 0.5, 0.5])) == [False] * 3
    assert leaves(policy("same-side", 2, 4), binary([0.7, 0.5, 0.7, 0.7]))[2:] == [False, True]


# The sheet's "How to test"


@torch.inference_mode()
def test_at_delta_zero_and_a_window_longer_than_the_model_the_full_model_answers(
    batch: Activations[NumpyArray],
) -> None:
    for window in WINDOWS:
        model = toy(window, size=N + 1)
        got = outcome(model, batch, 0.0)
        assert (got.depth_B == N).all()
        mask_BT = torch.from_numpy(mask_of(batch.lengths_B))
        full = model(torch.from_numpy(batch.hidden_BTD), mask_BT)[N]["logits"]
        np.testing.assert_array_equal(got.answers, full.numpy())


def test_above_delta_one_everyone_leaves_at_the_first_exit(batch: Activations[NumpyArray]) -> None:
    assert (outcome(toy(), batch, 1.01).depth_B == 1).all()


def test_a_window_of_one_lets_all_but_ties_leave_at_the_first_exit(
    batch: Activations[NumpyArray],
) -> None:
    assert (outcome(toy(size=1), batch, 0.0).depth_B == 1).all()
    assert leaves(policy("same-side", 1, 2), binary([0.5, 0.51])) == [False, True]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_with_two_classes_and_delta_zero_it_leaves_where_pabee_does(size: int) -> None:
    rule, patient = policy("same-side", size, 6), PatiencePolicy(6, regression=False)
    for sides in itertools.product((0.3, 0.8), repeat=6):
        state = patient.start(torch.ones(1, 1, dtype=torch.bool))
        expected = []
        for depth, (x, y) in enumerate(binary(sides), start=1):
            decision = patient.decide(
                {"logits": torch.tensor([[x, y]])},
                state,
                {"patience": torch.tensor(size - 1)},
                depth,
            )
            state = decision.state
            expected.append(bool(decision.leave_B))
        assert leaves(rule, binary(sides)) == expected, sides


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("size", [2, 3])
def test_who_leaves_by_monotone_or_flat_leaves_by_same_side(size: int, n_classes: int) -> None:
    generator = torch.Generator().manual_seed(size)
    fewer = 0
    for _ in range(80):
        looks = torch.randn(6, n_classes, generator=generator).cumsum(0).softmax(-1).tolist()
        wide = leaves(policy("same-side", size, 6, n_classes), looks)
        for window in ("monotone", "flat"):
            narrow = leaves(policy(window, size, 6, n_classes), looks)
            assert all(w for n, w in zip(narrow, wide, strict=True) if n)
            fewer += sum(wide) - sum(narrow)
    assert fewer > 50


# The two stages


@pytest.mark.parametrize("window", WINDOWS)
def test_never_switches_both_stages_off_and_delta_zero_only_the_first(
    window: str, batch: Activations[NumpyArray]
) -> None:
    model = toy(window, size=2)
    (knob,) = model.knobs
    assert (outcome(model, batch, knob.never).depth_B == N).all()
    windows_only = outcome(model, batch, 0.0).depth_B
    assert windows_only.min() == 2, "some leave by their window, and none before it is full"
    assert windows_only.max() == N


def test_entropy_is_divided_by_that_of_chance_and_compared_strictly() -> None:
    rule = policy("same-side", 9, 1, n_classes=4)
    chance, half = [[0.25] * 4], [[0.5, 0.5, 1e-30, 1e-30]]
    assert [leaves(rule, chance, delta) for delta in (0.999, 1.01)] == [[False], [True]]
    assert [leaves(rule, half, delta) for delta in (0.499, 0.501)] == [[False], [True]]
    assert leaves(rule, [[1.0, 1e-30, 1e-30, 1e-30]], 0.0) == [False], "0 is not below 0"


def test_each_row_keeps_its_own_window_and_entropy() -> None:
    rule = policy("same-side", 2, 3)
    knobs = {"delta": torch.tensor(0.3)}
    state: State = rule.start(torch.ones(3, 1, dtype=torch.bool))
    left = []
    # Rows: sure; on one side; from side to side. The mean entropy of the batch lets nobody leave.
    for depth, last in enumerate((0.6, 0.4, 0.6), start=1):
        p_BC = torch.tensor(binary([0.99, 0.7, last]))
        decision = rule.decide({"logits": p_BC.log()}, state, knobs, depth)
        state = decision.state
        left.append(decision.leave_B.tolist())
    assert left == [[True, False, False], [True, True, False], [True, True, False]]


# What is carried


@pytest.mark.parametrize("depth", range(1, N + 1))
def test_the_state_is_what_each_window_needs_and_no_more(depth: int) -> None:
    run_, side, value = StateField("uint8"), StateField("int16"), StateField("float32")
    fields = {w: toy(w, size=4).policy.state_fields(depth) for w in WINDOWS}
    assert fields["same-side"] == {"run": run_, "side": side}
    assert fields["monotone"] == {"run": run_, "side": side, "last": value}
    recent = StateField("float32", (min(depth, 3),))
    assert fields["flat"] == {"side": side, "recent": recent}
    assert recent.nbytes == 4 * min(depth, 3)
    for window in WINDOWS:
        assert toy(window, size=1).policy.state_fields(depth) == {}


@pytest.mark.parametrize("n_labels", [2, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_reach_across_the_split(
    window: str, size: int, n_labels: int, batch: Activations[NumpyArray]
) -> None:
    task = TaskSpec("classification", LABELS[:n_labels])
    model = toy(window, size, task=task)
    layers, cuts = TorchLayers(model), {depth: model.cut(depth) for depth in range(N)}
    for knobs in (at(0.0), at(0.25)):
        expected = whole(layers, batch, knobs)
        for k in range(N + 1):
            assert cut_at(k, layers, batch, knobs, cuts).same_as(expected), k
    if 1 < size < N - 1:
        assert len(set(outcome(model, batch, 0.0).depth_B.tolist())) > 1


@pytest.mark.parametrize("window", WINDOWS)
def test_exits_may_stand_after_some_layers_only(
    window: str, batch: Activations[NumpyArray]
) -> None:
    """It is exits that are counted: a window of two is full at the second."""
    model = toy(window, size=2, exits=[2, 4, N])
    got = set(outcome(model, batch, 0.0).depth_B.tolist())
    assert got <= {4, N}
    assert 4 in got
    if window == "flat":
        assert model.cut(3).state["recent"].shape == (1,)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_no_number_stays_and_its_window_starts_anew(window: str, bad: float) -> None:
    rule, sure = policy(window, 2, 5, r=1.0), [2.0, 0.0]
    state: State = rule.start(torch.ones(2, 1, dtype=torch.bool))
    left = []
    for depth, first in enumerate((sure, [bad, 0.0], [bad, 0.0], sure, sure), start=1):
        logits_BC = torch.tensor([first, sure])
        decision = rule.decide({"logits": logits_BC}, state, {"delta": torch.tensor(0.0)}, depth)
        state = decision.state
        assert all(torch.isfinite(value.float()).all() for value in state.values())
        assert torch.isfinite(decision.confidence_B).all()
        left.append(decision.leave_B.tolist())
    assert [first for first, _ in left] == [False, False, False, False, True]
    assert [second for _, second in left] == [False, True, True, True, True]
    assert not rule.decide(
        {"logits": torch.tensor([[bad, 0.0]] * 2)}, state, {"delta": torch.tensor(1.01)}, 5
    ).leave_B.any()


def test_the_run_does_not_wrap_around_in_its_byte() -> None:
    assert all(leaves(policy("same-side", 255, 300), binary([0.7] * 300))[254:])


def test_a_sample_leaves_with_the_current_exits_answer_and_is_sure_by_entropy() -> None:
    last = steps(policy("same-side", 2, 2), [(0.6, 0.4), (0.9, 0.1)])[-1]
    assert last.leave_B.item()
    torch.testing.assert_close(last.answer.softmax(-1), torch.tensor([[0.9, 0.1]]))
    unsure = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    assert last.confidence_B.item() == pytest.approx(1 - unsure, abs=1e-5)


# The architecture and settings


def test_all_exits_are_one_head_which_a_bundle_stores_once(tmp_path: Path) -> None:
    model = toy()
    assert len({id(head) for head in model.exits.values()}) == 1
    n_head = sum(p.numel() for p in model.exits["1"].parameters())
    assert sum(p.numel() for p in model.exits.parameters()) == n_head
    bundle = save_model(tmp_path, model, toy_tokenizer(), About("toy", 64, 1))
    stored = [name for name in bundle.tensors if name.startswith("exits.")]
    assert {name.split(".")[1] for name in stored} == {"1"}
    assert bundle.manifest.aliases["exits.6.classifier.weight"] == "exits.1.classifier.weight"
    assert len({id(head) for head in load_model(bundle).exits.values()}) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": "wide"}, "window 'wide': must be same-side, monotone, flat"),
        ({"window_size": 0}, "window_size 0: a whole number from 1 to 255"),
        ({"window_size": 2.5}, "window_size 2.5: a whole number"),
        ({"window_size": "x"}, "window_size x: a whole number"),
        ({"margin": 0.5}, "margin 0.5 in"),
        ({"flat_range": -0.1}, "flat_range -0.1 in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        toy_model("elbert", settings=settings)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "size"), [("monotone", 2), ("flat", 3)])
def test_the_graphs_of_windows_that_carry_values_decide_as_torch_does(
    window: str, size: int, tmp_path: Path
) -> None:
    settings = {"window": window, "window_size": size, "flat_range": 0.3}
    n = size + 1
    model = toy_model("elbert", n_layers=n, seed=7, settings=settings)
    bundle = save_model(tmp_path, model, toy_tokenizer(), About("toy", 64, 1))
    graphs = OnnxLayers(add_graphs(bundle, precisions=["fp32"]))
    for delta in (-1.0, 0.0, 0.5):
        knobs = {"delta": (delta,) * n}
        expected = whole(TorchLayers(model), inputs(32), knobs)
        close(Outcome.of(run(graphs, inputs(32), n, knobs).left), expected)
        assert (len(set(expected.depth_B.tolist())) > 1) == (delta >= 0)
