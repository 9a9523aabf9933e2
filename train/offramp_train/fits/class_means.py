"""Class Means: the mean feature of each class after each layer, and a typical distance from it.

Two passes over the training rows in evaluation mode, nothing kept but sums: distances need the means
of the first. See offramp_model.methods.class_means.

Axes: B samples, T tokens, D hidden width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp_model.methods.class_means import ClassMeans, distances
from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Example, collate
from offramp_train.fits.fit import Fit, Fitting

_ROWS = 128
_NEVER_NEAR = 1e-6  # divides the distances to a class that no row has: its probability is 0


@torch.no_grad()
def fit_means(fitting: Fitting) -> dict[str, Any]:
    """Sets every early exit's `means` and `scale`; on record: rows and scales."""
    model = fitting.model
    n_classes = model.spec.task.answer_width
    heads = {depth: _head(model, depth) for depth in model.spec.exits[:-1]}
    count_C = torch.zeros(n_classes, dtype=torch.float64)
    sums = {
        depth: torch.zeros_like(head.means, dtype=torch.float64) for depth, head in heads.items()
    }
    for features, target_B in _features(model, fitting.examples):
        count_C += torch.bincount(target_B, minlength=n_classes)
        for depth, feature_BD in features.items():
            sums[depth].index_add_(0, target_B, feature_BD.double())
    for depth, head in heads.items():
        overall_D = sums[depth].sum(dim=0) / count_C.sum()
        means_CD = sums[depth] / count_C.clamp(min=1.0)[:, None]
        head.means.copy_(torch.where((count_C > 0)[:, None], means_CD, overall_D))
    apart = {depth: torch.zeros(n_classes, dtype=torch.float64) for depth in heads}
    for features, _ in _features(model, fitting.examples):
        for depth, feature_BD in features.items():
            apart[depth] += distances(feature_BD, heads[depth].means).double().sum(dim=0)
    for depth, head in heads.items():
        # Rows that are all alike have no distance; they are near their mean by any divisor.
        scale_C = (apart[depth] / count_C.sum()).clamp(min=_NEVER_NEAR)
        head.scale.copy_(torch.where(count_C > 0, scale_C, _NEVER_NEAR))
    scales = {str(d): round(float(head.scale.mean()), 4) for d, head in heads.items()}
    return {"rows": int(count_C.sum()), "mean_scale": scales}


def _features(
    model: MultiExitModel, examples: Sequence[Example]
) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
    """(depth -> feature_BD of each early exit, target_B), batch by batch."""
    early = model.spec.exits[:-1]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    for start in range(0, len(order), _ROWS):
        batch = collate([examples[i] for i in order[start : start + _ROWS]], model.channels)
        hidden_BTD, features = model.backbone.embed(batch.inputs_BTF), {}
        for depth in range(1, early[-1] + 1 if early else 1):
            hidden_BTD = model.backbone.run_layers(hidden_BTD, batch.mask_BT, depth - 1, depth)
            if depth in early:
                features[depth] = _head(model, depth).feature(hidden_BTD, batch.mask_BT)
        yield features, batch.target_B


def _head(model: MultiExitModel, depth: int) -> ClassMeans:
    head = model.exits[str(depth)]
    assert isinstance(head, ClassMeans)
    return head


FITS = (Fit("class means", "train", fit_means),)
