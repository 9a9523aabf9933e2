"""The standard health service alone, in plain text: for probes that speak no TLS, as Kubernetes' own."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from offramp_common.errors import ConfigError


class HealthPort:
    """bind(), ... close(). What it tells is all that it knows: SERVING or not, by name."""

    def __init__(self, servicer: Any) -> None:
        """`servicer`: the gateway's own health service."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)

    async def listen(self, address: str) -> str:
        """Answer on HOST:PORT (port 0: a free one); returns it. Raises ConfigError."""
        host = address.rpartition(":")[0]
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(
                f"--health {address}: cannot listen there; give a free HOST:PORT of this machine"
            ) from error
        await self._server.start()
        return f"{host}:{bound}"

    async def close(self) -> None:
        await self._server.stop(0)
