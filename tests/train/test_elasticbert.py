"""ElasticBERT's recipe: a plain sum of losses, and gradients in balance."""

from __future__ import annotations

import pytest
import torch
from seen import VALUES, seen
from torch import Tensor
from toy_models import toy_model

from offramp_train.recipes.elasticbert import RECIPE, equilibrium
from offramp_train.recipes.recipe import Progress, plain_sum

L = 4


def _run(exits: tuple[int, ...], balanced: bool) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """(hidden state at each layer's output, loss of each exit) of one forward pass."""
    model = toy_model("elasticbert", n_layers=L, exits=exits, seed=1)
    hidden: dict[int, Tensor] = {}
    progress = Progress(0, 1, 0, L, exits=exits)

    def between(depth: int, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BTD.retain_grad()
        hidden[depth] = hidden_BTD
        return equilibrium(depth, hidden_BTD, progress) if balanced else (hidden_BTD, hidden_BTD)

    ids_BTF = torch.randint(4, 100, (3, 6, 1), generator=torch.Generator().manual_seed(0))
    outputs = model(ids_BTF, torch.ones(3, 6, dtype=torch.bool), between)
    target_B = torch.tensor([0, 3, 1])
    losses = {
        depth: torch.nn.functional.cross_entropy(outputs[depth]["logits"], target_B)
        for depth in exits
    }
    return hidden, losses


@pytest.mark.parametrize("exits", [(1, 2, 3, 4), (2, 4), (1, 2, 4), (4,)])
def test_the_gradient_at_a_layers_output_is_the_mean_of_the_losses_of_the_exits_from_there_on(
    exits: tuple[int, ...],
) -> None:
    """The sheet's first line, by autograd without any scaling."""
    plain, losses = _run(exits, balanced=False)
    expected = {
        depth: torch.stack(
            [
                torch.autograd.grad(losses[j], plain[depth], retain_graph=True)[0]
                for j in exits
                if j >= depth
            ]
        ).mean(dim=0)
        for depth in plain
    }
    hidden, losses = _run(exits, balanced=True)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    for depth, gradient_BTD in expected.items():
        # Float32 sums in another order.
        torch.testing.assert_close(hidden[depth].grad, gradient_BTD, rtol=1e-4, atol=1e-7)
        assert gradient_BTD.abs().max() > 1e-3


def test_two_layers_worked_out_by_hand() -> None:
    """h1 = 2x, h2 = 3 h1; the exits' losses are h1 and 5 h2."""
    progress = Progress(0, 1, 0, 2, exits=(1, 2))
    x = torch.tensor([1.0], requires_grad=True)
    first = 2 * x
    first.retain_grad()
    read1, on = equilibrium(1, first, progress)
    second = 3 * on
    second.retain_grad()
    read2, _ = equilibrium(2, second, progress)
    (read1 + 5 * read2).sum().backward()  # type: ignore[no-untyped-call]
    assert second.grad is not None
    assert first.grad is not None
    assert second.grad.item() == 5.0, "the last layer has one exit, and no second factor"
    assert first.grad.item() == (1 + 15) / 2
    assert x.grad is not None
    assert x.grad.item() == 2 * (1 + 15) / 2


def test_values_are_the_same_to_the_bit_and_without_gradients_nothing_is_done() -> None:
    _, plain = _run((1, 2, 3, 4), balanced=False)
    _, balanced = _run((1, 2, 3, 4), balanced=True)
    assert all(torch.equal(plain[depth], balanced[depth]) for depth in plain)
    with torch.no_grad():
        hidden_BTD = torch.randn(2, 3, 4)
        for out_BTD in equilibrium(1, hidden_BTD, Progress(0, 1, 0, 3, exits=(1, 2, 3))):
            assert torch.equal(out_BTD, hidden_BTD)
            assert not out_BTD.requires_grad


def test_the_loss_is_a_plain_sum_of_cross_entropies_or_squared_errors() -> None:
    torch.manual_seed(1)
    answers = {depth: torch.randn(5, 3) for depth in (1, 2, 3)}
    target_B = torch.tensor([0, 2, 1, 1, 0])
    by_hand = sum(torch.nn.functional.cross_entropy(a, target_B).item() for a in answers.values())
    assert plain_sum(seen(answers, target_B)).item() == pytest.approx(by_hand, rel=1e-6)
    values = {1: torch.tensor([[1.0], [2.0]]), 2: torch.tensor([[0.0], [4.0]])}
    loss = plain_sum(seen(values, torch.tensor([0.0, 4.0]), task=VALUES))
    assert loss.item() == (1 + 4) / 2 + 0.0


def test_nothing_is_frozen_and_the_gradients_are_balanced_in_training() -> None:
    (stage,) = RECIPE.stages
    assert (stage.trains, stage.between) == ("all", equilibrium)
