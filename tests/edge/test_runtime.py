"""The device's runtime: the law over graphs, batches that change nothing, and errors that help."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from law import Outcome
from toy_models import LABELS, toy_bundle, toy_inputs, toy_layers

from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import GRAPHS, WEIGHTS, Bundle
from offramp_common.errors import BundleError
from offramp_common.frames import Limits, decode_frame, encode_frame
from offramp_common.runner import Leaving, run
from offramp_common.spec import TaskSpec, never_exit
from offramp_edge.runtime import OnnxLayers, precisions
from offramp_model.export import add_graphs
from offramp_model.split_model import to_torch

N = 4
LENGTHS = [5, 12, 1, 9, 30, 7] * 4
# The cloud's torch and the device's ONNX Runtime sum in different orders; the toy heads are sharp.
TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=["deebert", "pabee"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Both precisions, matrices stored as int8; no exit head behind the second layer. Read only."""
    path = tmp_path_factory.mktemp(request.param)
    task = TaskSpec("classification", LABELS, pair=request.param == "pabee")
    made = toy_bundle(path, request.param, n_layers=N, width=128, exits=[1, 3, 4], task=task)
    return add_graphs(made)


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """To damage."""
    return Bundle.read(shutil.copytree(bundle.path, tmp_path / "copy"))


def cut_between(
    k: int, first: OnnxLayers, then: Any, inputs: Activations[NumpyArray], *, torch: bool = False
) -> Outcome:
    """run(0, k) on the device -> frame -> run(k, n) on `then`."""
    bundle = first.bundle
    knobs, cuts = bundle.knobs("fp32"), bundle.cuts
    head = run(first, inputs, k, knobs)
    left: list[Leaving[Any]] = list(head.left)
    if head.rest is not None:
        rest = decode_frame(encode_frame(head.rest, cuts[k], "fp32"), cuts, Limits())
        tail = run(then, to_torch(rest) if torch else rest, N, knobs)
        left += [
            Leaving(head.rest_rows[group.rows], group.depth, group.answer, group.confidence_B)
            for group in tail.left
        ]
    return Outcome.of(left)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_cut_anywhere_and_continued_by_graphs_gives_the_same_bits(
    bundle: Bundle, precision: str
) -> None:
    layers, inputs = OnnxLayers(bundle, precision), toy_inputs(bundle, LENGTHS)
    uncut = Outcome.of(run(layers, inputs, N, bundle.knobs("fp32")).left)
    assert len(set(uncut.depth_B)) > 1, "the operating point was to spread the exits"
    for k in range(N):
        assert cut_between(k, layers, layers, inputs).same_as(uncut), f"cut at {k}"


def test_cut_anywhere_and_continued_by_torch_gives_the_same_exits(bundle: Bundle) -> None:
    layers, torch_layers = OnnxLayers(bundle), toy_layers(bundle)
    inputs = toy_inputs(bundle, LENGTHS)
    uncut = Outcome.of(run(layers, inputs, N, bundle.knobs("fp32")).left)
    for k in range(N):
        mixed = cut_between(k, layers, torch_layers, inputs, torch=True)
        np.testing.assert_array_equal(mixed.depth_B, uncut.depth_B)
        np.testing.assert_allclose(mixed.answers, uncut.answers, atol=TOLERANCE)
        np.testing.assert_allclose(mixed.confidence_B, uncut.confidence_B, atol=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_batch_gives_bit_for_bit_what_its_rows_give_alone(bundle: Bundle, precision: str) -> None:
    layers, inputs = OnnxLayers(bundle, precision), toy_inputs(bundle, LENGTHS)
    knobs = bundle.knobs("fp32")
    together = Outcome.of(run(layers, inputs, N, knobs).left)
    rows = [inputs.take(np.array([row])) for row in range(inputs.batch_size)]
    alone = [Outcome.of(run(layers, row, N, knobs).left) for row in rows]
    assert together.same_as(
        Outcome(
            np.concatenate([one.answers for one in alone]),
            np.concatenate([one.depth_B for one in alone]),
            np.concatenate([one.confidence_B for one in alone]),
        )
    )


def test_padding_is_never_read(bundle: Bundle) -> None:
    layers, inputs = OnnxLayers(bundle), toy_inputs(bundle, [3, 9, 5])
    never = never_exit(bundle.manifest.knobs, N)
    clean = layers.step(inputs, never).acts
    clean.hidden_BTD[0, 3:] = np.nan
    clean.hidden_BTD[2, 5:] = np.nan
    again = layers.step(clean, never).acts
    for row, length in enumerate(again.lengths_B):
        assert np.isfinite(again.hidden_BTD[row, :length]).all()


def test_every_int8_layer_stays_near_its_fp32_layer(bundle: Bundle) -> None:
    fp32, int8 = OnnxLayers(bundle), OnnxLayers(bundle, "int8")
    never = never_exit(bundle.manifest.knobs, N)
    acts = toy_inputs(bundle, LENGTHS)
    for _ in range(N):  # from the same input: random layers amplify what differs before them
        exact, near = fp32.step(acts, never), int8.step(acts, never)
        apart = np.linalg.norm(near.acts.hidden_BTD - exact.acts.hidden_BTD)
        # Seen: 0.014 to 0.032. A wrong scale or zero point gives 1 and more.
        assert 0 < apart < 0.06 * np.linalg.norm(exact.acts.hidden_BTD)
        acts = exact.acts


def test_a_look_carries_the_branchs_outputs_and_an_answer_a_row(bundle: Bundle) -> None:
    layers, inputs = OnnxLayers(bundle), toy_inputs(bundle, [4, 8])
    step = layers.step(inputs, bundle.knobs("fp32"))
    assert step.look is not None
    assert step.look.leave_B.shape == step.look.confidence_B.shape == (2,)
    assert step.look.leave_B.dtype == np.bool_
    np.testing.assert_array_equal(step.look.outputs["logits"], step.look.answer)
    assert layers.step(step.acts, bundle.knobs("fp32")).look is None, "no exit head stands there"


def test_each_layers_time_is_measured(bundle: Bundle) -> None:
    times = OnnxLayers(bundle).measure(n_tokens=8, repeats=3)
    assert len(times) == N
    assert all(0 < ms < 1000 for ms in times)


def test_layers_are_loaded_when_they_are_needed_or_ahead(copy: Bundle) -> None:
    (copy.path / GRAPHS / "fp32" / "layer_03.onnx").write_bytes(b"not a graph")
    layers = OnnxLayers(copy)
    assert layers.load(0, 3) > 0
    run(layers, toy_inputs(copy, [4]), 3, never_exit(copy.manifest.knobs, N))
    with pytest.raises(BundleError, match=r"layer_03\.onnx: cannot be loaded .*bundle verify"):
        layers.load()


def test_two_threads_give_the_same_answers(bundle: Bundle) -> None:
    inputs, knobs = toy_inputs(bundle, [12, 30]), bundle.knobs("fp32")
    one, two = (
        Outcome.of(run(OnnxLayers(bundle, threads=threads), inputs, N, knobs).left)
        for threads in (1, 2)
    )
    np.testing.assert_array_equal(one.depth_B, two.depth_B)
    np.testing.assert_allclose(one.answers, two.answers, atol=TOLERANCE)


def missing(copy: Bundle, names: Sequence[str]) -> None:
    for name in names:
        path = copy.path / GRAPHS / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("names", "precision", "message"),
    [
        (["int8"], "int8", r"int8/layer_00\.onnx: missing; the bundle's graphs: fp32\. "),
        (["int8", "fp32"], "fp32", r"the bundle's graphs: none\. .*offramp train"),
        (["fp32/layer_02.onnx"], "fp32", r"fp32/layer_02\.onnx: missing"),
        ([], "int4", r"int4/layer_00\.onnx: missing; the bundle's graphs: fp32, int8\. "),
    ],
)
def test_missing_graphs_are_named_with_what_to_do(
    copy: Bundle, names: list[str], precision: str, message: str
) -> None:
    missing(copy, names)
    with pytest.raises(BundleError, match=message):
        OnnxLayers(copy, precision)


def test_the_precisions_there_are(copy: Bundle) -> None:
    assert precisions(copy) == ("fp32", "int8")
    missing(copy, ["fp32", "int8"])
    assert precisions(copy) == ()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_cut_short_are_an_error_and_no_crash(copy: Bundle, precision: str) -> None:
    weights = copy.path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(BundleError, match="cannot be loaded"):
        OnnxLayers(copy, precision).load()


def test_a_bundle_that_was_moved_runs_from_where_it_is(copy: Bundle, bundle: Bundle) -> None:
    inputs, knobs = toy_inputs(bundle, [6, 3]), bundle.knobs("fp32")
    there = Outcome.of(run(OnnxLayers(copy), inputs, N, knobs).left)
    assert there.same_as(Outcome.of(run(OnnxLayers(bundle), inputs, N, knobs).left))
