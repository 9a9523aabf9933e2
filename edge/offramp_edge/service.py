"""The device's local HTTP service: the Open Inference Protocol v2, and /metrics.

    GET  /v2  /v2/health/live  /v2/health/ready  /v2/models/NAME  /v2/models/NAME/ready
    POST /v2/models/NAME/infer

The input "text" is BYTES of shape [n], for a model of pairs [n, 2]; the request's parameter
"deadline_ms" counts from its arrival. Outputs hold a row a text: see `outputs_of`. "logits" come
only when the request names its outputs and logits are among them. Errors are {"error": "..."}.

With the parameter "provisional": true the reply is newline-delimited JSON of one or two such objects: as
soon as every text has an answer of some kind, if one of them is provisional, an object with "parameters":
{"provisional": true}; then the final one. An error after the first line stands on a line of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from offramp_common import __version__
from offramp_common.certs_expiry import show_expiry
from offramp_common.errors import RequestError
from offramp_edge.answers import Answer
from offramp_edge.first_answers import FirstAnswers
from offramp_edge.inference import Inference, output, outputs_of, parse
from offramp_edge.metrics import Metrics
from offramp_edge.worker import EdgeWorker

MAX_BODY_BYTES = 4 * 2**20
MAX_WAITING = 1024
"""Texts that may wait for the device at once; beyond, requests are refused with 503."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Service:
    """The HTTP side of one worker, which it does not own. Its settings should ask for logits."""

    def __init__(self, worker: EdgeWorker, certificates: Mapping[str, str] | None = None) -> None:
        """`certificates`: what each is for -> its PEM file, whose end the metrics show."""
        self._worker, self._manifest = worker, worker.bundle.manifest
        self._metrics = Metrics(worker.agent, worker.bundle.n_layers, worker.chooser)
        show_expiry(self._metrics.registry, certificates or {})
        self._waiting = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors_as_json])
        model = "/v2/models/{name}"
        app.add_routes(
            [
                web.get("/v2", self._server),
                web.get("/v2/health/live", self._live),
                web.get("/v2/health/ready", self._ready),
                web.get(model, self._model),
                web.get(f"{model}/ready", self._model_ready),
                web.post(f"{model}/infer", self._infer),
                web.get("/metrics", self._show_metrics),
            ]
        )
        return app

    async def _server(self, request: web.Request) -> web.Response:
        return web.json_response({"name": "offramp", "version": __version__, "extensions": []})

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def _ready(self, request: web.Request) -> web.Response:
        """Ready without a cloud too: the device answers, and the body says how things are."""
        session = self._worker.agent.session
        cloud = {"state": "none"} if session is None else {"state": session.breaker.state}
        if session is not None and session.breaker.reason:
            cloud["reason"] = session.breaker.reason
        return web.json_response({"ready": True, "name": self._manifest.name, "cloud": cloud})

    async def _model_ready(self, request: web.Request) -> web.Response:
        self._check_name(request)
        return await self._ready(request)

    async def _model(self, request: web.Request) -> web.Response:
        self._check_name(request)
        return web.json_response(
            {
                "name": self._manifest.name,
                "versions": ["1"],
                "platform": "offramp",
                "inputs": [
                    {
                        "name": "text",
                        "datatype": "BYTES",
                        "shape": [-1, 2] if self._manifest.task.pair else [-1],
                    }
                ],
                "outputs": outputs_of(self._manifest.task),
            }
        )

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        self._check_name(request)
        body = await request.read()
        traceparent = request.headers.get("traceparent", "")
        wanted = parse(body, self._manifest.task, traceparent)
        n = len(wanted.samples)
        if self._waiting + n > MAX_WAITING:
            raise web.HTTPServiceUnavailable(
                reason=f"{self._waiting} texts are waiting, {n} more are above {MAX_WAITING}"
            )
        self._waiting += n
        try:
            if wanted.provisional:
                return await self._streamed(request, wanted)
            answers = await asyncio.gather(*map(self._worker.answer_async, wanted.samples))
        finally:
            self._waiting -= n
        return web.json_response(self._reply(wanted, answers))

    async def _streamed(self, request: web.Request, wanted: Inference) -> web.StreamResponse:
        """What the device says at once, then the final answers."""
        first = FirstAnswers(len(wanted.samples))
        final = asyncio.gather(
            *(
                first.followed(
                    row, self._worker.answer_async(sample, on_provisional=first.note(row))
                )
                for row, sample in enumerate(wanted.samples)
            )
        )
        stream = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        try:
            sides: tuple[asyncio.Future[Any], ...] = (final, first.all)
            await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
            if not final.done() and any(answer.provisional for answer in first.answers):
                await stream.prepare(request)
                reply = self._reply(wanted, first.answers) | {"parameters": {"provisional": True}}
                await stream.write(json.dumps(reply).encode() + b"\n")
            try:
                reply = self._reply(wanted, await final)
            except RequestError as error:
                if not stream.prepared:
                    raise
                reply = {"error": str(error)}
            if not stream.prepared:
                await stream.prepare(request)
            await stream.write(json.dumps(reply).encode() + b"\n")
        finally:
            final.cancel()
        await stream.write_eof()
        return stream

    def _reply(self, wanted: Inference, answers: Sequence[Answer]) -> dict[str, Any]:
        reply: dict[str, Any] = {
            "model_name": self._manifest.name,
            "model_version": "1",
            "outputs": [output(name, answers, self._manifest.task) for name in wanted.outputs],
        }
        return reply | ({"id": wanted.id} if wanted.id else {})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _check_name(self, request: web.Request) -> None:
        name = request.match_info["name"]
        if name != self._manifest.name:
            raise web.HTTPNotFound(
                reason=f"no model {name!r:.80} here, only {self._manifest.name!r}"
            )


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return web.json_response({"error": str(error)}, status=400)
    except web.HTTPException as error:
        return web.json_response({"error": error.reason}, status=error.status)
