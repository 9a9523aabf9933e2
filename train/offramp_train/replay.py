"""Each exit's outputs recorded once, then any operating point replayed over them without the model.

A replay equals really running with exits, because policies see a row's outputs and carried state alone.
(A branch that reads carried state must not depend on the knobs; none does. A policy whose method reads layers
without an exit must decide from the branch's outputs, for such layers are not recorded.)

Axes: N rows of the data set, C answer width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp_common.activations import Activations, NumpyArray, mask_of
from offramp_common.runner import Knobs, Layers
from offramp_common.spec import KnobSpec, TaskSpec, never_exit
from offramp_model.exits import Decision, Policy
from offramp_train.metrics import Quality, prediction_of

Start = Callable[[Sequence[int]], Activations[Any]]
"""Row numbers -> those rows at depth 0, as the layers want them."""


@dataclass(frozen=True, slots=True)
class Recording:
    """outputs   depth -> name -> (N, ...): what each exit's branch gave for every row
    lengths_N  tokens of each row
    """

    outputs: Mapping[int, Mapping[str, Tensor]]
    lengths_N: NumpyArray
    n_layers: int


def record(
    layers: Layers[Any],
    start: Start,
    lengths: Sequence[int],
    knobs: tuple[KnobSpec, ...],
    batch: int = 64,
    done: Callable[[int], None] = lambda rows: None,
) -> Recording:
    """Run every row to full depth, looking at every exit. `done` is told the rows of each batch."""
    never = never_exit(knobs, layers.n_layers)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    parts: dict[int, dict[str, list[Tensor]]] = {}
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        acts = start(rows)
        while acts.depth < layers.n_layers:
            step = layers.step(acts, never)
            acts = step.acts
            if step.look is None:
                continue
            here = parts.setdefault(acts.depth, {})
            for name, value in step.look.outputs.items():
                here.setdefault(name, []).append(torch.as_tensor(value).clone())
        done(len(rows))
    back = torch.as_tensor(np.argsort(np.array(order)))
    outputs_by_depth = {
        depth: {name: torch.cat(values)[back] for name, values in named.items()}
        for depth, named in parts.items()
    }
    return Recording(outputs_by_depth, np.array(lengths), layers.n_layers)


@torch.inference_mode()
def replay(policy: Policy, recording: Recording, knobs: Knobs) -> tuple[NumpyArray, NumpyArray]:
    """(depth_N at which each row leaves, answer_NC it leaves with) at an operating point."""
    mask_NT = torch.from_numpy(mask_of(recording.lengths_N))
    state: Mapping[str, Tensor] = policy.start(mask_NT)
    depth_N = np.zeros(len(recording.lengths_N), dtype=np.int64)
    answer_NC: NumpyArray | None = None
    for depth, outputs in sorted(recording.outputs.items()):
        decision = policy.decide(outputs, state, _at(knobs, depth), depth)
        state = decision.state
        answer = decision.answer.numpy()
        answer_NC = answer.copy() if answer_NC is None else answer_NC
        here_N = depth_N == 0
        if depth < recording.n_layers:
            here_N &= decision.leave_B.numpy()
        answer_NC[here_N] = answer[here_N]
        depth_N[here_N] = depth
    assert answer_NC is not None, "a recording without exits"
    return depth_N, answer_NC


@dataclass(frozen=True, slots=True)
class Score:
    """mean_depth in layers and quality, both over weighted rows."""

    mean_depth: float
    quality: float


class Scorer:
    """Scores operating points over one recording. Policies that carry nothing are scored from a memory."""

    def __init__(
        self,
        policy: Policy,
        recording: Recording,
        specs: tuple[KnobSpec, ...],
        task: TaskSpec,
        quality: Quality,
        target_N: NumpyArray,
        weight_N: NumpyArray,
    ) -> None:
        self.policy, self.recording, self.specs, self.task = policy, recording, specs, task
        self.target_N, self.weight_N, self._quality = target_N, weight_N, quality
        self.exits = sorted(recording.outputs)
        self.memoryless = not any(policy.state_fields(depth) for depth in self.exits)
        self._known: dict[tuple[int, tuple[float, ...]], tuple[NumpyArray, NumpyArray]] = {}

    @property
    def n_layers(self) -> int:
        return self.recording.n_layers

    def score(self, knobs: Knobs) -> Score:
        depth_N, prediction_N = self._route(knobs) if self.memoryless else self._replay(knobs)
        mean_depth = float((depth_N * self.weight_N).sum() / self.weight_N.sum())
        return Score(mean_depth, self._quality(prediction_N, self.target_N, self.weight_N))

    def _replay(self, knobs: Knobs) -> tuple[NumpyArray, NumpyArray]:
        depth_N, answer_NC = replay(self.policy, self.recording, knobs)
        return depth_N, prediction_of(self.task, answer_NC)

    def _route(self, knobs: Knobs) -> tuple[NumpyArray, NumpyArray]:
        """The same from what each exit decides by itself, remembered for each value of its knobs."""
        looks = [
            self._look(depth, tuple(knobs[spec.name][depth - 1] for spec in self.specs))
            for depth in self.exits
        ]
        leave_EN = np.stack([leave for leave, _ in looks])
        leave_EN[-1] = True
        exit_N = leave_EN.argmax(axis=0)
        prediction_N = np.stack([prediction for _, prediction in looks])[
            exit_N, np.arange(len(exit_N))
        ]
        return np.array(self.exits)[exit_N], prediction_N

    @torch.inference_mode()
    def _look(self, depth: int, values: tuple[float, ...]) -> tuple[NumpyArray, NumpyArray]:
        known = self._known.get((depth, values))
        if known is None:
            knobs = {s.name: torch.tensor(v) for s, v in zip(self.specs, values, strict=True)}
            decision: Decision = self.policy.decide(self.recording.outputs[depth], {}, knobs, depth)
            answer = decision.answer.numpy()
            known = decision.leave_B.numpy(), prediction_of(self.task, answer)
            self._known[depth, values] = known
        return known


def _at(knobs: Knobs, depth: int) -> dict[str, Tensor]:
    return {
        name: torch.tensor(values[depth - 1], dtype=torch.float32) for name, values in knobs.items()
    }
