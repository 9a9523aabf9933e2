"""What the cloud notes of a request, below the span of the device that sent it: gateway, and replica
with decode, queue, layers and reply."""

from __future__ import annotations

import time
from collections.abc import Callable

from offramp_cloud.served import Served
from offramp_common.tracing import Tracer
from offramp_common.transport import Completion


def observer(tracer: Tracer) -> Callable[[Served], None]:
    """An observer of the gateway's requests that notes each as a span."""

    def observe(served: Served) -> None:
        tracer.add(
            "gateway",
            served.traceparent,
            served.began_s,
            served.began_s + served.ms / 1000,
            bundle=served.bundle,
            device=served.device,
            status=served.status,
            bytes=served.nbytes,
        )

    return observe


def note_run(
    tracer: Tracer, parent: str, arrived_s: float, decoded_s: float, done: Completion
) -> None:
    """A request that an engine has just answered. Its queue_ms count from its arrival, decoding included;
    what it waited between layers is in them, too, so that queue and layers are two sums, one after the
    other."""
    now_s = time.monotonic()
    replica = tracer.start("replica", parent, arrived_s)
    started_s = max(decoded_s, arrived_s + done.queue_ms / 1000)
    ended_s = min(now_s, started_s + done.compute_ms / 1000)
    tracer.add("decode", replica.traceparent, arrived_s, decoded_s)
    tracer.add("queue", replica.traceparent, decoded_s, started_s)
    tracer.add(
        "layers",
        replica.traceparent,
        started_s,
        ended_s,
        rows=len(done.exit_depth_B),
        deepest=int(done.exit_depth_B.max(initial=0)),
    )
    tracer.add("reply", replica.traceparent, ended_s, now_s)
    replica.end(now_s)
