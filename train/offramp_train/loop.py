"""The training loop: stages of a recipe, epochs, updates; it goes on after a stop as if there was none."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Batch, Epochs, Example, bucketed, collate, halved
from offramp_train.checkpoint import Checkpoints, Stopped, StopSignal
from offramp_train.config import TrainConfig, Training
from offramp_train.exit_answers import exit_quality
from offramp_train.metrics import metric_of
from offramp_train.optimiser import RunningMean, optimiser, schedule
from offramp_train.progress import Report
from offramp_train.quantise import StoredWeights
from offramp_train.recipe_check import set_trainable
from offramp_train.recipes.recipe import Between, Pass, Progress, Recipe, Seen, Stage


@dataclass(slots=True)
class Cursor:
    """What has been done. Of this stage: `best` is the watched quality of its best epoch, `passed` the rows
    that went forward (a row that an update sees twice counts twice)."""

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best: float = -math.inf
    seconds: float = 0.0
    passed: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """One training run of a model by a recipe."""

    def __init__(
        self,
        model: MultiExitModel,
        recipe: Recipe,
        config: TrainConfig,
        epochs: Epochs,
        dev: Sequence[Example],
        checkpoints: Checkpoints,
        report: Report,
        stop: StopSignal,
    ) -> None:
        self.model, self.recipe, self.config, self.epochs, self.dev = (
            model,
            recipe,
            config,
            epochs,
            dev,
        )
        self.checkpoints, self.report, self.stop = checkpoints, report, stop
        self.settings: Training = config.training
        self.extra = None if recipe.extra is None else recipe.extra(model, config.loss)
        self.cursor = Cursor()

    def fit(self) -> list[dict[str, Any]]:
        """Train to the end, from a checkpoint where there is one; the model holds the kept weights.

        Returns one record an epoch. Raises Stopped after saving a checkpoint when asked to stop.
        """
        saved = self.checkpoints.load()
        torch.manual_seed(self.config.seed)
        if saved is not None:
            self.cursor = Cursor(**json.loads(saved["cursor"]))
            self.model.load_state_dict(saved["model"])
            if self.extra is not None:
                self.extra.load_state_dict(saved["extra"])
            self.report.say(
                f"continuing at epoch {self.cursor.epoch + 1}, update {self.cursor.step}"
            )
        while self.cursor.stage < len(self.recipe.stages):
            self._stage(self.recipe.stages[self.cursor.stage], saved)
            saved = None
        self.model.requires_grad_(True)
        return self.cursor.history

    def _stage(self, stage: Stage, saved: dict[str, Any] | None) -> None:
        self.settings = self.config.for_stage(self.cursor.stage, len(self.recipe.stages))
        set_trainable(self.model, stage, self.settings.freeze_embeddings)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.updates = self._updates()
        self.weights = StoredWeights(self.model)
        self.optimiser = optimiser(self.model, self.extra, self.settings)
        self.mean = RunningMean(learning, self.settings.ema) if self.settings.ema else None
        if saved is not None:
            torch.set_rng_state(saved["rng"])
        if saved is not None and saved["optimiser"]:
            self.optimiser.load_state_dict(saved["optimiser"])
            if self.mean is not None:
                self.mean.means = saved["means"]
        started = time.monotonic() - self.cursor.seconds
        while self.cursor.epoch < self.settings.epochs:
            self._epoch(stage, started)
        if self.settings.keep == "best":
            self.model.load_state_dict(self.checkpoints.load_best())
        elif self.mean is not None:
            with torch.no_grad():
                for parameter, mean in zip(learning, self.mean.means, strict=True):
                    parameter.copy_(mean)
        done, history = self.cursor.stage + 1, self.cursor.history
        self.cursor = Cursor(stage=done, history=history)
        self._save(between_stages=True)

    def _epoch(self, stage: Stage, started: float) -> None:
        cursor, settings = self.cursor, self.settings
        # A generator of its own for each epoch: the order can be made again without storing it.
        rng = random.Random(f"{self.config.seed}/{cursor.stage}/{cursor.epoch}")
        altered = self.epochs.altered(cursor.epoch, settings.epochs)
        examples = self.epochs.make(rng, altered)
        batches = self._batches(examples, rng)
        quantised = cursor.epoch >= settings.epochs - settings.quantise_epochs
        self.model.train()
        if stage.quiet:
            self.model.backbone.eval()
        title = f"{stage.name}, epoch {cursor.epoch + 1} of {settings.epochs}"
        with self.report.bar(title, len(batches), cursor.batch) as bar:
            while cursor.batch < len(batches):
                group = batches[cursor.batch : cursor.batch + self._group]
                rows = [[examples[i] for i in batch] for batch in group]
                loss = self._update(stage, rows, quantised)
                cursor.loss_sum += loss * len(group)
                cursor.batch += len(group)
                cursor.seconds = time.monotonic() - started
                bar.step(len(group), f"loss {cursor.loss_sum / cursor.batch:.3f}")
                if self.stop.wanted:
                    self._save()
                    raise Stopped
                if cursor.step % settings.checkpoint_steps == 0:
                    self._save()
        self._finish_epoch(stage, quantised, cursor.loss_sum / len(batches))
        cursor.epoch, cursor.batch, cursor.loss_sum = cursor.epoch + 1, 0, 0.0
        self._save()

    @property
    def _group(self) -> int:
        """Batches of one update."""
        return 2 if self.recipe.halves else self.settings.accumulate

    def _batches(self, examples: Sequence[Example], rng: random.Random) -> list[list[int]]:
        lengths, batch = [len(e.ids) for e in examples], self.settings.batch
        if self.recipe.halves:
            return halved(lengths, batch, rng, random.Random(f"{self.config.seed}/halves"))
        return bucketed(lengths, batch, rng)

    def _updates(self) -> int:
        """Of the whole stage."""
        settings, total = self.settings, 0
        for epoch in range(settings.epochs):
            rows = self.epochs.size(self.epochs.altered(epoch, settings.epochs))
            if self.recipe.halves:
                total += math.ceil((rows // 2) / settings.batch)
            else:
                total += math.ceil(math.ceil(rows / settings.batch) / settings.accumulate)
        return total

    def _update(self, stage: Stage, group: list[list[Example]], quantised: bool) -> float:
        """One update from a group of batches; the mean loss."""
        settings = self.settings
        rate = schedule(self.cursor.step, self.updates, settings.warmup)
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = parameters["peak"] * rate
        self.optimiser.zero_grad(set_to_none=True)
        batches = [collate(examples, self.model.channels) for examples in group]
        with self.weights.swapped(quantised):
            loss = stage.gradients(
                Pass(
                    self.model,
                    self.extra,
                    lambda batch: self._see(stage, batch, settings.bf16),
                    batches,
                    settings.lr * rate,
                    self.config.loss,
                    lambda batch: self._see(stage, batch, bf16=False),
                )
            )
        learning = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(learning, settings.clip)
        self.optimiser.step()
        self.cursor.step += 1
        if self.mean is not None:
            self.mean.update(self.cursor.step)
        return loss

    def _see(self, stage: Stage, batch: Batch, bf16: bool) -> Seen:
        cursor, spec = self.cursor, self.model.spec
        cursor.passed += len(batch.target_B)
        progress = Progress(
            cursor.step, self.updates, cursor.epoch, spec.n_layers, self.config.loss, spec.exits
        )
        between = None
        if stage.between is not None:
            between = partial(_between, stage.between, progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = self.model(batch.inputs_BTF, batch.mask_BT, between)
        full = {
            depth: {n: v.float() if v.is_floating_point() else v for n, v in named.items()}
            for depth, named in outputs.items()
        }
        return Seen(
            full,
            spec.exits,
            batch.target_B,
            batch.weight_B,
            spec.task,
            self.config.loss,
            progress,
            self.extra,
        )

    def _finish_epoch(self, stage: Stage, quantised: bool, loss: float) -> None:
        cursor, settings = self.cursor, self.settings
        if self.mean is None:
            kept = self._look(stage)
        else:
            with self.mean.swapped():
                kept = self._look(stage)
        quality, watched, weights = kept
        name, _ = metric_of(self.model.spec.task)
        cursor.history.append(
            {
                "stage": stage.name,
                "epoch": cursor.epoch + 1,
                "loss": round(loss, 5),
                "rows_passed": cursor.passed,
                f"dev_{name}": {str(d): round(q, 5) for d, q in quality.items()},
            }
        )
        shown = " ".join(f"{100 * q:.2f}" for q in quality.values())
        self.report.say(
            f"{stage.name}, epoch {cursor.epoch + 1} of {settings.epochs}: loss {loss:.4f}, "
            f"dev {name} by exit {shown} (weights as stored), {cursor.seconds:.0f} s"
        )
        if (
            settings.keep == "best"
            and (quantised or not settings.quantise_epochs)
            and watched > cursor.best
        ):
            cursor.best = watched
            self.checkpoints.save_best(weights)

    def _look(self, stage: Stage) -> tuple[dict[int, float], float, dict[str, Tensor]]:
        """(quality of each exit on dev, the mean of those that the stage watches, the weights)."""
        with self.weights.swapped():
            quality = exit_quality(self.model, self.dev)
        depths = {"final": [self.model.n_layers], "all": list(quality)}
        watched = depths.get(stage.watches, list(quality)[:-1])
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return quality, float(np.mean([quality[depth] for depth in watched])), weights

    def _save(self, between_stages: bool = False) -> None:
        self.checkpoints.save(
            {
                "cursor": json.dumps(asdict(self.cursor)),
                "model": self.model.state_dict(),
                "extra": {} if self.extra is None else self.extra.state_dict(),
                "optimiser": {} if between_stages else self.optimiser.state_dict(),
                "means": [] if self.mean is None else self.mean.means,
                "rng": torch.get_rng_state(),
            }
        )


def _between(
    between: Between, progress: Progress, depth: int, hidden_BTD: Tensor
) -> tuple[Tensor, Tensor]:
    return between(depth, hidden_BTD, progress)
