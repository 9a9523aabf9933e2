"""Tokens left out on the way: the others' original places count where a family's layers read positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from offramp_common.activations import Activations, mask_of, unpack
from offramp_common.spec import TaskSpec, never_exit
from offramp_model.backbones import Backbone, backbone_from_config
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch

# Attention over fewer keys sums in another order.
TOLERANCE = 2e-5
LENGTHS = np.array([9, 4, 12])
VOCABULARY = 80
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    # Ten times the usual: attention that is nearly uniform would hide wrong places.
    "initializer_range": 0.2,
}
FAMILIES = ("bert", "mpnet", "roberta")
KEPT = ([0, 2, 3, 8], [0, 1, 2, 3], [0, 5, 11])


def backbone_of(family: str) -> Backbone:
    torch.manual_seed(0)
    return backbone_from_config({"model_type": family, **CONFIG}).eval()


def hidden_of(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    ids = unpack(np.random.default_rng(0).integers(5, VOCABULARY, LENGTHS.sum()), LENGTHS)
    mask_BT = torch.from_numpy(mask_of(LENGTHS))
    return backbone.embed_ids(torch.from_numpy(ids), None), mask_BT


def kept_of(hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """Hidden states, lengths and places of the tokens that are kept."""
    left_B = np.array([len(row) for row in KEPT])
    packed = np.concatenate([hidden_BTD[b, row].numpy() for b, row in enumerate(KEPT)])
    places = unpack(np.concatenate(KEPT), left_B)
    return torch.from_numpy(unpack(packed, left_B)), left_B, torch.from_numpy(places)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_kept_tokens_come_out_as_if_the_others_were_there_and_not_looked_at(family: str) -> None:
    backbone = backbone_of(family)
    hidden_BTD, mask_BT = hidden_of(backbone)
    seen_BT = torch.zeros_like(mask_BT)
    for row, kept in enumerate(KEPT):
        seen_BT[row, kept] = True
    n = backbone.n_layers
    whole_BTD = backbone.run_layers(hidden_BTD, seen_BT, 1, n)
    few_BTD, left_B, places_BT = kept_of(hidden_BTD)
    few_mask_BT = torch.from_numpy(mask_of(left_B))
    out_BTD = backbone.run_layers(few_BTD, few_mask_BT, 1, n, places_BT)
    for row, kept in enumerate(KEPT):
        np.testing.assert_allclose(
            out_BTD[row, : len(kept)], whole_BTD[row, kept], rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_places_that_are_0_1_2_change_nothing(family: str) -> None:
    backbone = backbone_of(family)
    hidden_BTD, mask_BT = hidden_of(backbone)
    places_BT = torch.arange(hidden_BTD.shape[1]).expand(mask_BT.shape)
    plain_BTD = backbone.run_layers(hidden_BTD, mask_BT, 0, 2)
    assert torch.equal(backbone.run_layers(hidden_BTD, mask_BT, 0, 2, places_BT), plain_BTD)


@torch.inference_mode()
def test_the_reference_runner_hands_places_to_the_layers() -> None:
    backbone = backbone_of("mpnet")
    hidden_BTD, _ = hidden_of(backbone)
    few_BTD, left_B, places_BT = kept_of(hidden_BTD)
    n, task = backbone.n_layers, TaskSpec("classification", ("a", "b"))
    spec = HeadSpec(task, backbone.width, n, (n,), {"pooling": "mean"})
    layers = TorchLayers(MultiExitModel(backbone, METHODS["deebert"], spec))
    acts = Activations(few_BTD.numpy(), left_B, 1, positions_BT=places_BT.numpy())
    knobs = never_exit(layers.model.knobs, n)
    got = layers.step(to_torch(acts), knobs).acts
    mask_BT = torch.from_numpy(mask_of(left_B))
    expected_BTD = backbone.run_layers(few_BTD, mask_BT, 1, 2, places_BT)
    assert torch.equal(got.hidden_BTD, expected_BTD)
    assert got.positions_BT is not None
    elsewhere = layers.step(to_torch(replace(acts, positions_BT=None)), knobs).acts
    assert not torch.allclose(elsewhere.hidden_BTD, expected_BTD, atol=1e-3)
