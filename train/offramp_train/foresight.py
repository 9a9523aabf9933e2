"""What confidence says of later exits, from a recording: the table that planners read from a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from offramp_common.activations import NumpyArray, mask_of
from offramp_common.bundle import Bundle, write_manifest
from offramp_common.forecast import Forecast, fit
from offramp_common.runner import Knobs
from offramp_model.exits import Policy
from offramp_train.measure import PRECISIONS, has_graphs, policy_of, subject
from offramp_train.progress import Report
from offramp_train.replay import Recording
from offramp_train.tables import Rows


@torch.inference_mode()
def forecast_of(policy: Policy, recording: Recording, knobs: Knobs) -> Forecast:
    """Replayed at an operating point: every exit looks at every row, as it does at the rows that stay."""
    state: Mapping[str, Tensor] = policy.start(torch.from_numpy(mask_of(recording.lengths_N)))
    confidences: list[NumpyArray] = []
    leaves: list[NumpyArray] = []
    for depth, outputs in sorted(recording.outputs.items()):
        values = {
            name: torch.tensor(of_exit[depth - 1], dtype=torch.float32)
            for name, of_exit in knobs.items()
        }
        decision = policy.decide(outputs, state, values, depth)
        state = decision.state
        confidences.append(decision.confidence_B.float().numpy())
        leaves.append(decision.leave_B.numpy())
    return fit(sorted(recording.outputs), np.stack(confidences), np.stack(leaves))


def record_forecasts(bundle: Bundle, rows: Rows, precision: str, report: Report) -> None:
    """Fit the tables of a bundle at the operating points that it has, and write them into the manifest.
    `precision`: "fp32", "int8" or "all"."""
    forecasts = dict(bundle.manifest.forecasts)
    for name in PRECISIONS if precision == "all" else (precision,):
        if name not in bundle.manifest.operating_points:
            continue
        here = subject(bundle, name if has_graphs(bundle, name) else "torch", rows)
        recording = here.record(report, f"recording exits, {name}")
        forecasts[name] = forecast_of(policy_of(bundle), recording, bundle.knobs(name))
        report.say(f"{name}: {in_words(forecasts[name])}")
    # Read again: nothing else in it is this command's.
    manifest = Bundle.read(bundle.path).manifest
    write_manifest(bundle.path, replace(manifest, forecasts=forecasts))


def in_words(forecast: Forecast) -> str:
    """A line: the chance to leave at the next exit, least sure to surest."""
    shown = []
    for outlook, following in zip(forecast.outlooks[:-1], forecast.exits, strict=False):
        shares = " ".join(f"{100 * leave:.0f}" for leave in outlook.leave)
        shown.append(f"{outlook.depth} to {following}: {shares} %")
    return f"leave from {', '.join(shown)}"
