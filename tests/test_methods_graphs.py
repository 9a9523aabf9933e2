"""Every method in the table as ONNX graphs: the device decides as torch does."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from law import Outcome, whole
from subjects import BATCHES, SUBJECTS, N, Subject, close, inputs
from toy_models import eager, mixed_knobs, toy_tokenizer

from offramp_common.activations import NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.runner import Leaving, run
from offramp_common.spec import never_exit
from offramp_edge.runtime import OnnxLayers
from offramp_model.export import add_graphs
from offramp_model.split_model import TorchLayers, to_numpy, to_torch
from offramp_model.store import About, load_model, save_model


@pytest.fixture(scope="module", params=SUBJECTS, ids="-".join)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = Subject(*request.param).model()
    path = tmp_path_factory.mktemp("-".join(request.param))
    points = {"fp32": mixed_knobs(model)}
    about = About("toy", 64, 1, operating_points=points)
    return add_graphs(save_model(path, model, toy_tokenizer(), about), precisions=["fp32"])


@pytest.mark.slow
@pytest.mark.parametrize("rows", BATCHES)
def test_the_graphs_decide_as_torch_does(exported: Bundle, rows: int) -> None:
    graphs, model = OnnxLayers(exported), load_model(exported)
    for knobs in (mixed_knobs(model), eager(model), never_exit(model.knobs, N)):
        got = Outcome.of(run(graphs, inputs(rows), N, knobs).left)
        close(got, whole(TorchLayers(model), inputs(rows), knobs))


@pytest.mark.slow
def test_the_device_runs_graphs_and_the_cloud_goes_on_in_torch(exported: Bundle) -> None:
    graphs, layers = OnnxLayers(exported), TorchLayers(load_model(exported))
    knobs = exported.knobs("fp32")
    expected = whole(layers, inputs(64), knobs)
    for k in range(N + 1):
        device = run(graphs, inputs(64), k, knobs)
        left: list[Leaving[NumpyArray]] = list(device.left)
        if device.rest is not None:
            cloud = run(layers, to_torch(device.rest), N, knobs)
            left += [
                Leaving(device.rest_rows[g.rows], g.depth, np.asarray(g.answer), g.confidence_B)
                for g in cloud.left
            ]
        close(Outcome.of(left), expected)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, 0.0])
def test_the_graphs_decide_as_torch_does_on_hidden_states_out_of_the_ordinary(
    exported: Bundle, bad: float
) -> None:
    graphs, model = OnnxLayers(exported), load_model(exported)
    layers = TorchLayers(model)
    start = run(layers, to_torch(inputs(4)), 1, never_exit(model.knobs, N)).rest
    assert start is not None
    broken = start.hidden_BTD.clone()
    broken[2, : start.lengths_B[2]] = bad
    start = replace(start, hidden_BTD=broken)
    for knobs in (mixed_knobs(model), eager(model)):
        got = Outcome.of(run(graphs, to_numpy(start), N, knobs).left)
        close(got, Outcome.of(run(layers, start, N, knobs).left))
