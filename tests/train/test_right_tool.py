"""The Right Tool's recipe, and its temperatures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from seen import seen
from tiny_checkpoint import make_checkpoint, tokenizer_text, write_topics
from torch import Tensor
from torch.nn.functional import cross_entropy

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.backbones import backbone_from_pretrained
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Example, encode
from offramp_train.data import read_splits
from offramp_train.exit_answers import exit_answers
from offramp_train.fits import FITS
from offramp_train.fits.fit import Fitting
from offramp_train.fits.right_tool import best_temperature, nll
from offramp_train.recipe_check import check_model, check_recipe
from offramp_train.recipes import RECIPES
from offramp_train.recipes.recipe import plain_sum

LABELS = ("animal", "food", "tool")
TASK = TaskSpec("classification", LABELS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def make_model(checkpoint: Path, exits: tuple[int, ...] = (1, 2, 3)) -> MultiExitModel:
    torch.manual_seed(0)
    backbone = backbone_from_pretrained(str(checkpoint))
    method = METHODS["right_tool"]
    spec = HeadSpec(TASK, backbone.width, backbone.n_layers, exits, method.settings)
    return MultiExitModel(backbone, method, spec)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Of dev."""
    splits = read_splits(write_topics(tmp_path_factory.mktemp("topics")))
    return encode(splits.dev, splits.task, tokenizer_text(), 16)


def sampled(temperature: float, rows: int = 20_000) -> tuple[Tensor, Tensor]:
    """(logits, labels drawn by softmax(logits / temperature))."""
    generator = torch.Generator().manual_seed(0)
    logits_NC = 2 * torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    p_NC = torch.softmax(logits_NC / temperature, dim=1)
    return logits_NC, torch.multinomial(p_NC, 1, generator=generator)[:, 0]


def test_the_loss_is_the_sum_over_all_exits_with_equal_weights() -> None:
    torch.manual_seed(0)
    answers, target_B = {d: torch.randn(5, 3) for d in (1, 2, 3)}, torch.tensor([0, 2, 1, 1, 0])
    by_hand = sum(cross_entropy(answers[d], target_B) for d in (1, 2, 3))
    torch.testing.assert_close(plain_sum(seen(answers, target_B)), by_hand)


@pytest.mark.parametrize("temperature", [0.59, 1.0, 1.30, 4.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    found = best_temperature(*sampled(temperature))
    # 20,000 labels: its standard error is about 1 %.
    assert found == pytest.approx(temperature, rel=0.04)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_no_other_temperature_has_a_smaller_loss(temperature: float) -> None:
    logits_NC, target_N = sampled(temperature, rows=500)
    found = best_temperature(logits_NC, target_N)
    least = nll(logits_NC, target_N, found)
    for factor in (0.25, 0.9, 0.999, 1 / found, 1.001, 1.1, 4.0):
        assert nll(logits_NC, target_N, found * factor) >= least


def test_a_temperature_stays_within_bounds_where_the_loss_has_no_smallest_value() -> None:
    logits_NC = torch.eye(3, dtype=torch.float64).repeat(4, 1)
    right_N = logits_NC.argmax(dim=1)
    assert best_temperature(logits_NC, right_N) == pytest.approx(0.05), "always right"
    assert best_temperature(logits_NC, (right_N + 1) % 3) == pytest.approx(20.0), "always wrong"
    assert 0.05 <= best_temperature(torch.zeros(6, 3, dtype=torch.float64), right_N[:6]) <= 20.0


@pytest.mark.parametrize("exits", [(1, 2, 3), (2, 3)])
def test_fitting_leaves_predictions_and_never_makes_the_likelihood_of_dev_smaller(
    checkpoint: Path, examples: list[Example], exits: tuple[int, ...]
) -> None:
    model = make_model(checkpoint, exits)
    with torch.no_grad():
        for depth in exits:
            model.exits[str(depth)].get_parameter("classifier.weight").mul_(depth * 4.0)
    before, targets = exit_answers(model, examples)
    (fit,) = FITS["right_tool"]
    assert (fit.part, fit.share) == ("dev", 0.0), "never on rows that were trained on"
    record = fit.run(Fitting(model.eval(), examples, 0))
    after, _ = exit_answers(model, examples)
    target_N = torch.from_numpy(targets)
    temperatures = []
    for depth in exits:
        temperature = model.exits[str(depth)].get_buffer("temperature").item()
        temperatures.append(temperature)
        assert record["temperature"][str(depth)] == pytest.approx(temperature, abs=1e-5)
        assert (before[depth].argmax(axis=1) == after[depth].argmax(axis=1)).all()
        assert after[depth] == pytest.approx(before[depth] / temperature, rel=1e-5)
        losses = [nll(torch.from_numpy(a[depth]), target_N, 1.0) for a in (before, after)]
        assert losses[1] < losses[0], "toy heads are far from calibrated"
        assert record["nll_before"][str(depth)] == pytest.approx(losses[0], abs=1e-4)
        assert record["nll_after"][str(depth)] == pytest.approx(losses[1], abs=1e-4)
    assert len(set(temperatures)) == len(exits), "one for each exit, not one for all"
    assert fit.run(Fitting(model, examples, 0)) == record, "fitted again, it does not drift"


def test_recipes_that_freeze_the_final_head_are_refused(checkpoint: Path) -> None:
    """All exits share the pooler and the mixes."""
    with pytest.raises(ConfigError, match="right_tool's exits share weights with it"):
        check_model(RECIPES["deebert"], make_model(checkpoint), {})
    method = METHODS["right_tool"]
    for name in ("right_tool", "pabee"):
        check_recipe(RECIPES[name], method, TASK, method.settings)
        check_model(RECIPES[name], make_model(checkpoint), {})
    check_recipe(RECIPES["right_tool"], METHODS["pabee"], TaskSpec("regression"), {})
