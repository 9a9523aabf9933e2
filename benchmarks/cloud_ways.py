"""Servers that answer at once, each in a process of its own: the ways that cloud_path.py compares."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import grpc

from offramp_common.wire import offload_pb2 as pb

BUNDLE, DIGEST = "echo", bytes(16)
REPLY = pb.OffloadReply(
    request_id="r", answers=bytes(360), exit_depths=[2], confidences=[0.5]
).SerializeToString()
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Answering:
    """A host (host.Host) whose engine does nothing."""

    async def complete(self, request: bytes, budget_ms: float) -> Any:
        from offramp_cloud.statuses import Outcome

        return Outcome(REPLY)

    def counters(self) -> dict[str, Any]:
        return {BUNDLE: {"requests": 0}}


async def echo(say: Connection) -> None:
    """The bare server."""

    async def complete(request: bytes, context: Any) -> bytes:
        return REPLY

    server = grpc.aio.server(options=OPTIONS)
    handlers = {"Complete": grpc.unary_unary_rpc_method_handler(complete)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("offramp.v1.OffloadService", handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say.send(f"127.0.0.1:{port}")
    await server.wait_for_termination()


async def replica(say: Connection) -> None:
    from offramp_cloud import cluster_keys
    from offramp_cloud.rates import Work
    from offramp_cloud.replica_server import ReplicaServer

    host: Any = Answering()
    server = ReplicaServer(host, cluster_keys.server_credentials(bytes(32)), Work)
    say.send(await server.start("127.0.0.1"))
    await asyncio.Event().wait()


async def offramp_gateway(say: Connection, address: str) -> None:
    from offramp_cloud import cluster_keys
    from offramp_cloud.backends import ReplicatedBackend
    from offramp_cloud.replica_link import Endpoint

    there = Endpoint("one", address, "app", BUNDLE, 0.0, {DIGEST.hex(): 0})

    class Known:
        async def endpoints(self) -> dict[str, Endpoint]:
            return {"one": there}

    async def nothing() -> None:
        pass

    backend = ReplicatedBackend(Known(), cluster_keys.channel_credentials(bytes(32)), nothing)
    await backend.start(20.0)
    await _serve(say, backend)


async def _serve(say: Connection, backend: Any) -> None:
    from offramp_cloud.gateway import Gateway, GatewaySettings

    gateway = Gateway(GatewaySettings(listen="127.0.0.1:0"))
    address = gateway.bind()
    await gateway.start(backend)
    say.send(address)
    await asyncio.Event().wait()


async def handle_gateway(say: Connection, ray_address: str) -> None:
    os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
    os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"] = "0"
    import ray
    from ray import serve

    from offramp_cloud.backends import Replica
    from offramp_cloud.statuses import Outcome

    ray.init(address=ray_address, log_to_driver=False, configure_logging=False)
    handle = serve.get_app_handle("plain")

    class Handles:
        bundles = (BUNDLE,)

        def depth_of(self, bundle: str, digest: bytes) -> int:
            return 0

        async def complete(self, bundle: str, digest: bytes, raw: bytes, ms: float) -> Outcome:
            return Outcome(await handle.answer.remote(raw))

        async def probe(self, bundle: str, timeout_s: float) -> list[Replica]:
            return [Replica(0, "", {})]

    await _serve(say, Handles())


def serve_ray(say: Connection) -> None:
    """A Ray with Serve, its gRPC ingress, and a replica of each kind; sends (Ray's address, ingress's)."""
    import ray
    from ray import serve
    from ray.serve.config import gRPCOptions

    class Plain:
        async def answer(self, raw: bytes) -> bytes:
            return REPLY

    class Ingress:
        async def Complete(self, request: pb.OffloadRequest) -> pb.OffloadReply:
            return pb.OffloadReply.FromString(REPLY)

    folder = tempfile.mkdtemp(prefix="offramp-", dir="/tmp")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=folder,
        _node_ip_address="127.0.0.1",
    )
    added = "offramp_common.wire.offload_pb2_grpc.add_OffloadServiceServicer_to_server"
    port = _free_port()
    serve.start(
        http_options={"host": "127.0.0.1", "port": _free_port()},
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=[added]),
    )
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    options: Any = {"max_ongoing_requests": 1000, "logging_config": quiet}
    serve.run(serve.deployment(**options)(Plain).bind(), name="plain", route_prefix="/plain")
    serve.run(serve.deployment(**options)(Ingress).bind(), name="ingress", route_prefix="/")
    gcs_port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    say.send((f"127.0.0.1:{gcs_port}", f"127.0.0.1:{port}"))
    say.recv()
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def in_process(
    main: Callable[..., Any], *args: Any
) -> tuple[multiprocessing.Process, Connection, Any]:
    here, there = multiprocessing.Pipe()
    process: Any = multiprocessing.get_context("spawn").Process(
        target=_run, args=(main, there, *args), daemon=True
    )
    process.start()
    there.close()
    try:
        return process, here, here.recv()
    except EOFError:
        sys.exit(f"{main.__name__} did not start")


def _run(main: Callable[..., Any], say: Connection, *args: Any) -> None:
    done = main(say, *args)
    if asyncio.iscoroutine(done):
        asyncio.run(done)
