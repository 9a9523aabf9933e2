"""CATs: temperatures and meta classifiers, each on rows of its own, the rest of the model fixed.

Differs from the paper: temperatures are the exact minimum of the loss that the paper goes down with Adam. The
shares of rows set apart, and the meta classifiers' rate, updates and rows, are ours.
See offramp_model.methods.cats.

Axes: N rows, E early exits, I inputs of the meta classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp_model.methods.cats import ConsistencyPolicy, MetaBranch
from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Example, collate
from offramp_train.exit_answers import exit_answers
from offramp_train.fits.fit import Fit, Fitting
from offramp_train.fits.right_tool import best_temperature

_LR, _UPDATES, _BATCH = 1e-3, 2000, 64
_ROWS = 128  # of one forward pass


def fit_temperatures(fitting: Fitting) -> dict[str, Any]:
    """Sets every early exit's `temperature`, by the likelihood of the labels."""
    model = fitting.model
    heads = {depth: _head(model, depth) for depth in model.spec.exits[:-1]}
    for head in heads.values():
        head.temperature.fill_(1.0)
    answers, targets = exit_answers(model, fitting.examples)
    for depth, head in heads.items():
        logits_NC = torch.from_numpy(answers[depth]).double()
        head.temperature.fill_(best_temperature(logits_NC, torch.from_numpy(targets)))
    return {"temperature": {str(d): round(head.temperature.item(), 5) for d, head in heads.items()}}


def fit_meta(fitting: Fitting) -> dict[str, Any]:
    """Trains the meta classifiers to tell where an exit agrees with the last one.

    On record, by exit: how often it agrees, and how well the score tells (area under its ROC curve).
    """
    model = fitting.model
    early = model.spec.exits[:-1]
    if not early:
        return {}
    inputs, agrees_EN = _meta_data(model, fitting.examples)
    metas: list[nn.Module] = [_head(model, depth).meta for depth in early]
    _train(metas, inputs, agrees_EN, fitting.seed)
    record: dict[str, Any] = {"agreement": {}, "roc_area": {}}
    with torch.no_grad():
        for depth, meta, input_NI, agrees_N in zip(early, metas, inputs, agrees_EN, strict=True):
            score_N = torch.softmax(meta(input_NI), dim=-1)[:, 1]
            record["agreement"][str(depth)] = round(agrees_N.float().mean().item(), 5)
            record["roc_area"][str(depth)] = roc_area(score_N, agrees_N)
    return record


def _train(metas: list[nn.Module], inputs: list[Tensor], agrees_EN: Tensor, seed: int) -> None:
    """Adam on the mean over exits of cross-entropy, classes weighted by N / count at each exit."""
    targets_EN = agrees_EN.long()
    counts_E2 = torch.stack([nn.functional.one_hot(t, 2).sum(dim=0) for t in targets_EN])
    weights_E2 = targets_EN.shape[1] / counts_E2.clamp(min=1).float()
    generator = torch.Generator().manual_seed(seed)
    parameters = list({id(p): p for meta in metas for p in meta.parameters()}.values())
    optimiser = torch.optim.Adam(parameters, lr=_LR)
    with torch.enable_grad():
        for _ in range(_UPDATES):
            rows = torch.randint(targets_EN.shape[1], (_BATCH,), generator=generator)
            losses = [
                nn.functional.cross_entropy(meta(input_NI[rows]), target_N[rows], weight_2)
                for meta, input_NI, target_N, weight_2 in zip(
                    metas, inputs, targets_EN, weights_E2, strict=True
                )
            ]
            optimiser.zero_grad()
            torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    for parameter in parameters:
        parameter.grad = None


@torch.no_grad()
def _meta_data(model: MultiExitModel, examples: Sequence[Example]) -> tuple[list[Tensor], Tensor]:
    """(input_NI of each early exit's meta classifier, agrees_EN)."""
    *early, last = model.spec.exits
    policy = model.policy
    assert isinstance(policy, ConsistencyPolicy)
    seen: list[Tensor] = []
    distinct = {id(_head(model, depth).meta): _head(model, depth).meta for depth in early}
    hooks = [
        meta.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for meta in distinct.values()
    ]
    inputs: list[list[Tensor]] = []
    agrees: list[Tensor] = []
    for start in range(0, len(examples), _ROWS):
        batch = collate(examples[start : start + _ROWS], model.channels)
        outputs = model(batch.inputs_BTF, batch.mask_BT)
        full_BC = outputs[last]["logits"]
        agrees.append(torch.stack([policy.agrees(outputs[d]["logits"], full_BC) for d in early]))
        inputs.append(list(seen))
        seen.clear()
    for hook in hooks:
        hook.remove()
    return [torch.cat(of_exit) for of_exit in zip(*inputs, strict=True)], torch.cat(agrees, dim=1)


def roc_area(score_N: Tensor, positive_N: Tensor) -> float | None:
    """The chance that a positive row has the higher score of a random pair; None without both kinds."""
    positives, negatives = score_N[positive_N], score_N[~positive_N].sort().values
    if not len(positives) or not len(negatives):
        return None
    below = torch.searchsorted(negatives, positives.contiguous())
    not_above = torch.searchsorted(negatives, positives.contiguous(), right=True)
    return round(float((below + not_above).double().mean() / 2 / len(negatives)), 5)


def _head(model: MultiExitModel, depth: int) -> MetaBranch:
    head = model.exits[str(depth)]
    assert isinstance(head, MetaBranch)
    return head


FITS = (
    Fit("temperatures", "scale", fit_temperatures, share=0.05, tasks=("classification",)),
    Fit("meta classifiers", "meta", fit_meta, share=0.1),
)
