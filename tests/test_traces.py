"""One trace for one request, from the device that asks to the layers of the replica that answers, over
real gRPC; and it accounts for the request's time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cloud_world import serving
from edge_cloud import Link, TorchAsNumpy, cloud_of
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from toy_models import toy_bundle, toy_layers

from offramp_cloud.traces import observer
from offramp_common.bundle import Bundle
from offramp_common.tracing import ProviderTracer
from offramp_edge import EdgeWorker, Sample
from offramp_model.export import add_graphs

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
DEVICE = {"request", "queue", "layers", "offload", "air", "encode", "network", "answer"}
CLOUD = {"gateway", "replica", "decode", "queue", "layers", "reply"}
TEXTS = [f"w{i} w{i * 7 % 96} w{i * 11 % 13}" for i in range(40)]


class Notes:
    """Spans of both tiers, in this process; `service` of each says whose."""

    def __init__(self) -> None:
        self.edge, self.cloud = InMemorySpanExporter(), InMemorySpanExporter()

    @staticmethod
    def tracer(exporter: InMemorySpanExporter) -> ProviderTracer:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        return ProviderTracer(provider)

    def spans(self) -> list[ReadableSpan]:
        return [*self.edge.get_finished_spans(), *self.cloud.get_finished_spans()]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("traced") / "toy", "pabee", n_layers=4, split=2)


@asynccontextmanager
async def world(bundle: Bundle, notes: Notes, **settings: Any) -> Any:
    """A worker that is up with its cloud, both with tracers. It leaves to the cloud what it has sent."""
    settings = {"hedge_after": math.inf} | settings
    layers = TorchAsNumpy(toy_layers(bundle))
    async with cloud_of(bundle) as cloud:
        tracer = notes.tracer(notes.cloud)
        cloud.gateway.observers.append(observer(tracer))
        cloud.engine.tracer = tracer
        async with (
            Link(cloud.address) as link,
            EdgeWorker(bundle, link.address, layers=layers, exits=False, **settings) as worker,
        ):
            await worker.answer_async("w1")  # connected, and every first time is over
            notes.edge.clear()
            notes.cloud.clear()
            worker.agent.tracer = notes.tracer(notes.edge)
            yield worker, link


def ids(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def children(spans: Iterable[ReadableSpan], of: ReadableSpan) -> set[str]:
    return {s.name for s in spans if s.parent is not None and s.parent.span_id == ids(of)[1]}


def the(spans: Iterable[ReadableSpan], name: str) -> ReadableSpan:
    (found,) = [span for span in spans if span.name == name]
    return found


async def test_a_request_is_one_trace_from_the_caller_to_the_replicas_layers(
    bundle: Bundle,
) -> None:
    notes = Notes()
    async with world(bundle, notes, split=2, plan="fixed") as (worker, _):
        answer = await worker.answer_async(Sample(TEXTS[0], id="the one", traceparent=CALLER))
    spans = notes.spans()
    assert {ids(span)[0] for span in spans} == {int(CALLER.split("-")[1], 16)}
    edge, cloud = notes.edge.get_finished_spans(), notes.cloud.get_finished_spans()
    assert {span.name for span in edge} == DEVICE
    assert {span.name for span in cloud} == CLOUD
    request, offload = the(edge, "request"), the(edge, "offload")
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == CALLER.split("-")[2]
    assert children(spans, request) == {"queue", "layers", "offload", "answer"}
    assert children(spans, offload) == {"air", "encode", "network", "gateway", "replica"}
    assert children(spans, the(cloud, "replica")) == {"decode", "queue", "layers", "reply"}
    assert request.attributes is not None
    assert request.attributes["id"] == "the one"
    assert request.attributes["where"] == answer.where == "cloud"


async def test_spans_account_for_nearly_all_of_the_time_of_requests(bundle: Bundle) -> None:
    notes = Notes()
    async with world(bundle, notes, split=2, plan="fixed") as (worker, _):
        for text in TEXTS:
            await worker.answer_async(text)
    spans = notes.spans()
    covered = total = 0.0
    for request in (span for span in spans if span.name == "request"):
        parts = [
            s
            for s in spans
            if ids(s)[0] == ids(request)[0] and s.name not in ("request", "offload")
        ]
        total += duration(request)
        covered += union(parts, request)
    assert total > 0
    assert covered >= 0.95 * total, f"{covered / total:.1%} of the time is accounted for"


async def test_the_replicas_time_lies_within_the_gateways_and_that_within_the_networks(
    bundle: Bundle,
) -> None:
    notes = Notes()
    async with world(bundle, notes, split=2, plan="fixed") as (worker, _):
        for text in TEXTS:
            await worker.answer_async(text)
    spans = notes.spans()
    for replica in (span for span in spans if span.name == "replica"):
        ours = [span for span in spans if ids(span)[0] == ids(replica)[0]]
        order = [the(ours, "network"), the(ours, "gateway"), replica]
        for outer, inner in pairwise(order):
            # The two tiers look at their clocks by themselves, some microseconds apart.
            assert start(outer) <= start(inner) + 1e6
            assert end(inner) <= end(outer) + 1e6
        parts = [s for s in ours if s.parent is not None and s.parent.span_id == ids(replica)[1]]
        assert union(parts, replica) == pytest.approx(duration(replica), abs=1000)


async def test_an_answer_of_the_devices_own_is_a_trace_too(bundle: Bundle) -> None:
    notes = Notes()
    async with world(bundle, notes, split=4, plan="fixed") as (worker, _):
        await worker.answer_async(TEXTS[0])
    assert {span.name for span in notes.spans()} == {"request", "queue", "layers", "answer"}


async def test_a_request_that_the_cloud_did_not_answer_says_why(bundle: Bundle) -> None:
    notes = Notes()
    async with world(bundle, notes, split=2, plan="fixed") as (
        worker,
        link,
    ):
        link.swallow()
        answer = await worker.answer_async(TEXTS[0], deadline_ms=150)
    assert answer.where == "fallback"
    offload, request = (the(notes.spans(), name) for name in ("offload", "request"))
    assert offload.attributes is not None
    assert request.attributes is not None
    assert offload.attributes["reason"]
    assert request.attributes["reason"] == answer.reason == "deadline"


async def test_a_caller_who_wants_no_trace_is_not_noted_anywhere(bundle: Bundle) -> None:
    notes = Notes()
    async with world(bundle, notes, split=2, plan="fixed") as (worker, _):
        await worker.answer_async(Sample(TEXTS[0], traceparent=CALLER[:-2] + "00"))
    assert not notes.spans()


def start(span: ReadableSpan) -> int:
    assert span.start_time is not None
    return span.start_time


def end(span: ReadableSpan) -> int:
    assert span.end_time is not None
    return span.end_time


def duration(span: ReadableSpan) -> int:
    return end(span) - start(span)


def union(parts: Iterable[ReadableSpan], within: ReadableSpan) -> int:
    """Nanoseconds of `within` in which at least one of the parts lasts."""
    covered, at = 0, start(within)
    for part in sorted(parts, key=start):
        until = min(end(part), end(within))
        if until > at:
            covered += until - max(at, start(part))
            at = until
    return covered


def test_the_command_line_writes_spans_of_both_tiers_to_files(
    tmp_path: Path,
) -> None:
    made = toy_bundle(tmp_path / "toy", "deebert", n_layers=4, split=2)
    add_graphs(made, precisions=["fp32"])
    cloud, edge = tmp_path / "cloud.jsonl", tmp_path / "edge.jsonl"
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in TEXTS[:8]))
    arguments = ["--local", "--insecure", "--bundle", str(made.path), "--trace", str(cloud)]
    with serving(arguments) as served:
        command = [
            sys.executable,
            "-m",
            "offramp_common",
            "edge",
            "run",
            "--bundle",
            str(made.path),
        ]
        command += ["--cloud", served.address, "--input", str(tmp_path / "in.txt"), "--no-exits"]
        command += [
            "--plan",
            "fixed",
            "--trace",
            str(edge),
            "--output",
            str(tmp_path / "out.jsonl"),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        assert served.stop() == 0
    there, here = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (cloud, edge)
    )
    sent = {span["trace_id"] for span in here if span["name"] == "network"}
    assert sent
    assert sent <= {span["trace_id"] for span in there if span["name"] == "layers"}
    assert {span["service"] for span in here} == {"offramp-edge"}
