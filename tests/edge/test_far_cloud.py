"""A cloud that is far away, over real gRPC with TLS and the link emulator."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from edge_cloud import TorchAsNumpy, cloud_of

from offramp_common import certs
from offramp_common.bundle import Bundle
from offramp_edge import EdgeWorker
from offramp_simulate.link_emulator import LinkEmulator
from offramp_simulate.links import PROFILES


async def test_a_cloud_to_which_connecting_takes_longer_than_a_second_is_connected_to(
    bundle: Bundle, layers: TorchAsNumpy, tls_dir: Path
) -> None:
    """Over a satellite TCP and TLS take 1.2 s, and the first greeting 1.8."""
    async with cloud_of(bundle, credentials=certs.server_credentials(tls_dir)) as cloud:
        host, port = cloud.address.rsplit(":", 1)
        async with LinkEmulator(PROFILES["satellite"], (host, int(port))) as link:
            address = "{}:{}".format(*link.address)
            settings: dict[str, Any] = {
                "exits": False,
                "plan": "fixed",
                "hedge_after": math.inf,
                "deadline_ms": None,
                "probe_timeout_ms": 20_000.0,
                "offload_timeout_ms": 20_000.0,
            }
            worker = EdgeWorker(bundle, address, layers=layers, ca=tls_dir / "ca.pem", **settings)
            async with worker:
                assert (await worker.answer_async("w1 w2 w3")).where == "cloud"
