"""One sample's spans on the device: request, and below it queue, layers, offload (air, encode, network)
and answer. What the cloud notes of the sample hangs below offload."""

from __future__ import annotations

import time

from offramp_common.tracing import Span, Tracer
from offramp_edge.answers import Answer


class Trace:
    """Made when the sample is taken, of a tracer that is on. `end` closes what is still open. Times are
    those of time.monotonic(), the real worker's clock."""

    def __init__(self, tracer: Tracer, caller: str, began_s: float) -> None:
        """`caller`: the traceparent that came with the sample, empty without one."""
        self._tracer = tracer
        self._request = tracer.start("request", caller, began_s)
        self._offload: Span | None = None
        self._done_s = began_s  # until then the spans account for the time

    def ran(self, asked_s: float, began_s: float, ended_s: float) -> None:
        """A stretch on the device. That its thread was left is heard of a little later: until then the
        sample was still on its way from there."""
        parent, now_s = self._request.traceparent, time.monotonic()
        ms = round(1000 * (ended_s - began_s), 3)
        self._tracer.add("queue", parent, asked_s, began_s)
        self._tracer.add("layers", parent, began_s, now_s, ms=ms)
        self._done_s = now_s

    def sends(self) -> str:
        """It goes to the cloud now; the traceparent to send. What it has waited for since it left the
        device's layers is room in the air."""
        now_s = time.monotonic()
        self._offload = self._tracer.start("offload", self._request.traceparent, self._done_s)
        self._tracer.add("air", self._offload.traceparent, self._done_s, now_s)
        self._done_s = now_s
        return self._offload.traceparent

    def answered(self, encode_ms: float) -> None:
        """The cloud has; so long went into making the frame."""
        if self._offload is not None:
            parent, now_s = self._offload.traceparent, time.monotonic()
            sent_s = self._done_s + encode_ms / 1000
            self._tracer.add("encode", parent, self._done_s, sent_s)
            self._tracer.add("network", parent, sent_s, now_s)
            self._done_s = now_s
        self.gave_up("")

    def gave_up(self, reason: str) -> None:
        """The cloud did not, for this reason."""
        if self._offload is not None:
            self._offload.end(None, reason=reason)
            self._offload = None

    def end(self, answer: Answer) -> None:
        self.gave_up("not needed")
        now_s = time.monotonic()
        self._tracer.add("answer", self._request.traceparent, self._done_s, now_s)
        self._request.end(
            now_s,
            id=answer.id,
            where=answer.where,
            reason=answer.reason,
            exit_depth=answer.exit_depth,
            split=answer.split,
        )
