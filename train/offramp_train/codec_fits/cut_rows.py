"""A data file's rows cut at a depth, as the device has them there, beside the uncut model's answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from offramp_common.activations import Activations, NumpyArray
from offramp_common.spec import never_exit
from offramp_model.split_model import TorchLayers, to_numpy
from offramp_train.measure import Subject


@dataclass(frozen=True, slots=True, eq=False)
class CutBatch:
    """rows       their numbers in the data file, of about the same length
    acts       depth -> the rows after so many layers
    answer_BC  the uncut model's, from the last exit
    """

    rows: NumpyArray
    acts: Mapping[int, Activations[NumpyArray]]
    answer_BC: NumpyArray


def torch_layers(subject: Subject) -> TorchLayers:
    """A subject on torch is one whose layers can be looked into."""
    assert isinstance(subject.layers, TorchLayers), subject.runtime
    return subject.layers


@torch.inference_mode()
def cut_batches(
    subject: Subject, depths: Sequence[int], batch: int, rows: Sequence[int] | None = None
) -> Iterator[CutBatch]:
    """All rows (or those given), shortest first, each batch run once through all layers; no row leaves."""
    layers = torch_layers(subject)
    never = never_exit(subject.bundle.manifest.knobs, layers.n_layers)
    chosen = range(len(subject.rows)) if rows is None else rows
    order = sorted(chosen, key=lambda row: (subject.lengths[row], row))
    for first in range(0, len(order), batch):
        here = order[first : first + batch]
        acts, cut, look = subject.start(here), {}, None
        while acts.depth < layers.n_layers:
            if acts.depth in depths:
                cut[acts.depth] = to_numpy(acts)
            step = layers.step(acts, never)
            acts, look = step.acts, step.look
        assert look is not None, "no exit head at full depth"
        yield CutBatch(np.array(here), cut, look.answer.float().numpy())
