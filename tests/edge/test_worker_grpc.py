"""The worker and a real gateway over real gRPC on loopback; nothing here is made up but the link."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cloud_world import serving
from edge_cloud import Link, TorchAsNumpy, cloud_of
from toy_models import toy_bundle

from offramp_cloud.admission import Admission
from offramp_cloud.servicer import SERVICE
from offramp_cloud.stalls import IDLE
from offramp_common import certs
from offramp_common.bundle import Bundle
from offramp_common.errors import CloudBusy, CloudUnavailable, DeadlineExceeded, RequestError
from offramp_common.runner import run
from offramp_common.text import TextEncoder
from offramp_common.transport import Hello, Offload
from offramp_common.wire import offload_pb2 as pb
from offramp_edge import Answer, EdgeWorker, Sample
from offramp_edge.answers import Failed
from offramp_edge.grpc_transport import GrpcTransport

TEXTS = [f"w{i % 96} w{i * 7 % 96} w{i * 11 % 13}" for i in range(60)]
# A sample that is sent stays sent: on a busy machine a hedge would answer before the cloud.
HARD_KNOBS: dict[str, Any] = {"exits": False, "plan": "fixed", "hedge_after": math.inf}


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


def up(worker: EdgeWorker) -> bool:
    assert worker.agent.session is not None
    return worker.agent.session.breaker.state == "up"


def state(worker: EdgeWorker) -> str:
    assert worker.agent.session is not None
    return worker.agent.session.breaker.state


def local(bundle: Bundle, layers: TorchAsNumpy, text: str) -> tuple[int, tuple[float, ...]]:
    acts = TextEncoder(bundle)([text])
    (left,) = run(layers, acts, bundle.n_layers, bundle.knobs("fp32")).left
    return left.depth, tuple(left.answer[0].tolist())


@pytest.mark.parametrize("split", range(5))
async def test_all_answers_are_the_whole_models_bit_for_bit(
    bundle: Bundle, layers: TorchAsNumpy, split: int
) -> None:
    async with (
        cloud_of(bundle) as cloud,
        # One in the air at a time: in a batch the order of float32 sums differs.
        EdgeWorker(
            bundle,
            cloud.address,
            layers=layers,
            split=split,
            codec="fp32",
            logits=True,
            max_in_flight=1,
            hedge_after=math.inf,
        ) as worker,
    ):
        answers = [a async for a in worker.answer_many_async(TEXTS)]
        where = {a.where for a in answers if isinstance(a, Answer)}
        assert where <= {"device", "cloud"}
        assert ("cloud" in where) == (split < 4)
        for text, answer in zip(TEXTS, answers, strict=True):
            assert isinstance(answer, Answer)
            assert (answer.exit_depth, answer.logits) == local(bundle, layers, text)


async def test_many_in_flight_are_not_mixed_up(bundle: Bundle, layers: TorchAsNumpy) -> None:
    async with (
        cloud_of(bundle) as cloud,
        EdgeWorker(
            bundle,
            cloud.address,
            layers=layers,
            split=0,
            logits=True,
            max_in_flight=32,
            hedge_after=math.inf,
        ) as worker,
    ):
        await until(lambda: up(worker))
        answers = await asyncio.gather(*(worker.answer_async(text) for text in TEXTS * 4))
    for text, answer in zip(TEXTS * 4, answers, strict=True):
        depth, logits = local(bundle, layers, text)
        assert (answer.where, answer.exit_depth) == ("cloud", depth)
        # The cloud runs them in batches: float32 sums in another order, logits below 20.
        np.testing.assert_allclose(np.array(answer.logits), np.array(logits), atol=1e-4)


async def test_bytes_are_those_that_the_gateway_got(bundle: Bundle, layers: TorchAsNumpy) -> None:
    async with (
        cloud_of(bundle) as cloud,
        EdgeWorker(bundle, cloud.address, layers=layers, **HARD_KNOBS) as worker,
    ):
        answers = [await worker.answer_async(text, deadline_ms=5000) for text in TEXTS[:8]]
        got = [served.nbytes for served in cloud.served if served.request_id]
        assert [answer.bytes_up for answer in answers] == got
        assert all(answer.bytes_down > 4 * 5 for answer in answers)


async def test_request_id_deadline_and_trace_arrive(bundle: Bundle, layers: TorchAsNumpy) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with (
        cloud_of(bundle) as cloud,
        EdgeWorker(bundle, cloud.address, layers=layers, **HARD_KNOBS) as worker,
    ):
        await worker.answer_async(Sample(TEXTS[0], traceparent=trace))
        (served,) = [served for served in cloud.served if served.request_id]
        assert served.traceparent == trace
        assert served.status == "OK"


@pytest.mark.parametrize("with_device_certificate", [False, True])
async def test_over_tls(
    bundle: Bundle, layers: TorchAsNumpy, tls_dir: Path, with_device_certificate: bool
) -> None:
    credentials = certs.server_credentials(tls_dir, require_client=with_device_certificate)
    files: dict[str, Any] = {"ca": tls_dir / "ca.pem"}
    if with_device_certificate:
        files |= {"cert": tls_dir / "kiosk-7.pem", "key": tls_dir / "kiosk-7.key"}
    async with (
        cloud_of(bundle, credentials=credentials) as cloud,
        EdgeWorker(bundle, cloud.address, layers=layers, **files, **HARD_KNOBS) as worker,
    ):
        assert (await worker.answer_async(TEXTS[0])).where == "cloud"
        device = {served.device for served in cloud.served}
        assert device == ({"kiosk-7"} if with_device_certificate else {""})


async def test_a_cloud_with_another_authority_is_not_trusted_and_the_device_answers(
    bundle: Bundle, layers: TorchAsNumpy, tls_dir: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    certs.init(tmp_path)
    async with (
        cloud_of(bundle, credentials=certs.server_credentials(tls_dir)) as cloud,
        EdgeWorker(
            bundle, cloud.address, layers=layers, ca=tmp_path / "ca.pem", **HARD_KNOBS
        ) as worker,
    ):
        answer = await worker.answer_async(TEXTS[0])
        assert (answer.where, answer.reason) == ("fallback", "setup")
        assert not cloud.served
    assert "--ca" in caplog.text


@pytest.mark.parametrize("required", ["no TLS", "no certificate"])
async def test_a_device_that_is_not_let_in_answers_alone(
    bundle: Bundle, layers: TorchAsNumpy, tls_dir: Path, required: str
) -> None:
    credentials = certs.server_credentials(tls_dir, require_client=required == "no certificate")
    files: dict[str, Any] = {"ca": tls_dir / "ca.pem"} if required == "no certificate" else {}
    async with (
        cloud_of(bundle, credentials=credentials) as cloud,
        EdgeWorker(bundle, cloud.address, layers=layers, **files, **HARD_KNOBS) as worker,
    ):
        answer = await worker.answer_async(TEXTS[0])
        assert (answer.where, answer.reason) == ("fallback", "unavailable")


async def test_a_cloud_with_another_model_is_refused(
    bundle: Bundle, layers: TorchAsNumpy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = toy_bundle(tmp_path / "toy", "pabee", n_layers=4, split=2, seed=1)
    async with (
        cloud_of(other) as cloud,
        EdgeWorker(bundle, cloud.address, layers=layers, **HARD_KNOBS) as worker,
    ):
        for text in TEXTS[:5]:
            answer = await worker.answer_async(text)
            assert (answer.where, answer.reason, answer.exit_depth) == ("fallback", "mismatch", 4)
        assert state(worker) == "refused"
    # asyncio logs errors too, of grpc's poller, that are nobody's concern here.
    ours = [record for record in caplog.records if record.name == "offramp.edge"]
    loud = [record for record in ours if record.levelname == "ERROR"]
    assert len(loud) == 1


async def test_a_cloud_without_this_bundle_is_refused(
    bundle: Bundle, layers: TorchAsNumpy, tmp_path: Path
) -> None:
    other = toy_bundle(tmp_path / "toy", "pabee", name="another", n_layers=4)
    async with (
        cloud_of(other) as cloud,
        EdgeWorker(bundle, cloud.address, layers=layers, **HARD_KNOBS) as worker,
    ):
        assert (await worker.answer_async(TEXTS[0])).reason == "mismatch"


async def test_a_cloud_that_stops_and_starts_again_is_used_again(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    async with EdgeWorker(
        bundle, "127.0.0.1:1", layers=layers, **HARD_KNOBS, backoff_max_ms=300.0
    ) as worker:
        answer = await worker.answer_async(TEXTS[0])
        assert (answer.where, answer.reason, answer.exit_depth) == ("fallback", "unavailable", 4)
    async with cloud_of(bundle) as cloud:
        address = cloud.address
        worker = EdgeWorker(bundle, address, layers=layers, **HARD_KNOBS, backoff_max_ms=300.0)
        async with worker:
            assert (await worker.answer_async(TEXTS[0])).where == "cloud"
            await cloud.stop()
            answers = [a async for a in worker.answer_many_async(TEXTS)]
            assert {a.where for a in answers if isinstance(a, Answer)} == {"fallback"}
            assert state(worker) == "aside"
            async with cloud_of(bundle, listen=address):
                await until(lambda: up(worker))
                assert (await worker.answer_async(TEXTS[0])).where == "cloud"


async def test_a_connection_lost_without_traffic_is_noticed_and_greeted_again(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    async with cloud_of(bundle) as cloud:
        worker = EdgeWorker(
            bundle, cloud.address, layers=layers, **HARD_KNOBS, backoff_max_ms=300.0
        )
        async with worker:
            assert (await worker.answer_async(TEXTS[0])).where == "cloud"
            await cloud.stop()
            await until(lambda: state(worker) == "aside")
            async with cloud_of(bundle, listen=cloud.address) as again:
                await until(lambda: up(worker))
                assert (await worker.answer_async(TEXTS[0])).where == "cloud"
                hello, work = again.served
                assert not hello.request_id
                assert work.request_id


async def test_a_stream_that_the_cloud_ends_as_idle_is_no_failure_and_the_next_sample_opens_another(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    async with (
        cloud_of(bundle, admission=Admission(idle_timeout_s=0.3)) as cloud,
        EdgeWorker(bundle, cloud.address, layers=layers, **HARD_KNOBS) as worker,
    ):
        for ended in range(3):
            answer = await worker.answer_async(TEXTS[ended], deadline_ms=5000)
            assert (answer.where, up(worker)) == ("cloud", True)
            await until(lambda ended=ended: cloud.gateway.stalled[IDLE] == ended + 1)  # type: ignore[misc]
        assert up(worker)
        greetings = [served for served in cloud.served if not served.request_id]
        assert len(greetings) == 1


async def test_a_request_on_its_way_to_a_stream_that_ends_well_is_sent_again_once() -> None:
    streams = 0

    async def serve(requests: AsyncIterator[bytes], context: Any) -> None:
        nonlocal streams
        streams += 1
        request = pb.OffloadRequest.FromString(await anext(requests))
        if request.request_id == "unlucky" or streams == 1:
            return
        reply = pb.OffloadReply(
            request_id=request.request_id, answers=bytes(4), exit_depths=[4], confidences=[1.0]
        )
        await context.write(pb.StreamReply(reply=reply).SerializeToString())
        await anext(requests, None)

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(serve)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {"CompleteStream": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    transport = GrpcTransport(f"127.0.0.1:{port}")
    done = await transport.complete(Offload("r", "toy", b"", b"whatever"), timeout_s=10)
    assert (done.request_id, streams) == ("r", 2)
    await transport.close()
    transport, streams = GrpcTransport(f"127.0.0.1:{port}"), 0
    with pytest.raises(CloudUnavailable):
        await transport.complete(Offload("unlucky", "toy", b"", b"whatever"), timeout_s=10)
    assert streams == 2
    await transport.close()
    await server.stop(None)


async def test_a_link_cut_in_mid_run_loses_no_sample(bundle: Bundle, layers: TorchAsNumpy) -> None:
    async with cloud_of(bundle) as cloud, Link(cloud.address) as link:
        worker = EdgeWorker(bundle, link.address, layers=layers, **HARD_KNOBS, backoff_max_ms=200.0)
        async with worker:
            await until(lambda: up(worker))
            got: list[Answer] = []
            async for answer in worker.answer_many_async(TEXTS * 5):
                assert isinstance(answer, Answer)
                got.append(answer)
                if len(got) == 50:
                    link.cut()
                if len(got) == 150:
                    link.mend()
            assert [a.text for a in got] == TEXTS * 5
            assert {"cloud", "fallback"} <= {a.where for a in got}
            assert {a.reason for a in got} == {"", "unavailable"}
            assert all(a.complete for a in got)
            await until(lambda: up(worker))
            assert (await worker.answer_async(TEXTS[0])).where == "cloud"


async def test_a_black_hole_costs_one_timeout_and_is_left_when_it_ends(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    async with cloud_of(bundle) as cloud, Link(cloud.address) as link:
        worker = EdgeWorker(
            bundle,
            link.address,
            layers=layers,
            **HARD_KNOBS,
            offload_timeout_ms=400.0,
            backoff_max_ms=300.0,
        )
        async with worker:
            assert (await worker.answer_async(TEXTS[0])).where == "cloud"
            link.swallow()
            began = time.monotonic()
            answers = [a async for a in worker.answer_many_async(TEXTS)]
            took_s = time.monotonic() - began
            assert {(a.where, a.reason) for a in answers if isinstance(a, Answer)} == {
                ("fallback", "timeout")
            }
            # 60 samples, in fewer than ten time-outs' time (two are expected; a noisy machine).
            assert took_s < 4.0
            link.mend()
            await until(lambda: up(worker))
            assert (await worker.answer_async(TEXTS[0])).where == "cloud"


async def test_a_deadline_holds_on_a_black_hole(bundle: Bundle, layers: TorchAsNumpy) -> None:
    async with (
        cloud_of(bundle) as cloud,
        Link(cloud.address) as link,
        EdgeWorker(bundle, link.address, layers=layers, **HARD_KNOBS) as worker,
    ):
        await until(lambda: up(worker))
        link.swallow()
        began = time.monotonic()
        answer = await worker.answer_async(TEXTS[0], deadline_ms=300)
        took_ms = 1000 * (time.monotonic() - began)
        assert (answer.where, answer.reason, answer.exit_depth) == ("fallback", "deadline", 2)
        assert answer.ms <= 300
        assert took_ms < 450  # handing over, on a machine that does other things too


@pytest.mark.slow
async def test_an_idle_black_hole_is_found_by_keepalive(bundle: Bundle) -> None:
    async with cloud_of(bundle) as cloud, Link(cloud.address) as link:
        transport = GrpcTransport(link.address, keepalive_s=1.0)
        hello = Hello(bundle.manifest.name, {2: bundle.digest(2)}, ("int8",))
        await transport.hello(hello, timeout_s=5)
        work = Offload("r", bundle.manifest.name, bundle.digest(2), b"whatever")
        with pytest.raises(RequestError):
            await transport.complete(work, timeout_s=5)
        link.swallow()
        began = time.monotonic()
        with pytest.raises(CloudUnavailable):
            await transport.complete(work, timeout_s=60)
        assert time.monotonic() - began < 30
        await transport.close()


async def test_the_transport_translates_what_the_cloud_says(bundle: Bundle) -> None:
    async with cloud_of(bundle) as cloud:
        transport = GrpcTransport(cloud.address)
        work = Offload("r", bundle.manifest.name, bundle.digest(2), b"no frame")
        with pytest.raises(RequestError, match="INVALID_ARGUMENT: not a frame"):
            await transport.complete(work, timeout_s=5)
        # One bad request harms no other on the same stream, and the same id may be used again.
        with pytest.raises(RequestError):
            await transport.complete(work, timeout_s=5)
        with pytest.raises(DeadlineExceeded):
            await transport.complete(work, timeout_s=0)
        await cloud.stop()
        with pytest.raises(CloudUnavailable):
            await transport.complete(work, timeout_s=5)
        await transport.close()


async def test_work_that_nobody_waits_for_is_given_up_by_the_cloud(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    async with cloud_of(bundle) as cloud:
        worker = EdgeWorker(
            bundle,
            cloud.address,
            layers=layers,
            **{**HARD_KNOBS, "hedge_after": math.inf, "offload_timeout_ms": 60_000.0},
        )
        async with worker:
            cloud.backend.free.clear()
            asking = asyncio.create_task(worker.answer_async(TEXTS[0], deadline_ms=60_000))
            await until(lambda: cloud.gateway.at_work == 1)
            asking.cancel()
            # Long before its deadline: the device has said so.
            await until(lambda: cloud.gateway.at_work == 0)
            assert [served.status for served in cloud.served if served.request_id] == ["CANCELLED"]
            cloud.backend.free.set()
            # The stream lives on.
            assert (await worker.answer_async(TEXTS[1])).where == "cloud"


async def test_replies_after_the_deadline_are_dropped_and_counted(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    async with cloud_of(bundle) as cloud, Link(cloud.address) as link:
        worker = EdgeWorker(bundle, link.address, layers=layers, **HARD_KNOBS)
        async with worker:
            await until(lambda: up(worker))
            session = worker.agent.session
            assert session is not None
            cloud.backend.free.clear()
            asking = asyncio.create_task(worker.answer_async(TEXTS[0], deadline_ms=400))
            await until(lambda: cloud.gateway.at_work == 1)
            link.swallow()  # the answer is on its way when nobody waits for it any more
            cloud.backend.free.set()
            answer = await asking
            assert answer.where != "cloud"
            link.mend()
            await until(lambda: session.late_replies >= 1)


async def test_how_long_a_full_cloud_wants_to_be_left_alone_arrives(bundle: Bundle) -> None:
    async with cloud_of(bundle) as cloud:
        transport = GrpcTransport(cloud.address)

        async def full(*work: Any, **how: Any) -> Any:
            raise CloudBusy("full; come later", 1500.0)

        cloud.backend.complete = full  # type: ignore[method-assign]
        work = Offload("r", bundle.manifest.name, bundle.digest(2), b"whatever")
        with pytest.raises(CloudBusy) as refused:
            await transport.complete(work, timeout_s=5)
        assert refused.value.retry_after_ms == pytest.approx(1500.0)
        await transport.close()


async def test_sync_and_async_calls_share_one_worker(bundle: Bundle, layers: TorchAsNumpy) -> None:
    async with (
        cloud_of(bundle) as cloud,
        EdgeWorker(bundle, cloud.address, layers=layers, **HARD_KNOBS) as worker,
    ):
        # From a loop that is running, as in Jupyter: in a thread here, for the gateway needs it.
        sync = await asyncio.to_thread(worker.answer, TEXTS[0])
        many = await asyncio.to_thread(lambda: list(worker.answer_many(iter(TEXTS))))
        assert sync.where == "cloud"
        assert [a.text for a in many if isinstance(a, Answer)] == TEXTS
        again = await worker.answer_async(TEXTS[0])
        assert again.label == sync.label


async def test_an_async_source_is_read_in_the_callers_loop(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    loop = asyncio.get_running_loop()

    async def source() -> object:
        for text in TEXTS[:5]:
            assert asyncio.get_running_loop() is loop
            yield text
        yield ("a", "pair")

    async with EdgeWorker(bundle, layers=layers) as worker:
        results = [r async for r in worker.answer_many_async(source())]  # type: ignore[arg-type]
    assert [type(r) for r in results] == [Answer] * 5 + [Failed]


async def test_a_provisional_answer_comes_in_the_callers_loop(
    bundle: Bundle, layers: TorchAsNumpy
) -> None:
    loop, first = asyncio.get_running_loop(), []

    def told(answer: Answer) -> None:
        assert asyncio.get_running_loop() is loop
        first.append(answer)

    async with (
        cloud_of(bundle) as cloud,
        EdgeWorker(bundle, cloud.address, layers=layers, **HARD_KNOBS) as worker,
    ):
        final = await worker.answer_async(TEXTS[0], on_provisional=told)
        assert final.where == "cloud"
        await until(lambda: bool(first))
        assert (first[0].reason, first[0].exit_depth) == ("provisional", 2)


def test_without_a_cloud_all_layers_run_here(bundle: Bundle, layers: TorchAsNumpy) -> None:
    with EdgeWorker(bundle, layers=layers) as worker:
        answers = list(worker.answer_many(TEXTS, ordered=False))
        assert {a.where for a in answers if isinstance(a, Answer)} == {"device"}
        with pytest.raises(RequestError, match="one sentence"):
            worker.answer(("a", "pair"))
        for _ in worker.answer_many(iter(TEXTS)):
            break  # dropping the rest harms nobody
        assert worker.answer(TEXTS[0], id="mine").id == "mine"
    with pytest.raises(RuntimeError, match="closed"):
        worker.answer(TEXTS[0])
    worker.close()  # twice is once


@pytest.mark.slow
async def test_a_killed_cloud_process_loses_no_sample(bundle: Bundle, layers: TorchAsNumpy) -> None:
    arguments = ["--bundle", str(bundle.path), "--local", "--insecure"]

    async def answered(worker: EdgeWorker, kill: Callable[[], None]) -> list[Answer]:
        got: list[Answer] = []
        async for answer in worker.answer_many_async(TEXTS * 3):
            assert isinstance(answer, Answer)
            got.append(answer)
            if len(got) == 30:
                kill()
        return got

    with serving(arguments) as first:
        address = first.address
        worker = EdgeWorker(bundle, address, layers=layers, **HARD_KNOBS)
        async with worker:
            await until(lambda: up(worker))
            got = await answered(worker, first.process.kill)
            assert [a.text for a in got] == TEXTS * 3
            assert {"cloud", "fallback"} <= {a.where for a in got}
            assert all(a.complete for a in got)
            with serving([*arguments, "--listen", address]):
                await until(lambda: up(worker))
                assert (await worker.answer_async(TEXTS[0])).where == "cloud"
