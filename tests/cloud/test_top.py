"""`offramp top` reads a gateway's metrics: what happened between two readings, and clear words when
there is no gateway."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console

from offramp_cloud.top import Reading, between, quantile
from offramp_cloud.top_cli import screen
from offramp_common.cli import UNREACHABLE, USAGE
from offramp_common.errors import ConfigError

FIRST = """
# TYPE offramp_cloud_requests counter
offramp_cloud_requests_total{bundle="b",status="OK"} 100
offramp_cloud_requests_total{bundle="b",status="UNAVAILABLE"} 4
# TYPE offramp_cloud_request_bytes counter
offramp_cloud_request_bytes_total{bundle="b"} 1000
# TYPE offramp_cloud_exits counter
offramp_cloud_exits_total{bundle="b",depth="4"} 50
# TYPE offramp_cloud_rows counter
offramp_cloud_rows_total{bundle="b"} 100
# TYPE offramp_engine_layer_rows counter
offramp_engine_layer_rows_total{bundle="b",replica="7"} 5000
# TYPE offramp_cloud_request_seconds histogram
offramp_cloud_request_seconds_bucket{bundle="b",le="0.01"} 10
offramp_cloud_request_seconds_bucket{bundle="b",le="0.1"} 10
offramp_cloud_request_seconds_bucket{bundle="b",le="+Inf"} 10
"""
SECOND = """
# TYPE offramp_cloud_requests counter
offramp_cloud_requests_total{bundle="b",status="OK"} 140
offramp_cloud_requests_total{bundle="b",status="UNAVAILABLE"} 6
# TYPE offramp_cloud_request_bytes counter
offramp_cloud_request_bytes_total{bundle="b"} 9000
# TYPE offramp_cloud_exits counter
offramp_cloud_exits_total{bundle="b",depth="4"} 60
offramp_cloud_exits_total{bundle="b",depth="6"} 30
# TYPE offramp_cloud_rows counter
offramp_cloud_rows_total{bundle="b"} 140
# TYPE offramp_cloud_devices gauge
offramp_cloud_devices 3
# TYPE offramp_cloud_replicas gauge
offramp_cloud_replicas{bundle="b"} 1
# TYPE offramp_certificate_expiry_timestamp_seconds gauge
offramp_certificate_expiry_timestamp_seconds{file="ca"} 1864000
offramp_certificate_expiry_timestamp_seconds{file="server"} 1432000
# TYPE offramp_engine_work_left gauge
offramp_engine_work_left{bundle="b",replica="8"} 640
# TYPE offramp_engine_layer_rows counter
offramp_engine_layer_rows_total{bundle="b",replica="8"} 20
# TYPE offramp_engine_batch_rows histogram
offramp_engine_batch_rows_bucket{bundle="b",le="+Inf",replica="8"} 5
offramp_engine_batch_rows_sum{bundle="b",replica="8"} 20
offramp_engine_batch_rows_count{bundle="b",replica="8"} 5
# TYPE offramp_cloud_request_seconds histogram
offramp_cloud_request_seconds_bucket{bundle="b",le="0.01"} 10
offramp_cloud_request_seconds_bucket{bundle="b",le="0.1"} 50
offramp_cloud_request_seconds_bucket{bundle="b",le="+Inf"} 50
"""
VIEW = between(Reading.of(FIRST, 10.0), Reading.of(SECOND, 14.0), now_epoch_s=1_000_000.0)


def test_counters_become_rates_of_the_time_between_the_readings() -> None:
    (bundle,) = VIEW.bundles
    assert VIEW.seconds == 4.0
    assert (bundle.requests, bundle.rows) == (42 / 4, 10.0)
    assert bundle.refused == {"UNAVAILABLE": 0.5}
    assert VIEW.bytes_in == 2000.0
    assert (VIEW.devices, bundle.replicas) == (3, 1)


def test_exit_depths_are_those_of_the_answers_in_between() -> None:
    assert VIEW.bundles[0].depths == {4: 0.25, 6: 0.75}


def test_a_replica_that_is_new_counts_from_zero_and_its_batches_have_a_mean() -> None:
    (replica,) = VIEW.replicas
    assert (replica.name, replica.work_left, replica.batch, replica.layer_rows) == ("8", 640, 4, 5)


def test_times_are_those_of_the_requests_in_between() -> None:
    # All 40 lie between 10 and 100 ms, and are taken to be spread evenly there.
    assert VIEW.bundles[0].p50_ms == pytest.approx(55.0)
    assert VIEW.bundles[0].p95_ms == pytest.approx(95.5)
    assert VIEW.bundles[0].queue_p50_ms is None


def test_the_certificate_that_ends_first_counts() -> None:
    assert VIEW.certificate_days == 5.0


def test_a_counter_that_fell_began_anew_with_its_process() -> None:
    restarted = SECOND.replace('status="OK"} 140', 'status="OK"} 8')
    view = between(Reading.of(FIRST, 10.0), Reading.of(restarted, 14.0), 0.0)
    assert view.bundles[0].requests == (8 + 2) / 4


@pytest.mark.parametrize(
    ("buckets", "share", "wanted"),
    [
        ([], 0.5, None),
        ([(1.0, 0.0), (math.inf, 0.0)], 0.5, None),
        ([(1.0, 4.0), (2.0, 4.0), (math.inf, 4.0)], 0.5, 0.5),
        ([(1.0, 0.0), (2.0, 4.0), (math.inf, 4.0)], 1.0, 2.0),
        ([(1.0, 1.0), (2.0, 1.0), (math.inf, 4.0)], 0.9, 2.0),  # beyond the last bound
    ],
)
def test_quantiles_of_a_histogram(
    buckets: list[tuple[float, float]], share: float, wanted: float | None
) -> None:
    assert quantile(buckets, share) == wanted


def test_the_screen_shows_all_of_it() -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(screen(VIEW, "gateway:9464"))
    text = console.file.getvalue()
    for words in ("3 devices", "ends in 5 days", "UNAVAILABLE 0.5", "75%", "640", "gateway:9464"):
        assert words in text


def test_a_view_is_plain_json() -> None:
    assert json.loads(json.dumps(VIEW.to_json()))["bundles"][0]["name"] == "b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# TYPE other counter\nother_total 1\n", "not a gateway's"),
        ("", "not a gateway's"),
        ("<html>hello</html>", "not Prometheus' text"),
    ],
)
def test_metrics_of_something_else_are_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Reading.of(text, 0.0)


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/metrics" else 404)
        self.end_headers()
        self.wfile.write(SECOND.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def page() -> Iterator[str]:
    """HOST:PORT of somebody who serves the second reading."""
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "offramp_common", "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_once_with_json_prints_one_line_and_nothing_else_to_stdout(page: str) -> None:
    done = top(page, "--once", "--json", "--every", "0.1")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["devices"] == 3
    assert not done.stderr


def test_for_people_the_view_goes_to_standard_error(page: str) -> None:
    done = top(page, "--once", "--every", "0.1")
    assert (done.returncode, done.stdout) == (0, "")
    assert "3 devices" in done.stderr


def test_a_gateway_that_is_not_there_is_said_to_be_unreachable() -> None:
    done = top("127.0.0.1:9", "--once")
    assert done.returncode == UNREACHABLE
    assert "nothing answers at http://127.0.0.1:9/metrics" in done.stderr
    assert "--metrics" in done.stderr


@pytest.mark.parametrize("arguments", [["127.0.0.1:1", "--every", "0"], [], ["gateway", "--once"]])
def test_wrong_arguments_are_usage(arguments: list[str]) -> None:
    assert top(*arguments).returncode == USAGE
