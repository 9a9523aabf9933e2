"""Methods that read every layer, with exits after some layers only: the others only add to the state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from law import Outcome, cut_at, whole
from subjects import close, inputs
from toy_models import eager, mixed_knobs, toy_bundle, toy_layers, toy_model

from offramp_common.activations import Activations
from offramp_common.runner import Knobs, run
from offramp_common.spec import never_exit
from offramp_edge.runtime import OnnxLayers
from offramp_model.export import add_graphs
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch
from offramp_train.replay import record, replay

N = 4
CASES = [
    (method.name, exits)
    for method in METHODS.values()
    if method.every_layer
    for exits in ((2, 3, 4), (1, 4), (3, 4), (4,))
]


def points(model: MultiExitModel) -> list[Knobs]:
    return [mixed_knobs(model), eager(model), never_exit(model.knobs, model.n_layers)]


@pytest.mark.parametrize(("method", "exits"), CASES)
def test_rows_leave_at_exits_alone_and_the_law_holds_at_every_split_point(
    method: str, exits: Sequence[int]
) -> None:
    model = toy_model(method, n_layers=N, exits=exits, seed=3)
    layers, batch = TorchLayers(model), inputs(16)
    cuts = {depth: model.cut(depth) for depth in range(N)}
    for knobs in points(model):
        expected = whole(layers, batch, knobs)
        assert set(expected.depth_B.tolist()) <= set(exits)
        for k in range(N + 1):
            assert cut_at(k, layers, batch, knobs, cuts).same_as(expected), f"split point {k}"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "exits"), [c for c in CASES if c[1] in ((2, 3, 4), (1, 4))])
def test_graphs_carry_the_same_state_past_layers_without_an_exit(
    method: str, exits: Sequence[int], tmp_path: Path
) -> None:
    toy = toy_bundle(tmp_path, method, n_layers=N, exits=exits, seed=3)
    bundle = add_graphs(toy, ["fp32"])
    graphs, layers = OnnxLayers(bundle), toy_layers(bundle)
    batch, never = inputs(8), never_exit(bundle.manifest.knobs, N)
    ours, theirs = batch, to_torch(batch)
    for depth in range(1, N + 1):
        step, expected = graphs.step(ours, never), layers.step(theirs, never)
        ours, theirs = step.acts, expected.acts
        assert (step.look is None) == (depth not in exits)
        if depth < N:
            assert sorted(ours.state) == sorted(theirs.state)
        for name, value in ours.state.items():
            # Of size 1; two runtimes were seen to differ by 1e-6.
            np.testing.assert_allclose(value, theirs.state[name].numpy(), rtol=0, atol=1e-5)
    for knobs in points(layers.model):
        close(Outcome.of(run(graphs, batch, N, knobs).left), whole(layers, batch, knobs))


@pytest.mark.parametrize(("method", "exits"), CASES)
def test_a_replay_of_the_exits_alone_equals_really_running(
    method: str, exits: Sequence[int]
) -> None:
    model = toy_model(method, n_layers=N, exits=exits, seed=3)
    layers, batch = TorchLayers(model), inputs(24)

    def start(rows: Sequence[int]) -> Activations[Any]:
        return to_torch(batch.take(np.array(rows)))

    recording = record(layers, start, batch.lengths_B.tolist(), model.knobs)
    assert sorted(recording.outputs) == list(exits)
    for knobs in points(model):
        really = whole(layers, batch, knobs)
        depth_N, answer_NC = replay(model.policy, recording, knobs)
        np.testing.assert_array_equal(depth_N, really.depth_B)
        # Rows were recorded in another order, and so in other batches: see subjects.TOLERANCE.
        np.testing.assert_allclose(answer_NC, really.answers, rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("method", sorted({name for name, _ in CASES}))
def test_every_layer_counts_at_a_later_exit(method: str) -> None:
    """The pitfall of these methods: forgetting the layers between exits."""
    model = toy_model(method, n_layers=N, exits=(2, 4), seed=3)
    mask_BT = torch.ones(4, 5, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    hidden_LBTD = torch.randn(N, 4, 5, model.spec.width, generator=generator)

    def last(changed: int | None) -> torch.Tensor:
        state: dict[str, torch.Tensor] = {}
        knobs = {knob.name: torch.tensor(knob.never) for knob in model.knobs}
        for depth in range(1, N + 1):
            head = model.head(depth)
            assert head is not None
            hidden_BTD = hidden_LBTD[depth - 1] + (1.0 if depth == changed else 0.0)
            decision, outputs = head(hidden_BTD, mask_BT, state, knobs)
            state = decision.state
        logits_BC: torch.Tensor = outputs["logits"]
        return logits_BC

    for depth in range(1, N + 1):
        assert ((last(depth) - last(None)).abs().amax(dim=-1) > 1e-3).all(), f"layer {depth}"
