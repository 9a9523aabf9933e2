"""How a gateway is seen from outside: metrics, traces, and a port for probes."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from offramp_cloud.gateway import Gateway
from offramp_cloud.gauges import add_gauges
from offramp_cloud.health_port import HealthPort
from offramp_cloud.metrics import Metrics
from offramp_cloud.traces import observer
from offramp_common.certs import pair_of
from offramp_common.certs_expiry import show_expiry
from offramp_common.tracing import Tracer, tracer_to


class Outside:
    """listen() before anything slow, ready() once the gateway serves, close().

    tracer       of this process; engines in it use it too
    metrics_at, health_at   HOST:PORT of each, None without
    """

    def __init__(self, args: argparse.Namespace, gateway: Gateway, tracer: Tracer) -> None:
        """Raises ConfigError for certificates that cannot be read."""
        self.tracer = tracer
        self.metrics_at: str | None = None
        self.health_at: str | None = None
        self._metrics_to, self._health_to = args.metrics, args.health
        self._metrics = Metrics(lambda: gateway.replicas)
        self._health = HealthPort(gateway.health) if args.health else None
        gateway.observers.append(self._metrics.observe)
        add_gauges(self._metrics.registry, gateway)
        if args.tls_dir is not None:
            files = {name: pair_of(args.tls_dir, name).cert for name in ("ca", "server")}
            show_expiry(self._metrics.registry, files)
        if tracer.on:
            gateway.observers.append(observer(tracer))

    def listen(self) -> None:
        """Raises ConfigError for a port that is taken."""
        if self._metrics_to:
            self.metrics_at = self._metrics.listen(self._metrics_to)

    async def ready(self) -> None:
        """Probes are answered from now on: before, none being there means not ready."""
        if self._health is not None:
            self.health_at = await self._health.listen(self._health_to)

    async def close(self) -> None:
        self._metrics.close()
        if self._health is not None:
            await self._health.close()


@asynccontextmanager
async def seen(args: argparse.Namespace, gateway: Gateway) -> AsyncIterator[Outside]:
    """For as long as the gateway serves, and drains. Raises ConfigError."""
    with tracer_to(args.trace, "offramp-gateway") as tracer:
        outside = Outside(args, gateway, tracer)
        try:
            yield outside
        finally:
            await outside.close()
