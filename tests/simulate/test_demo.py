"""The demo: its table's arithmetic, its page, and the whole of it on a toy model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from toy_models import LABELS, toy_bundle

from offramp_simulate import svg
from offramp_simulate.demo import (
    Outcome,
    Settings,
    Strategy,
    choice,
    percentile,
    summarise,
    to_json,
)
from offramp_simulate.demo_report import render

N_SENTENCES = 12


def _record(number: int, label: str, depth: int, where: str, ms: float) -> dict[str, Any]:
    return {
        "id": str(number), "text": f"<w{number}> & co", "label": label, "expected": "red",
        "exit_depth": depth, "where": where, "ms": ms, "bytes_up": 10, "kind": "easy",
        "reason": "timeout" if where == "fallback" else "", "split": 1 if where == "cloud" else 3,
        **({"codec": "int4"} if where == "cloud" else {}),
    }  # fmt: skip


@pytest.fixture
def outcomes() -> list[Outcome]:
    ours = Outcome(Strategy("offramp", "offramp: exits, the planner", None, True))
    ours.records = [
        _record(1, "red", 1, "device", 1.0),
        _record(2, "red", 3, "cloud", 50.0),
        _record(3, "blue", 2, "fallback", 9.0),
        _record(4, "blue", 2, "cloud", 40.0),
    ]
    ours.link_bytes_up = 4000
    full = Outcome(Strategy("full", "full model on the device", 3, False))
    full.records = [_record(n, label, 3, "device", 5.0) for n, label in enumerate("rbbb", start=1)]
    for record, label in zip(full.records, ("red", "blue", "blue", "blue"), strict=True):
        record["label"] = label
    return [ours, full]


def test_the_table_counts_layers_where_they_ran_and_agreement_with_the_full_model(
    outcomes: list[Outcome],
) -> None:
    ours, full = summarise(outcomes)
    assert ours["accuracy"] == 0.5
    assert ours["agreement"] == 0.75
    # cloud: 3 - 1 and 2 - 1; device: 1 + 1 + 2 (a fallback runs here) + 1
    assert ours["cloud_layers"] == 0.75
    assert ours["device_layers"] == 1.25
    assert ours["on_device"] == 0.5
    assert ours["fallback"] == 0.25
    assert ours["bytes_up"] == 1000
    assert ours["exit_depths"] == {"1": 1, "2": 2, "3": 1}
    assert ours["choices"] == {
        "sent after layer 1 as int4": 2, "left at exit 1": 1, "fallback: timeout": 1
    }  # fmt: skip
    assert full["choices"] == {"all layers here": 4}
    assert full["device_layers"] == 3
    assert full["agreement"] == 1


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(v) for v in range(1, 101)]
    assert percentile(values, 0.5) == 51
    assert percentile(values, 0.95) == 96
    assert percentile([7.0], 0.95) == 7


def test_the_report_is_one_page_that_loads_nothing_and_escapes_what_users_wrote(
    outcomes: list[Outcome],
) -> None:
    rows = summarise(outcomes)
    about = {"sentences": 4, "source": "<here>", "hardware": "2 cores"}
    page = render(to_json(outcomes, rows, Settings(Path("a&b")), about))
    assert "&lt;w1&gt; &amp; co" in page
    assert "<w1>" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<figure>") == 4
    assert "50.0%" in page
    assert "sent after layer 1 as int4" in page
    assert "the planner: the cloud did not answer: timeout 1" in page


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"where": "cloud", "split": 0}, "sent the input"),
        ({"where": "cloud", "split": 2, "codec": "int8+z"}, "sent after layer 2 as int8+z"),
        ({"where": "device", "split": 1, "hedge": "device"}, "sent, but the device was first"),
        ({"where": "device", "split": 3}, "all layers here"),
    ],
)
def test_what_became_of_a_sample_is_said_in_words(changes: dict[str, Any], words: str) -> None:
    assert choice(_record(1, "red", 3, "device", 1.0) | changes, n_layers=3) == words


def test_pictures_are_well_formed_whatever_the_names() -> None:
    pictures = [
        svg.cumulative({"a<b": [1.0, 20.0], "c": [300.0]}, "ms & more", "share"),
        svg.bars({'"x"': 0.0, "y": 12345.0}, "bytes"),
        svg.columns({"exit 1": {"device": 3, "cloud": 1}, "exit 2": {}}, "", "n"),
        svg.bars({"nothing": 0.0}, "bytes"),
    ]
    for picture in pictures:
        ElementTree.fromstring(picture)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a toy bundle with graphs, sentences for it)."""
    from offramp_model.export import add_graphs

    folder = tmp_path_factory.mktemp("demo")
    add_graphs(toy_bundle(folder / "bundle"), ("fp32",))
    data = folder / "sentences.jsonl"
    rows = [
        {"text": " ".join(f"w{(7 * n + k) % 90}" for k in range(3 + n % 5)), "label": LABELS[n % 5]}
        for n in range(N_SENTENCES)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "bundle", data


def _demo(toy: tuple[Path, Path], *more: str) -> list[str]:
    bundle, data = toy
    command = [sys.executable, "-m", "offramp_common", "demo", "--link", "wifi"]
    return [*command, "--bundle", str(bundle), "--data", str(data), *more]


def _in_session(marker: str) -> list[str]:
    """Command lines of live processes that mention `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if marker in line:
                found.append(line)
    return found


@pytest.mark.slow
def test_the_whole_demo_answers_every_sentence_by_every_strategy(
    toy: tuple[Path, Path], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    command = _demo(toy, "--local", "--json", "-", "--report", str(page))
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["strategy"] for row in result["table"]] == [
        "offramp", "cut", "device", "input", "split", "full"
    ]  # fmt: skip
    assert all(row["n"] == N_SENTENCES and row["fallback"] == 0 for row in result["table"])
    by_key = {row["strategy"]: row for row in result["table"]}
    # The law, through real processes: exits decide alike wherever the cut is. (int8 may differ.)
    assert by_key["device"]["exit_depths"] == by_key["input"]["exit_depths"]
    assert by_key["device"]["bytes_up"] == 0 < by_key["input"]["bytes_up"]
    assert by_key["split"]["cloud_layers"] == 2
    sent = by_key["cut"]["choices"]
    assert all(name.split()[0] in ("left", "sent") for name in sent)
    assert page.read_text().startswith("<!doctype html>")
    assert not _in_session(str(toy[0]))


@pytest.mark.slow
def test_ctrl_c_ends_the_demo_and_all_its_processes(toy: tuple[Path, Path]) -> None:
    # Over a slow link, so that it cannot have finished before the signal comes.
    command = _demo(toy, "--local", "--link", "satellite")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("1/6"):
            break
    assert len(_in_session(str(toy[0]))) >= 2
    process.send_signal(signal.SIGINT)
    process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 130
    deadline = time.monotonic() + 10
    while _in_session(str(toy[0])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _in_session(str(toy[0]))


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--split", "3"], "between 1 and 2"),
        (["--report", "no/such/place/r.html"], "no directory"),
        (["--data", "missing.jsonl"], "no such file"),
        (["--link", "carrier-pigeon"], "no such profile; there are 3g, lte"),
    ],
)
def test_wrong_arguments_are_told_with_the_remedy(
    toy: tuple[Path, Path], more: list[str], complaint: str
) -> None:
    command = _demo(toy, "--local", *more)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
