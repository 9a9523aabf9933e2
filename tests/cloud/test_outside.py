"""A gateway as operators see it: who is there, what it leans on, probes in plain text, and `offramp top`
on the real thing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from cloud_world import serving
from edge_cloud import cloud_of
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from offramp_cloud.gauges import Recent, add_gauges
from offramp_cloud.health_port import HealthPort
from offramp_cloud.served import Served
from offramp_common.bundle import Bundle
from offramp_common.cli import USAGE
from offramp_common.errors import ConfigError


def test_callers_are_counted_once_each_for_a_minute() -> None:
    now_s = 0.0
    recent = Recent(lambda: now_s)
    recent.observe(Served(device="kiosk-7", peer="ipv4:10.0.0.1:4000"))
    recent.observe(Served(device="kiosk-7", peer="ipv4:10.0.0.1:4001"))
    recent.observe(Served(peer="ipv4:10.0.0.2:5000"))
    recent.observe(Served(peer="ipv4:10.0.0.2:5001"))
    assert recent.count() == 2
    now_s = 40.0
    recent.observe(Served(device="kiosk-7"))
    now_s = 61.0
    assert recent.count() == 1
    now_s = 200.0
    assert recent.count() == 0


async def test_a_bundle_that_nobody_answers_for_is_shown_with_none(bundle: Bundle) -> None:
    registry = CollectorRegistry()
    async with cloud_of(bundle) as cloud:
        add_gauges(registry, cloud.gateway)
        labels = {"bundle": bundle.manifest.name}
        assert registry.get_sample_value("offramp_cloud_replicas", labels) == 1
        cloud.gateway.replicas.clear()
        assert registry.get_sample_value("offramp_cloud_replicas", labels) == 0
        assert registry.get_sample_value("offramp_cloud_at_work") == 0
        tasks = registry.get_sample_value("offramp_cloud_tasks")
        assert tasks is not None
        assert tasks >= 1


async def test_probes_are_answered_in_plain_text_until_the_end_of_draining(bundle: Bundle) -> None:
    async with cloud_of(bundle) as cloud:
        port = HealthPort(cloud.gateway.health)
        address = await port.listen("127.0.0.1:0")
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            await cloud.stop()
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await port.close()


async def test_a_port_that_is_taken_is_named(bundle: Bundle) -> None:
    async with cloud_of(bundle) as cloud:
        with pytest.raises(ConfigError, match=f"--health {cloud.address}: cannot listen there"):
            await HealthPort(cloud.gateway.health).listen(cloud.address)


def test_a_gateway_with_tls_serves_probes_metrics_and_top(bundle: Bundle, tls_dir: Path) -> None:
    arguments = ["--local", "--bundle", str(bundle.path), "--tls-dir", str(tls_dir)]
    arguments += ["--metrics", "127.0.0.1:0", "--health", "127.0.0.1:0"]
    with serving(arguments) as served:
        with grpc.insecure_channel(served.ready["health"]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        command = [sys.executable, "-m", "offramp_common", "top", served.ready["metrics"]]
        command += ["--once", "--json", "--every", "0.2"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        view = json.loads(done.stdout)
        assert [each["name"] for each in view["bundles"]] == [bundle.manifest.name]
        assert view["bundles"][0]["replicas"] == 1
        assert view["replicas"][0]["work_left"] == 0
        assert 300 < view["certificate_days"] < 366
        assert served.stop() == 0


def test_a_trace_that_cannot_be_written_ends_the_start_with_its_name(bundle: Bundle) -> None:
    command = [sys.executable, "-m", "offramp_common", "cloud", "serve", "--local", "--insecure"]
    command += ["--bundle", str(bundle.path), "--listen", "127.0.0.1:0", "--trace", "/nowhere/x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == USAGE
    assert "--trace /nowhere/x: cannot be written" in done.stderr
