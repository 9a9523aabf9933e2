"""A training run on a tiny checkpoint, with what tests stop it by and compare it in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import tokenizer_text
from torch import Tensor

from offramp_model.backbones import backbone_from_pretrained
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Epochs, encode
from offramp_train.build import resolve_config
from offramp_train.checkpoint import Checkpoints, Stopped, StopSignal
from offramp_train.config import TrainConfig
from offramp_train.data import Splits
from offramp_train.loop import Trainer
from offramp_train.progress import Report
from offramp_train.recipe_check import start_heads
from offramp_train.recipes import recipe_named
from offramp_train.recipes.recipe import Recipe


class StopAfter(StopSignal):
    """Asks to stop at the n-th look, as a signal would at an arbitrary update."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    @property
    def wanted(self) -> bool:
        self.left -= 1
        return self.left <= 0


def small_config(**table: Any) -> TrainConfig:
    """Two epochs in batches of 16, unless `table` says otherwise."""
    training = {"lr": 3e-3, "batch": 16, "epochs": 2, **table.pop("training", {})}
    return resolve_config({**table, "training": training}, where="test")


def make_trainer(
    config: TrainConfig,
    splits: Splits,
    checkpoint: Path,
    work: Path,
    stop: StopSignal | None = None,
    report: Report | None = None,
    recipe: Recipe | None = None,
) -> Trainer:
    """Ready to `fit`. `recipe` is the configuration's unless given."""
    backbone = backbone_from_pretrained(str(checkpoint))
    exits = tuple(range(1, backbone.n_layers + 1))
    spec = HeadSpec(splits.task, backbone.width, backbone.n_layers, exits, config.settings)
    torch.manual_seed(config.seed)
    model = MultiExitModel(backbone, METHODS[config.method], spec)
    start_heads(model, "auto")
    examples = encode(splits.train, splits.task, tokenizer_text(), 16)
    dev = encode(splits.dev, splits.task, tokenizer_text(), 16)
    epochs = Epochs(tuple(examples), splits.task, config.augment, unknown=1)
    checkpoints = Checkpoints(work, config.to_json())
    return Trainer(
        model,
        recipe or recipe_named(config.recipe),
        config,
        epochs,
        dev,
        checkpoints,
        report or Report(),
        stop or StopSignal(),
    )


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_stops_leave_no_trace(
    config: TrainConfig, stops: tuple[int, ...], splits: Splits, checkpoint: Path, work: Path
) -> None:
    """A run stopped after so many looks, again and again, ends with the bits of one that was not."""
    whole = make_trainer(config, splits, checkpoint, work / "whole")
    history = whole.fit()
    for looks in stops:
        with pytest.raises(Stopped):
            make_trainer(config, splits, checkpoint, work / "parts", StopAfter(looks)).fit()
        # The stop came from outside: whatever else draws random numbers must not matter.
        torch.rand(looks)
    parts = make_trainer(config, splits, checkpoint, work / "parts")
    assert parts.fit() == history
    expected, got = weights_of(whole), weights_of(parts)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    if whole.extra is not None and parts.extra is not None:
        expected, got = whole.extra.state_dict(), parts.extra.state_dict()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
