"""The three commands as a user runs them: separate processes, a tiny model, real graphs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import make_checkpoint, write_similarity, write_topics

from offramp_common.bundle import Bundle

_COMMAND = [sys.executable, "-c", "from offramp_common.cli import console_main; console_main()"]
_TIMEOUT_S = 240.0


def _offramp(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*_COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    make_checkpoint(folder / "checkpoint")
    write_topics(folder / "topics")
    write_similarity(folder / "similarity")
    return folder


@pytest.fixture(scope="module")
def topics(folder: Path) -> Path:
    """A bundle of the toy topics, made by the command, all settings from a file but the paths."""
    (folder / "topics.toml").write_text(
        'method = "deebert"\nrecipe = "self-distilled-joint"\nmax_tokens = 16\n'
        "[training]\nepochs = 12\nlr = 3e-3\nhead_lr = 1e-2\nbatch = 16\nquantise_epochs = 1\n"
        '[calibration]\nmax_drop = 2.0\nlabel_weights = { tool = 2.0 }\n[card]\ndataset = "toy topics"\n'
    )
    out = folder / "bundle"
    _offramp(
        *("train", "--backbone", folder / "checkpoint", "--data", folder / "topics"),
        *("--config", folder / "topics.toml", "--out", out, "--threads", 1),
    )
    return out


def test_train_makes_a_whole_bundle_and_leaves_nothing_else(topics: Path) -> None:
    bundle = Bundle.read(topics)
    bundle.verify()
    m = bundle.manifest
    assert m.name == "bundle"
    assert m.task.labels == ("animal", "food", "tool")
    assert set(m.operating_points) == {"fp32", "int8"}
    assert not topics.with_name("bundle.part").exists()
    points = {p["precision"]: p for p in m.curve if p["kind"] == "operating point"}
    assert points["fp32"]["accuracy"] > 0.8
    assert points["fp32"]["split"] == "test"
    assert points["fp32"]["mean_depth"] < 3.0
    card = (topics / "README.md").read_text()
    assert card.startswith("---\nlibrary_name:")
    assert "toy topics" in card
    assert f"{100 * points['int8']['accuracy']:.2f}" in card
    # Neither card nor manifest may name directories of the machine that made them.
    assert str(topics.parent) not in card + (topics / "bundle.json").read_text()
    assert "<svg" in (topics / "curve.svg").read_text()


def test_evaluate_runs_with_exits_on_every_runtime(topics: Path, folder: Path) -> None:
    results: dict[str, Any] = {}
    for precision in ("fp32", "int8", "torch"):
        plot = folder / f"{precision}.svg"
        done = _offramp(
            *("evaluate", topics, "--data", folder / "topics" / "test.tsv", "--oos-label", "tool"),
            *("--precision", precision, "--json", "-", "--plot", plot),
        )
        results[precision] = json.loads(done.stdout)
        assert "mean depth" in done.stderr
        assert "out of scope, recall" in done.stderr
        assert "<svg" in plot.read_text()
    fp32, torch = results["fp32"], results["torch"]
    assert fp32["rows"] == 60
    assert sum(row["leaving"] for row in fp32["exits"]) == pytest.approx(1.0)
    assert fp32["layers_run"] == round(60 * fp32["mean_depth"])
    # The same weights on two runtimes: only a row on the edge of a threshold may leave elsewhere.
    assert fp32["mean_depth"] == pytest.approx(torch["mean_depth"], abs=2 / 60)
    at = next(p for p in Bundle.read(topics).manifest.curve if p["kind"] == "operating point")
    assert fp32["mean_depth"] == pytest.approx(at["mean_depth"], abs=1e-4)
    assert fp32["quality"]["accuracy"]["with_exits"] == pytest.approx(at["accuracy"], abs=1e-4)
    assert fp32["out_of_scope"]["rows"] > 0


def test_evaluate_takes_the_first_rows_alone(topics: Path, folder: Path) -> None:
    data = folder / "topics" / "test.tsv"
    done = _offramp("evaluate", topics, "--data", data, "--limit", 7, "--json", "-")
    assert json.loads(done.stdout)["rows"] == 7


def test_calibrate_writes_a_new_operating_point(topics: Path, folder: Path) -> None:
    dev = folder / "topics" / "dev.tsv"
    done = _offramp("calibrate", topics, "--data", dev, "--mean-depth", 1.5, "--json", "-")
    found = json.loads(done.stdout)
    assert set(found) == {"fp32", "int8"}
    assert found["fp32"]["mean_depth"] <= 1.5
    bundle = Bundle.read(topics)
    bundle.verify()
    assert list(bundle.knobs("fp32")["threshold"]) == found["fp32"]["knobs"]["threshold"]
    # The card was the command's own, so it follows.
    assert f"{100 * found['fp32']['accuracy']:.2f}" in (topics / "README.md").read_text()
    (topics / "README.md").write_text("by hand\n")
    done = _offramp("calibrate", topics, "--data", dev, "--max-drop", 1, "--precision", "int8")
    assert "was edited" in done.stderr
    assert (topics / "README.md").read_text() == "by hand\n"
    assert Bundle.read(topics).knobs("fp32") == bundle.knobs("fp32")


def test_pairs_with_scores_are_a_regression_from_end_to_end(folder: Path) -> None:
    out = folder / "similar"
    done = _offramp(
        *("train", "--backbone", folder / "checkpoint", "--data", folder / "similarity"),
        *("--out", out, "--method", "pabee", "--epochs", 15, "--lr", 0.003),
    )
    assert "sentence pairs; regression" in done.stderr
    m = Bundle.read(out).manifest
    assert m.task.kind == "regression"
    assert m.task.pair
    assert m.cuts[0].width == 2  # segments travel
    data = folder / "similarity" / "dev.jsonl"
    done = _offramp("evaluate", out, "--data", data, "--json", "-")
    result = json.loads(done.stdout)
    assert set(result["quality"]) == {"pearson", "spearman"}
    assert result["quality"]["pearson"]["full_depth"] > 0.6  # a few epochs of a toy


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "nope"], "known: deebert"),
        (["--method", "pabee", "--recipe", "deebert"], "share weights"),
        (["--backbone", "pkg:no-such-weights"], "no installed package no_such_weights"),
        (["--backbone", "."], "cannot be loaded"),
        (["--task", "regression"], "is not a number"),
        (["--columns", "a,b,c,d"], "TEXT,LABEL"),
    ],
)
def test_train_refuses_what_makes_no_sense(words: list[str], says: str, folder: Path) -> None:
    given = {
        "--backbone": folder / "checkpoint",
        "--data": folder / "topics",
        "--out": folder / "no",
    }
    flags = [word for pair in given.items() if pair[0] not in words for word in pair]
    done = _offramp("train", *flags, *words, code=2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_epsilon_is_refused_where_the_method_offers_no_guarantee(
    folder: Path, topics: Path
) -> None:
    data = folder / "topics" / "dev.tsv"
    done = _offramp("calibrate", topics, "--data", data, "--epsilon", 0.1, code=2)
    assert "--epsilon: deebert offers no guarantee; methods that do: cats" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)  # whole trainings, each a process of its own
def test_a_kept_checkpoint_makes_the_bundle_again_without_training(folder: Path) -> None:
    words = [
        "train",
        "--backbone",
        folder / "checkpoint",
        "--data",
        folder / "topics",
        "--keep-work",
    ]
    words += ["--method", "pabee", "--epochs", 1, "--out", folder / "kept"]
    assert "epoch 1 of 1" in _offramp(*words).stderr
    first = Bundle.read(folder / "kept")
    assert "exists; give --overwrite" in _offramp(*words, code=2).stderr
    done = _offramp(*words, "--overwrite", "--name", "again")
    assert "epoch 1 of 1" not in done.stderr
    second = Bundle.read(folder / "kept")
    assert second.manifest.name == "again"
    assert second.digest(0) == first.digest(0)


@pytest.mark.slow
@pytest.mark.timeout(900)  # whole trainings, each a process of its own
def test_a_killed_command_continues_to_the_same_bundle(folder: Path) -> None:
    def words(out: Path) -> list[str]:
        flags = ["train", "--backbone", folder / "checkpoint", "--data", folder / "topics"]
        return [*map(str, flags), "--out", str(out), "--method", "pabee", "--epochs", "60"]

    whole, parts = folder / "whole", folder / "parts"
    _offramp(*words(whole))
    work = folder / "parts.part" / "checkpoint.pt"
    for signal_number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)):
        before = work.stat().st_mtime_ns if work.exists() else 0
        with subprocess.Popen([*_COMMAND, *words(parts)], stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + _TIMEOUT_S
            while not work.exists() or work.stat().st_mtime_ns == before:
                assert process.poll() is None, "ended before it was stopped: more epochs are needed"
                assert time.monotonic() < until
                time.sleep(0.01)
            os.kill(process.pid, signal_number)
            assert process.wait(_TIMEOUT_S) == code
    _offramp(*words(parts))
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert Bundle.read(whole).digest(0) == Bundle.read(parts).digest(0)
