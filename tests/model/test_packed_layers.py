"""Layers over packed rows: the reference's answers, for every method and every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from law import Outcome
from subjects import SUBJECTS, N, Subject, close, inputs
from tiny_checkpoint import FAMILY_CONFIGS
from torch import Tensor
from toy_models import eager, mixed_knobs, toy_model

from offramp_common.activations import Activations, Rows
from offramp_common.runner import JoinedLayers, run
from offramp_common.spec import never_exit
from offramp_model.backbones import FAMILIES, Backbone, backbone_from_config
from offramp_model.backbones.packed import Packed, can_pack, padded_to
from offramp_model.packed_layers import PackedLayers
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch

# The same sums in another order, over four layers whose values are of size 1.
TOLERANCE = 1e-5


@pytest.fixture(params=SUBJECTS, ids="-".join)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(*request.param)


def whole(layers: Any, acts: Activations[Tensor], knobs: Any) -> Outcome:
    return Outcome.of(run(layers, acts, N, knobs).left)


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_packed_rows_get_the_references_answers_and_exits(subject: Subject, rows: int) -> None:
    model, batch = subject.model(), to_torch(inputs(rows))
    for knobs in (mixed_knobs(model), eager(model), never_exit(model.knobs, N)):
        close(whole(PackedLayers(model), batch, knobs), whole(TorchLayers(model), batch, knobs))


def test_batches_run_together_get_what_each_gets_alone(subject: Subject) -> None:
    """Of other lengths and at other operating points, and in the middle of the model."""
    model = subject.model()
    layers = PackedLayers(model)
    points = [mixed_knobs(model), eager(model), never_exit(model.knobs, N)]
    parts = [(to_torch(inputs(3 + i, seed=i)), knobs) for i, knobs in enumerate(points)]
    for _ in range(N):
        together = layers.steps([(Rows.of(acts), knobs) for acts, knobs in parts])
        for (acts, knobs), step in zip(parts, together, strict=True):
            alone = TorchLayers(model).step(acts, knobs)
            assert step.look is not None
            assert alone.look is not None
            np.testing.assert_array_equal(step.look.leave_B, alone.look.leave_B)
            torch.testing.assert_close(step.look.answer, alone.look.answer, rtol=0, atol=1e-4)
            assert set(step.acts.state) == set(alone.acts.state)
        parts = [(step.acts, knobs) for step, (_, knobs) in zip(together, parts, strict=True)]


def family_backbone(family: str) -> Backbone:
    settings: dict[str, Any] = {
        "vocab_size": 80,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "initializer_range": 0.2,
        **FAMILY_CONFIGS[family],
    }
    if family == "albert":
        settings |= {"num_hidden_groups": 2, "inner_group_num": 2}
    if family == "distilbert":
        settings = {"vocab_size": 80, "initializer_range": 0.2, **FAMILY_CONFIGS[family]}
        settings |= {"n_layers": 4}
    torch.manual_seed(0)
    return backbone_from_config({"model_type": family, **settings}).eval()


def with_backbone(backbone: Backbone) -> MultiExitModel:
    like = toy_model("deebert", n_layers=4)
    return MultiExitModel(backbone, like.method, like.spec).eval()


def packable() -> list[str]:
    return [family for family in sorted(FAMILIES) if family in FAMILY_CONFIGS]


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("family", packable())
@torch.inference_mode()
def test_each_family_packed_equals_its_own_modules(family: str, positions: bool) -> None:
    model = with_backbone(family_backbone(family))
    assert can_pack(model.backbone)
    ids = np.random.default_rng(0).integers(4, 80, (5, 12, 1))
    acts = Activations(torch.from_numpy(ids), np.array([9, 3, 12, 3, 1]), 0)
    never = never_exit(model.knobs, 4)
    start = TorchLayers(model).step(acts, never).acts
    if positions:
        places = torch.cumsum(torch.randint(1, 4, (5, 12)), dim=1)
        start = replace(start, positions_BT=places)
    packed, reference = PackedLayers(model), TorchLayers(model)
    got, wanted = start, start
    for _ in range(3):
        got, wanted = packed.step(got, never).acts, reference.step(wanted, never).acts
    for row, length in enumerate(acts.lengths_B):
        a, b = got.hidden_BTD[row, :length], wanted.hidden_BTD[row, :length]
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def test_a_family_that_cannot_be_packed_is_run_as_the_reference_does() -> None:
    backbone = family_backbone("bert")
    backbone.family = "strange"
    model = with_backbone(backbone)
    batch = inputs(8)
    ids = to_torch(replace(batch, hidden_BTD=batch.hidden_BTD % 80))
    never = never_exit(model.knobs, 4)
    got, wanted = (run(kind(model), ids, 4, never).left for kind in (PackedLayers, TorchLayers))
    assert Outcome.of(got).same_as(Outcome.of(wanted))
    with pytest.raises(ValueError, match="strange runs in fp32 alone"):
        PackedLayers(model, precision="bf16")


def test_brain_floats_err_by_their_own_rounding_alone() -> None:
    model, batch = toy_model("deebert"), to_torch(inputs(8))
    never = never_exit(model.knobs, N)
    got = whole(PackedLayers(model, precision="bf16"), batch, never)
    wanted = whole(TorchLayers(model), batch, never)
    # 8 bits a value, logits of size 1 to 3 after three layers; a wrong row would be off by units.
    np.testing.assert_allclose(got.answers, wanted.answers, atol=0.3)
    with pytest.raises(ValueError, match="must be one of fp32, bf16"):
        PackedLayers(model, precision="fp8")


def test_rows_without_a_number_leave_their_neighbours_alone() -> None:
    model = toy_model("deebert")
    never = never_exit(model.knobs, N)
    start = TorchLayers(model).step(to_torch(inputs(8)), never).acts
    broken = start.hidden_BTD.clone()
    broken[3] = float("nan")
    broken[5] = float("inf")
    healthy = whole(PackedLayers(model), start, never)
    got = whole(PackedLayers(model), replace(start, hidden_BTD=broken), never)
    others = [0, 1, 2, 4, 6, 7]
    np.testing.assert_array_equal(got.answers[others], healthy.answers[others])
    assert np.isnan(got.answers[[3, 5]]).all()


def test_the_matrix_products_see_few_sizes_and_little_padding() -> None:
    """oneDNN keeps memory for each size that it ever saw."""
    sizes = {tokens: padded_to(tokens) for tokens in range(1, 1025)}
    assert len(set(sizes.values())) <= 112
    for tokens, padded in sizes.items():
        assert tokens <= padded <= tokens * (1 + 1 / 16)
    assert [sizes[tokens] for tokens in range(1, 33)] == list(range(1, 33))  # lone rows


def test_a_layer_over_any_rows_has_one_of_those_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    run_layer = Packed.run_layer

    def watched(self: Packed, index: int, hidden_ND: Tensor, runs: Any, bias: Any) -> Tensor:
        seen.append((sum(rows * length for rows, length in runs), hidden_ND.shape[0]))
        return run_layer(self, index, hidden_ND, runs, bias)

    monkeypatch.setattr(Packed, "run_layer", watched)
    model = toy_model("deebert")
    never = never_exit(model.knobs, N)
    for rows in (1, 7, 31, 64):
        whole(PackedLayers(model), to_torch(inputs(rows)), never)
    assert len(seen) == 4 * N
    assert max(tokens for tokens, _ in seen) > 128
    assert [given for _, given in seen] == [padded_to(tokens) for tokens, _ in seen]


def test_rows_that_are_not_copied_together_yet_are_run_as_a_batch_of_them(subject: Subject) -> None:
    model = subject.model()
    never, layers = never_exit(model.knobs, N), PackedLayers(model)
    for depth in range(2):
        pieces = [to_torch(inputs(4 + i, seed=i)) for i in range(2)]
        if depth:
            pieces = [TorchLayers(model).step(acts, never).acts for acts in pieces]
        at = [np.array([0, 2]), np.array([1, 3, 4])]
        rows = Rows(tuple(zip(pieces, at, strict=True)))
        (step,) = layers.steps([(rows, never)])
        alone = [
            TorchLayers(model).step(acts.take(i), never) for acts, i in zip(pieces, at, strict=True)
        ]
        assert step.look is not None
        answers = torch.cat([one.look.answer for one in alone if one.look is not None])
        torch.testing.assert_close(step.look.answer, answers, rtol=0, atol=1e-4)
        for name, value in step.acts.state.items():
            wanted = torch.cat([one.acts.state[name] for one in alone])
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-4)


def test_packed_layers_are_joined_layers_and_the_reference_is_not() -> None:
    model = toy_model("deebert")
    assert isinstance(PackedLayers(model), JoinedLayers)
    assert not isinstance(TorchLayers(model), JoinedLayers)
