"""Dataclasses <-> protobuf: the one place that knows both.

`..._from_pb` reads what the other side sent: it returns values within limits or raises WireError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offramp_common.errors import WireError
from offramp_common.exit_classes import NO_CLASS
from offramp_common.frames import Limits
from offramp_common.runner import Knobs
from offramp_common.spec import MAX_NAME_BYTES
from offramp_common.transport import (
    MAX_PRIORITY,
    MAX_REQUEST_ID,
    Completion,
    Hello,
    Offload,
    Welcome,
)
from offramp_common.wire import offload_pb2 as pb

_MAX_KNOBS = 16
_MAX_DEPTHS = 1024
_MAX_CODECS = 64
_MAX_NAME = 256  # bytes, of bundles and software
_MAX_DIGEST = 64
_SHORTEST_MS = 1e-3


def hello_to_pb(hello: Hello) -> pb.HelloRequest:
    digests = [pb.RangeDigest(depth=d, digest=digest) for d, digest in hello.digests.items()]
    return pb.HelloRequest(
        protocol=hello.protocol,
        bundle=hello.bundle,
        digests=digests,
        codecs=hello.codecs,
        software=hello.software,
    )


def hello_from_pb(message: pb.HelloRequest) -> Hello:
    """Raises WireError for what no well-behaved device sends."""
    _check_size("bundle", message.bundle, _MAX_NAME)
    _check_size("software", message.software, _MAX_NAME)
    _check_codecs(message.codecs)
    digests = {entry.depth: entry.digest for entry in message.digests}
    if len(digests) != len(message.digests) or len(digests) > _MAX_DEPTHS:
        raise WireError(
            f"{len(message.digests)} digests of {len(digests)} depths: one a depth, "
            f"at most {_MAX_DEPTHS}"
        )
    for digest in digests.values():
        _check_size("digest", digest, _MAX_DIGEST)
    return Hello(message.bundle, digests, tuple(message.codecs), message.protocol, message.software)


def welcome_to_pb(welcome: Welcome) -> pb.HelloReply:
    return pb.HelloReply(
        protocol=welcome.protocol,
        codecs=welcome.codecs,
        max_frame_bytes=welcome.limits.max_frame_bytes,
        max_rows=welcome.limits.max_rows,
        max_tokens=welcome.limits.max_tokens,
        knobs=knobs_to_pb(welcome.knobs),
        software=welcome.software,
    )


def welcome_from_pb(message: pb.HelloReply) -> Welcome:
    """Raises WireError for what no well-behaved cloud sends."""
    _check_size("software", message.software, _MAX_NAME)
    _check_codecs(message.codecs)
    if not (message.max_frame_bytes and message.max_rows and message.max_tokens):
        raise WireError(
            f"limits of {message.max_frame_bytes} bytes, {message.max_rows} rows and "
            f"{message.max_tokens} tokens: each must be at least 1"
        )
    limits = Limits(message.max_frame_bytes, message.max_rows, message.max_tokens)
    knobs = knobs_from_pb(message.knobs)
    return Welcome(tuple(message.codecs), limits, knobs, message.protocol, message.software)


def offload_to_pb(work: Offload) -> pb.OffloadRequest:
    # 0 means no deadline, so one that has passed travels as the shortest.
    deadline_ms = 0.0 if work.deadline_ms is None else max(work.deadline_ms, _SHORTEST_MS)
    return pb.OffloadRequest(
        request_id=work.request_id,
        bundle=work.bundle,
        digest=work.digest,
        frame=work.frame,
        knobs=knobs_to_pb(work.knobs),
        deadline_ms=deadline_ms,
        traceparent=work.traceparent,
        priority=work.priority,
    )


def offload_from_pb(message: pb.OffloadRequest) -> Offload:
    """Raises WireError for what no well-behaved device sends."""
    _check_size("request_id", message.request_id, MAX_REQUEST_ID, least=1)
    _check_size("bundle", message.bundle, _MAX_NAME)
    _check_size("digest", message.digest, _MAX_DIGEST)
    _check_size("traceparent", message.traceparent, MAX_REQUEST_ID)
    _check_ms("deadline_ms", message.deadline_ms)
    if abs(message.priority) > MAX_PRIORITY:
        raise WireError(
            f"priority {message.priority}: must be from {-MAX_PRIORITY} to {MAX_PRIORITY}"
        )
    return Offload(
        message.request_id,
        message.bundle,
        message.digest,
        message.frame,
        knobs_from_pb(message.knobs),
        message.deadline_ms or None,
        message.traceparent,
        message.priority,
    )


def completion_to_pb(done: Completion) -> pb.OffloadReply:
    return pb.OffloadReply(
        request_id=done.request_id,
        answers=np.ascontiguousarray(done.answers, dtype="<f4").tobytes(),
        exit_depths=done.exit_depth_B.tolist(),
        confidences=done.confidence_B.tolist(),
        queue_ms=done.queue_ms,
        compute_ms=done.compute_ms,
        exit_classes=() if done.exit_classes_BE is None else done.exit_classes_BE.ravel().tolist(),
    )


def completion_from_pb(message: pb.OffloadReply) -> Completion:
    """Raises WireError when the reply's parts do not fit each other."""
    _check_size("request_id", message.request_id, MAX_REQUEST_ID, least=1)
    _check_ms("queue_ms", message.queue_ms)
    _check_ms("compute_ms", message.compute_ms)
    rows = len(message.exit_depths)
    fits = rows and message.answers and len(message.answers) % (4 * rows) == 0
    if not fits or len(message.confidences) != rows:
        raise WireError(
            f"a reply of {rows} exit depths, {len(message.confidences)} confidences and "
            f"{len(message.answers)} bytes of answers"
        )
    answers = np.frombuffer(message.answers, dtype="<f4").reshape(rows, -1).astype(np.float32)
    return Completion(
        message.request_id,
        answers,
        np.array(message.exit_depths, dtype=np.int64),
        np.array(message.confidences, dtype=np.float32),
        message.queue_ms,
        message.compute_ms,
        _exit_classes(message, rows),
    )


def _exit_classes(message: pb.OffloadReply, rows: int) -> NDArray[np.int32] | None:
    classes = np.array(message.exit_classes, dtype=np.int32)
    if not classes.size:
        return None
    if classes.size % rows or classes.size > rows * _MAX_DEPTHS or classes.min() < NO_CLASS:
        raise WireError(
            f"{classes.size} exit classes for {rows} rows, the lowest {classes.min()}: must be as many for "
            f"each row, at most {_MAX_DEPTHS}, none below {NO_CLASS}"
        )
    return classes.reshape(rows, -1)


def knobs_to_pb(knobs: Knobs) -> list[pb.Knob]:
    return [pb.Knob(name=name, values=values) for name, values in knobs.items()]


def knobs_from_pb(messages: Sequence[pb.Knob]) -> Knobs:
    """Raises WireError; an infinity passes, since "never leave" may be one."""
    knobs = {message.name: tuple(message.values) for message in messages}
    if len(knobs) != len(messages) or len(knobs) > _MAX_KNOBS:
        raise WireError(f"{len(messages)} knobs: at most {_MAX_KNOBS}, each once")
    for name, values in knobs.items():
        _check_size("knob", name, MAX_NAME_BYTES, least=1)
        if len(values) > _MAX_DEPTHS or any(map(math.isnan, values)):
            raise WireError(
                f"knob {name}: {len(values)} values, must be at most {_MAX_DEPTHS}, none NaN"
            )
    return knobs


def _check_size(what: str, value: str | bytes, most: int, least: int = 0) -> None:
    size = len(value.encode()) if isinstance(value, str) else len(value)
    if not least <= size <= most:
        raise WireError(f"{what} of {size} bytes: must be {least} to {most}")


def _check_ms(what: str, value: float) -> None:
    # NaN fails the comparison too.
    if not 0 <= value < math.inf:
        raise WireError(f"{what} {value}: must be finite and not negative")


def _check_codecs(names: Sequence[str]) -> None:
    if len(names) > _MAX_CODECS:
        raise WireError(f"{len(names)} codecs: at most {_MAX_CODECS}")
    for name in names:
        _check_size("codec", name, MAX_NAME_BYTES)
