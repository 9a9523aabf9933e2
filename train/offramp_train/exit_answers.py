"""What every exit of a model in training says of a set of examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from offramp_common.activations import NumpyArray
from offramp_model.exits import State
from offramp_model.split_model import MultiExitModel
from offramp_train.batches import Example, collate
from offramp_train.metrics import metric_of, prediction_of

_EVALUATION_ROWS = 128


@torch.inference_mode()
def exit_answers(
    model: MultiExitModel, examples: Sequence[Example]
) -> tuple[dict[int, NumpyArray], NumpyArray]:
    """(depth -> answer_NC of that exit, target_N), rows in order of length."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    never = {knob.name: torch.tensor(float(knob.never)) for knob in model.knobs}
    parts: dict[int, list[NumpyArray]] = {depth: [] for depth in model.spec.exits}
    for start in range(0, len(order), _EVALUATION_ROWS):
        rows = [examples[i] for i in order[start : start + _EVALUATION_ROWS]]
        batch = collate(rows, model.channels)
        outputs = model(batch.inputs_BTF, batch.mask_BT)
        # The policy's answers: a method may mix exits, and then the branch's own are not what it says.
        state: State = model.policy.start(batch.mask_BT)
        for depth in model.looks:
            decision = model.policy.decide(outputs[depth], state, never, depth)
            state = decision.state
            if depth in parts:
                parts[depth].append(decision.answer.float().numpy())
    target_N = np.array([examples[i].target for i in order])
    return {depth: np.concatenate(answers) for depth, answers in parts.items()}, target_N


def exit_quality(model: MultiExitModel, examples: Sequence[Example]) -> dict[int, float]:
    """Quality of each exit on all examples, by the task's first metric."""
    task = model.spec.task
    _, quality = metric_of(task)
    answers, target_N = exit_answers(model, examples)
    one_N = np.ones(len(target_N))
    return {d: quality(prediction_of(task, a), target_N, one_N) for d, a in answers.items()}
