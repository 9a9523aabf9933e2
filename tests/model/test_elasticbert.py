"""ElasticBERT against its sheet: which rule it takes from where, and cutting a model for good."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import subjects
import torch
from law import Outcome, cut_at, whole
from toy_models import LABELS, mixed_knobs, toy_model

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import Knobs
from offramp_common.spec import StateField, TaskSpec, never_exit
from offramp_model.methods.deebert import EntropyPolicy
from offramp_model.methods.pabee import PatiencePolicy
from offramp_model.split_model import MultiExitModel, TorchLayers

N = 6
LN_C = math.log(len(LABELS))
REGRESSION = TaskSpec("regression")


@pytest.fixture(scope="module")
def by_entropy() -> MultiExitModel:
    return toy_model("elasticbert", n_layers=N, seed=1)


@pytest.fixture(scope="module")
def by_patience() -> MultiExitModel:
    # Of two classes, because random exits seldom agree on one of five.
    task = TaskSpec("classification", ("yes", "no"))
    return toy_model("elasticbert", n_layers=N, task=task, seed=1, settings={"rule": "patience"})


@pytest.fixture(scope="module")
def inputs() -> Activations[NumpyArray]:
    return subjects.inputs(48, below=30)


def outcome(model: MultiExitModel, inputs: Activations[NumpyArray], **knobs: float) -> Outcome:
    point: Knobs = {name: (value,) * N for name, value in knobs.items()}
    return whole(TorchLayers(model), inputs, point)


# The sheet's "How to test" (its first line, gradients, is in tests/train/test_elasticbert.py)


@torch.inference_mode()
def full_answers(model: MultiExitModel, inputs: Activations[NumpyArray]) -> NumpyArray:
    mask_BT = torch.from_numpy(mask_of(inputs.lengths_B))
    hidden_BTD = model.backbone.embed(torch.from_numpy(inputs.hidden_BTD))
    hidden_BTD = model.backbone.run_layers(hidden_BTD, mask_BT, 0, N)
    answers: NumpyArray = model.exits[str(N)](hidden_BTD, mask_BT, {})["logits"].numpy()
    return answers


def test_at_threshold_zero_or_patience_of_all_layers_every_sample_gets_the_full_models_logits(
    by_entropy: MultiExitModel, by_patience: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    for model, knobs in ((by_entropy, {"threshold": 0.0}), (by_patience, {"patience": float(N)})):
        got = outcome(model, inputs, **knobs)
        assert (got.depth_B == N).all()
        np.testing.assert_array_equal(got.answers, full_answers(model, inputs))


def test_above_ln_c_every_sample_leaves_at_layer_one(
    by_entropy: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    assert (outcome(by_entropy, inputs, threshold=LN_C * 1.001).depth_B == 1).all()


@pytest.mark.parametrize("depth", range(1, N))
def test_a_model_cut_for_good_answers_as_the_whole_one_made_to_leave_there(
    by_entropy: MultiExitModel, inputs: Activations[NumpyArray], depth: int
) -> None:
    """The static model has the first layers, and the pooler and classifier of the last of them."""
    static = toy_model("elasticbert", n_layers=depth, exits=[depth], seed=2)
    static.backbone.embeddings.load_state_dict(by_entropy.backbone.embeddings.state_dict())
    for ours, theirs in zip(static.backbone.layers, by_entropy.backbone.layers, strict=False):
        ours.load_state_dict(theirs.state_dict())
    static.exits[str(depth)].load_state_dict(by_entropy.exits[str(depth)].state_dict())
    thresholds = [0.0] * N
    thresholds[depth - 1] = LN_C * 1.001
    forced = whole(TorchLayers(by_entropy), inputs, {"threshold": tuple(thresholds)})
    assert (forced.depth_B == depth).all()
    never = never_exit(static.knobs, depth)
    np.testing.assert_array_equal(whole(TorchLayers(static), inputs, never).answers, forced.answers)


def test_samples_leave_earlier_at_a_higher_threshold_and_later_with_more_patience(
    by_entropy: MultiExitModel, by_patience: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    lower_to_higher = [
        outcome(by_entropy, inputs, threshold=LN_C * step / 10).depth_B for step in range(11)
    ]
    more_to_less = [
        outcome(by_patience, inputs, patience=float(t)).depth_B for t in range(N, 0, -1)
    ]
    for depths in (lower_to_higher, more_to_less):
        for later, earlier in itertools.pairwise(depths):
            assert (earlier <= later).all()
        assert len({float(depth_B.mean()) for depth_B in depths}) > 3, "it must make a difference"


# Its rules


def test_by_itself_classes_go_by_entropy_and_values_by_patience() -> None:
    assert toy_model("elasticbert").policy == EntropyPolicy(len(LABELS))
    assert toy_model("elasticbert", task=REGRESSION).policy == PatiencePolicy(3, regression=True)


def test_classes_may_go_by_patience(
    by_patience: MultiExitModel, inputs: Activations[NumpyArray]
) -> None:
    assert by_patience.policy == PatiencePolicy(N, regression=False)
    assert [knob.name for knob in by_patience.knobs] == ["patience"]
    assert by_patience.cut(2).state == {
        "count": StateField("uint8"),
        "previous": StateField("int16"),
    }
    got = outcome(by_patience, inputs, patience=2.0)
    assert got.depth_B.min() == 3, "at exit t + 1 at the earliest"


@pytest.mark.parametrize("k", range(N + 1))
def test_by_patience_a_model_cut_anywhere_gives_the_same_answers(
    by_patience: MultiExitModel, inputs: Activations[NumpyArray], k: int
) -> None:
    layers, knobs = TorchLayers(by_patience), mixed_knobs(by_patience)
    cuts = {depth: by_patience.cut(depth) for depth in range(N)}
    expected = whole(layers, inputs, knobs)
    assert len(set(expected.depth_B.tolist())) > 1
    assert cut_at(k, layers, inputs, knobs, cuts).same_as(expected)


def test_rules_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="rule 'entropy': a number has no entropy"):
        toy_model("elasticbert", task=REGRESSION, settings={"rule": "entropy"})
    with pytest.raises(ValueError, match="rule 'x': must be auto, entropy or patience"):
        toy_model("elasticbert", settings={"rule": "x"})


def test_every_exit_has_a_pooler_and_a_classifier_of_its_own(by_patience: MultiExitModel) -> None:
    for part in ("pooler.weight", "classifier.weight"):
        weights = [by_patience.exits[str(d)].get_parameter(part) for d in range(1, N + 1)]
        assert len({weight.data_ptr() for weight in weights}) == N, part
