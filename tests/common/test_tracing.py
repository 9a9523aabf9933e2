"""Spans keep one trace together, cost nothing where nobody looks, and can be read afterwards."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from offramp_common.errors import ConfigError
from offramp_common.tracing import OFF, ProviderTracer, tracer_to

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNWANTED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


@pytest.fixture
def noted() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(noted: InMemorySpanExporter) -> ProviderTracer:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(noted))
    return ProviderTracer(provider)


def test_a_span_below_a_callers_belongs_to_the_callers_trace(
    tracer: ProviderTracer, noted: InMemorySpanExporter
) -> None:
    outer = tracer.start("request", CALLER)
    tracer.add("layers", outer.traceparent, 1.0, 2.0, depth=3)
    outer.end(where="cloud")
    layers, request = noted.get_finished_spans()
    assert layers.context is not None
    assert request.context is not None
    assert layers.parent is not None
    assert request.parent is not None
    assert f"{request.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{request.parent.span_id:016x}" == CALLER.split("-")[2]
    assert layers.context.trace_id == request.context.trace_id
    assert layers.parent.span_id == request.context.span_id
    assert layers.attributes == {"depth": 3}
    assert request.attributes == {"where": "cloud"}


def test_without_a_caller_a_trace_begins_and_its_ids_have_the_standards_form(
    tracer: ProviderTracer, noted: InMemorySpanExporter
) -> None:
    span = tracer.start("request")
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[13]", span.traceparent)
    span.end()
    assert noted.get_finished_spans()[0].parent is None


@pytest.mark.parametrize("parent", ["", "garbage", "00-zz-1-01", "00-" + "0" * 32 + "-1-01"])
def test_a_malformed_parent_begins_a_trace_instead_of_failing(
    tracer: ProviderTracer, noted: InMemorySpanExporter, parent: str
) -> None:
    tracer.start("request", parent).end()
    assert noted.get_finished_spans()[0].parent is None


def test_a_caller_who_wants_no_trace_gets_none_but_its_ids_travel_on(
    tracer: ProviderTracer, noted: InMemorySpanExporter
) -> None:
    span = tracer.start("request", UNWANTED)
    span.end()
    assert not noted.get_finished_spans()
    assert span.traceparent.split("-")[1] == UNWANTED.split("-")[1]
    assert span.traceparent.endswith("-00")


def test_times_of_the_monotonic_clock_become_times_of_day(
    tracer: ProviderTracer, noted: InMemorySpanExporter
) -> None:
    now_s = time.monotonic()
    tracer.add("encode", "", now_s - 2.5, now_s - 1.0)
    after_ns = time.time_ns()
    (span,) = noted.get_finished_spans()
    assert span.start_time is not None
    assert span.end_time is not None
    # Both ends are converted on their own, microseconds apart; the bound leaves room for a pause.
    assert abs(span.end_time - span.start_time - 1.5e9) < 0.5e9
    assert after_ns - 10e9 < span.end_time < after_ns


def test_where_nobody_looks_the_callers_ids_travel_on_and_nothing_is_noted() -> None:
    assert not OFF.on
    span = OFF.start("request", CALLER)
    OFF.add("layers", span.traceparent, 0.0, 1.0)
    span.end(where="device")
    assert span.traceparent == CALLER
    with tracer_to(None, "offramp-edge") as tracer:
        assert tracer is OFF


def test_a_file_gets_a_line_of_json_for_each_span(tmp_path: Path) -> None:
    with tracer_to(str(tmp_path / "spans.jsonl"), "offramp-edge") as tracer:
        outer = tracer.start("request")
        tracer.add("layers", outer.traceparent, 1.0, 2.0, depth=3)
        outer.end(where="device")
    lines = [json.loads(line) for line in (tmp_path / "spans.jsonl").read_text().splitlines()]
    layers, request = lines
    assert layers["name"] == "layers"
    assert layers["service"] == "offramp-edge"
    assert layers["parent_id"] == request["span_id"]
    assert layers["trace_id"] == request["trace_id"]
    assert request["attributes"] == {"where": "device"}
    assert layers["end_ns"] - layers["start_ns"] == pytest.approx(1e9, rel=0.2)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"--trace .*nowhere/spans.jsonl: cannot be written"),
        tracer_to(str(tmp_path / "nowhere" / "spans.jsonl"), "offramp-edge"),
    ):
        pass
