"""`offramp edge` as a process: streams, signals, pipes, exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cloud_world import wait_until
from edge_cloud import cloud_of

from offramp_common.bundle import Bundle

TEXTS = [f"w{i % 96} w{i * 7 % 96}" for i in range(40)]
WAIT_S = 60.0


def command(action: str, bundle: Bundle, *arguments: str) -> list[str]:
    start = [sys.executable, "-m", "offramp_common", "edge", action, "--bundle", str(bundle.path)]
    return [*start, *arguments]


def run(
    bundle: Bundle, *arguments: str, given: str = "", action: str = "run"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(action, bundle, *arguments),
        input=given,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@contextmanager
def started(
    bundle: Bundle, *arguments: str, action: str = "run"
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(action, bundle, *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    hangs = threading.Timer(WAIT_S, process.kill)
    hangs.start()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        hangs.cancel()
        hangs.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None and not stream.closed:
                stream.close()


def test_lines_of_text_give_lines_of_json(graphs_bundle: Bundle) -> None:
    done = run(graphs_bundle, given="\n".join(TEXTS))
    assert done.returncode == 0, done.stderr
    got = records(done.stdout)
    assert [record["text"] for record in got] == TEXTS
    assert [record["id"] for record in got] == [str(i + 1) for i in range(len(TEXTS))]
    assert {record["where"] for record in got} == {"device"}
    assert "40 answered" in done.stderr
    assert len({record["exit_depth"] for record in got}) > 1


def test_json_lines_keep_ids_and_are_scored(graphs_bundle: Bundle, tmp_path: Path) -> None:
    plain = records(run(graphs_bundle, given="\n".join(TEXTS)).stdout)
    lines = [
        {"id": i, "text": record["text"], "label": record["label"] if i % 2 else "nothing"}
        for i, record in enumerate(plain)
    ]
    source, output, summary = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "sum.json"))
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", str(source), "--output", str(output), "--json", str(summary)]
    done = run(graphs_bundle, *files, "--unordered")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    got = records(output.read_text())
    assert sorted(record["id"] for record in got) == list(range(len(lines)))
    assert all(record["expected"] == lines[record["id"]]["label"] for record in got)
    about = json.loads(summary.read_text())
    assert (about["n"], about["labelled"], about["accuracy"]) == (40, 40, 0.5)


def test_a_run_from_the_command_line_reports_and_keeps_what_it_learnt(
    online_bundle: Bundle, tmp_path: Path
) -> None:
    config, summary, kept = (tmp_path / n for n in ("edge.toml", "sum.json", "counters.json"))
    config.write_text(f'bandit_alpha = 0.5\nbandit_cost = 2.0\nbandit_file = "{kept}"\n')
    options = ["--config", str(config), "--json", str(summary)]
    for round in (1, 2):
        done = run(online_bundle, *options, given="\n".join(TEXTS))
        assert done.returncode == 0, done.stderr
        about = json.loads(summary.read_text())["bandit"]
        assert [row["depth"] for row in about] == [1, 2, 3, 4]
        assert [row["cost"] for row in about] == pytest.approx([0.5, 1.0, 1.5, 2.0])
        assert about[0]["observed"] == sum(row["played"] for row in about) == round * len(TEXTS)
        assert [row["observed"] for row in about] == json.loads(kept.read_text())["observed"]
    answers = records(done.stdout)
    assert all(len(answer["exit_classes"]) == answer["exit_depth"] for answer in answers)
    assert f"exit chosen 1: {about[0]['played']} (differs 0.0%)" in done.stderr


def test_bad_lines_are_named_and_the_exit_code_tells(graphs_bundle: Bundle) -> None:
    given = '{"text": "w1"}\nnot json\n{"text": ["w1", "w2"]}\n{"id": "last", "text": "w2"}\n'
    done = run(graphs_bundle, given=given)
    assert done.returncode == 1
    first, bad, pair, last = records(done.stdout)
    assert (first["id"], last["id"]) == ("1", "last")
    assert (bad["line"], pair["line"]) == (2, 3)
    assert "not JSON" in bad["error"]
    assert "one sentence" in pair["error"]
    assert "2 bad lines" in done.stderr


def test_answers_come_while_input_is_still_being_written(graphs_bundle: Bundle) -> None:
    with started(graphs_bundle) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for text in TEXTS[:3]:
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["text"] == text
        process.stdin.close()
        assert process.wait(WAIT_S) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_answered(
    graphs_bundle: Bundle, tmp_path: Path, number: signal.Signals
) -> None:
    output, summary = tmp_path / "out.jsonl", tmp_path / "sum.json"
    with started(graphs_bundle, "--output", str(output), "--json", str(summary)) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("\n".join(TEXTS[:5]) + "\n")
        process.stdin.flush()
        wait_until(lambda: output.exists() and len(output.read_text().splitlines()) == 5)
        process.send_signal(number)
        assert process.wait(WAIT_S) == 130
        said = process.stderr.read()
    assert [record["text"] for record in records(output.read_text())] == TEXTS[:5]
    assert json.loads(summary.read_text())["n"] == 5
    assert "5 answered" in said
    assert "Traceback" not in said


def test_a_reader_that_goes_away_ends_it_quietly(graphs_bundle: Bundle) -> None:
    with started(graphs_bundle) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("w1\n")
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write("w2\n" * 50)
        process.stdin.close()
        assert process.wait(WAIT_S) == 0
        said = process.stderr.read()
    assert "Traceback" not in said
    assert "Exception" not in said


def test_a_cloud_that_is_not_there_is_no_reason_to_stop(graphs_bundle: Bundle) -> None:
    done = run(
        graphs_bundle,
        *("--cloud", "127.0.0.1:1", "--plan", "fixed", "--no-exits", "--logits"),
        given="\n".join(TEXTS),
    )
    assert done.returncode == 0, done.stderr
    for record in records(done.stdout):
        assert (record["where"], record["reason"]) == ("fallback", "unavailable")
        assert (record["exit_depth"], len(record["logits"])) == (4, 5)
    assert "unavailable 40" in done.stderr


async def test_provisional_lines_come_before_the_final_ones(graphs_bundle: Bundle) -> None:
    lines = "\n".join(json.dumps({"id": f"mine {i}", "text": text}) for i, text in enumerate(TEXTS))
    how = ("--plan", "fixed", "--no-exits", "--provisional", "--deadline-ms", "20000")
    async with cloud_of(graphs_bundle) as cloud:
        where = ("--cloud", cloud.address)
        done = await asyncio.to_thread(lambda: run(graphs_bundle, *where, *how, given=lines))
    assert done.returncode == 0, done.stderr
    got = records(done.stdout)
    first = [record for record in got if record.get("provisional")]
    final = [record for record in got if not record.get("provisional")]
    assert {record["id"] for record in first} == {f"mine {i}" for i in range(40)}
    assert sorted(record["id"] for record in final) == sorted(record["id"] for record in first)
    assert {(record["exit_depth"], record["complete"]) for record in first} == {(2, False)}
    assert {record["complete"] for record in final} == {True}
    places = {(record["id"], record["complete"]): i for i, record in enumerate(got)}
    assert all(places[record["id"], False] < places[record["id"], True] for record in first)
    assert "40 answered" in done.stderr, "provisional ones do not count"


def test_it_explains_what_it_decided_on(graphs_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "sum.json"
    where = ("--cloud", "127.0.0.1:1", "--min-split", "1", "--json", str(file))
    done = run(graphs_bundle, *where, "--explain", given="\n".join(TEXTS))
    assert done.returncode == 0, done.stderr
    assert "not to be sent" in done.stderr
    depths = json.loads(file.read_text())["explained"]["depths"]
    assert [bool(row["options"]) for row in depths] == [False, True, True, True]
    alone = run(graphs_bundle, "--explain", given=TEXTS[0])
    assert "every sample the same way" in alone.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cloud", "192.0.2.1:443"], "--ca FILE"),
        (["--cloud", "nonsense"], "HOST:PORT"),
        (["--cloud", "127.0.0.1:1", "--ca", "none.pem"], "none.pem"),
        (["--cloud", "127.0.0.1:1", "--ca", "x", "--insecure"], "exclude"),
        (["--ca", "x"], "without a cloud"),
        (["--split", "9"], "split 9"),
        (["--codec", "zip"], "codec 'zip'"),
        (["--precision", "int3"], "int3"),
        (["--deadline-ms", "0"], "deadline_ms"),
        (["--input", "none.jsonl"], "none.jsonl"),
        (["--output", "none/x"], "none/x"),
        (["--config", "none.toml"], "none.toml"),
        (["--json", "-"], "would mix"),
    ],
)
def test_a_set_up_that_cannot_work_is_refused_in_one_line(
    graphs_bundle: Bundle, arguments: list[str], message: str
) -> None:
    done = run(graphs_bundle, *arguments, given="w1\n")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_config_file_sets_what_options_do_not(graphs_bundle: Bundle, tmp_path: Path) -> None:
    config = tmp_path / "edge.toml"
    config.write_text("exits = false\nlogits = true\n")
    done = run(graphs_bundle, "--config", str(config), given="w1\n")
    (record,) = records(done.stdout)
    assert record["exit_depth"] == 4
    assert "logits" in record


def test_the_service_runs_until_it_is_told_to_end(graphs_bundle: Bundle) -> None:
    with started(graphs_bundle, "--listen", "127.0.0.1:0", action="serve") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = json.loads(process.stdout.readline())
        base = f"http://{ready['listening']}/v2/models/{ready['model']}"
        body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["w1"]}]}
        request = urllib.request.Request(f"{base}/infer", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            assert json.loads(response.read())["model_name"] == "toy"
        process.terminate()
        assert process.wait(WAIT_S) == 0
        assert "warn" not in process.stderr.read().lower()


def test_a_service_that_others_can_reach_warns(graphs_bundle: Bundle) -> None:
    with started(graphs_bundle, "--listen", "0.0.0.0:0", action="serve") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
        assert "without TLS or a password" in process.stderr.read()


def test_the_device_loads_none_of_the_clouds_libraries(
    graphs_bundle: Bundle, tmp_path: Path
) -> None:
    """Running, not only importing: what a device needs is the base install."""
    source = tmp_path / "in.txt"
    source.write_text("\n".join(TEXTS))
    program = f"""
import sys
from offramp_common.cli import main
import offramp_edge, offramp_edge.service, offramp_edge.grpc_transport
for name in dir(offramp_edge): getattr(offramp_edge, name)
code = main(["edge", "run", "--bundle", {str(graphs_bundle.path)!r}, "--input", {str(source)!r},
             "--output", {str(tmp_path / "out")!r}, "--cloud", "127.0.0.1:1", "--no-exits"])
heavy = ("torch", "transformers", "ray", "onnx", "onnxscript", "cryptography", "offramp_model",
         "offramp_cloud", "offramp_train", "offramp_simulate")
loaded = [name for name in heavy if name in sys.modules]
print(code, loaded)
"""
    # Commands of other packages would load their modules: the device's alone are asked for.
    program = program.replace(
        "from offramp_common.cli import main",
        "import offramp_common.cli as cli, argparse\n"
        "from offramp_edge.cli import add_command\n"
        "def parser():\n"
        "    p = argparse.ArgumentParser(); add_command(p.add_subparsers(dest='command')); return p\n"
        "cli.build_parser = parser\n"
        "from offramp_common.cli import main",
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        env=dict(os.environ),
    )
    assert done.stdout.strip() == "0 []", done.stderr
