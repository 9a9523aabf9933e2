"""A device that sends by a codec fitted to its bundle, and a cloud with or without it, over real gRPC."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from edge_cloud import TorchAsNumpy, cloud_of
from fitted_codecs import random_codecs
from toy_models import toy_bundle, toy_layers

from offramp_common.activations import Activations
from offramp_common.bundle import Bundle
from offramp_common.errors import ConfigError
from offramp_common.frames import Limits, decode_frame, encode_frame
from offramp_common.runner import run
from offramp_common.text import TextEncoder
from offramp_edge import EdgeSettings, EdgeWorker
from offramp_edge.settings import plan_for
from offramp_model.split_model import to_torch
from offramp_train.codec_fits.fit import put_codec

TEXTS = [" ".join(f"w{(i * 7 + j * j) % 96}" for j in range(3 + i)) for i in range(12)]


@pytest.fixture
def fitted(tmp_path: Path) -> Bundle:
    bundle = toy_bundle(tmp_path / "fitted")
    for codec in random_codecs(bundle.cuts[1].width):
        bundle = put_codec(bundle, codec, {})
    return bundle


def expected(bundle: Bundle, label: str, text: str) -> np.ndarray:
    """The answer to what the cloud decodes, if the sample does not leave before."""
    layers, cut = toy_layers(bundle), bundle.cuts[1]
    knobs = {knob.name: (knob.never,) * bundle.n_layers for knob in bundle.manifest.knobs}
    first = run(TorchAsNumpy(layers), TextEncoder(bundle)([text]), 1, knobs)
    assert first.rest is not None
    frame = encode_frame(first.rest, cut, bundle.codecs(1)[label].name, bundle.fitted)
    got: Activations[np.ndarray] = decode_frame(frame, {1: cut}, Limits(), bundle.fitted)
    answer: np.ndarray = run(layers, to_torch(got), bundle.n_layers, knobs).left[0].answer.numpy()
    first_row: np.ndarray = answer[0]
    return first_row


@pytest.mark.parametrize("label", ["pruned-int4", "bottleneck"])
async def test_the_cloud_answers_from_what_is_left(fitted: Bundle, label: str) -> None:
    layers = TorchAsNumpy(toy_layers(fitted))
    async with (
        cloud_of(fitted) as cloud,
        EdgeWorker(
            fitted,
            cloud.address,
            layers=layers,
            split=1,
            codec=label,
            exits=False,
            logits=True,
            max_in_flight=1,
            hedge_after=math.inf,
        ) as worker,
    ):
        for text in TEXTS:
            answer = await worker.answer_async(text)
            assert answer.where == "cloud"
            # The engine packs rows, the reference pads them: sums in another order.
            np.testing.assert_allclose(
                np.array(answer.logits), expected(fitted, label, text), atol=1e-4
            )


async def test_a_cloud_with_other_parameters_is_sent_int8_rather(
    fitted: Bundle, tmp_path: Path
) -> None:
    other = toy_bundle(tmp_path / "other")
    for codec in random_codecs(other.cuts[1].width, seed=1):
        other = put_codec(other, codec, {})
    layers = TorchAsNumpy(toy_layers(fitted))
    async with (
        cloud_of(other) as cloud,
        EdgeWorker(
            fitted,
            cloud.address,
            layers=layers,
            split=1,
            codec="bottleneck",
            exits=False,
            hedge_after=math.inf,
        ) as worker,
    ):
        assert (await worker.answer_async(TEXTS[3])).where == "cloud"
        assert worker.agent.session is not None
        assert "bottleneck" not in "".join(worker.agent.session.codecs())


def test_a_plan_names_what_travels(fitted: Bundle) -> None:
    own = fitted.codecs(1)["bottleneck"].name
    assert plan_for(fitted, EdgeSettings(split=1, codec="bottleneck")).codecs[0] == own
    assert own in plan_for(fitted, EdgeSettings(split=1)).codecs
    assert own not in plan_for(fitted, EdgeSettings(split=2)).codecs
    assert plan_for(fitted, EdgeSettings(codec="bottleneck")).codecs[0] == "int8"
    with pytest.raises(ConfigError, match="hidden states travel as"):
        plan_for(fitted, EdgeSettings(split=2, codec="bottleneck"))
