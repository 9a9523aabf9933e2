"""Training: it learns, stages keep to their part, and a stopped run continues as if there was no stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import FAMILY_CONFIGS, make_checkpoint, write_topics
from torch import Tensor
from trainers import (
    StopAfter,
    assert_stops_leave_no_trace,
    make_trainer,
    small_config,
    weights_of,
)

from offramp_common.errors import ConfigError
from offramp_train.checkpoint import Stopped
from offramp_train.data import Splits, read_splits
from offramp_train.optimiser import schedule
from offramp_train.progress import Report


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return read_splits(write_topics(tmp_path_factory.mktemp("topics")))


@pytest.fixture(autouse=True)
def small_matrices_are_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp_model.store._SMALLEST_MATRIX", 64)


def test_every_exit_learns(splits: Splits, checkpoint: Path, tmp_path: Path) -> None:
    config = small_config(recipe="self-distilled-joint", training={"epochs": 10, "head_lr": 1e-2})
    history = make_trainer(config, splits, checkpoint, tmp_path).fit()
    first, last = history[0], history[-1]
    assert last["loss"] < 0.5 * first["loss"]
    # Three topics, one word decides: chance is 33 %.
    assert all(quality > 0.8 for quality in last["dev_accuracy"].values()), last


JOINT: dict[str, Any] = {
    "recipe": "self-distilled-joint",
    "training": {
        "accumulate": 2, "quantise_epochs": 1, "ema": 0.9, "freeze_embeddings": True, "warmup": 0.2,
        "checkpoint_steps": 3,
    },
    "augment": {
        "word_dropout": 0.1, "mix_label": "tool", "mix_share": 0.2, "repeat": {"food": 2},
        "weights": {"animal": 2.0},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("table", "stops"),
    [(JOINT, (2, 7, 4)), ({"method": "deebert"}, (5, 13, 11, 14)), ({"method": "pabee"}, (16, 1))],
    ids=["self-distilled-joint", "deebert", "pabee"],
)
def test_a_stopped_run_continues_to_the_same_bits(
    table: dict[str, Any], stops: tuple[int, ...], splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    assert_stops_leave_no_trace(small_config(**table), stops, splits, checkpoint, tmp_path)


class DiesIn(Report):
    """Ends the run without a checkpoint, as a kill would, when a line says so."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word

    def say(self, line: str) -> None:
        if self.word in line:
            raise RuntimeError("killed")


def test_a_killed_run_continues_from_its_last_checkpoint(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    config = small_config(**{**JOINT, "training": {**JOINT["training"], "keep": "best"}})
    whole = make_trainer(config, splits, checkpoint, tmp_path / "whole")
    whole.fit()
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(
            config, splits, checkpoint, tmp_path / "parts", report=DiesIn("epoch 2 of 2: loss")
        ).fit()
    parts = make_trainer(config, splits, checkpoint, tmp_path / "parts")
    parts.fit()
    expected, got = weights_of(whole), weights_of(parts)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_work_directory_of_other_settings_is_refused(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        make_trainer(small_config(), splits, checkpoint, tmp_path, StopAfter(1)).fit()
    with pytest.raises(ConfigError, match="differs: seed, training"):
        make_trainer(small_config(seed=7, training={"lr": 1e-4}), splits, checkpoint, tmp_path)


def test_deeberts_second_stage_leaves_backbone_and_final_head_as_they_were(
    splits: Splits, checkpoint: Path, tmp_path: Path
) -> None:
    config = small_config(method="deebert", training={"quantise_epochs": 1})
    trainer = make_trainer(config, splits, checkpoint, tmp_path)
    after_first: dict[str, Tensor] = {}
    run_stage = trainer._stage

    def watched(*arguments: Any) -> None:
        run_stage(*arguments)
        if not after_first:
            after_first.update(weights_of(trainer))

    trainer._stage = watched  # type: ignore[method-assign, assignment]
    trainer.fit()
    changed = {
        name
        for name, tensor in weights_of(trainer).items()
        if not torch.equal(tensor, after_first[name])
    }
    assert changed
    assert all(name.startswith(("exits.1.", "exits.2.")) for name in changed), changed


def test_the_best_epoch_is_kept_rather_than_the_last(
    splits: Splits, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qualities = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(
        "offramp_train.loop.exit_quality",
        lambda model, dev: dict.fromkeys((1, 2, 3), next(qualities)),
    )
    config = small_config(method="pabee", training={"epochs": 3, "keep": "best"})
    trainer = make_trainer(config, splits, checkpoint, tmp_path)
    seen: list[dict[str, Tensor]] = []
    finish = trainer._finish_epoch

    def watched(*arguments: Any) -> None:
        seen.append(weights_of(trainer))
        finish(*arguments)

    trainer._finish_epoch = watched  # type: ignore[method-assign, assignment]
    trainer.fit()
    kept = weights_of(trainer)
    same = [all(torch.equal(w[n], kept[n]) for n in w) for w in seen]
    assert same == [False, True, False]


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_each_family_learns_a_step(family: str, splits: Splits, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / family, family, layers=2)
    small = replace(splits, train=splits.train.take(list(range(16))))
    config = small_config(
        recipe="self-distilled-joint", training={"epochs": 1, "quantise_epochs": 1}
    )
    trainer = make_trainer(config, small, path, tmp_path / "work")
    before = weights_of(trainer)
    (record,) = trainer.fit()
    assert record["loss"] == record["loss"]  # a number
    changed = [name for name, w in weights_of(trainer).items() if not torch.equal(w, before[name])]
    assert any(name.startswith("backbone.layers") for name in changed)
    assert any(name.startswith("exits.1") for name in changed)


def test_the_rate_rises_over_the_warm_up_and_falls_to_nothing() -> None:
    rates = [schedule(step, 10, 0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(1 / 8)
    assert schedule(10, 10, 0.2) == 0.0
    assert schedule(0, 10, 0.0) == 1.0
