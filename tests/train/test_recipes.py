from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seen import VALUES, seen
from tiny_checkpoint import make_checkpoint
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_common.weights import dequantise, quantise_linear, quantise_table
from offramp_model.backbones import backbone_from_pretrained
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Example
from offramp_train.build import resolve_config, set_apart
from offramp_train.fits.fit import Fit
from offramp_train.quantise import StoredWeights, as_stored
from offramp_train.recipe_check import (
    check_model,
    check_recipe,
    loss_settings,
    set_trainable,
    start_heads,
)
from offramp_train.recipes import RECIPES
from offramp_train.recipes.recipe import depth_weighted, early_sum, final_loss
from offramp_train.recipes.self_distilled_joint import self_distilled

TASK = TaskSpec("classification", ("a", "b", "c"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def _model(checkpoint: Path, method: str = "deebert", **settings: Any) -> MultiExitModel:
    backbone = backbone_from_pretrained(str(checkpoint))
    chosen = {**METHODS[method].settings, **settings}
    exits = tuple(range(1, backbone.n_layers + 1))
    spec = HeadSpec(TASK, backbone.width, backbone.n_layers, exits, chosen)
    return MultiExitModel(backbone, METHODS[method], spec)


def _answers() -> tuple[dict[int, Tensor], Tensor]:
    torch.manual_seed(1)
    answers = {depth: torch.randn(5, 3, requires_grad=True) for depth in (1, 2, 3)}
    return answers, torch.tensor([0, 2, 1, 1, 0])


def test_pabees_loss_is_the_sum_of_depth_times_loss_over_the_sum_of_depths() -> None:
    answers, target = _answers()
    by_hand = (
        1 * cross_entropy(answers[1], target)
        + 2 * cross_entropy(answers[2], target)
        + 3 * cross_entropy(answers[3], target)
    ) / 6
    assert torch.allclose(depth_weighted(seen(answers, target)), by_hand)


def test_pabees_loss_for_a_regression_is_made_of_squared_errors() -> None:
    torch.manual_seed(2)
    answers = {depth: torch.randn(4, 1) for depth in (1, 2)}
    target = torch.tensor([0.5, 1.0, -1.0, 2.0])
    errors = [((answers[d][:, 0] - target) ** 2).mean() for d in (1, 2)]
    loss = depth_weighted(seen(answers, target, task=VALUES))
    assert torch.allclose(loss, (errors[0] + 2 * errors[1]) / 3)


def test_deeberts_second_loss_is_a_plain_sum_over_the_early_exits() -> None:
    answers, target = _answers()
    by_hand = cross_entropy(answers[1], target) + cross_entropy(answers[2], target)
    assert torch.allclose(early_sum(seen(answers, target)), by_hand)
    assert torch.allclose(final_loss(seen(answers, target)), cross_entropy(answers[3], target))


def test_self_distillation_pulls_early_exits_to_the_deepest_and_not_the_deepest_to_them() -> None:
    answers, target = _answers()
    settings: dict[str, Any] = {"exit_weights": (1.0, 2.0, 3.0), "distil": 0.25, "temperature": 2.0}
    loss = self_distilled(seen(answers, target, RECIPES["self-distilled-joint"], **settings))
    teacher = (answers[3].detach() / 2).softmax(-1)
    by_hand = 3 * cross_entropy(answers[3], target)
    for depth in (1, 2):
        distance = kl_div((answers[depth] / 2).log_softmax(-1), teacher, reduction="batchmean")
        by_hand += depth * (0.75 * cross_entropy(answers[depth], target) + 0.25 * 4 * distance)
    assert torch.allclose(loss, by_hand / 6)
    loss.backward()  # type: ignore[no-untyped-call]
    alone = answers[3].detach().requires_grad_()
    (3 * cross_entropy(alone, target) / 6).backward()  # type: ignore[no-untyped-call]
    assert answers[3].grad is not None
    assert alone.grad is not None
    assert torch.allclose(answers[3].grad, alone.grad)


def test_row_weights_count_in_every_loss() -> None:
    answers, target = _answers()
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    recipe = RECIPES["self-distilled-joint"]
    for loss in (depth_weighted, early_sum, final_loss, self_distilled):
        first = {depth: answer[:3] for depth, answer in answers.items()}
        whole = loss(seen(answers, target, recipe, weight_B=weight))
        assert torch.allclose(whole, loss(seen(first, target[:3], recipe)))


def test_two_stages_are_refused_where_exits_share_weights_with_the_final_head(
    checkpoint: Path,
) -> None:
    with pytest.raises(ConfigError, match="share weights"):
        check_model(RECIPES["deebert"], _model(checkpoint, "pabee"), {})
    check_model(RECIPES["deebert"], _model(checkpoint), {})
    check_model(RECIPES["self-distilled-joint"], _model(checkpoint, "pabee"), {"exit_weights": ()})


def test_loss_settings_that_a_recipe_does_not_have_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe pabee has no loss\.temperature; it has none"):
        loss_settings(RECIPES["pabee"], {"temperature": 4.0}, "f.toml")
    joint = RECIPES["self-distilled-joint"]
    for bad in ({"distil": 1.5}, {"distil": "x"}, {"distil": True}, {"exit_weights": [-1.0]}):
        with pytest.raises(ConfigError, match=r"f\.toml: loss\.\w+ = .*: must be"):
            loss_settings(joint, bad, "f.toml")
    weights = loss_settings(joint, {"exit_weights": [1, 1]}, "f.toml")
    with pytest.raises(ConfigError, match="2 weights for 3 exits"):
        check_model(joint, _model(checkpoint), weights)


def test_a_recipe_that_leaves_something_untrained_or_trains_what_is_not_there_is_refused() -> None:
    class_task = TaskSpec("classification", ("a", "b"))
    odd = replace(METHODS["deebert"], learned=lambda settings: ("logits", "stop"))
    with pytest.raises(ConfigError, match="would leave deebert's 'stop' untrained"):
        check_recipe(RECIPES["pabee"], odd, class_task, {})
    needy = replace(RECIPES["pabee"], needs=("logits", "stop"))
    with pytest.raises(ConfigError, match="trains the exits' 'stop', which deebert does not have"):
        check_recipe(needy, METHODS["deebert"], class_task, {})
    narrow = replace(RECIPES["pabee"], tasks=("classification",))
    with pytest.raises(ConfigError, match="no loss for regression; recipes that have: deebert"):
        check_recipe(narrow, METHODS["pabee"], TaskSpec("regression"), {})


def test_rows_set_apart_for_a_fit_are_no_longer_trained_on() -> None:
    rows = [Example((1,), (0,), i) for i in range(100)]
    fits = (Fit("a", "scale", lambda f: {}, 0.1), Fit("b", "train", lambda f: {}))
    train, parts = set_apart(rows, fits, seed=3)
    assert set(parts) == {"scale"}
    assert (len(train), len(parts["scale"])) == (90, 10)
    assert {e.target for e in train} | {e.target for e in parts["scale"]} == set(range(100))
    assert set_apart(rows, fits, seed=3) == (train, parts)
    assert set_apart(rows, (), seed=3) == (rows, {})


def test_each_stage_trains_its_own_part(checkpoint: Path) -> None:
    model, stages = _model(checkpoint), RECIPES["deebert"].stages
    early = {id(p) for depth in ("1", "2") for p in model.exits[depth].parameters()}
    set_trainable(model, stages[0], freeze_embeddings=False)
    assert {id(p) for p in model.parameters() if not p.requires_grad} == early
    set_trainable(model, stages[1], freeze_embeddings=False)
    assert {id(p) for p in model.parameters() if p.requires_grad} == early
    set_trainable(model, RECIPES["pabee"].stages[0], freeze_embeddings=True)
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    assert frozen == {id(p) for p in model.backbone.embeddings.parameters()}


def test_exit_heads_start_from_the_checkpoints_pooler(checkpoint: Path) -> None:
    model = _model(checkpoint)
    start_heads(model, "auto")
    pooler = model.backbone.pretrained_pooler
    assert pooler is not None
    for head in model.exits.values():
        assert torch.equal(head.get_submodule("pooler").get_parameter("weight"), pooler[0])
        assert head.get_submodule("classifier").get_parameter("weight").std() < 0.04
    averaging = _model(checkpoint, pooling="mean")
    start_heads(averaging, "auto")
    assert not torch.equal(averaging.exits["1"].get_parameter("pooler.weight"), pooler[0])
    assert not any("pretrained" in name for name, _ in model.named_parameters())


def test_a_checkpoint_without_a_pooler_is_not_taken_for_one_that_has(tmp_path: Path) -> None:
    model = _model(make_checkpoint(tmp_path, "distilbert"))
    assert model.backbone.pretrained_pooler is None
    with pytest.raises(ConfigError, match="has no pooler"):
        start_heads(model, "pretrained")


def test_fake_quantisation_gives_the_bits_that_a_bundle_gives_back() -> None:
    torch.manual_seed(3)
    matrix = torch.randn(7, 33)
    matrix[2] = 0.0
    values, scale = quantise_linear(matrix.numpy())
    assert np.array_equal(as_stored(matrix, "linear").numpy(), dequantise(values, scale, "linear"))
    values, scale = quantise_table(matrix.numpy())
    assert np.array_equal(as_stored(matrix, "table").numpy(), dequantise(values, scale, "table"))


def test_stored_weights_pass_gradients_straight_through_and_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny model's matrices are below the size from which a bundle quantises.
    monkeypatch.setattr("offramp_model.store._SMALLEST_MATRIX", 64)
    model = _model(make_checkpoint(tmp_path)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, mask = torch.randint(5, 20, (2, 6, 1)), torch.ones(2, 6, dtype=torch.bool)
    with StoredWeights(model).swapped():
        quantised = model(inputs, mask)[3]["logits"]
        quantised.sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    query = model.backbone.get_parameter("layers.0.attention.self.query.weight")
    assert query.grad is not None
    with torch.no_grad():
        assert not torch.equal(model(inputs, mask)[3]["logits"], quantised)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"method": "nope"}, "method 'nope' is unknown; known: deebert"),
        ({"recipe": "nope"}, "recipe 'nope' is unknown"),
        ({"epohcs": 3}, "unknown key epohcs"),
        ({"training": {"epohcs": 3}}, r"unknown key training\.epohcs"),
        ({"training": {"epochs": "3"}}, r"training\.epochs = '3': must be of type int"),
        ({"training": {"epochs": 0}}, r"training\.epochs = 0: must be above 0"),
        ({"training": 3}, r"write \[training\]"),
        ({"settings": {"poolling": "mean"}}, "no setting 'poolling'; it has: pooling"),
    ],
)
def test_a_wrong_setting_is_named(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_config(table, where="f.toml")


def test_recipes_bring_the_papers_settings_and_the_users_win() -> None:
    deebert = resolve_config({"method": "deebert"}, where="x")
    assert (deebert.recipe, deebert.training.batch, deebert.training.epochs) == ("deebert", 8, 3)
    pabee = resolve_config({"method": "pabee", "training": {"epochs": 2}}, where="x")
    assert (pabee.recipe, pabee.training.batch, pabee.training.epochs) == ("pabee", 32, 2)
    assert pabee.training.keep == "best"
    assert pabee.settings == {"pooling": "first"}
