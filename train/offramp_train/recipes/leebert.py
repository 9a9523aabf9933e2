"""LeeBERT's recipe: every exit learns from the labels and from every other exit, and the weights of all these
losses are learned too, by cross-level optimisation. Zhu, ACL 2021. See offramp_model.methods.leebert.

    a_i  = CE(z_i, y) (regression: squared error)
    d_ij = T^2 KL(softmax(z_j / T) || softmax(z_i / T)), student i, teacher j, detached (squared distance)
    Total(theta; omega; b) = sum_i w_i a_i + sum_(i != j) w_ij d_ij on a batch b

    w = S softmax(omega + ln of the start weights); omega starts at 0, S is the number of label terms

The training rows are in two fixed halves, D1 and D2; dev has no part in it. An update, of b1 from D1 and b2
from D2:
1. theta' = theta - eta grad_theta Total(theta; omega; b1), eta the backbone's rate in this update
2. G2 = grad_omega sum_i a_i(theta'; b2) = -eta grad_omega <grad_theta Total(theta; omega; b1), v>, v the
   gradient of that sum at theta', by the difference of Total at theta + eps v and theta - eps v with
   eps = 0.01 / |v|
3. G1 = grad_omega Total(theta; omega; b1), and omega learns from G2 + lambda_c G1
4. theta learns from Total on b1 and b2 together, with omega as it was

What one update costs: Total is linear in its terms, so 2 and 3 need the values of the terms only. Beside the
forward and backward pass of b1 and of b2 that any training has, that is one forward and backward pass of b2
and two forward passes of b1: 11 against 6, a backward pass taken as two forward passes; 1.8 times.

Differs from the paper, of which the abstract alone was at hand (exits teach each other, weights are learned
at two levels, the data is in two parts; the rest is a reconstruction, and no official code is known):
1. With `outer` "per unit" G2 is taken per unit of eta, "with eta" as above. eta is of the order 1e-5: G2
   would be lost beside G1, which moves weight to whatever loss is smallest, from the labels to distillation.
   lambda_c is 0.1 for the same reason.
2. omega and theta learn at the same time, by AdamW, omega at training.extra_lr.
3. Weights start even among exits ("depth": as PABEE's), and distillation with `share` of the whole.
4. Dropout is the same in 1 and at both sides of the difference. There teachers stay as they were in 1, for
   Total has them detached, and the model runs in float32 even where it trains in bfloat16.
`weights` "single-level" has G1 alone, lambda_c = 0 G2 alone (bi-level); "fixed" learns none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp_model.split_model import MultiExitModel
from offramp_train.recipes.gradients import Gradient, inner, learning, moved_aside
from offramp_train.recipes.recipe import (
    Pass,
    Recipe,
    Seen,
    Setting,
    Stage,
    mutual_divergence,
    needs_early_exits,
)


class LossWeights(nn.Module):
    """The weights of K loss terms: an exit's on the labels each, then a (student, teacher) pair's each.

    omega   (K,), what is learned;  start  (K,), weights before that, of any sum
    """

    start: Tensor

    def __init__(self, exits: tuple[int, ...], settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        labels = [float(depth) if settings["start"] == "depth" else 1.0 for depth in exits]
        share, n_pairs = settings["share"], len(exits) * (len(exits) - 1)
        pair = sum(labels) * share / (1.0 - share) / n_pairs
        self.total = settings["weight_sum"] or float(len(exits))
        # Without a share pairs are no terms at all: nothing could raise a weight of 0.
        start = torch.tensor([*labels, *([pair] * n_pairs if share else [])])
        self.register_buffer("start", start)
        self.omega = nn.Parameter(torch.zeros_like(start))

    @property
    def weights(self) -> Tensor:
        """(K,), adding up to `total`."""
        return self.total * torch.softmax(self.omega.detach() + self.start.log(), dim=0)

    def terms(self, seen: Seen, teacher_EBC: Tensor | None = None) -> Tensor:
        """(K,): the values of all terms, each the mean over rows; see `mutual_divergence`."""
        labels_E = torch.stack(list(seen.losses().values()))
        if not self.settings["share"]:
            return labels_E
        apart_EE = mutual_divergence(seen, self.settings["temperature"], teacher_EBC)
        pairs = ~torch.eye(len(labels_E), dtype=torch.bool, device=labels_E.device)
        return torch.cat([labels_E, apart_EE[pairs]])

    def weigh(self, omega: Tensor, terms_K: Tensor) -> Tensor:
        """Total of these terms. Written so that omega = 0 gives the start weights' mean to the bit."""
        unscaled_K = self.start * torch.exp(omega - omega.detach().max())
        return self.total * ((unscaled_K * terms_K).sum() / unscaled_K.sum())


def cross_level(work: Pass) -> float:
    """Leaves the gradients of the model and of omega; returns the mean of Total over both batches."""
    weights, value = work.extra, 0.0
    assert isinstance(weights, LossWeights), "Recipe.extra makes them"
    for number, batch in enumerate(work.batches):
        before = torch.get_rng_state()
        seen = work.see(batch)
        terms_K = weights.terms(seen)
        total = weights.weigh(weights.omega.detach(), terms_K)
        (total / len(work.batches)).backward()  # type: ignore[no-untyped-call]
        value += total.item()
        if number == 0 and work.settings["weights"] != "fixed":
            weights.omega.grad = omega_gradient(work, weights, seen, before)
    return value / len(work.batches)


def omega_gradient(work: Pass, weights: LossWeights, seen: Seen, dice: Tensor) -> Tensor:
    """G2 + lambda_c G1: (K,), once the model has b1's gradient.

    `seen` is b1's pass, `dice` the random state before it.
    """
    pull_K = terms_K = weights.terms(seen).detach()
    if work.settings["weights"] == "cross-level":
        eta = work.lr if work.settings["outer"] == "with eta" else 1.0
        # .grad holds b1's share of the mean over batches.
        step = work.lr * len(work.batches)
        pull_K = work.settings["lambda_c"] * terms_K - eta * slopes(work, weights, seen, step, dice)
    (gradient,) = torch.autograd.grad(weights.weigh(weights.omega, pull_K), weights.omega)
    return gradient


def slopes(work: Pass, weights: LossWeights, seen: Seen, step: float, dice: Tensor) -> Tensor:
    """(K,): <grad_theta term_k(theta; b1), v>, how much term k's descent would lower the outer loss.

    `step` times .grad leads from theta to theta'. The random state is left as it was.
    """
    first, second = work.batches
    # Teachers are detached in Total: they must not move with theta here either.
    teacher_EBC = torch.stack(list(seen.answers.values())).detach()
    parameters = learning(work.model)
    descent: Gradient = [p.grad for p in parameters]
    with torch.random.fork_rng(devices=[]):
        with moved_aside(parameters, descent, -step):
            outer = torch.stack(list(work.see(second).losses().values())).sum()
            v = torch.autograd.grad(outer, parameters, allow_unused=True)
        length = inner(v, v).sqrt().item()
        if length == 0.0:  # nothing to gain: all terms are alike
            return torch.zeros_like(weights.start)
        eps, sides = 0.01 / length, []
        for by in (eps, -eps):
            torch.set_rng_state(dice)
            with torch.no_grad(), moved_aside(parameters, v, by):
                sides.append(weights.terms((work.exact or work.see)(first), teacher_EBC))
    return (sides[0] - sides[1]) / (2 * eps)


def _extra(model: MultiExitModel, settings: Mapping[str, Any]) -> LossWeights:
    return LossWeights(model.spec.exits, settings)


RECIPE = Recipe(
    name="leebert",
    summary="everything at once, exits teach each other, and all losses' weights are learned",
    source="LeeBERT",
    stages=(Stage("all exits", "all", "all", cross_level),),
    # An update has a batch of each half.
    defaults={
        "max_tokens": 128,
        "training": {"lr": 2e-5, "batch": 16, "epochs": 5, "keep": "best", "extra_lr": 1e-2},
    },
    settings=(
        Setting("weights", "cross-level", "what the losses' weights learn from",
                choices=("cross-level", "single-level", "fixed")),
        Setting("lambda_c", 0.1, "weight of G1 beside G2"),
        Setting("outer", "per unit", "G2 as it stands or per unit of eta",
                choices=("per unit", "with eta")),
        Setting("temperature", 2.0, "T, of both softmaxes in distillation", 1e-3),
        Setting("start", "even", "the exits' weights at the start", choices=("even", "depth")),
        Setting("share", 0.5, "distillation's share of the weights at the start; 0: none ever", 0.0, 0.99),
        Setting("weight_sum", 0.0, "what the weights add up to; 0: the number of exits"),
    ),
    extra=_extra,
    halves=True,
    check=needs_early_exits,
)  # fmt: skip
