"""LeeBERT's recipe against its sheet."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import make_pass, random_batch
from seen import VALUES, seen
from tiny_checkpoint import make_checkpoint, write_topics
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, kl_div
from toy_models import toy_model
from trainers import assert_stops_leave_no_trace, make_trainer, small_config, weights_of

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_train.batches import Batch, collate
from offramp_train.data import Splits, read_splits
from offramp_train.loop import Trainer
from offramp_train.recipe_check import check_model, loss_settings
from offramp_train.recipes import RECIPES
from offramp_train.recipes.gradients import learning
from offramp_train.recipes.leebert import LossWeights, cross_level
from offramp_train.recipes.recipe import Pass, Seen, gradients_of

RECIPE = RECIPES["leebert"]
FIXED: dict[str, Any] = {"weights": "fixed", "share": 0.0, "start": "depth", "weight_sum": 1.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    whole = read_splits(write_topics(tmp_path_factory.mktemp("topics")))
    return replace(whole, train=whole.train.take(list(range(128))))


def _same_weights(a: Trainer, b: Trainer) -> bool:
    expected = weights_of(b)
    return all(torch.equal(w, expected[name]) for name, w in weights_of(a).items())


def _weights(**settings: Any) -> LossWeights:
    return LossWeights((1, 2, 3), loss_settings(RECIPE, settings, "test"))


# The sheet's "How to test"


def test_with_fixed_weights_by_depth_and_no_distillation_it_is_pabees_training_to_the_bit(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    """PABEE's on the same batches: two to an update, one of each half."""
    training = {"keep": "last"}
    ours = small_config(method="leebert", loss=FIXED, training=training)
    a = make_trainer(ours, splits, checkpoint, tmp_path / "a")
    pabee = small_config(method="leebert", recipe="pabee", training=training)
    recipe = replace(RECIPES["pabee"], halves=True)
    b = make_trainer(pabee, splits, checkpoint, tmp_path / "b", recipe=recipe)
    histories = a.fit(), b.fit()
    assert histories[0] == histories[1]
    assert _same_weights(a, b)


def test_when_weights_do_not_move_it_is_mutual_distillation_with_fixed_weights_to_the_bit(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    """The look-ahead and both sides of the difference change neither the model nor the random numbers."""
    # A rate of 0 is refused; at this one omega moves by 1e-30, and exp(omega) is 1.
    training = {"keep": "last", "extra_lr": 1e-30}
    moving = small_config(method="leebert", training=training)
    fixed = small_config(method="leebert", loss={"weights": "fixed"}, training=training)
    a = make_trainer(moving, splits, checkpoint, tmp_path / "a")
    b = make_trainer(fixed, splits, checkpoint, tmp_path / "b")
    assert [r["loss"] for r in a.fit()] == [r["loss"] for r in b.fit()]
    assert isinstance(a.extra, LossWeights)
    assert a.extra.omega.abs().max() > 0, "omega did learn"
    assert _same_weights(a, b)


def test_fixed_weights_give_the_gradient_of_the_weighted_sum() -> None:
    model = toy_model("leebert", seed=3)
    work = make_pass(model, RECIPE, [random_batch(1), random_batch(2)], weights="fixed")
    loss = cross_level(work)
    got = [p.grad for p in learning(model)]
    assert isinstance(work.extra, LossWeights)
    assert work.extra.omega.grad is None, "nothing for the optimiser to do"
    model.zero_grad()
    weights, extra = work.extra.weights, work.extra
    assert gradients_of(lambda s: (weights * extra.terms(s)).sum())(work) == pytest.approx(loss)
    for x, parameter in zip(got, learning(model), strict=True):
        torch.testing.assert_close(x, parameter.grad, rtol=1e-4, atol=1e-6)


def exact_outer_gradient(work: Pass) -> Tensor:
    """grad_omega of the label losses on b2 at theta - lr grad Total(theta; omega; b1), by autograd twice."""
    extra, (first, second) = work.extra, work.batches
    assert isinstance(extra, LossWeights)
    parameters = dict(work.model.named_parameters())
    total = extra.weigh(extra.omega, extra.terms(work.see(first)))
    gradients = torch.autograd.grad(total, list(parameters.values()), create_graph=True)
    moved = {
        name: p - work.lr * gradient
        for (name, p), gradient in zip(parameters.items(), gradients, strict=True)
    }
    outputs = functional_call(work.model, moved, (second.inputs_BTF, second.mask_BT))
    losses = [cross_entropy(out["logits"], second.target_B) for out in outputs.values()]
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), extra.omega)
    return gradient


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("lr", [1e-3, 1e-2, 1e-1])
def test_the_difference_gives_the_exact_second_order_gradient(lr: float, dropout: bool) -> None:
    model = toy_model("leebert", n_layers=2, width=16, seed=3).train(dropout)
    batches = [random_batch(1), random_batch(2)]
    work = make_pass(model, RECIPE, batches, lr=lr, lambda_c=0.0, outer="with eta")
    assert isinstance(work.extra, LossWeights)
    # The fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        cross_level(work)
        got = work.extra.omega.grad
        assert got is not None
        torch.manual_seed(0)
        exact = exact_outer_gradient(work)
    assert torch.cosine_similarity(got, exact, dim=0) > 0.9999, "the sheet asks for 0.99"
    assert got.norm().item() == pytest.approx(exact.norm().item(), rel=0.02)


class NoisyExit(Seen):
    """One exit, by seen.settings["noisy"], is told random labels."""

    __slots__ = ()

    def losses(self) -> dict[int, Tensor]:
        losses, noisy = dict(Seen.losses(self)), self.settings["noisy"]
        noise_B = torch.randint(0, 3, self.target_B.shape)
        losses[noisy] = self.mean(self.row_losses_of(self.answers[noisy], noise_B))
        return losses

    def row_losses_of(self, answer_BC: Tensor, target_B: Tensor) -> Tensor:
        return cross_entropy(answer_BC, target_B, reduction="none")


def _pairs(trainer: Trainer, n: int) -> Iterator[list[Batch]]:
    """Batches of 16, the first from one half of the rows, the second from the other."""
    rng, rows = random.Random(3), list(trainer.epochs.examples)
    halves = rows[::2], rows[1::2]
    for _ in range(n):
        yield [collate(rng.sample(half, 16), 1) for half in halves]


@pytest.mark.slow
@pytest.mark.parametrize(("noisy", "lambda_c"), [(1, 0.1), (2, 0.1), (3, 0.1), (2, 0.0), (2, 1.0)])
def test_the_weight_of_an_exit_whose_labels_are_noise_in_the_first_half_falls(
    noisy: int, lambda_c: float, splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    config = small_config(method="leebert", loss={"lambda_c": lambda_c})
    trainer = make_trainer(config, splits, checkpoint, tmp_path)
    model, extra = trainer.model.train(), trainer.extra
    assert isinstance(extra, LossWeights)
    start = extra.weights[:3]
    groups = [
        {"params": model.parameters(), "lr": 3e-3},
        {"params": extra.parameters(), "lr": 1e-2, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups)
    settings = {**config.loss, "noisy": noisy}
    for batches in _pairs(trainer, 80):
        work = make_pass(model, RECIPE, batches, lr=3e-3, lambda_c=lambda_c)

        def see(batch: Batch, work: Pass = work) -> Seen:
            shown = work.see(batch)
            kind = NoisyExit if batch is work.batches[0] else Seen
            return kind(
                shown.outputs, shown.exits, shown.target_B, shown.weight_B, shown.task, settings,
                shown.progress,
            )  # fmt: skip

        optimiser.zero_grad()
        cross_level(replace(work, extra=extra, see=see))
        optimiser.step()
    end = extra.weights[:3]
    assert end[noisy - 1] < 0.9 * start[noisy - 1]
    assert end.argmin() == noisy - 1, "and lies below all others"
    assert extra.weights.sum().item() == pytest.approx(3.0, rel=1e-5)


# Numbers, and the pitfalls


def _answers() -> tuple[dict[int, Tensor], Tensor]:
    torch.manual_seed(1)
    answers = {depth: torch.randn(5, 3, requires_grad=True) for depth in (1, 2, 3)}
    return answers, torch.tensor([0, 2, 1, 1, 0])


def test_the_terms_by_hand() -> None:
    answers, target = _answers()
    expected = [cross_entropy(answers[i], target) for i in (1, 2, 3)]
    for i in (1, 2, 3):
        for j in (1, 2, 3):
            if i != j:
                teacher = (answers[j] / 2).softmax(-1)
                log_p = (answers[i] / 2).log_softmax(-1)
                expected.append(4 * kl_div(log_p, teacher, reduction="batchmean"))
    got = _weights().terms(seen(answers, target, RECIPE))
    torch.testing.assert_close(got, torch.stack(expected))


def test_two_exits_worked_out_by_hand() -> None:
    # Halved by T = 2 their logits give (1/2, 1/2) and (3/4, 1/4); whole, (1/2, 1/2) and (9/10, 1/10).
    answers = {1: torch.zeros(1, 2), 2: 2 * torch.tensor([[0.75, 0.25]]).log()}
    task = TaskSpec("classification", ("a", "b"))
    weights = LossWeights((1, 2), loss_settings(RECIPE, {}, "test"))
    terms = weights.terms(seen(answers, torch.tensor([0]), RECIPE, task=task))
    # ln 2; -ln 0.9; 4 (3/4 ln 3/2 + 1/4 ln 1/2), the first taught by the second; 4 (1/2 ln 2/3 + 1/2 ln 2)
    by_hand = [0.693147, 0.105361, 0.523248, 0.575364]
    assert terms.tolist() == pytest.approx(by_hand, abs=1e-5)
    # Half of a sum of 2 for the labels, half for the pairs: a weight of 1/2 each.
    assert weights.weigh(weights.omega, terms).item() == pytest.approx(sum(by_hand) / 2, abs=1e-5)


def test_for_values_exits_are_as_far_apart_as_the_square_of_their_difference() -> None:
    answers = {1: torch.tensor([[1.0], [2.0]]), 2: torch.tensor([[3.0], [1.0]])}
    weights = LossWeights((1, 2), loss_settings(RECIPE, {}, "test"))
    got = weights.terms(seen(answers, torch.tensor([0.0, 1.0]), RECIPE, task=VALUES))
    # labels: (1 + 1) / 2, (9 + 0) / 2; pairs: (4 + 1) / 2
    assert got.tolist() == [1.0, 4.5, 2.5, 2.5]


def test_teachers_learn_nothing() -> None:
    answers, target = _answers()
    terms = _weights().terms(seen(answers, target, RECIPE))
    first_from_second = terms[3]
    got = torch.autograd.grad(first_from_second, list(answers.values()), allow_unused=True)
    sizes = [0.0 if gradient is None else gradient.abs().max().item() for gradient in got]
    assert sizes[0] > 1e-4
    assert sizes[1:] == [0.0, 0.0]


def test_weights_add_up_to_the_number_of_exits_wherever_omega_is() -> None:
    weights = _weights()
    assert weights.weights.tolist() == pytest.approx([0.5, 0.5, 0.5] + [0.25] * 6)
    torch.manual_seed(0)
    for scale in (1.0, 10.0, 1000.0):
        with torch.no_grad():
            weights.omega.copy_(torch.randn(9) * scale)
        assert weights.weights.sum().item() == pytest.approx(3.0, rel=1e-5)
        assert (weights.weights >= 0).all()
        ones = weights.weigh(weights.omega, torch.ones(9))
        assert ones.item() == pytest.approx(3.0, rel=1e-5)
        assert torch.autograd.grad(ones, weights.omega)[0].isfinite().all()


def test_the_start_weights_are_the_settings() -> None:
    by_depth = _weights(start="depth", share=0.25, weight_sum=8.0)
    # 6 of 8 for the labels as 1 : 2 : 3, 2 of 8 for the six pairs
    assert by_depth.weights.tolist() == pytest.approx([1.0, 2.0, 3.0] + [1 / 3] * 6)
    assert _weights(**FIXED).weights.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def _omega_gradient(**settings: Any) -> Tensor:
    model = toy_model("leebert", n_layers=2, width=16, seed=3)
    work = make_pass(model, RECIPE, [random_batch(1), random_batch(2)], lr=1e-2, **settings)
    cross_level(work)
    assert isinstance(work.extra, LossWeights)
    assert work.extra.omega.grad is not None
    return work.extra.omega.grad


def test_the_levels_add_up() -> None:
    g1, g2 = _omega_gradient(weights="single-level"), _omega_gradient(lambda_c=0.0)
    torch.testing.assert_close(_omega_gradient(lambda_c=0.7), g2 + 0.7 * g1)
    with_eta = _omega_gradient(lambda_c=0.7, outer="with eta")
    torch.testing.assert_close(with_eta, 1e-2 * g2 + 0.7 * g1)
    # G1 is the softmax's: w_k (term_k - the weighted mean of terms)
    model = toy_model("leebert", n_layers=2, width=16, seed=3)
    work = make_pass(model, RECIPE, [random_batch(1), random_batch(2)])
    assert isinstance(work.extra, LossWeights)
    w_K, terms_K = work.extra.weights, work.extra.terms(work.see(work.batches[0])).detach()
    torch.testing.assert_close(g1, w_K * (terms_K - (w_K * terms_K).sum() / w_K.sum()))


def test_a_bfloat16_run_takes_the_difference_in_float32() -> None:
    model = toy_model("leebert", n_layers=2, width=16, seed=3)
    work = make_pass(model, RECIPE, [random_batch(1), random_batch(2)], lambda_c=0.0)
    looks: list[str] = []

    def noted(name: str, batch: Batch) -> Seen:
        looks.append(name)
        return work.see(batch)

    see, exact = partial(noted, "see"), partial(noted, "exact")
    cross_level(replace(work, see=see, exact=exact))
    assert looks == ["see", "see", "exact", "exact", "see"], "b1, b2 at theta', b1 twice, b2"


def test_the_training_loop_offers_a_float32_pass_beside_the_bfloat16_one(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    seen_once: list[bool] = []

    def spy(work: Pass) -> float:
        if not seen_once:
            batch = work.batches[0]
            work.model.eval()
            with torch.no_grad():
                plain = work.model(batch.inputs_BTF, batch.mask_BT)[3]["logits"]
                assert work.exact is not None
                seen_once.append(torch.equal(work.exact(batch).answers[3], plain))
                seen_once.append(torch.equal(work.see(batch).answers[3], plain))
            work.model.train()
        return cross_level(work)

    recipe = replace(RECIPE, stages=(replace(RECIPE.stages[0], gradients=spy),))
    config = small_config(method="leebert", training={"bf16": True, "epochs": 1})
    history = make_trainer(config, splits, checkpoint, tmp_path, recipe=recipe).fit()
    assert seen_once == [True, False]
    assert math.isfinite(history[0]["loss"])


def test_every_update_has_a_batch_of_each_half_and_the_halves_stay_the_same(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    """And dev, which decides what is kept, is in neither."""
    halves: tuple[set[Any], set[Any]] = (set(), set())

    def spy(work: Pass) -> float:
        assert len(work.batches) == 2
        for half, batch in zip(halves, work.batches, strict=True):
            half.update(round(w, 3) for w in batch.weight_B.tolist())
        return cross_level(work)

    recipe = replace(RECIPE, stages=(replace(RECIPE.stages[0], gradients=spy),))
    config = small_config(method="leebert")
    trainer = make_trainer(config, splits, checkpoint, tmp_path, recipe=recipe)
    # A weight of its own marks each row.
    marked = [replace(e, weight=1.0 + i / 1000) for i, e in enumerate(trainer.epochs.examples)]

    class Marked:
        examples = tuple(marked)

        def altered(self, epoch: int, epochs: int) -> bool:
            return False

        def size(self, altered: bool) -> int:
            return len(marked)

        def make(self, rng: random.Random, altered: bool = True) -> Any:
            return list(marked)

    trainer.epochs = Marked()  # type: ignore[assignment]
    trainer.fit()
    assert len(halves[0] | halves[1]) == len(marked) == 128
    assert not halves[0] & halves[1]
    assert len(halves[0]) == len(halves[1])


def test_a_stopped_run_continues_to_the_same_bits(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    training = {"quantise_epochs": 1, "ema": 0.9}
    config = small_config(method="leebert", training=training)
    assert_stops_leave_no_trace(config, (2, 3), splits, checkpoint, tmp_path)


def test_a_lone_exit_is_refused() -> None:
    with pytest.raises(ConfigError, match="has only the final one"):
        check_model(RECIPE, toy_model("leebert", exits=[3]), {})
