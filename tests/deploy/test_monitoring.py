"""Dashboard, alerts and the page for operators name metrics that both tiers export, read from both
while they run; and the page names the alerts that there are."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import ClientSession, web
from deployed import DEPLOY, ROOT
from edge_cloud import TorchAsNumpy, cloud_of
from prometheus_client.parser import text_string_to_metric_families
from toy_models import toy_bundle, toy_layers

from offramp_cloud.gauges import add_gauges
from offramp_cloud.metrics import Metrics as CloudMetrics
from offramp_common import certs
from offramp_common.certs_expiry import show_expiry
from offramp_edge import EdgeWorker
from offramp_edge.answers import CLOUD, FALLBACK, REASONS
from offramp_edge.service import Service

DASHBOARD = json.loads((DEPLOY / "monitoring" / "grafana.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "monitoring" / "alerts.yaml").read_text())
PAGE = (ROOT / "docs" / "operators.md").read_text()
_NAME = re.compile(r"\bofframp_(?:cloud|edge|engine|certificate)_\w+")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    on_panels = [target["expr"] for panel in panels() for target in panel["targets"]]
    return on_panels + [v["query"] for v in DASHBOARD["templating"]["list"]]


def rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Sample name -> its labels, of a gateway and of a device's service that have answered."""
    pages = asyncio.run(both_pages(tmp_path_factory.mktemp("monitored")))
    found: dict[str, set[str]] = {}
    for text in pages:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


async def both_pages(folder: Path) -> list[str]:
    bundle = toy_bundle(folder / "toy", "pabee", n_layers=4, split=2)
    certs.init(folder / "certs")
    layers = TorchAsNumpy(toy_layers(bundle))
    async with cloud_of(bundle) as cloud:
        metrics = CloudMetrics(lambda: cloud.gateway.replicas)
        add_gauges(metrics.registry, cloud.gateway)
        show_expiry(metrics.registry, {"server": folder / "certs" / "server.pem"})
        cloud.gateway.observers.append(metrics.observe)
        at = metrics.listen("127.0.0.1:0")
        worker = EdgeWorker(
            bundle, cloud.address, layers=layers, exits=False, split=2, hedge_after=math.inf
        )
        try:
            async with worker, served(Service(worker)) as device:
                answers = [await worker.answer_async(text) for text in ("w1 w2 w3", "w4")]
                assert [answer.where for answer in answers] == [CLOUD, CLOUD]
                late = await worker.answer_async("w5 w6", deadline_ms=0.001)
                assert late.where == FALLBACK
                await cloud.gateway.probe()
                return [await page(f"http://{at}"), await page(device)]
        finally:
            metrics.close()


@asynccontextmanager
async def served(service: Service) -> AsyncIterator[str]:
    """Where the device's service listens meanwhile."""
    runner = web.AppRunner(service.app())
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def page(base: str) -> str:
    async with ClientSession() as session, session.get(f"{base}/metrics") as reply:
        assert reply.status == 200
        return await reply.text()


def test_every_metric_on_the_dashboard_is_exported(exported: dict[str, set[str]]) -> None:
    asked = {name for query in queries() for name in _NAME.findall(query)}
    assert len(asked) > 20
    assert asked <= exported.keys(), sorted(asked - exported.keys())


def test_every_metric_of_an_alert_is_exported(exported: dict[str, set[str]]) -> None:
    for rule in rules():
        asked = set(_NAME.findall(rule["expr"]))
        assert asked
        assert asked <= exported.keys(), rule["alert"]


def test_every_metric_on_the_page_for_operators_is_exported(exported: dict[str, set[str]]) -> None:
    asked = set(_NAME.findall(PAGE))
    assert asked
    assert asked <= exported.keys(), sorted(asked - exported.keys())


def test_labels_that_queries_group_and_choose_by_are_there(exported: dict[str, set[str]]) -> None:
    # The scraper's own beside ours.
    known = {label for labels in exported.values() for label in labels} | {"instance", "job", "le"}
    for query in [*queries(), *(rule["expr"] for rule in rules())]:
        asked = {
            word.strip()
            for words in re.findall(r"by \(([^)]*)\)", query)
            for word in words.split(",")
        }
        for name, chosen in re.findall(r"(offramp_\w+)\{([^}]*)\}", query):
            labels = set(re.findall(r"(\w+)(?:=~|=|!=)", chosen))
            assert labels <= exported[name] | {"instance", "job"}, query
        assert asked - {""} <= known, query


def test_the_dashboard_shows_what_an_operator_asks_for_first() -> None:
    shown = {name for query in queries() for name in _NAME.findall(query)}
    for name in (
        "offramp_cloud_requests_total",  # by outcome
        "offramp_cloud_request_seconds_bucket",
        "offramp_cloud_queue_seconds_bucket",
        "offramp_cloud_compute_seconds_bucket",
        "offramp_cloud_exits_total",
        "offramp_cloud_devices",
        "offramp_engine_work_left",
        "offramp_engine_batch_rows_sum",
        "offramp_edge_answers_total",  # by where
        "offramp_edge_fallbacks_total",  # by reason
        "offramp_edge_stage_ms_bucket",
        "offramp_edge_exit_depth_bucket",
        "offramp_edge_bytes_up_total",
        "offramp_edge_link_rtt_ms",
        "offramp_edge_link_uplink_mbps",
        "offramp_certificate_expiry_timestamp_seconds",
    ):
        assert name in shown


def test_panels_do_not_overlap_and_have_distinct_ids() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        box = panel["gridPos"]
        assert box["x"] + box["w"] <= 24
        for x in range(box["x"], box["x"] + box["w"]):
            for y in range(box["y"], box["y"] + box["h"]):
                other = taken.setdefault((x, y), panel["title"])
                assert other == panel["title"], f"{other} and {panel['title']}"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_page_explains_every_alert_and_every_reason_of_a_fallback() -> None:
    for rule in rules():
        assert f"| {rule['alert']} |" in PAGE
    table = PAGE.partition("| a fallback's reason |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    assert named == REASONS.keys() - {"provisional"}


def test_the_pages_commands_and_files_are_there() -> None:
    from deployed import parsed

    for words in re.findall(r"^    offramp (certs .*?)(?:\s+#.*)?$", PAGE, re.MULTILINE):
        parsed(["offramp", *words.split()])
    for path in re.findall(r"`((?:benchmarks|docs|deploy)/[\w./-]+)`", PAGE):
        assert (ROOT / Path(path)).exists(), path
