"""CATs' recipe and fits, and a bundle calibrated with a guarantee."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seen import VALUES, seen
from tiny_checkpoint import make_checkpoint, write_topics
from torch import Tensor
from torch.nn.functional import cross_entropy

from offramp_common.bundle import Bundle
from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.backbones import backbone_from_pretrained
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.methods.cats import ConsistencyPolicy, MetaBranch
from offramp_model.split_model import MultiExitModel
from offramp_model.store import load_model, named_tensors
from offramp_train.batches import Example, collate
from offramp_train.build import Request, resolve_config, set_apart, train_bundle
from offramp_train.calibrate import Goal
from offramp_train.fits.cats import FITS, _train, fit_meta, fit_temperatures, roc_area
from offramp_train.fits.fit import Fitting
from offramp_train.progress import Report
from offramp_train.recalibrate import recalibrate
from offramp_train.recipe_check import check_recipe, set_trainable
from offramp_train.recipes import RECIPES
from offramp_train.recipes.cats import early_mean
from offramp_train.tables import read_rows

CLASSES = TaskSpec("classification", ("animal", "food", "tool"))
RECIPE = RECIPES["cats"]
N = 5


def model_of(checkpoint: Path, task: TaskSpec = CLASSES, **settings: Any) -> MultiExitModel:
    torch.manual_seed(5)
    backbone = backbone_from_pretrained(str(checkpoint))
    chosen = {**METHODS["cats"].settings, **settings}
    spec = HeadSpec(task, backbone.width, N, tuple(range(1, N + 1)), chosen, 0.3)
    made = MultiExitModel(backbone, METHODS["cats"], spec)
    with torch.no_grad():
        for depth in range(1, N + 1):  # random heads that differ, and mostly agree
            made.exits[str(depth)].get_parameter("classifier.weight").mul_(4.0)
    return made.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), layers=N)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 10, 300)
    return [
        Example(tuple(rng.integers(5, 27, n).tolist()), (0,) * n, int(rng.integers(0, 3)))
        for n in lengths.tolist()
    ]


def checksum(model: MultiExitModel, *changing: str) -> str:
    """Of all tensors but those whose name has one of `changing` in it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(model).items()):
        if not any(part in name for part in changing):
            digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def outputs_of(model: MultiExitModel, examples: list[Example]) -> dict[int, dict[str, Tensor]]:
    batch = collate(examples, model.channels)
    return model(batch.inputs_BTF, batch.mask_BT)  # type: ignore[no-any-return]


@torch.no_grad()
def comparable(model: MultiExitModel, examples: list[Example]) -> None:
    """Moves the exits' values to the last one's, with a tolerance that half of them are within."""
    outputs = outputs_of(model, examples)
    apart = [outputs[depth]["logits"] - outputs[N]["logits"] for depth in range(1, N)]
    for depth, difference_N1 in enumerate(apart, start=1):
        model.exits[str(depth)].get_parameter("classifier.bias").sub_(difference_N1.mean())
    policy = model.policy
    assert isinstance(policy, ConsistencyPolicy)
    half = torch.stack([(d - d.mean()).abs().median() for d in apart]).median().item()
    model.policy = replace(policy, tolerance=half)


# The recipe


def test_early_exits_learn_the_mean_over_exits_of_the_labels_or_of_the_full_models_class() -> None:
    torch.manual_seed(1)
    answers = {depth: torch.randn(6, 3, requires_grad=True) for depth in (1, 2, 4)}
    target = torch.tensor([0, 2, 1, 1, 0, 2])
    labels = (cross_entropy(answers[1], target) + cross_entropy(answers[2], target)) / 2
    torch.testing.assert_close(early_mean(seen(answers, target, RECIPE)), labels)
    full = answers[4].argmax(dim=1)
    consistency = (cross_entropy(answers[1], full) + cross_entropy(answers[2], full)) / 2
    loss = early_mean(seen(answers, target, RECIPE, target="full-model"))
    torch.testing.assert_close(loss, consistency)
    loss.backward()  # type: ignore[no-untyped-call]
    assert answers[4].grad is None, "the full model is not pulled towards its early exits"


def test_early_exits_of_a_regression_learn_the_full_models_value() -> None:
    torch.manual_seed(2)
    answers = {depth: torch.randn(4, 1) for depth in (1, 2, 3)}
    target = torch.tensor([0.5, 1.0, -1.0, 2.0])
    for chosen, wanted in (("labels", target), ("full-model", answers[3][:, 0])):
        errors = [(answers[depth][:, 0] - wanted).square().mean() for depth in (1, 2)]
        loss = early_mean(seen(answers, target, RECIPE, task=VALUES, target=chosen))
        torch.testing.assert_close(loss, (errors[0] + errors[1]) / 2)


def test_row_weights_count() -> None:
    torch.manual_seed(1)
    answers = {depth: torch.randn(5, 3) for depth in (1, 2, 3)}
    target, weight = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    first = {depth: answer[:3] for depth, answer in answers.items()}
    for chosen in ("labels", "full-model"):
        whole = early_mean(seen(answers, target, RECIPE, weight_B=weight, target=chosen))
        torch.testing.assert_close(
            whole, early_mean(seen(first, target[:3], RECIPE, target=chosen))
        )


def test_the_second_stage_trains_early_heads_alone_and_quietly(checkpoint: Path) -> None:
    model = model_of(checkpoint)
    first, second = RECIPE.stages
    assert (second.trains, second.quiet) == ("early exits", True)
    set_trainable(model, second, freeze_embeddings=False)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in model.named_parameters() if n.startswith("exits.")} - {
        n for n, _ in model.named_parameters() if n.startswith(f"exits.{N}.")
    }
    assert first.trains == "backbone+final"


def test_other_recipes_fit_the_method_and_its_recipe_fits_other_methods() -> None:
    cats = METHODS["cats"]
    for recipe in ("deebert", "pabee", "self-distilled-joint"):
        check_recipe(RECIPES[recipe], cats, CLASSES, cats.settings)
    check_recipe(RECIPE, METHODS["deebert"], CLASSES, {})
    with pytest.raises(ConfigError, match="the exits' 'logits', which class_means does not"):
        check_recipe(RECIPE, METHODS["class_means"], CLASSES, {})


# The fits


def test_each_fit_has_rows_of_its_own(examples: list[Example]) -> None:
    train, parts = set_apart(list(examples), FITS, seed=1)
    assert {name: len(rows) for name, rows in parts.items()} == {"scale": 15, "meta": 30}
    everywhere = [*map(id, train), *map(id, parts["scale"]), *map(id, parts["meta"])]
    assert sorted(everywhere) == sorted(map(id, examples))


def test_temperatures_are_fitted_and_nothing_else_changes(
    checkpoint: Path, examples: list[Example]
) -> None:
    model = model_of(checkpoint)
    before, outputs = checksum(model, ".temperature"), outputs_of(model, examples)
    for depth in (1, 3):
        # Labels that this exit is right about in four rows of five.
        classes_N = outputs[depth]["logits"].argmax(dim=1)
        target_N = torch.where(torch.arange(len(examples)) % 5 > 0, classes_N, (classes_N + 1) % 3)
        rows = [replace(e, target=int(t)) for e, t in zip(examples, target_N, strict=True)]
        record = fit_temperatures(Fitting(model, rows, seed=0))
        assert checksum(model, ".temperature") == before
        fitted = model.exits[str(depth)].get_buffer("temperature").item()
        assert record["temperature"][str(depth)] == pytest.approx(fitted, abs=1e-5)
        logits_NC = outputs[depth]["logits"] / fitted
        losses = [cross_entropy(logits_NC * x, target_N).item() for x in (1.0, 0.97, 1.03)]
        assert losses[0] == min(losses), "the loss is least at the temperature found"


@pytest.mark.parametrize("how", ["each", "shared"])
@pytest.mark.parametrize("task", [CLASSES, VALUES], ids=lambda task: task.kind)
def test_meta_classifiers_learn_to_tell_and_the_full_model_stays_as_it_is(
    how: str, task: TaskSpec, checkpoint: Path, examples: list[Example]
) -> None:
    model = model_of(checkpoint, task, meta=how)
    if task == VALUES:
        comparable(model, examples)
    before = checksum(model, ".meta.")
    meta = checksum(model)
    record = fit_meta(Fitting(model, examples, seed=0))
    assert checksum(model, ".meta.") == before, "F and the early heads are frozen"
    assert checksum(model) != meta
    assert all(parameter.grad is None for parameter in model.parameters())
    outputs, policy = outputs_of(model, examples), model.policy
    assert isinstance(policy, ConsistencyPolicy)
    for depth in range(1, N):
        agrees_N = policy.agrees(outputs[depth]["logits"], outputs[N]["logits"])
        share = agrees_N.float().mean().item()
        assert 0.02 < share < 0.98, "guards this test: some rows agree and some do not"
        assert record["agreement"][str(depth)] == pytest.approx(share, abs=1e-5)
        area = roc_area(outputs[depth]["score"], agrees_N)
        # As the runner sees scores, not as the fit did: the same inputs, the same history.
        assert record["roc_area"][str(depth)] == pytest.approx(area, abs=1e-3)
        assert area is not None
        assert area > 0.7


def test_a_fit_is_the_same_again(checkpoint: Path, examples: list[Example]) -> None:
    sums = []
    for _ in range(2):
        model = model_of(checkpoint)
        fit_meta(Fitting(model, examples, seed=3))
        sums.append(checksum(model))
    assert sums[0] == sums[1]


def test_the_rarer_answer_counts_as_much_as_the_commoner() -> None:
    """Inputs that say nothing: weighted by N / count, the score comes out at a half, not at the share."""
    torch.manual_seed(0)
    net: list[torch.nn.Module] = [torch.nn.Linear(1, 2)]
    agrees_EN = torch.arange(400)[None] % 10 > 0  # nine in ten
    _train(net, [torch.zeros(400, 1)], agrees_EN, seed=0)
    score = torch.softmax(net[0](torch.zeros(1, 1)), dim=-1)[0, 1].item()
    assert score == pytest.approx(0.5, abs=0.05)


def test_the_area_under_the_roc_curve_counts_pairs_in_order() -> None:
    score, positive = torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([True, True, False, False])
    # Pairs: 0.9 above both; 0.4 ties with 0.4 and is above 0.1.
    assert roc_area(score, positive) == (1 + 1 + 0.5 + 1) / 4
    assert roc_area(score, torch.ones(4, dtype=torch.bool)) is None


# A bundle


@pytest.fixture(scope="module")
def trained(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Bundle]:
    """Two bundles that differ in how long their second stage was: 1 epoch, and 3."""
    folder = tmp_path_factory.mktemp("cats")
    data = write_topics(folder / "data", train=300, dev=400, test=200)
    made = {}
    for epochs in (1, 3):
        table = {
            "method": "cats",
            "backbone": str(checkpoint),
            "training": {"lr": 3e-3, "batch": 16, "stage_epochs": [6, epochs]},
        }
        config = resolve_config(table, where="test")
        request = Request(
            config, data, folder / f"bundle{epochs}", "offramp train ...", finish=epochs == 1
        )
        made[epochs] = train_bundle(request, Report())
    return made


@pytest.mark.slow
def test_training_early_heads_and_fitting_leave_the_full_model_bit_for_bit(
    trained: dict[int, Bundle],
) -> None:
    one, three = trained[1].tensors, trained[3].tensors
    full = [n for n in one if not n.startswith("exits.") or n.startswith(f"exits.{N}.")]
    assert all(np.array_equal(one[name], three[name]) for name in full)
    assert not np.array_equal(one["exits.1.narrow.weight"], three["exits.1.narrow.weight"])
    assert isinstance(load_model(trained[1]).exits["1"], MetaBranch)
    stages = [entry["stage"] for entry in trained[1].manifest.training["history"]]
    assert stages[-2:] == ["temperatures", "meta classifiers"]


@pytest.mark.slow
def test_a_bundle_carries_its_guarantee_and_loses_it_with_another_goal(
    trained: dict[int, Bundle],
) -> None:
    bundle = trained[1]
    promised = bundle.manifest.training["guarantee"]
    assert set(promised) == {"fp32", "int8"}
    assert promised["fp32"]["epsilon"] == 0.1
    assert (promised["fp32"]["rows"], promised["fp32"]["data"]) == (400, "dev")
    assert promised["fp32"]["inconsistent"] >= 10, (
        "guards this test: the toy must disagree at times"
    )
    card = bundle.path / "README.md"
    assert "with probability 0.9 at least the answer agrees" in card.read_text()
    rows = read_rows(bundle.path.parent / "data" / "dev.tsv")
    result = recalibrate(bundle, rows, Goal(epsilon=0.2), "fp32", {}, Report())
    again = Bundle.read(bundle.path)
    assert json.loads(json.dumps(result))["fp32"]["guarantee"]["epsilon"] == 0.2
    assert again.manifest.training["guarantee"]["fp32"]["data"] == "dev.tsv"
    assert "fp32: with probability 0.8 at least" in card.read_text()
    assert len(set(again.knobs("fp32")["threshold"])) == 1
    assert result["fp32"]["mean_depth"] < N
    recalibrate(again, rows, Goal(max_drop=1.0), "fp32", {}, Report())
    last = Bundle.read(bundle.path)
    assert set(last.manifest.training["guarantee"]) == {"int8"}
    assert "fp32: with probability" not in card.read_text()
    last.verify()
