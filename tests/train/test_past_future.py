"""Past-Future's recipe: imitation, and lower layers that learn little at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from seen import seen
from tiny_checkpoint import make_checkpoint, write_topics
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from toy_models import toy_model
from trainers import assert_stops_leave_no_trace, small_config

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.methods import METHODS
from offramp_train.batches import Example
from offramp_train.config import Calibration
from offramp_train.data import read_splits
from offramp_train.recipe_check import check_model, check_recipe, loss_settings
from offramp_train.recipes import RECIPES
from offramp_train.recipes.past_future import RECIPE, imitation, past_future, soft_freeze
from offramp_train.recipes.recipe import Progress
from offramp_train.shift import shift_label

L, WIDTH = 3, 4
TARGET_B = torch.tensor([0, 2, 1, 1, 0])
TASK = TaskSpec("classification", ("a", "b", "c"))


def outputs(exits: tuple[int, ...] = (1, 2, 3)) -> dict[int, dict[str, Tensor]]:
    """Of five rows: logits at exits, every layer's pooled state, and each early exit's imitations."""
    torch.manual_seed(0)
    out: dict[int, dict[str, Tensor]] = {}
    for depth in range(1, L + 1):
        out[depth] = {"pooled": torch.randn(5, WIDTH, requires_grad=True)}
        if depth in exits:
            out[depth]["logits"] = torch.randn(5, 3, requires_grad=True)
            if depth < L:
                out[depth]["imitated"] = torch.randn(5, L - depth, WIDTH, requires_grad=True)
    return out


def of(named: dict[int, dict[str, Tensor]], **settings: Any) -> Any:
    return seen(named, TARGET_B, RECIPE, **settings)


def test_the_loss_is_half_the_depth_weighted_loss_and_half_the_imitation() -> None:
    named = outputs()
    task = sum(d * cross_entropy(named[d]["logits"], TARGET_B) for d in (1, 2, 3)) / 6
    first = [
        1 - cosine_similarity(named[j]["pooled"], named[1]["imitated"][:, j - 2]) for j in (2, 3)
    ]
    second = 1 - cosine_similarity(named[3]["pooled"], named[2]["imitated"][:, 0])
    # Of each exit the mean over rows and later layers; of those the mean, whatever their number.
    apart = (torch.stack(first).mean() + second.mean()) / 2
    torch.testing.assert_close(imitation(of(named)), apart)
    torch.testing.assert_close(past_future(of(named)), (task + apart) / 2)
    torch.testing.assert_close(past_future(of(named, imitation=0.0)), task)


def test_the_imitation_costs_nothing_exactly_where_it_is_parallel_to_its_target() -> None:
    named = outputs()
    for source in (1, 2):
        targets = [named[j]["pooled"] for j in range(source + 1, L + 1)]
        named[source]["imitated"] = 3.0 * torch.stack(targets, dim=1)
    # A cosine of float32 vectors is 1 but for rounding.
    assert imitation(of(named)).item() == pytest.approx(0.0, abs=1e-6)
    turned = named[1]["imitated"].detach().clone()
    turned[2, 1] = -turned[2, 1]
    named[1]["imitated"] = turned
    # One of ten vectors of the first of two exits points the other way.
    assert imitation(of(named)).item() == pytest.approx(2 / 10 / 2, abs=1e-6)


def test_no_gradient_reaches_what_is_imitated() -> None:
    named = outputs()
    imitation(of(named)).backward()  # type: ignore[no-untyped-call]
    assert all(named[depth]["pooled"].grad is None for depth in (1, 2, 3))
    assert all(named[depth]["imitated"].grad is not None for depth in (1, 2))


def test_layers_without_an_exit_are_imitated_too_and_imitate_nothing() -> None:
    named, exits = outputs(exits=(1, 3)), (1, 3)
    picture = of({depth: named[depth] for depth in exits})
    full = type(picture)(
        named, exits, TARGET_B, torch.ones(5), TASK, picture.settings, picture.progress
    )
    apart = [
        1 - cosine_similarity(named[j]["pooled"], named[1]["imitated"][:, j - 2]) for j in (2, 3)
    ]
    torch.testing.assert_close(imitation(full), torch.stack(apart).mean())


def test_rows_count_by_their_weight() -> None:
    named = outputs()
    weight_B = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    weighted = past_future(seen(named, TARGET_B, RECIPE, weight_B=weight_B))
    first = {d: {n: v[:3] for n, v in named[d].items()} for d in named}
    torch.testing.assert_close(weighted, past_future(seen(first, TARGET_B[:3], RECIPE)))


def passed(step: int, steps: int, depth: int, freeze: float = 2.0, draws: int = 1000) -> float:
    """Share of draws in which a gradient comes through behind `depth`."""
    progress = Progress(step, steps, 0, L, {"freeze_layers": freeze})
    torch.manual_seed(0)
    count = 0
    for _ in range(draws):
        hidden_BTD = torch.ones(1, 1, 1, requires_grad=True) * 2.0
        read_BTD, next_BTD = soft_freeze(depth, hidden_BTD, progress)
        assert torch.equal(read_BTD, hidden_BTD)
        assert read_BTD is next_BTD, "the exit head and the next layer see the same"
        count += read_BTD.requires_grad
    return count / draws


def test_a_low_layer_learns_with_the_share_of_training_that_is_over() -> None:
    for depth in (1, 2):
        assert passed(0, 100, depth) == 0.0
        # 1000 draws: a standard error of 0.014.
        assert passed(25, 100, depth) == pytest.approx(0.25, abs=0.05)
        assert passed(90, 100, depth) == pytest.approx(0.90, abs=0.05)
    assert passed(0, 100, depth=3) == 1.0, "above F nothing is held back"
    assert passed(0, 100, depth=1, freeze=0.0) == 1.0


def test_low_layers_are_drawn_each_by_itself() -> None:
    progress = Progress(1, 2, 0, L, {"freeze_layers": 2.0})
    torch.manual_seed(0)
    hidden_BTD = torch.ones(1, 1, 1, requires_grad=True) * 2.0
    draws = {
        tuple(soft_freeze(d, hidden_BTD, progress)[0].requires_grad for d in (1, 2))
        for _ in range(50)
    }
    assert len(draws) == 4


def test_a_stopped_run_draws_the_same_layers_as_one_that_was_not(tmp_path: Path) -> None:
    config = small_config(method="past_future")
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    splits = read_splits(write_topics(tmp_path / "topics"))
    assert_stops_leave_no_trace(config, (5, 13), splits, checkpoint, tmp_path)


def test_other_pairs_of_method_and_recipe_are_refused_with_the_reason() -> None:
    method = METHODS["past_future"]
    with pytest.raises(ConfigError, match="would leave past_future's 'imitated' untrained"):
        check_recipe(RECIPES["pabee"], method, TASK, method.settings)
    with pytest.raises(ConfigError, match="'imitated', which deebert does not have"):
        check_recipe(RECIPE, METHODS["deebert"], TASK, {})
    check_recipe(RECIPE, method, TASK, method.settings)


def test_settings_that_make_no_sense_are_refused_with_the_reason() -> None:
    model = toy_model("past_future", n_layers=L)
    check_model(RECIPE, model, loss_settings(RECIPE, {}, "f.toml"))
    with pytest.raises(ConfigError, match=r"freeze_layers = 1\.5: must be whole"):
        check_model(RECIPE, model, loss_settings(RECIPE, {"freeze_layers": 1.5}, "f.toml"))
    last = toy_model("past_future", n_layers=L, exits=[L])
    with pytest.raises(ConfigError, match="only the final one"):
        check_model(RECIPE, last, loss_settings(RECIPE, {}, "f.toml"))


def test_a_logit_cannot_be_shifted_by_one_bias_and_a_shift_is_refused() -> None:
    """Its classifiers' biases reach the logits through sums and gates."""
    model = toy_model("past_future", n_layers=L, task=TASK)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    examples = [Example((2, 5 + i, 3), (0, 0, 0), i % 3) for i in range(6)]
    with pytest.raises(ConfigError, match="past_future has no classifiers to shift"):
        shift_label(model, examples, Calibration(shift_label="b"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
