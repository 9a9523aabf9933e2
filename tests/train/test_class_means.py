"""Class Means' recipe, its fit, and thresholds just above 1 / C."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from tiny_checkpoint import make_checkpoint

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.backbones import backbone_from_pretrained
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.methods.class_means import ClassMeans
from offramp_model.split_model import MultiExitModel
from offramp_model.store import named_tensors
from offramp_train.batches import Example, collate
from offramp_train.calibrate import grid, sweep
from offramp_train.fits.class_means import fit_means
from offramp_train.fits.fit import Fitting
from offramp_train.metrics import metric_of
from offramp_train.recipe_check import check_recipe, set_trainable, start_heads
from offramp_train.recipes import RECIPES
from offramp_train.replay import Recording, Scorer

CLASSES = TaskSpec("classification", ("a", "b", "c", "d"))
UNSEEN = 3  # the class that no training row has


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultiExitModel:
    torch.manual_seed(3)
    backbone = backbone_from_pretrained(str(make_checkpoint(tmp_path_factory.mktemp("checkpoint"))))
    spec = HeadSpec(CLASSES, backbone.width, backbone.n_layers, (1, 2, 3), {"pooling": "mean"}, 0.5)
    made = MultiExitModel(backbone, METHODS["class_means"], spec)
    start_heads(made, "auto")
    return made.eval()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    rng = np.random.default_rng(4)
    made = []
    for _ in range(300):
        n = int(rng.integers(3, 12))
        ids = tuple(int(i) for i in rng.integers(5, 25, n))
        made.append(Example(ids, (0,) * n, int(rng.integers(0, UNSEEN))))
    return made


def checksum(model: MultiExitModel) -> str:
    """Of everything but means and scales."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(model).items()):
        if not name.endswith((".means", ".scale")):
            digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def stored(model: MultiExitModel, examples: list[Example], depth: int) -> torch.Tensor:
    """All features after `depth` layers at once, one row at a time, in float64."""
    rows = []
    for example in examples:
        batch = collate([example], model.channels)
        hidden_BTD = model.backbone.embed(batch.inputs_BTF)
        hidden_BTD = model.backbone.run_layers(hidden_BTD, batch.mask_BT, 0, depth)
        rows.append(hidden_BTD[0].double().mean(dim=0))
    return torch.stack(rows)


def test_means_and_scales_of_a_streaming_pass_are_those_of_stored_features(
    model: MultiExitModel, examples: list[Example]
) -> None:
    before = checksum(model)
    record = fit_means(Fitting(model, examples, seed=0))
    assert record["rows"] == 300
    assert checksum(model) == before, "nothing else of the model changes"
    target_N = torch.tensor([example.target for example in examples])
    for depth in (1, 2):
        feature_ND = stored(model, examples, depth)
        for c in range(UNSEEN):
            mean_D = feature_ND[target_N == c].mean(dim=0)
            # Over all rows, not the class's alone.
            scale = (feature_ND - mean_D).norm(dim=1).mean()
            got = model.exits[str(depth)].get_buffer("means")[c]
            # Features are float32, of size 1, from batches of other shapes.
            torch.testing.assert_close(got.double(), mean_D, rtol=0, atol=1e-5)
            found = model.exits[str(depth)].get_buffer("scale")[c].item()
            assert found == pytest.approx(scale.item(), rel=1e-4)


def test_features_of_another_size_fitted_anew_change_no_probability(
    model: MultiExitModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(examples, model.channels)

    def probabilities() -> torch.Tensor:
        fit_means(Fitting(model, examples, seed=0))
        with torch.no_grad():
            outputs = model(batch.inputs_BTF, batch.mask_BT)
        return torch.stack([outputs[depth]["logits"].softmax(-1) for depth in (1, 2)])

    before, scale = probabilities(), model.exits["1"].get_buffer("scale").clone()
    plain = ClassMeans.feature
    monkeypatch.setattr(ClassMeans, "feature", lambda self, h, m: 50.0 * plain(self, h, m))
    torch.testing.assert_close(probabilities(), before, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        model.exits["1"].get_buffer("scale")[:UNSEEN], 50.0 * scale[:UNSEEN], rtol=1e-4, atol=0
    )
    assert (before.amax(dim=-1) - 1 / UNSEEN).abs().max() > 0.01, "they differ from chance"


def test_a_class_without_rows_is_never_the_answer(
    model: MultiExitModel, examples: list[Example]
) -> None:
    fit_means(Fitting(model, examples, seed=0))
    batch = collate(examples, model.channels)
    with torch.no_grad():
        outputs = model(batch.inputs_BTF, batch.mask_BT)
    for depth in (1, 2):
        p_NC = outputs[depth]["logits"].softmax(-1)
        assert (p_NC[:, UNSEEN] == 0).all()
        assert torch.isfinite(p_NC).all()


def test_rows_that_are_all_alike_do_not_divide_by_zero(model: MultiExitModel) -> None:
    fit_means(Fitting(model, [Example((5, 6, 7), (0, 0, 0), 1)] * 4, seed=0))
    assert all((model.exits[d].get_buffer("scale") > 0).all() for d in ("1", "2"))


def test_the_recipe_trains_the_backbone_and_the_final_head(model: MultiExitModel) -> None:
    (stage,) = RECIPES["class_means"].stages
    set_trainable(model, stage, freeze_embeddings=False)
    assert all(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)


def test_recipes_that_train_exits_are_refused_and_this_one_for_exits_that_learn() -> None:
    mine, settings = METHODS["class_means"], METHODS["class_means"].settings
    check_recipe(RECIPES["class_means"], mine, CLASSES, settings)
    with pytest.raises(ConfigError, match="trains the exits' 'logits', which class_means does not"):
        check_recipe(RECIPES["deebert"], mine, CLASSES, settings)
    with pytest.raises(
        ConfigError, match="would leave pabee's 'logits' untrained; recipes that fit"
    ):
        check_recipe(RECIPES["class_means"], METHODS["pabee"], CLASSES, {})


def test_calibration_finds_the_thresholds_just_above_one_over_the_number_of_classes() -> None:
    """150 classes, normalised distances about 1: the largest probabilities lie within 0.7 % to 1.3 %."""
    n, rows = 150, 400
    rng = np.random.default_rng(6)
    target_N = rng.integers(0, n, rows)
    outputs = {}
    for depth in (1, 2, 3):
        distance_NC = rng.normal(1.0, 0.03, (rows, n))
        distance_NC[np.arange(rows), target_N] -= rng.uniform(0.0, 0.6, rows)
        outputs[depth] = {"logits": torch.from_numpy(-distance_NC.astype(np.float32))}
    task = TaskSpec("classification", tuple(map(str, range(n))))
    method, spec = METHODS["class_means"], HeadSpec(task, 8, 3, (1, 2, 3))
    _, quality = metric_of(task)
    scorer = Scorer(
        method.policy(spec),
        Recording(outputs, np.full(rows, 5), 3),
        method.knobs(spec),
        task,
        quality,
        target_N,
        np.ones(rows),
    )
    (knob,) = scorer.specs
    useful = [v for v in grid(scorer, knob) if 0.0065 < v < 0.0135]
    assert len(useful) > 30
    depths = [score.mean_depth for _, score in sweep(scorer)]
    assert len(depths) == 12
    assert max(np.diff(depths)) < 0.3, "evenly spread over mean depth, as far as exits allow"
