"""Noise from the network: frames and protobuf messages give valid values or the stated errors."""

from __future__ import annotations

import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from offramp_common import messages
from offramp_common.errors import WireError
from offramp_common.frames import Limits, decode_frame
from offramp_common.transport import Completion, Hello, Offload, Welcome
from offramp_common.wire import offload_pb2 as pb

N_FRAMES = 20_000
N_MESSAGES = 5_000


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    """benchmarks/fuzz_frames.py, which runs the same for longer."""
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_frames.py"
    spec = importlib.util.spec_from_file_location("fuzz_frames", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_mutated_frames_decode_to_valid_activations_or_are_refused(fuzzer: ModuleType) -> None:
    report = fuzzer.fuzz(N_FRAMES, seed=1)
    assert report.failures == []
    # The mutations reach all the way in: some still decode, and no one check refuses most.
    assert report.outcomes["decoded"] > N_FRAMES / 10
    assert report.outcomes["UnknownCodec"] > 0
    assert len(report.reasons) > 40
    assert max(report.reasons.values()) < N_FRAMES / 5
    assert report.longest_message < 400
    assert report.peak_bytes_refusing < 2 * fuzzer.LIMITS.max_frame_bytes


def test_the_frames_that_are_mutated_are_valid(fuzzer: ModuleType) -> None:
    frames = fuzzer.valid_frames()
    assert {decode_frame(f, fuzzer.CUTS, fuzzer.LIMITS).depth for f in frames} == set(fuzzer.CUTS)
    assert all(
        fuzzer.broken_invariant(decode_frame(f, fuzzer.CUTS, fuzzer.LIMITS)) is None for f in frames
    )


def test_the_same_seed_gives_the_same_frames(fuzzer: ModuleType) -> None:
    first, second = (fuzzer.fuzz(300, seed=5, measure_memory=False) for _ in range(2))
    assert first.reasons == second.reasons


def test_pure_noise_is_refused(fuzzer: ModuleType) -> None:
    rng = random.Random(0)
    for _ in range(2_000):
        with pytest.raises(WireError):
            decode_frame(rng.randbytes(rng.randrange(200)), fuzzer.CUTS, Limits())


# ---- protobuf messages

HELLO = Hello("bundle", {0: b"x" * 16, 6: b"y" * 16}, ("int8", "fp16"), software="0.1")
WELCOME = Welcome(("int8",), Limits(), {"threshold": (0.1, 0.5), "patience": (3.0, 3.0)})
WORK = Offload("r1", "bundle", b"x" * 16, b"frame", {"threshold": (0.5,)}, 40.0, "00-abc-def-01")
DONE = Completion("r1", np.ones((2, 3), np.float32), np.array([4, 6]), np.ones(2, np.float32), 1, 2)
CHOSEN = replace(DONE, exit_classes_BE=np.array([[2, -1, -1], [0, 1, 2]], np.int32))


def check_hello(hello: Hello) -> None:
    assert len(hello.digests) <= 1024
    assert len(hello.codecs) <= 64


def check_welcome(welcome: Welcome) -> None:
    limits = welcome.limits
    assert min(limits.max_frame_bytes, limits.max_rows, limits.max_tokens) >= 1
    check_knobs(welcome.knobs)


def check_offload(work: Offload) -> None:
    assert 1 <= len(work.request_id.encode()) <= 64
    assert work.deadline_ms is None or 0 < work.deadline_ms < float("inf")
    check_knobs(work.knobs)


def check_knobs(knobs: Any) -> None:
    assert len(knobs) <= 16
    assert not np.isnan([value for values in knobs.values() for value in values]).any()


def check_completion(done: Completion) -> None:
    rows = len(done.exit_depth_B)
    assert rows >= 1
    assert done.confidence_B.shape == (rows,)
    assert done.answers.ndim == 2
    assert len(done.answers) == rows
    assert done.answers.size
    assert 0 <= done.queue_ms < float("inf")
    if done.exit_classes_BE is not None:
        assert done.exit_classes_BE.dtype == np.int32
        assert done.exit_classes_BE.ndim == 2
        assert len(done.exit_classes_BE) == rows
        assert 0 < done.exit_classes_BE.shape[1] <= 1024
        assert done.exit_classes_BE.min() >= -1


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flipped bits, random bytes, cuts, doubled parts; or noise."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(64))
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(out))
        match rng.randrange(5):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                out[at:at] = rng.randbytes(rng.randrange(1, 5))
            case 3:
                out[at:at] = data[rng.randrange(len(data)) :]
            case _:
                del out[at : at + rng.randrange(1, 9)]
                out = out or bytearray(data)
    return bytes(out)


@pytest.mark.parametrize(
    ("kind", "read", "valid", "check"),
    [
        (pb.HelloRequest, messages.hello_from_pb, messages.hello_to_pb(HELLO), check_hello),
        (pb.HelloReply, messages.welcome_from_pb, messages.welcome_to_pb(WELCOME), check_welcome),
        (pb.OffloadRequest, messages.offload_from_pb, messages.offload_to_pb(WORK), check_offload),
        (
            pb.OffloadReply,
            messages.completion_from_pb,
            messages.completion_to_pb(DONE),
            check_completion,
        ),
        (
            pb.OffloadReply,
            messages.completion_from_pb,
            messages.completion_to_pb(CHOSEN),
            check_completion,
        ),
    ],
    ids=["hello", "welcome", "offload", "completion", "completion with exit classes"],
)
def test_mutated_protobuf_messages_are_read_within_limits_or_refused(
    kind: Any, read: Any, valid: Any, check: Any
) -> None:
    rng, data = random.Random(0), valid.SerializeToString()
    counts, longest = {"unparsable": 0, "refused": 0, "read": 0}, 0
    for _ in range(N_MESSAGES):
        try:
            message = kind.FromString(mutated(data, rng))
        except DecodeError:
            counts["unparsable"] += 1
            continue
        try:
            value = read(message)
        except WireError as error:
            counts["refused"] += 1
            longest = max(longest, len(str(error)))
        else:
            counts["read"] += 1
            check(value)
    assert longest < 400
    assert min(counts.values()) > 5, counts
