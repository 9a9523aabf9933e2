"""Calibration with a guarantee: answers agree with the full model's with probability 1 - epsilon at least.

Schuster, Fisch, Jaakkola, Barzilay, EMNLP 2021 (offramp_model.methods.cats). A row goes wrong when it leaves
at an exit whose answer is not the full model's, so only if its M, the largest score of such exits, is above
the threshold. Among the calibration rows' M a new row's is as likely to have one rank as another: a
threshold with a share epsilon of them above it at most, infinity counted as one of them, keeps the promise
whatever the score is worth. Rows whose exits all agree cannot go wrong and are dropped; with fewer than
1 / epsilon others the threshold is infinity, and nobody leaves early.

It holds on average over draws of calibration rows and new rows, where the new ones are exchangeable with
those, and nothing else was chosen on them.

Axes: E early exits, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from offramp_common.activations import NumpyArray
from offramp_common.errors import ConfigError
from offramp_common.runner import Knobs
from offramp_model.methods import METHODS
from offramp_train.config import Calibration, TrainConfig
from offramp_train.replay import Recording, Scorer

GUARANTEE = "conformal"
"""What a method with this `guarantee` has: one knob, which the branch output "score" of an early exit must be
above for a row to leave, and a policy that says when two answers agree."""


@runtime_checkable
class Agreeing(Protocol):
    """The policy of such a method."""

    def agrees(self, answer_BC: Tensor, full_BC: Tensor) -> Tensor:
        """Whether an answer is as good as the full model's, (B,) bool."""
        ...


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What was promised, and on what.

    rows   of the calibration data;  inconsistent: those of them with an early exit that disagrees
    """

    epsilon: float
    rows: int
    inconsistent: int

    def sentence(self) -> str:
        """For people."""
        few = ""
        if self.inconsistent * self.epsilon < 1:
            needed = (
                f"{math.ceil(1 / self.epsilon)} would be needed" if self.epsilon else "epsilon is 0"
            )
            few = f": too few for anybody to leave early, {needed}"
        return (
            f"agrees with the full model with probability {1 - self.epsilon:g} at least, on rows like these "
            f"{self.rows} ({self.inconsistent} have an early exit that disagrees{few})"
        )

    def to_json(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "rows": self.rows, "inconsistent": self.inconsistent}


def check_guarantee(method: str, where: str) -> None:
    """Raises ConfigError where the method offers no guarantee."""
    if METHODS[method].guarantee != GUARANTEE:
        able = ", ".join(m.name for m in METHODS.values() if m.guarantee == GUARANTEE)
        raise ConfigError(f"{where}: {method} offers no guarantee; methods that do: {able}")


def settled(config: TrainConfig, given: Mapping[str, Any], where: str) -> Calibration:
    """[calibration] with the epsilon that counts; `given` is what the user wrote of it.

    A recipe's epsilon is for methods that keep the promise, and where the user names no other goal. Raises
    ConfigError where nobody could keep it.
    """
    chosen, name = config.calibration, f"{where}: calibration.epsilon"
    able = METHODS[config.method].guarantee == GUARANTEE
    if "epsilon" not in given and (not able or "max_drop" in given):
        return replace(chosen, epsilon=0.0)
    if not chosen.epsilon:
        return chosen
    check_guarantee(config.method, name)
    others = {
        "training.keep = 'best'": config.training.keep == "best",
        "calibration.shift_label": bool(chosen.shift_label),
        "calibration.label_weights": bool(chosen.label_weights),
    }
    for other in [other for other, is_set in others.items() if is_set]:
        raise ConfigError(
            f"{name} = {chosen.epsilon:g}: the guarantee needs dev rows as they are, on which nothing else "
            f"was chosen, and {other} does not leave them so; change that, or set epsilon = 0"
        )
    return chosen


def threshold_of(score_EN: NumpyArray, agrees_EN: NumpyArray, epsilon: float) -> float:
    """The threshold: of the rows' M and infinity, in order, the one at the share 1 - epsilon, rounding up.

    infinity where the rows are too few for epsilon: then nobody leaves early.
    """
    largest_N = np.where(agrees_EN, -math.inf, score_EN).max(axis=0, initial=-math.inf)
    ordered = np.append(np.sort(largest_N[~agrees_EN.all(axis=0)]), math.inf)
    return float(ordered[math.ceil((len(ordered) - 1) * (1 - epsilon))])


def scores_and_agreement(policy: Agreeing, recording: Recording) -> tuple[NumpyArray, NumpyArray]:
    """(score_EN, agrees_EN) of the early exits; a score that is no number lets nobody leave: -infinity."""
    *early, last = sorted(recording.outputs)
    full_NC = recording.outputs[last]["logits"]
    scores, agrees = [np.zeros((0, len(full_NC)))], [np.zeros((0, len(full_NC)), bool)]
    for depth in early:
        outputs = recording.outputs[depth]
        score_N = torch.where(outputs["score"].isnan(), -math.inf, outputs["score"])
        scores.append(score_N.double().numpy()[None])
        agrees.append(policy.agrees(outputs["logits"], full_NC).numpy()[None])
    return np.concatenate(scores), np.concatenate(agrees)


def guaranteed(scorer: Scorer, epsilon: float) -> tuple[Knobs, Guarantee]:
    """The operating point that keeps the promise, one value for all exits. Raises ConfigError."""
    policy, recording = scorer.policy, scorer.recording
    if not isinstance(policy, Agreeing):
        raise ConfigError("epsilon: this exit method offers no guarantee")
    if len(set(scorer.weight_N.tolist())) > 1:
        raise ConfigError(
            "epsilon: label weights do not go with a guarantee, which is for rows like those of the file; "
            "take a file with the mix of labels of real use"
        )
    (knob,) = scorer.specs
    score_EN, agrees_EN = scores_and_agreement(policy, recording)
    # Moved up at most, which keeps the promise; scores end at 1, so `never` is as good as infinity.
    found = min(max(threshold_of(score_EN, agrees_EN, epsilon), knob.low), knob.never)
    inconsistent = int((~agrees_EN.all(axis=0)).sum())
    knobs = {knob.name: (found,) * recording.n_layers}
    return knobs, Guarantee(epsilon, agrees_EN.shape[1], inconsistent)


def on_record(
    training: Mapping[str, Any], found: Mapping[str, Guarantee | None], data: str
) -> dict[str, Any]:
    """A manifest's `training` with what is promised now: precision -> Guarantee and the rows' name.

    What was promised of other precisions stays; None takes it away.
    """
    before = {k: v for k, v in training.get("guarantee", {}).items() if k not in found}
    after = {k: {**g.to_json(), "data": data} for k, g in found.items() if g is not None}
    rest = {key: value for key, value in training.items() if key != "guarantee"}
    return {**rest, "guarantee": {**before, **after}} if before or after else rest


def sentences_of(training: Mapping[str, Any], what_agrees: str) -> str:
    """For the card: what is promised, of which precision; "" where nothing is."""
    lines = [
        f"- {precision}: with probability {1 - g['epsilon']:g} at least the answer agrees with the full "
        f"model's ({what_agrees}); calibrated on {g['rows']} rows ({g['data']}), {g['inconsistent']} of them "
        "with an early exit that disagrees."
        for precision, g in training.get("guarantee", {}).items()
    ]
    if not lines:
        return ""
    return "\n".join(
        [
            *lines,
            "",
            "This is a statement about agreement, not about accuracy. It holds on average over draws of "
            "calibration rows and new rows, for new rows exchangeable with the calibration rows (not when "
            "the data drifts), at the calibrated operating point in that precision.",
        ]
    )
