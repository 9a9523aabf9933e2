"""Dataclasses <-> protobuf: the one place that knows both."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from offramp_common.errors import WireError
from offramp_common.frames import Limits
from offramp_common.runner import Knobs
from offramp_common.transport import MAX_REQUEST_ID, Completion, Hello, Offload, Welcome
from offramp_common.wire import offload_pb2 as pb

_MAX_KNOBS = 16
_MAX_DEPTHS = 1024


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
    digests = {entry.depth: entry.digest for entry in message.digests}
    return Hello(
        message.bundle, digests, tuple(message.codecs), message.protocol, message.software
    )


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
    limits = Limits(message.max_frame_bytes, message.max_rows, message.max_tokens)
    knobs = knobs_from_pb(message.knobs)
    return Welcome(tuple(message.codecs), limits, knobs, message.protocol, message.software)


def offload_to_pb(work: Offload) -> pb.OffloadRequest:
    return pb.OffloadRequest(
        request_id=work.request_id,
        bundle=work.bundle,
        digest=work.digest,
        frame=work.frame,
        knobs=knobs_to_pb(work.knobs),
        deadline_ms=work.deadline_ms or 0.0,
        traceparent=work.traceparent,
    )


def offload_from_pb(message: pb.OffloadRequest) -> Offload:
    """Raises WireError for what no well-behaved device sends."""
    if not 1 <= len(message.request_id.encode()) <= MAX_REQUEST_ID:
        raise WireError(f"request_id must have 1 to {MAX_REQUEST_ID} bytes")
    if len(message.traceparent) > MAX_REQUEST_ID:
        raise WireError(f"traceparent of {len(message.traceparent)} characters, at most {MAX_REQUEST_ID}")
    # NaN fails the comparison too.
    if not message.deadline_ms >= 0:
        raise WireError(f"deadline_ms {message.deadline_ms}: must not be negative")
    return Offload(
        message.request_id,
        message.bundle,
        message.digest,
        message.frame,
        knobs_from_pb(message.knobs),
        message.deadline_ms or None,
        message.traceparent,
    )


def completion_to_pb(done: Completion) -> pb.OffloadReply:
    return pb.OffloadReply(
        request_id=done.request_id,
        answers=np.ascontiguousarray(done.answers, dtype="<f4").tobytes(),
        exit_depths=done.exit_depth_B.tolist(),
        confidences=done.confidence_B.tolist(),
        queue_ms=done.queue_ms,
        compute_ms=done.compute_ms,
    )


def completion_from_pb(message: pb.OffloadReply) -> Completion:
    """Raises WireError when the reply's parts do not fit each other."""
    rows = len(message.exit_depths)
    if not rows or len(message.confidences) != rows or len(message.answers) % (4 * rows):
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
    )


def knobs_to_pb(knobs: Knobs) -> list[pb.Knob]:
    return [pb.Knob(name=name, values=values) for name, values in knobs.items()]


def knobs_from_pb(messages: Iterable[pb.Knob]) -> Knobs:
    knobs = {message.name: tuple(message.values) for message in messages}
    if len(knobs) > _MAX_KNOBS or any(len(values) > _MAX_DEPTHS for values in knobs.values()):
        raise WireError(f"at most {_MAX_KNOBS} knobs of {_MAX_DEPTHS} values")
    return knobs
