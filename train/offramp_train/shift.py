"""After training: one label's logit lowered at every exit, where it costs the other labels too much.

Training on made-up out-of-scope rows makes a model call too much out of scope. How much is too much is a
choice, and a constant on one logit makes it without training again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from offramp_common.errors import ConfigError
from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Example
from offramp_train.config import Calibration
from offramp_train.exit_answers import exit_answers
from offramp_train.quantise import StoredWeights

_STEP, _LOWEST = 0.125, -12.0


def shift_label(model: MultiExitModel, dev: Sequence[Example], settings: Calibration) -> float:
    """Lower the logit by the least that does it, measured with the weights as stored; returns the shift.

    Where nothing reaches the accuracy asked for, the shift with the highest accuracy is taken. Raises
    ConfigError for an unknown label, or exits without a classifier.
    """
    labels = model.spec.task.labels
    if settings.shift_label not in labels:
        raise ConfigError(
            f"calibration.shift_label: {settings.shift_label!r} is not a label of the data"
        )
    label = labels.index(settings.shift_label)
    with StoredWeights(model).swapped():
        answers, target_N = exit_answers(model, dev)
    shift = least_shift(answers[model.n_layers], target_N, label, settings.shift_others / 100)
    heads = [model.exits[str(depth)] for depth in model.spec.exits]
    classifiers = [getattr(head, "classifier", None) for head in heads]
    with torch.no_grad():
        # Exits may share one classifier: it is shifted once.
        for classifier in {id(c): c for c in classifiers}.values():
            # A bias shifts a logit only where the logits are what the classifier gives.
            if not isinstance(classifier, nn.Linear) or classifier.out_features != len(labels):
                raise ConfigError(
                    f"calibration.shift_label: {model.method.name} has no classifiers to shift"
                )
            classifier.bias[label] += shift
    return shift


def least_shift(logits_NC: np.ndarray, target_N: np.ndarray, label: int, others: float) -> float:
    """The shift nearest to 0, in [-12, 0], at which rows of other labels have accuracy `others`.

    Where there is none: the one with the highest accuracy.
    """
    other_N = target_N != label
    logits_NC, target_N = logits_NC[other_N].copy(), target_N[other_N]
    best, best_shift = -1.0, 0.0
    plain_N = logits_NC[:, label].copy()
    for i in range(int(_LOWEST / -_STEP) + 1):
        shift = -_STEP * i
        logits_NC[:, label] = plain_N + shift
        accuracy = float((logits_NC.argmax(axis=1) == target_N).mean())
        if accuracy > best:
            best, best_shift = accuracy, shift
        if accuracy >= others:
            return shift
    return best_shift
