"""`offramp cloud serve --local` as a process, and what it refuses before anything is started."""

from __future__ import annotations

import argparse
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cloud_world import World, alive, assert_same, serving
from grpc_health.v1 import health_pb2, health_pb2_grpc

from offramp_cloud.cli import add_command
from offramp_common.bundle import Bundle
from offramp_common.certs import channel_credentials
from offramp_common.errors import BundleError, ConfigError
from offramp_common.messages import completion_from_pb, offload_to_pb
from offramp_common.wire import offload_pb2_grpc as pb_grpc


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_local_cloud_answers_and_ends_on_a_signal(
    number: signal.Signals, code: int, world: World, tls_dir: Path
) -> None:
    acts = world.rows((5, 8), 2)
    arguments = ["--local", "--bundle", str(world.bundle.path), "--tls-dir", str(tls_dir)]
    with serving([*arguments, "--metrics", "127.0.0.1:0", "--json-log"]) as served:
        pair = (tls_dir / "kiosk-7.pem", tls_dir / "kiosk-7.key")
        credentials = channel_credentials(tls_dir / "ca.pem", *pair)
        with grpc.secure_channel(served.address, credentials) as channel:
            stub = pb_grpc.OffloadServiceStub(channel)
            reply = stub.Complete(offload_to_pb(world.offload_of(acts)), timeout=20)
        assert_same(completion_from_pb(reply), world.local(acts))
        pid = served.process.pid
        assert served.ready["bundles"] == ["toy"]
        assert (served.ready["pid"], served.ready["replica_pids"]) == (pid, [pid])
        url = f"http://{served.ready['metrics']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as page:
            assert 'offramp_cloud_rows_total{bundle="toy"} 2.0' in page.read().decode()
        family = served.family()
        assert served.stop(number) == code
        assert not alive(family)
    events = [json.loads(line) for line in served.log]
    assert [event["event"] for event in events if event["event"] == "request"] == ["request"]
    assert events[-1]["event"] == "stopped"


def test_requests_at_work_are_answered_before_a_cloud_ends(world: World) -> None:
    acts = world.rows([60] * 100, 0)
    work = offload_to_pb(world.offload_of(acts))
    with serving(["--local", "--insecure", "--bundle", str(world.bundle.path)]) as served:
        with grpc.insecure_channel(served.address) as channel:
            stub = pb_grpc.OffloadServiceStub(channel)
            calls = [stub.Complete.future(work, timeout=30) for _ in range(3)]
            while not any(call.done() for call in calls):
                calls[0].result()
            served.process.send_signal(signal.SIGTERM)
            for call in calls:
                assert_same(completion_from_pb(call.result()), world.local(acts), exactly=False)
        assert served.process.wait(20) == 0


@pytest.mark.parametrize(("version", "served"), [("TLSv1_2", False), ("TLSv1_3", True)])
def test_devices_speak_tls_1_3_or_are_not_heard(
    version: str, served: bool, world: World, tls_dir: Path, tls_cloud: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls_dir / "ca.pem")
    context.load_cert_chain(tls_dir / "kiosk-7.pem", tls_dir / "kiosk-7.key")
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    host, _, port = tls_cloud.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as there:
                assert served
                assert there.version() == "TLSv1.3"
        except ssl.SSLError:
            assert not served


def test_a_device_without_a_certificate_is_not_let_in(tls_dir: Path, tls_cloud: str) -> None:
    credentials = channel_credentials(tls_dir / "ca.pem")
    with grpc.secure_channel(tls_cloud, credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module")
def tls_cloud(bundle: Bundle, tls_dir: Path) -> Iterator[str]:
    """The address of `offramp cloud serve --local` as most start it: with a folder of certificates."""
    arguments = ["--local", "--bundle", str(bundle.path), "--tls-dir", str(tls_dir)]
    with serving(arguments) as served:
        yield served.address


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    return parser.parse_args(["cloud", "serve", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --tls-dir DIR .*or --insecure"),
        (["--insecure", "--listen", "0.0.0.0:7443"], "can be reached .*--force-insecure"),
        (["--insecure", "--listen", "cloud.example:7443"], "can be reached from other machines"),
        (["--insecure", "--anonymous"], "--anonymous and --revoked need --tls-dir"),
        (["--insecure", "--tls-dir", "certs"], "exclude each other"),
        (["--insecure", "--replicas", "2"], "--local runs in this process"),
        (["--tls-dir", "/nonexistent"], "/nonexistent/ca.pem"),
        (["--insecure", "--listen", "127.0.0.1"], "must be HOST:PORT"),
        (["--insecure", "--listen", "127.0.0.1:99999"], "must be HOST:PORT"),
        (["--insecure", "--metrics", "127.0.0.1:x"], "--metrics '127.0.0.1:x'"),
        (["--insecure", "--attach", "app"], "give --bundle DIR, or --attach NAME"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    arguments: list[str], message: str, bundle: Bundle
) -> None:
    args = parsed("--local", "--bundle", str(bundle.path), *arguments)
    with pytest.raises(ConfigError, match=message):
        args.run(args)


def test_two_bundles_of_one_name_are_refused(bundle: Bundle) -> None:
    args = parsed("--local", "--insecure", *(2 * ("--bundle", str(bundle.path))))
    with pytest.raises(ConfigError, match="two share a name"):
        args.run(args)


def test_a_missing_bundle_is_refused(tmp_path: Path) -> None:
    args = parsed("--local", "--insecure", "--bundle", str(tmp_path / "none"))
    with pytest.raises(BundleError, match="no bundle there"):
        args.run(args)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "not a Ray client's"),
        ("127.0.0.1:1", "nothing answers there .*ray start --head"),
        ("127.0.0.1:port", "nothing answers there"),
    ],
)
def test_an_unknown_ray_is_refused(address: str, message: str, bundle: Bundle) -> None:
    listen = ["--insecure", "--listen", "127.0.0.1:0", "--address", address]
    args = parsed("--bundle", str(bundle.path), *listen)
    with pytest.raises(ConfigError, match=message):
        args.run(args)


def test_a_port_in_use_ends_the_command_with_2_and_one_line(bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "offramp_common", "cloud", "serve", "--listen", listen]
        ended = subprocess.run(
            [*command, "--insecure", "--bundle", str(bundle.path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(rf"offramp cloud: cannot listen on {listen}: .*in use.*\n", ended.stderr)
