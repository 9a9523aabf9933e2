"""BE3R's recipe: shares that add up, the first epoch, and that the price of depth decides the depth."""

from __future__ import annotations

import itertools

import pytest
import torch
from seen import VALUES, seen
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toy_models import toy_model

from offramp_common.errors import ConfigError
from offramp_common.spec import TaskSpec
from offramp_model.methods import METHODS
from offramp_train.recipe_check import check_model, check_recipe, loss_settings
from offramp_train.recipes import RECIPES
from offramp_train.recipes.be3r import RECIPE, expert_loss, stop_shares
from offramp_train.recipes.recipe import Seen

TARGET = torch.tensor([0, 2, 1, 1, 0])
LABELS = TaskSpec("classification", ("a", "b", "c"))


def _outputs(width: int = 3) -> dict[int, dict[str, Tensor]]:
    torch.manual_seed(1)
    return {
        2: {"logits": torch.randn(5, width), "route": torch.randn(5, requires_grad=True)},
        3: {"logits": torch.randn(5, width), "route": torch.randn(5, requires_grad=True)},
        6: {"logits": torch.randn(5, width)},
    }


def _by_hand(mine: Seen, mu: float, nu: float) -> Tensor:
    one, two = (r.sigmoid() for r in mine.named("route").values())
    shares = [one, (1 - one) * two, (1 - one) * (1 - two)]
    losses = [cross_entropy(a, TARGET, reduction="none") for a in mine.answers.values()]
    mixed = sum(s * loss for s, loss in zip(shares, losses, strict=True))
    depth = sum(s * e / 6 for s, e in zip(shares, (2, 3, 6), strict=True))
    return torch.as_tensor(mixed + mu * depth).mean() + nu * torch.stack(losses).mean()


@pytest.mark.parametrize("hard", [0.0, 1.0])
def test_the_shares_of_each_sample_add_up_to_one(hard: float) -> None:
    share_EB = stop_shares(seen(_outputs(), TARGET, RECIPE, hard=hard))
    assert (share_EB >= -1e-6).all(), "a straight-through 0 is a difference of float32 numbers"
    assert torch.allclose(share_EB.sum(dim=0), torch.ones(5))


def test_the_loss_is_the_mixture_and_the_price_of_depth_and_the_mean_of_the_experts() -> None:
    mine = seen(_outputs(), TARGET, RECIPE, epoch=1, mu=0.3, nu=0.7)
    assert torch.allclose(expert_loss(mine), _by_hand(mine, 0.3, 0.7))


def test_the_first_epoch_has_no_price_and_no_load_and_trains_every_expert_in_full() -> None:
    mine = seen(_outputs(), TARGET, RECIPE, epoch=0, mu=0.3, nu=0.7, load=5.0)
    assert torch.allclose(expert_loss(mine), _by_hand(mine, 0.0, 1.0))


@pytest.mark.parametrize("target", [(), (0.5, 0.25, 0.25)])
def test_the_load_term_is_the_squared_distance_of_mean_shares(target: tuple[float, ...]) -> None:
    plain = seen(_outputs(), TARGET, RECIPE, epoch=1)
    mine = seen(_outputs(), TARGET, RECIPE, epoch=1, load=2.0, load_target=target)
    wanted = torch.tensor(target or (1 / 3,) * 3)
    apart = (stop_shares(mine).mean(dim=1) - wanted).square().sum()
    assert torch.allclose(expert_loss(mine), expert_loss(plain) + 2.0 * apart)


def test_hard_routes_are_zero_or_one_with_the_gradient_of_the_chance() -> None:
    gradients = []
    for hard in (0.0, 0.2):
        outputs = _outputs()
        share_EB = stop_shares(seen(outputs, TARGET, RECIPE, step=8, steps=10, hard=hard))
        if hard:
            chosen_B = (outputs[2]["route"] >= 0).float()
            assert torch.allclose(share_EB[0], chosen_B)
            assert torch.allclose(share_EB, share_EB.round(), atol=1e-6)
        share_EB[0].sum().backward()  # type: ignore[no-untyped-call]
        gradients.append(outputs[2]["route"].grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.allclose(gradients[0], gradients[1])
    before = stop_shares(seen(_outputs(), TARGET, RECIPE, step=7, steps=10, hard=0.2))
    assert torch.equal(before, stop_shares(seen(_outputs(), TARGET, RECIPE, step=7, steps=10)))


def test_row_weights_count_in_all_of_it() -> None:
    outputs, weight = _outputs(), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    first = {d: {n: v[:3] for n, v in named.items()} for d, named in outputs.items()}
    whole = expert_loss(seen(outputs, TARGET, RECIPE, weight_B=weight, epoch=1, load=1.0))
    assert torch.allclose(whole, expert_loss(seen(first, TARGET[:3], RECIPE, epoch=1, load=1.0)))


def test_a_values_loss_is_made_of_squared_errors() -> None:
    target = torch.tensor([0.5, 1.0, -1.0, 2.0, 0.0])
    mine = seen(_outputs(1), target, RECIPE, task=VALUES, epoch=1, mu=0.0, nu=1.0)
    error_EB = torch.stack([(a[:, 0] - target) ** 2 for a in mine.answers.values()])
    expected = (stop_shares(mine) * error_EB).sum(dim=0).mean() + error_EB.mean()
    assert torch.allclose(expert_loss(mine), expected)


# The price of depth, on rows of which some are easy for the first expert, and nearly all for the last


def _rows(rows: int, seed: int) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """(how hard each row is, with noise (B, 1): what routers read; target_B; depth -> logits)."""
    generator = torch.Generator().manual_seed(seed)
    target_B = torch.randint(0, 3, (rows,), generator=generator)
    hard_B = torch.rand(rows, generator=generator)
    answers = {}
    for depth, reach in ((2, 0.4), (4, 0.7), (6, 1.0)):
        sure_B = 4 * (reach - hard_B).clamp(-0.5, 0.5)
        answers[depth] = sure_B.unsqueeze(1) * nn.functional.one_hot(target_B, 3)
    noise_B = 0.05 * torch.randn(rows, generator=generator)
    return (hard_B + noise_B).unsqueeze(1), target_B, answers


def _see(routers: nn.ModuleList, rows: int, seed: int, mu: float) -> Seen:
    read_B1, target_B, answers = _rows(rows, seed)
    outputs = {depth: {"logits": answer} for depth, answer in answers.items()}
    for depth, router in zip((2, 4), routers, strict=True):
        outputs[depth]["route"] = router(read_B1)[:, 0]
    return seen(outputs, target_B, RECIPE, epoch=1, mu=mu, nu=0.5)


def _mean_depth_on_dev(mu: float) -> float:
    torch.manual_seed(0)
    routers = nn.ModuleList(
        [nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, 1)) for _ in (2, 4)]
    )
    optimiser = torch.optim.Adam(routers.parameters(), lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        expert_loss(_see(routers, 128, 1, mu)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        share_EB = stop_shares(_see(routers, 500, 2, mu))
    return float((share_EB * torch.tensor([[2.0], [4.0], [6.0]])).sum(dim=0).mean())


def test_without_a_price_samples_go_deep_and_the_higher_it_is_the_earlier_they_stop() -> None:
    depths = [_mean_depth_on_dev(mu) for mu in (0.0, 0.3, 1.0, 3.0, 30.0)]
    # 0.05 layers of noise between neighbours.
    assert all(less > more - 0.05 for less, more in itertools.pairwise(depths)), depths
    assert depths[0] > 5.5
    assert 2.5 < depths[2] < 5.5, "a price between must route by how hard a row is"
    assert depths[-1] < 2.1


# What it is refused for


def test_shares_that_do_not_add_up_are_refused() -> None:
    model = toy_model("be3r", n_layers=6, exits=[2, 4, 6])
    for bad in ([0.5, 0.5], [0.5, 0.5, 0.5]):
        settings = loss_settings(RECIPE, {"load_target": bad}, "f.toml")
        with pytest.raises(ConfigError, match=r"loss\.load_target: \d shares for 3 exits"):
            check_model(RECIPE, model, settings)
    check_model(RECIPE, model, loss_settings(RECIPE, {"load_target": [0.5, 0.3, 0.2]}, "f.toml"))
    check_model(RECIPE, model, loss_settings(RECIPE, {}, "f.toml"))


def test_it_fits_its_own_method_alone() -> None:
    method = METHODS["be3r"]
    for task in (LABELS, VALUES):
        check_recipe(RECIPE, method, task, method.settings)
    with pytest.raises(ConfigError, match=r"would leave be3r's 'route' untrained.*: be3r"):
        check_recipe(RECIPES["pabee"], method, LABELS, method.settings)
    with pytest.raises(ConfigError, match="trains the exits' 'route', which palbert does not have"):
        check_recipe(RECIPE, METHODS["palbert"], LABELS, METHODS["palbert"].settings)
