"""The device's HTTP service, asked by a real client."""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from edge_cloud import TorchAsNumpy, cloud_of

from offramp_common.bundle import Bundle
from offramp_common.spec import TaskSpec
from offramp_edge import EdgeWorker
from offramp_edge.inference import MAX_TEXTS, outputs_of, parse
from offramp_edge.service import MAX_BODY_BYTES, Service

NAME = "toy"
# A sample that is sent stays sent: on a busy machine a hedge would answer before the cloud.
IN_CLOUD: dict[str, Any] = {"plan": "fixed", "hedge_after": math.inf}


@pytest.fixture
async def worker(bundle: Bundle, layers: TorchAsNumpy) -> AsyncIterator[EdgeWorker]:
    async with EdgeWorker(bundle, layers=layers, logits=True, deadline_ms=None) as made:
        yield made


@pytest.fixture
async def client(worker: EdgeWorker) -> AsyncIterator[TestClient[Any, Any]]:
    async with TestClient(TestServer(Service(worker).app())) as made:
        yield made


def request_of(*texts: str, **fields: Any) -> dict[str, Any]:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": list(texts)}
    return {"inputs": [tensor], **fields}


async def infer(client: TestClient[Any, Any], body: Any, status: int = 200) -> dict[str, Any]:
    async with client.post(f"/v2/models/{NAME}/infer", json=body) as response:
        assert response.status == status, await response.text()
        reply: dict[str, Any] = await response.json()
        return reply


async def test_it_says_what_it_is(client: TestClient[Any, Any]) -> None:
    for path, key in (("/v2", "name"), ("/v2/health/live", "live"), ("/v2/health/ready", "ready")):
        async with client.get(path) as response:
            assert response.status == 200
            assert key in await response.json()
    async with client.get(f"/v2/models/{NAME}") as response:
        about = await response.json()
    assert about["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert [entry["name"] for entry in about["outputs"]] == [
        "label", "probability", "exit_depth", "where", "reason", "logits",
    ]  # fmt: skip
    async with client.get(f"/v2/models/{NAME}/ready") as response:
        assert (await response.json())["cloud"] == {"state": "none"}


async def test_texts_get_a_row_each_in_their_order(
    client: TestClient[Any, Any], worker: EdgeWorker
) -> None:
    texts = [f"w{i} w{i + 3}" for i in range(20)]
    reply = await infer(client, request_of(*texts, id="mine"))
    assert (reply["model_name"], reply["id"]) == (NAME, "mine")
    outputs = {entry["name"]: entry for entry in reply["outputs"]}
    assert set(outputs) == {"label", "probability", "exit_depth", "where", "reason"}
    assert all(entry["shape"] == [20] for entry in outputs.values())
    for i, text in enumerate(texts):
        answer = await worker.answer_async(text)
        assert outputs["label"]["data"][i] == answer.label
        assert outputs["exit_depth"]["data"][i] == answer.exit_depth
        assert outputs["probability"]["data"][i] == pytest.approx(answer.probability)


async def test_named_outputs_only_when_they_are_asked_for(client: TestClient[Any, Any]) -> None:
    body = request_of("w1", "w2", outputs=[{"name": "logits"}, {"name": "label"}])
    logits, label = (await infer(client, body))["outputs"]
    assert (logits["name"], logits["shape"], logits["datatype"]) == ("logits", [2, 5], "FP32")
    assert len(logits["data"]) == 10
    assert label["datatype"] == "BYTES"


BAD: dict[str, Any] = {
    "no object": [1],
    "no inputs": {},
    "two inputs": {"inputs": [{}, {}]},
    "another name": {
        "inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": ["a"]}]
    },
    "another type": {
        "inputs": [{"name": "text", "datatype": "FP32", "shape": [1], "data": [1.0]}]
    },
    "another shape": {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "b"]}]
    },
    "a shape that does not fit": {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a"]}]
    },
    "a shape of texts": {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": ["a"], "data": ["a"]}]
    },
    "no data": {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1]}]},
    "numbers for texts": {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [1]}]
    },
    "too many": request_of(*["a"] * (MAX_TEXTS + 1)),
    "an unknown output": request_of("a", outputs=[{"name": "embedding"}]),
    "outputs that are no list": request_of("a", outputs="label"),
    "a deadline that is no number": request_of("a", parameters={"deadline_ms": "soon"}),
    "a deadline in the past": request_of("a", parameters={"deadline_ms": -1}),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_request_is_refused_with_a_reason(
    client: TestClient[Any, Any], what: str
) -> None:
    assert (await infer(client, BAD[what], status=400))["error"]
    await infer(client, request_of("w1"))


async def test_what_is_not_there_is_not_found(client: TestClient[Any, Any]) -> None:
    for path in ("/v2/models/other", "/v2/models/other/ready", "/v3"):
        async with client.get(path) as response:
            assert response.status == 404
            assert (await response.json())["error"]
    async with client.get(f"/v2/models/{NAME}/infer") as response:
        assert response.status == 405
        assert (await response.json())["error"]


async def test_a_body_that_is_no_json_or_too_large_is_refused(
    client: TestClient[Any, Any],
) -> None:
    for body, status in ((b"\xff", 400), (b"{", 400), (b"x" * (MAX_BODY_BYTES + 1), 413)):
        data = io.BytesIO(body)
        async with client.post(f"/v2/models/{NAME}/infer", data=data) as response:
            assert response.status == status
            assert (await response.json())["error"]


async def test_metrics_count_what_was_answered(client: TestClient[Any, Any]) -> None:
    await infer(client, request_of("w1", "w2", "w3"))
    async with client.get("/metrics") as response:
        text = await response.text()
    assert 'offramp_edge_answers_total{where="device"} 3.0' in text
    assert "offramp_edge_exit_depth_count 3.0" in text
    assert 'offramp_edge_answer_ms_count{where="device"} 3.0' in text


async def test_without_its_cloud_it_is_ready_and_says_how_things_are(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    async with cloud_of(bundle) as cloud:
        how: dict[str, Any] = {"exits": False, "logits": True, **IN_CLOUD}
        worker = EdgeWorker(bundle, cloud.address, layers=layers, **how)
        async with worker, TestClient(TestServer(Service(worker).app())) as client:
            body = request_of("w1", parameters={"deadline_ms": 5000})
            (_, _, _, where, reason) = (await infer(client, body))["outputs"]
            assert (where["data"], reason["data"]) == (["cloud"], [""])
            await cloud.stop()
            (_, _, _, where, reason) = (await infer(client, body))["outputs"]
            assert (where["data"], reason["data"]) == (["fallback"], ["unavailable"])
            async with client.get("/v2/health/ready") as response:
                assert response.status == 200
                ready = await response.json()
            assert ready["ready"] is True
            assert ready["cloud"] == {"state": "aside", "reason": "unavailable"}
            async with client.get("/metrics") as response:
                text = await response.text()
            assert 'offramp_edge_cloud{state="aside"} 1.0' in text
            assert 'offramp_edge_fallbacks_total{reason="unavailable"} 1.0' in text
            assert "offramp_edge_link_rtt_ms" in text


async def test_many_requests_at_once_are_all_answered(client: TestClient[Any, Any]) -> None:
    replies = await asyncio.gather(
        *(infer(client, request_of(f"w{i}", f"w{i}")) for i in range(50))
    )
    for reply in replies:
        first, second = reply["outputs"][0]["data"]
        assert first == second


def test_pairs_may_be_nested_or_flat() -> None:
    task = TaskSpec("classification", ("yes", "no"), pair=True)
    for data in ('[["a", "b"], ["c", "d"]]', '["a", "b", "c", "d"]'):
        body = (
            '{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2, 2], "data": '
            + data
            + "}]}"
        )
        texts = [sample.text for sample in parse(body.encode(), task).samples]
        assert texts == [("a", "b"), ("c", "d")]


def test_a_regression_has_a_number_and_no_probability() -> None:
    named = {entry["name"]: entry for entry in outputs_of(TaskSpec("regression"))}
    assert "probability" not in named
    assert named["label"]["datatype"] == "FP32"
    assert named["logits"]["shape"] == [-1, 1]


async def lines_of(client: TestClient[Any, Any], body: Any) -> list[dict[str, Any]]:
    async with client.post(f"/v2/models/{NAME}/infer", json=body) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "application/x-ndjson"
        return [json.loads(line) async for line in response.content]


async def test_a_provisional_answer_is_streamed_before_the_final_one(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    how: dict[str, Any] = {"exits": False, **IN_CLOUD}
    async with cloud_of(bundle) as cloud:
        worker = EdgeWorker(bundle, cloud.address, layers=layers, **how)
        async with worker, TestClient(TestServer(Service(worker).app())) as client:
            parameters = {"provisional": True, "deadline_ms": 5000}
            first, final = await lines_of(client, request_of("w1", "w2", parameters=parameters))
            assert first["parameters"] == {"provisional": True}
            assert "parameters" not in final
            for reply, reason, depth in ((first, "provisional", 2), (final, "", 4)):
                rows = {entry["name"]: entry["data"] for entry in reply["outputs"]}
                assert rows["reason"] == [reason] * 2
                assert rows["exit_depth"] == [depth] * 2


async def test_answers_that_are_final_at_once_are_one_line(client: TestClient[Any, Any]) -> None:
    (final,) = await lines_of(client, request_of("w1", parameters={"provisional": True}))
    assert "parameters" not in final


@pytest.mark.parametrize("value", [1, "yes", None])
async def test_provisional_is_true_or_false(client: TestClient[Any, Any], value: Any) -> None:
    reply = await infer(client, request_of("w1", parameters={"provisional": value}), status=400)
    assert "provisional" in reply["error"]


async def test_the_contracts_numbers_are_among_the_metrics(
    bundle: Bundle, layers: TorchAsNumpy, tmp_path: Path
) -> None:
    async with cloud_of(bundle) as cloud:
        worker = EdgeWorker(bundle, cloud.address, layers=layers, spool=str(tmp_path / "spool"))
        async with worker, TestClient(TestServer(Service(worker).app())) as client:
            await infer(client, request_of("w1"))
            async with client.get("/metrics") as response:
                text = await response.text()
    for name in ("hedges_begun", "hedges_wasted", "retries", "late_replies", "spool_samples"):
        assert f"offramp_edge_{name} 0.0" in text
