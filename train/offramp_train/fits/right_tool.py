"""The Right Tool's temperatures: one for each exit, by the likelihood of dev."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offramp_train.exit_answers import exit_answers
from offramp_train.fits.fit import Fit, Fitting

_LEAST, _MOST = 0.05, 20.0  # of a temperature; the paper's are 0.59 to 1.30
_HALVINGS = 50


def best_temperature(logits_NC: Tensor, target_N: Tensor) -> float:
    """T in [0.05, 20] with the smallest mean negative log-likelihood of softmax(logits / T).

    The loss is convex in b = 1 / T, and its slope is the mean of E[z] - z_y, E being over softmax(b z).
    """
    chosen_N = logits_NC.gather(1, target_N.unsqueeze(1))[:, 0]
    low, high = 1.0 / _MOST, 1.0 / _LEAST

    def slope(b: float) -> float:
        expected_N = (torch.softmax(b * logits_NC, dim=1) * logits_NC).sum(dim=1)
        return float((expected_N - chosen_N).mean())

    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1.0 / high


def nll(logits_NC: Tensor, target_N: Tensor, temperature: float) -> float:
    """The mean negative log-likelihood of softmax(logits / temperature)."""
    return float(torch.nn.functional.cross_entropy(logits_NC / temperature, target_N))


def fit_temperatures(fitting: Fitting) -> dict[str, Any]:
    """Sets every exit's `temperature`; returns them with dev's losses before and after, by depth."""
    heads = {depth: fitting.model.exits[str(depth)] for depth in fitting.model.spec.exits}
    for head in heads.values():
        head.get_buffer("temperature").fill_(1.0)
    answers, targets = exit_answers(fitting.model, fitting.examples)
    target_N = torch.from_numpy(targets)
    record: dict[str, Any] = {"temperature": {}, "nll_before": {}, "nll_after": {}}
    for depth, head in heads.items():
        logits_NC = torch.from_numpy(answers[depth]).double()
        head.get_buffer("temperature").fill_(best_temperature(logits_NC, target_N))
        fitted = head.get_buffer("temperature").item()
        for name, value in {
            "temperature": fitted,
            "nll_before": nll(logits_NC, target_N, 1.0),
            "nll_after": nll(logits_NC, target_N, fitted),
        }.items():
            record[name][str(depth)] = round(value, 5)
    return record


FITS = (Fit("temperatures", "dev", fit_temperatures),)
