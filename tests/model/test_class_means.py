"""Class Means against its paper and sheet, and on distances worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import subjects
import torch
from law import Outcome, whole
from toy_models import LABELS, toy_bundle, toy_layers, toy_model

from offramp_common.activations import Activations, NumpyArray
from offramp_common.spec import TaskSpec, never_exit
from offramp_model.exits import HeadSpec
from offramp_model.methods.class_means import METHOD, ClassMeans, NearestMeanPolicy, distances
from offramp_model.split_model import MultiExitModel, TorchLayers
from offramp_model.store import About, save_model

N, WIDTH = 4, 32


def head(means: list[list[float]], scale: list[float], pooling: str = "first") -> ClassMeans:
    labels = LABELS[: len(means)]
    spec = HeadSpec(
        TaskSpec("classification", labels), len(means[0]), 2, (1, 2), {"pooling": pooling}
    )
    made = ClassMeans(spec)
    made.means.copy_(torch.tensor(means))
    made.scale.copy_(torch.tensor(scale))
    return made


def logits(made: ClassMeans, feature: list[float]) -> torch.Tensor:
    hidden_BTD = torch.tensor([[feature]])
    got: torch.Tensor = made(hidden_BTD, torch.ones(1, 1, dtype=torch.bool), {})["logits"][0]
    return got


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return toy_model("class_means", n_layers=N, width=WIDTH, seed=1)


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(64, below=30)


def at(threshold: float) -> dict[str, tuple[float, ...]]:
    return {"threshold": (threshold,) * N}


# The rule


def test_logits_are_minus_the_distances_divided_by_their_scale() -> None:
    # From (0, 0): 5 to (3, 4), divided by 2.5; 1 to (1, 0), divided by 4.
    got = logits(head([[3.0, 4.0], [1.0, 0.0]], [2.5, 4.0]), [0.0, 0.0])
    torch.testing.assert_close(got, torch.tensor([-2.0, -0.25]))
    # p = 1 / (1 + e^-1.75) = 0.8520 of the second class.
    decide = NearestMeanPolicy().decide
    for threshold, leaves in ((0.851, True), (0.853, False)):
        decision = decide({"logits": got[None]}, {}, {"threshold": torch.tensor(threshold)}, 1)
        assert decision.leave_B.tolist() == [leaves]
        assert decision.answer.argmax().item() == 1
        assert decision.confidence_B.item() == pytest.approx(1 / (1 + math.exp(-1.75)))


def test_the_class_of_the_largest_probability_wins_over_the_least_raw_distance() -> None:
    # 3 to class 0 and 4 to class 1, whose rows lie further apart: 3 / 1 against 4 / 8.
    got = logits(head([[3.0, 0.0], [0.0, 4.0]], [1.0, 8.0]), [0.0, 0.0])
    assert got.argmax().item() == 1


def test_a_sample_at_a_class_mean_is_of_that_class_far_from_the_origin_too() -> None:
    generator = torch.Generator().manual_seed(2)
    # Features of early layers point much the same way: long vectors, small differences.
    shared = 40.0 * torch.randn(384, generator=generator)
    means = shared + 0.1 * torch.randn(151, 384, generator=generator)
    got = distances(means, means)
    assert got.argmin(dim=1).tolist() == list(range(151))
    exact = torch.cdist(means.double(), means.double())
    # Float32 holds such means to about 4e-6 a coordinate; a distance of 0 comes out as at most 0.2 % of
    # the others (about 2.8).
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=5e-3)


def test_a_threshold_of_one_is_the_full_model(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    got = whole(TorchLayers(model), inputs, at(1.0))
    assert (got.depth_B == N).all()
    with torch.no_grad():
        other = toy_model("deebert", n_layers=N, width=WIDTH, seed=1)
        other.backbone.load_state_dict(model.backbone.state_dict())
        other.exits[str(N)].load_state_dict(model.exits[str(N)].state_dict())
    full = whole(TorchLayers(other), inputs, never_exit(other.knobs, N))
    assert np.array_equal(got.answers, full.answers), "the final head is an ordinary one"


def test_a_threshold_of_zero_is_the_nearest_mean_after_the_first_layer(
    model: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    got: Outcome = whole(TorchLayers(model), inputs, at(0.0))
    assert (got.depth_B == 1).all()
    ids = torch.from_numpy(inputs.hidden_BTD)
    mask = torch.arange(ids.shape[1]) < torch.from_numpy(inputs.lengths_B)[:, None]
    with torch.no_grad():
        hidden = model.backbone.run_layers(model.backbone.embed(ids), mask, 0, 1)
        first = model.exits["1"]
        apart = (hidden[:, 0, None] - first.get_buffer("means")).norm(dim=-1)
    assert got.answers.argmax(axis=1).tolist() == apart.argmin(dim=1).tolist(), "scales are 1"


def test_the_probability_must_be_above_the_threshold_and_not_at_it() -> None:
    tied = {"logits": torch.zeros(1, 4)}  # 1 / 4 each, exactly
    for threshold, leaves in ((0.25, False), (0.2499, True)):
        decision = NearestMeanPolicy().decide(tied, {}, {"threshold": torch.tensor(threshold)}, 1)
        assert decision.leave_B.item() is leaves


def test_normalised_distances_up_to_one_give_a_flat_softmax() -> None:
    """The sheet's numbers: useful thresholds lie just above 1 / C."""
    for n, largest in ((2, 0.731), (10, 0.232)):
        normal = torch.full((1, n), -1.0)
        normal[0, 0] = 0.0
        decision = NearestMeanPolicy().decide(
            {"logits": normal}, {}, {"threshold": torch.tensor(0.5)}, 1
        )
        assert decision.confidence_B.item() == pytest.approx(largest, abs=5e-4)


def test_scaling_features_and_what_was_fitted_on_them_changes_no_probability() -> None:
    feature = [0.3, -1.2]
    one = logits(head([[3.0, 4.0], [1.0, 0.0]], [2.0, 3.0]), feature)
    ten = logits(head([[30.0, 40.0], [10.0, 0.0]], [20.0, 30.0]), [10 * x for x in feature])
    torch.testing.assert_close(one, ten)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_feature_that_is_no_number_never_leaves(bad: float) -> None:
    made = head([[3.0, 4.0], [1.0, 0.0]], [2.5, 4.0])
    for feature in ([bad, 0.0], [bad, bad]):
        broken = {"logits": logits(made, feature)[None]}
        decision = NearestMeanPolicy().decide(broken, {}, {"threshold": torch.tensor(0.0)}, 1)
        assert not decision.leave_B.item()
        assert decision.confidence_B.item() == 0.0


def test_the_mean_of_real_tokens_is_read_where_that_is_asked_for() -> None:
    made = head([[3.0, 4.0], [1.0, 0.0]], [1.0, 1.0], pooling="mean")
    hidden_BTD = torch.tensor([[[2.0, 2.0], [0.0, -2.0], [9.0, 9.0]]])
    mask_BT = torch.tensor([[True, True, False]])
    got = made(hidden_BTD, mask_BT, {})["logits"][0]
    torch.testing.assert_close(got, torch.tensor([-math.sqrt(20.0), 0.0]), rtol=0, atol=1e-3)


# Architecture


def test_early_exits_have_nothing_to_train_and_the_policy_carries_nothing(
    model: MultiExitModel,
) -> None:
    for depth in range(1, N):
        assert list(model.exits[str(depth)].parameters()) == []
        assert model.policy.state_fields(depth) == {}
    assert METHOD.learned({}) == ("final",)
    assert len(list(model.exits[str(N)].parameters())) == 4


def test_means_and_scales_are_in_the_bundle_and_in_its_digests(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "a", "class_means", n_layers=N, seed=3)
    made = toy_model("class_means", n_layers=N, seed=3)
    loaded = toy_layers(bundle).model
    for depth in range(1, N):
        for name in ("means", "scale"):
            ours = made.exits[str(depth)].get_buffer(name)
            assert torch.equal(loaded.exits[str(depth)].get_buffer(name), ours)
    assert bundle.tensors["exits.2.means"].shape == (len(LABELS), WIDTH)
    made.exits["2"].get_buffer("scale").mul_(2.0)
    other = save_model(tmp_path / "b", made, "{}", About("toy", 64, 1))
    changed = [bundle.digest(depth) != other.digest(depth) for depth in range(N)]
    assert changed == [True, True, False, False], "a cut behind exit 2 does not depend on its scale"
