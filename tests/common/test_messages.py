"""Dataclasses and protobuf messages: nothing is lost, and what no well-behaved side sends is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp_common import messages
from offramp_common.errors import WireError
from offramp_common.frames import Limits
from offramp_common.transport import Completion, Hello, Offload, Welcome
from offramp_common.wire import offload_pb2 as pb

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
NAMES = st.text(st.characters(codec="utf-8"), max_size=16)
KNOB_NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=16)
FLOATS = st.floats(allow_nan=False, width=32)
KNOBS = st.dictionaries(KNOB_NAMES, st.lists(FLOATS, max_size=5).map(tuple), max_size=4)
CODECS = st.lists(NAMES, max_size=4).map(tuple)
IDS = st.text(st.characters(codec="ascii"), min_size=1, max_size=64)
UINT32 = st.integers(0, 2**32 - 1)
MS = st.floats(0, 1e6, width=32)


def over_the_wire(message: Any) -> Any:
    """As the other side parses it."""
    return type(message).FromString(message.SerializeToString())


@SETTINGS
@given(
    st.builds(Hello, NAMES, st.dictionaries(UINT32, st.binary(max_size=64)), CODECS, UINT32, NAMES)
)
def test_hello_comes_back_as_it_was(hello: Hello) -> None:
    assert messages.hello_from_pb(over_the_wire(messages.hello_to_pb(hello))) == hello


@SETTINGS
@given(
    st.builds(
        Welcome,
        CODECS,
        st.builds(
            Limits, st.integers(1, 2**63), st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1)
        ),
        KNOBS,
        UINT32,
        NAMES,
    )
)
def test_welcome_comes_back_as_it_was(welcome: Welcome) -> None:
    assert messages.welcome_from_pb(over_the_wire(messages.welcome_to_pb(welcome))) == welcome


@SETTINGS
@given(
    st.builds(
        Offload,
        IDS,
        NAMES,
        st.binary(max_size=64),
        st.binary(max_size=99),
        KNOBS,
        st.one_of(st.none(), st.floats(0.001953125, 1e6, width=32)),
        IDS,
        st.integers(-100, 100),
    )
)
def test_offload_comes_back_as_it_was(work: Offload) -> None:
    assert messages.offload_from_pb(over_the_wire(messages.offload_to_pb(work))) == work


@SETTINGS
@given(IDS, st.integers(1, 6), st.integers(1, 4), st.integers(0, 3), st.integers(0), MS, MS)
def test_completion_comes_back_bit_for_bit(
    request_id: str,
    rows: int,
    width: int,
    exits: int,
    seed: int,
    queue_ms: float,
    compute_ms: float,
) -> None:
    rng = np.random.default_rng(seed)
    classes_BE = rng.integers(-1, 2**15, (rows, exits)).astype(np.int32) if exits else None
    done = Completion(
        request_id,
        rng.standard_normal((rows, width)).astype(np.float32),
        rng.integers(1, 2**32, rows),
        rng.random(rows).astype(np.float32),
        queue_ms,
        compute_ms,
        classes_BE,
    )
    back = messages.completion_from_pb(over_the_wire(messages.completion_to_pb(done)))
    assert (back.request_id, back.queue_ms, back.compute_ms) == (request_id, queue_ms, compute_ms)
    for name, dtype in (("answers", "f4"), ("exit_depth_B", "i8"), ("confidence_B", "f4")):
        got, wanted = getattr(back, name), getattr(done, name)
        assert got.dtype == dtype
        assert got.shape == wanted.shape
        assert got.tobytes() == wanted.tobytes()
        got.fill(0)
    if classes_BE is None:
        assert back.exit_classes_BE is None
    else:
        assert back.exit_classes_BE is not None
        assert back.exit_classes_BE.dtype == np.int32
        assert back.exit_classes_BE.tolist() == classes_BE.tolist()


def completion(rows: int = 2) -> Completion:
    return Completion(
        "r1", np.ones((rows, 3), np.float32), np.full(rows, 4), np.ones(rows, np.float32)
    )


def test_a_reply_without_exit_classes_has_the_bytes_it_always_had() -> None:
    """Golden: devices in the field read these. Field by field: id, answers, depths, confidences, times."""
    done = Completion(
        "r1", np.array([[1, -2]], np.float32), np.array([4]), np.ones(1, np.float32), 0.5, 2.0
    )
    wire = messages.completion_to_pb(done).SerializeToString().hex()
    assert wire == (
        "0a027231" "12080000803f000000c0" "1a0104" "22040000803f" "2d0000003f" "3500000040"
    )  # fmt: skip
    chosen = replace(done, exit_classes_BE=np.array([[3, -1]], np.int32))
    # Field 7, packed, two bytes: zigzag puts 3 at 6 and -1 at 1.
    assert messages.completion_to_pb(chosen).SerializeToString().hex() == wire + "3a020601"


def test_nan_answers_and_confidences_cross() -> None:
    done = completion()
    done.answers[0, 1] = done.confidence_B[0] = np.nan
    back = messages.completion_from_pb(messages.completion_to_pb(done))
    assert back.answers.tobytes() == done.answers.tobytes()
    assert math.isnan(back.confidence_B[0])


# ---- deadlines


def offload(**changes: Any) -> Offload:
    return replace(Offload("r1", "bundle", b"d" * 16, b"frame"), **changes)


def test_no_deadline_is_no_deadline_on_the_other_side() -> None:
    assert messages.offload_from_pb(messages.offload_to_pb(offload())).deadline_ms is None


@pytest.mark.parametrize("deadline_ms", [0.0, -5.0, 1e-60, -math.inf])
def test_a_deadline_that_has_passed_does_not_become_none(deadline_ms: float) -> None:
    sent = messages.offload_to_pb(offload(deadline_ms=deadline_ms))
    got = messages.offload_from_pb(sent).deadline_ms
    assert got == pytest.approx(0.001)


# ---- what no well-behaved side sends


def refused(read: Any, message: Any, match: str) -> None:
    with pytest.raises(WireError, match=match):
        read(message)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"request_id": ""}, "request_id of 0 bytes: must be 1 to 64"),
        ({"request_id": "é" * 33}, "request_id of 66 bytes"),
        ({"traceparent": "x" * 65}, "traceparent of 65 bytes: must be 0 to 64"),
        ({"bundle": "x" * 257}, "bundle of 257 bytes"),
        ({"digest": b"x" * 65}, "digest of 65 bytes"),
        ({"deadline_ms": -1.0}, "deadline_ms -1.0: must be finite and not negative"),
        ({"deadline_ms": math.nan}, "deadline_ms nan"),
        ({"deadline_ms": math.inf}, "deadline_ms inf"),
        ({"priority": 101}, "priority 101: must be from -100 to 100"),
        ({"priority": -101}, "priority -101"),
        ({"knobs": [pb.Knob(name=str(i)) for i in range(17)]}, "17 knobs: at most 16"),
        ({"knobs": [pb.Knob(name="a"), pb.Knob(name="a")]}, "2 knobs: .* each once"),
        ({"knobs": [pb.Knob(name="")]}, "knob of 0 bytes"),
        ({"knobs": [pb.Knob(name="x" * 65)]}, "knob of 65 bytes"),
        ({"knobs": [pb.Knob(name="a", values=[0.5, math.nan])]}, "none NaN"),
        ({"knobs": [pb.Knob(name="a", values=[0.0] * 1025)]}, "1025 values, must be at most 1024"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_offload_is_refused(change: dict[str, Any], match: str) -> None:
    message = messages.offload_to_pb(offload())
    for name, value in change.items():
        if name == "knobs":
            message.knobs.extend(value)
        else:
            setattr(message, name, value)
    refused(messages.offload_from_pb, message, match)


def test_an_infinite_knob_passes_since_never_leave_may_be_one() -> None:
    knobs = {"threshold": (math.inf, -math.inf)}
    assert messages.knobs_from_pb(messages.knobs_to_pb(knobs)) == knobs


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"request_id": ""}, "request_id of 0 bytes"),
        ({"answers": b""}, "2 exit depths, 2 confidences and 0 bytes of answers"),
        ({"answers": b"\0" * 23}, "23 bytes of answers"),
        ({"answers": b"\0" * 20}, "20 bytes of answers"),
        ({"exit_depths": []}, "0 exit depths"),
        ({"exit_depths": [1, 2, 3]}, "3 exit depths, 2 confidences"),
        ({"confidences": [0.5]}, "2 exit depths, 1 confidences"),
        ({"queue_ms": math.nan}, "queue_ms nan"),
        ({"compute_ms": -1.0}, "compute_ms -1.0: must be finite and not negative"),
        ({"exit_classes": [1, 2, 3]}, "3 exit classes for 2 rows"),
        ({"exit_classes": [0, -2]}, "2 exit classes for 2 rows, the lowest -2: .* none below -1"),
        ({"exit_classes": [0] * 2050}, "2050 exit classes .* at most 1024"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_completion_is_refused(change: dict[str, Any], match: str) -> None:
    message = messages.completion_to_pb(completion())
    for name, value in change.items():
        if name in ("exit_depths", "confidences", "exit_classes"):
            message.ClearField(name)
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    refused(messages.completion_from_pb, message, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bundle": "x" * 257}, "bundle of 257 bytes"),
        ({"software": "x" * 257}, "software of 257 bytes"),
        ({"codecs": ["x"] * 65}, "65 codecs: at most 64"),
        ({"codecs": ["x" * 65]}, "codec of 65 bytes"),
        ({"digests": [pb.RangeDigest(depth=d) for d in range(1025)]}, "at most 1024"),
        ({"digests": [pb.RangeDigest(depth=1), pb.RangeDigest(depth=1)]}, "one a depth"),
        ({"digests": [pb.RangeDigest(depth=1, digest=b"x" * 65)]}, "digest of 65 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_hello_is_refused(change: dict[str, Any], match: str) -> None:
    refused(messages.hello_from_pb, pb.HelloRequest(**change), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"max_frame_bytes": 0}, "limits of 0 bytes, 2 rows and 3 tokens: each must be at least 1"),
        ({"max_rows": 0}, "0 rows"),
        ({"max_tokens": 0}, "0 tokens"),
        ({"codecs": ["x"] * 65}, "65 codecs"),
        ({"software": "x" * 257}, "software of 257 bytes"),
        ({"knobs": [pb.Knob(name="a", values=[math.nan])]}, "knob a: 1 values, .* none NaN"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_welcome_is_refused(change: dict[str, Any], match: str) -> None:
    fields = {"max_frame_bytes": 9, "max_rows": 2, "max_tokens": 3, **change}
    refused(messages.welcome_from_pb, pb.HelloReply(**fields), match)
