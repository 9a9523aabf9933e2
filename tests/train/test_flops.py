"""The counter that all methods are compared by, against formulas."""

from __future__ import annotations

import numpy as np
import pytest
from toy_models import toy_model

from offramp_common.spec import TaskSpec
from offramp_model.backbones import backbone_from_config
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_train.flops import FlopTable, count_flops


@pytest.mark.parametrize("n_tokens", [1, 7, 128])
def test_bert_base_costs_what_the_formula_says_to_the_last_multiplication(n_tokens: int) -> None:
    """A layer is 24 T D^2 (four D x D products, two of D x 4D) and 4 T^2 D (scores, and their use); a head
    is its pooler and classifier. Elementwise work, which nobody counts here, is all that is missing."""
    width, n_layers, classes = 768, 12, 3
    task = TaskSpec("classification", tuple("abc"))
    spec = HeadSpec(task, width, n_layers, tuple(range(1, n_layers + 1)), {"pooling": "first"})
    model = MultiExitModel(backbone_from_config({"model_type": "bert"}), METHODS["deebert"], spec)
    flops = count_flops(model, n_tokens)
    layer = 24 * n_tokens * width**2 + 4 * n_tokens**2 * width
    head = 2 * width**2 + 2 * width * classes
    assert flops.layers == (layer,) * n_layers
    assert flops.heads == (head,) * n_layers
    assert flops.until(5) == 5 * (layer + head)


def test_layers_without_an_exit_cost_no_head() -> None:
    flops = count_flops(toy_model("deebert", exits=(2, 3)), 5)
    assert flops.heads[0] == 0 < flops.heads[1] == flops.heads[2]


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_exits_can_be_counted(method: str) -> None:
    """Whatever a head reads, state of earlier exits too, it costs at least a classifier's products."""
    model = toy_model(method)
    width, classes = model.backbone.width, model.spec.task.answer_width
    flops = count_flops(model, 4)
    assert all(head >= 2 * width * classes for head in flops.heads)


def test_rows_are_charged_for_their_own_length_and_depth() -> None:
    model = toy_model("deebert")
    table = FlopTable(model)
    found_N = table.rows(np.array([1, 3, 1]), np.array([4, 9, 9]))
    wanted = [count_flops(model, tokens).until(depth) for depth, tokens in [(1, 4), (3, 9), (1, 9)]]
    assert found_N.tolist() == wanted
