"""Frames of codecs that were fitted to the bundle, at the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cloud_world import World
from fitted_codecs import random_codecs
from toy_models import toy_bundle

from offramp_common.activations import join
from offramp_common.bundle import Bundle
from offramp_common.codecs import CODECS
from offramp_common.errors import UnknownCodec
from offramp_common.frames import Limits, decode_frame, encode_frame
from offramp_common.transport import Hello, Offload
from offramp_train.codec_fits.fit import put_codec

LENGTHS = (3, 19, 1, 30)


@pytest.fixture
def fitted(tmp_path: Path) -> Bundle:
    """A toy bundle with one codec of each kind, for depth 1."""
    bundle = toy_bundle(tmp_path / "fitted")
    for codec in random_codecs(bundle.cuts[1].width):
        bundle = put_codec(bundle, codec, {"data": "made up"})
    return bundle


async def test_the_engine_answers_what_the_decoded_rows_answer(fitted: Bundle) -> None:
    world = World(fitted)
    engine = world.engine()
    acts, cut = world.rows(LENGTHS, 1), fitted.cuts[1]
    for name in fitted.fitted:
        frame = encode_frame(acts, cut, name, fitted.fitted)
        decoded = decode_frame(frame, {1: cut}, Limits(), fitted.fitted)
        work = Offload("r", fitted.manifest.name, fitted.digest(1), frame)
        got, expected = await engine.complete(work), world.local(decoded)
        np.testing.assert_allclose(got.answers, expected.answers, rtol=0, atol=1e-4)
        assert got.exit_depth_B.tolist() == expected.exit_depth_B.tolist()
    await engine.close()


async def test_frames_with_fewer_tokens_share_a_batch_with_whole_ones(fitted: Bundle) -> None:
    world = World(fitted)
    acts, cut = world.rows(LENGTHS, 1), fitted.cuts[1]
    frames = [encode_frame(acts, cut, name, fitted.fitted) for name in (*fitted.fitted, "fp32")]
    parts = [decode_frame(frame, {1: cut}, Limits(), fitted.fitted) for frame in frames]
    together = world.local(join(parts))
    alone = np.concatenate([world.local(part).answers for part in parts])
    np.testing.assert_allclose(together.answers, alone, rtol=0, atol=1e-4)


async def test_the_greeting_names_the_bundles_own_codecs_and_only_those(fitted: Bundle) -> None:
    engine = World(fitted).engine()
    name = fitted.manifest.name
    own = tuple(fitted.fitted)
    welcome = engine.welcome(Hello(name, {1: fitted.digest(1)}, own[:1]))
    assert welcome.codecs == (*CODECS, *own)
    with pytest.raises(UnknownCodec, match=r"bottleneck@1\.00000000"):
        engine.welcome(Hello(name, {1: fitted.digest(1)}, ("bottleneck@1.00000000",)))
    await engine.close()


def test_codecs_change_no_digest_and_can_be_verified(fitted: Bundle, tmp_path: Path) -> None:
    plain = toy_bundle(tmp_path / "plain")
    assert [plain.digest(d) for d in range(3)] == [fitted.digest(d) for d in range(3)]
    fitted.verify()
    assert "codecs.safetensors" in fitted.manifest.files
