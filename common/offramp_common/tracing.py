"""One trace through both tiers: spans with W3C ids, or nothing at all where nobody looks.

A span's ids travel as `traceparent` (https://www.w3.org/TR/trace-context/), in the message that the
device sends: what the gateway and the replica note of a request hangs below the device's own span.

Times are readings of time.monotonic(), which the tiers take anyway for their numbers: a span can be
noted once it is over, and costs a request no clock of its own. `OFF` is the tracer of everybody who
was not asked for traces; the package opentelemetry-sdk is imported only for the others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from offramp_common.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan

OTLP = "otlp"
"""The sink that is a collector; its address stands in OTEL_EXPORTER_OTLP_ENDPOINT, as everywhere."""

Attribute = str | int | float


class Span(Protocol):
    """Something that has begun."""

    @property
    def traceparent(self) -> str:
        """What makes another span, here or in another process, a child of this one."""
        ...

    def end(self, at_s: float | None = None, **attributes: Attribute) -> None:
        """It is over; `at_s` on time.monotonic(), None for now."""
        ...


class Tracer(Protocol):
    """Where spans go. Any thread may use it."""

    @property
    def on(self) -> bool:
        """False where noting anything would be for nothing."""
        ...

    def start(self, name: str, parent: str = "", at_s: float | None = None) -> Span:
        """Begin a span below `parent` (a traceparent), or a new trace without one."""
        ...

    def add(
        self, name: str, parent: str, start_s: float, end_s: float, **attributes: Attribute
    ) -> None:
        """A span that is over already."""
        ...


class _Passed:
    """No span: whoever asks for its ids gets the caller's, which travel on."""

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def end(self, at_s: float | None = None, **attributes: Attribute) -> None:
        pass


class _Off:
    on = False

    def start(self, name: str, parent: str = "", at_s: float | None = None) -> Span:
        return _Passed(parent)

    def add(
        self, name: str, parent: str, start_s: float, end_s: float, **attributes: Attribute
    ) -> None:
        pass


OFF: Tracer = _Off()


class _TimeOfDay:
    """Nanoseconds since 1970 of a reading of time.monotonic(). The distance of the two clocks is looked
    at now and then, not for each reading: a thread that is held up between them would bend a span."""

    _LOOK_S = 60.0  # a clock that is put right, as after the start of a device without a battery

    def __init__(self) -> None:
        self._looked_s = -self._LOOK_S

    def ns(self, at_s: float | None) -> int:
        """None: now."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= self._LOOK_S:
            self._looked_s = now_s
            # Of a few looks the one that was held up least: the later the second clock is read, the
            # less they seem apart.
            self._apart_ns = max(time.time_ns() - time.monotonic_ns() for _ in range(5))
        return self._apart_ns + int(1e9 * (now_s if at_s is None else at_s))


class _Noted:
    """A span of OpenTelemetry."""

    __slots__ = ("_clock", "_span")

    def __init__(self, span: OtelSpan, clock: _TimeOfDay) -> None:
        self._span, self._clock = span, clock

    @property
    def traceparent(self) -> str:
        ids = self._span.get_span_context()
        return f"00-{ids.trace_id:032x}-{ids.span_id:016x}-{int(ids.trace_flags):02x}"

    def end(self, at_s: float | None = None, **attributes: Attribute) -> None:
        self._span.set_attributes(attributes)
        self._span.end(self._clock.ns(at_s))


class ProviderTracer:
    """Spans for a TracerProvider of OpenTelemetry's SDK, whose processors say where they go."""

    on = True

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("offramp")
        self._propagator = TraceContextTextMapPropagator()
        self._clock = _TimeOfDay()

    def start(self, name: str, parent: str = "", at_s: float | None = None) -> Span:
        begun = self._tracer.start_span(name, self._below(parent), start_time=self._clock.ns(at_s))
        return _Noted(begun, self._clock)

    def add(
        self, name: str, parent: str, start_s: float, end_s: float, **attributes: Attribute
    ) -> None:
        self.start(name, parent, start_s).end(max(start_s, end_s), **attributes)

    def _below(self, parent: str) -> Context:
        from opentelemetry.context import Context

        # A malformed one is ignored, as the standard asks: a new trace begins.
        carrier = {"traceparent": parent} if parent else {}
        return self._propagator.extract(carrier, Context())


@contextmanager
def tracer_to(sink: str | None, service: str) -> Iterator[Tracer]:
    """The tracer of a process called `service`; what it noted has been written when this ends.

    `sink`: None or "" for OFF, "otlp" for a collector, else a file that gets one JSON object a line:
    name, service, trace_id, span_id, parent_id, start_ns, end_ns, attributes. How many traces are
    kept is OpenTelemetry's own setting (OTEL_TRACES_SAMPLER); a caller's choice is kept to. Raises
    ConfigError for a file that cannot be written, and where the packages are missing.
    """
    if not sink:
        yield OFF
        return
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
        raise ConfigError("--trace needs opentelemetry-sdk: pip install 'offramp[trace]'")
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": service})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    with ExitStack() as stack:
        exporter = _exporter(sink, stack)
        stack.callback(provider.shutdown)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        yield ProviderTracer(provider)


def _exporter(sink: str, stack: ExitStack) -> SpanExporter:
    """What writes to `sink`; `stack` closes it."""
    if sink == OTLP:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        except ModuleNotFoundError as error:
            raise ConfigError(
                "--trace otlp needs opentelemetry-exporter-otlp-proto-grpc: "
                "pip install 'offramp[trace]', or name a file"
            ) from error
        return OTLPSpanExporter()
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    try:
        # One line a write, so that a file that is cut off ends in a whole line.
        file = open(sink, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - the stack closes it
    except OSError as error:
        raise ConfigError(f"--trace {sink}: cannot be written ({error.strerror})") from error
    stack.enter_context(file)
    return ConsoleSpanExporter(out=file, formatter=_line)


def _line(span: ReadableSpan) -> str:
    ids, parent = span.get_span_context(), span.parent
    entry = {
        "name": span.name,
        "service": span.resource.attributes.get("service.name"),
        "trace_id": f"{ids.trace_id:032x}" if ids else None,
        "span_id": f"{ids.span_id:016x}" if ids else None,
        "parent_id": f"{parent.span_id:016x}" if parent else None,
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "attributes": dict(span.attributes or {}),
    }
    return json.dumps(entry) + "\n"
