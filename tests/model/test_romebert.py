"""RomeBERT decides as DeeBERT does; what is its own is the training (tests/train/test_romebert.py)."""

from __future__ import annotations

import numpy as np
import subjects
import torch
from law import whole
from toy_models import LABELS, toy_model
from twins import assert_decides_as

from offramp_common.activations import Activations, mask_of
from offramp_common.spec import TaskSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import TorchLayers

N = 4


def _inputs() -> Activations[np.ndarray]:
    return subjects.inputs(32, below=30)


@torch.inference_mode()
def test_at_threshold_zero_the_answer_is_the_final_heads_on_all_layers() -> None:
    """The sheet's last line: S = 0 equals the jointly trained final head, to the bit."""
    model, inputs = toy_model("romebert", n_layers=N, seed=3), _inputs()
    got = whole(TorchLayers(model), inputs, {"threshold": (0.0,) * N})
    mask_BT = torch.from_numpy(mask_of(inputs.lengths_B))
    outputs = model(torch.from_numpy(inputs.hidden_BTD), mask_BT)
    assert (got.depth_B == N).all()
    np.testing.assert_array_equal(got.answers, outputs[N]["logits"].numpy())


def test_with_the_same_weights_it_decides_as_deebert_does() -> None:
    points = [{"threshold": float(threshold)} for threshold in np.linspace(0.0, 1.6, 9)]
    assert_decides_as("romebert", "deebert", TaskSpec("classification", LABELS), points)


def test_its_recipe_is_its_own_and_nothing_is_carried() -> None:
    method = METHODS["romebert"]
    assert method.recipe == "romebert"
    assert toy_model("romebert").policy.state_fields(2) == {}
