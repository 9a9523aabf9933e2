"""The spool: nothing lost, nothing answered twice, whenever it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cloud_world import serving, wait_until
from edge_world import LAYERS, N, World, in_world, local, texts
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from offramp_common.bundle import Bundle
from offramp_common.errors import ConfigError
from offramp_edge import EdgeWorker
from offramp_edge.answers import Answer, Sample
from offramp_edge.spool import Kept, Spool

MIB = 2**20


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_samples_come_back_in_order_and_their_answers_are_written_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MIB)
    given = [Sample("one", "1", ref={"mine": 1}), Sample(("a", "b"), "2", traceparent="t")]
    for sample in given:
        spool.keep(sample)
    spool.close()
    spool = Spool(tmp_path, MIB)
    assert spool.waiting == 2
    for sample in given:
        kept = spool.oldest()
        assert kept is not None
        assert kept.sample == sample
        assert spool.answered(kept, {"id": "x", "label": "yes"})
        assert not spool.answered(kept, {"id": "x", "label": "no"})
    assert (spool.oldest(), spool.waiting, spool.nbytes, spool.final) == (None, 0, 0, 2)
    spool.close()
    assert [(line["id"], line["label"]) for line in lines(tmp_path)] == [
        ({"mine": 1}, "yes"),
        ("2", "yes"),
    ]


def test_beyond_its_size_the_oldest_are_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    for number in range(100):
        spool.keep(Sample("x" * 50, str(number)))
    assert spool.nbytes <= 1000
    oldest = spool.oldest()
    assert oldest is not None
    assert oldest.sample.id == str(100 - spool.waiting)
    assert spool.dropped == 100 - spool.waiting
    spool.keep(Sample("x" * 2000, "too large for it alone"))
    assert (spool.waiting, spool.nbytes) == (0, 0)
    # One that was dropped while its answer was under way is not written.
    assert not spool.answered(oldest, {})
    spool.close()


def test_the_files_stay_bounded(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 100_000)
    for number in range(600):
        spool.keep(Sample("x" * 500, str(number)))
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    spool.close()
    assert size < 8 * MIB  # SQLite's write-ahead log is folded in every 4 MiB


def test_a_folder_is_used_by_one_process_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MIB)
    with pytest.raises(ConfigError, match="its own folder"):
        Spool(tmp_path, MIB)
    spool.close()
    Spool(tmp_path, MIB).close()


def test_a_file_that_is_no_spool_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spool.sqlite").write_bytes(b"something else" * 100)
    with pytest.raises(ConfigError, match="spool"):
        Spool(tmp_path, MIB)


def test_answers_that_were_taken_away_are_not_missed(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MIB)
    spool.keep(Sample("a", "1"))
    spool.answered(Kept(1, Sample("a", "1")), {})
    spool.close()
    (tmp_path / "answers.jsonl").rename(tmp_path / "collected.jsonl")
    spool = Spool(tmp_path, MIB)
    spool.keep(Sample("b", "2"))
    kept = spool.oldest()
    assert kept is not None
    spool.answered(kept, {})
    spool.close()
    assert [line["id"] for line in lines(tmp_path)] == ["2"]


class Died(BaseException):
    """The process ends here."""


class Dying(Spool):
    """Dies at the `at`-th step of a delivery; what SQLite has not committed is gone, as in a crash."""

    at = 0

    def _deliver(self) -> None:
        if self.at == 1:
            raise Died
        if self.at == 2:  # half a line is in the file
            os.pwrite(self._file, b'{"half', self._count("written"))
            raise Died
        if self.at == 3:  # the line is in the file, the database does not know
            (text,) = self._db.execute("SELECT line FROM outbox").fetchone()
            os.pwrite(self._file, text.encode(), self._count("written"))
            raise Died
        super()._deliver()


@given(steps=st.lists(st.tuples(st.sampled_from("kar"), st.integers(0, 3)), max_size=15))
@hypothesis_settings(max_examples=20, deadline=None)
def test_whenever_it_dies_every_sample_is_answered_once(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool, kept_ids = Dying(folder, MIB), []
    for number, (step, at) in enumerate(steps):
        if step == "k":
            spool.keep(Sample("text", str(number)))
            kept_ids.append(str(number))
        elif step == "r" or (oldest := spool.oldest()) is None:
            spool.close()
            spool = Dying(folder, MIB)
        else:
            spool.at = at
            try:
                spool.answered(oldest, {"label": number})
            except Died:
                spool.close()
                spool = Dying(folder, MIB)
    spool.at = 0
    while (kept := spool.oldest()) is not None:
        assert spool.answered(kept, {"label": "last"})
    assert (spool.waiting, spool.nbytes, spool.final) == (0, 0, len(kept_ids))
    spool.close()
    assert [line["id"] for line in lines(folder)] == kept_ids


# With an agent around it

HARD = next(text for text in texts(50) if local(text, LAYERS.knobs())[0] == N)


def test_what_was_answered_short_is_answered_again_when_the_cloud_is_back(tmp_path: Path) -> None:
    final: list[Answer] = []

    async def scenario(world: World) -> None:
        world.cloud.mode = "gone"
        given = texts(20)
        answers = [await world.answer(text, id=str(i)) for i, text in enumerate(given)]
        short = [answer for answer in answers if not answer.complete]
        assert short
        assert all(answer.spooled for answer in short)
        assert not any(answer.spooled for answer in answers if answer.complete)
        world.cloud.mode = "up"
        assert await world.resender.emptied(60)
        assert [answer.id for answer in final] == [answer.id for answer in short]
        for answer in final:
            assert isinstance(answer.text, str)
            depth, _ = local(answer.text, LAYERS.knobs())
            assert (answer.exit_depth, answer.complete) == (depth, True)
        assert [line["id"] for line in lines(tmp_path)] == [answer.id for answer in short]

    in_world(scenario, fallback="exit", spool=tmp_path, on_final=final.append)


def test_a_full_disk_costs_the_final_answer_not_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(world: World) -> None:
        world.cloud.mode = "gone"
        (page_count,) = world.resender.spool._db.execute("PRAGMA page_count").fetchone()
        world.resender.spool._db.execute(f"PRAGMA max_page_count = {page_count + 1}")
        answers = [await world.answer(HARD + " 5" * 800) for _ in range(20)]
        assert {a.where for a in answers} == {"fallback"}
        assert not answers[-1].spooled
        assert world.resender.lost > 0

    in_world(scenario, exits=False, fallback="exit", spool=tmp_path)
    assert "the spool takes no samples" in caplog.text


def test_a_spool_needs_a_cloud(bundle: Bundle, layers: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        EdgeWorker(bundle, layers=layers, spool=str(tmp_path))


@pytest.mark.slow
def test_killed_again_and_again_nothing_is_lost_and_nothing_answered_twice(
    graphs_bundle: Bundle, tmp_path: Path
) -> None:
    folder, output = tmp_path / "spool", tmp_path / "out.jsonl"
    (tmp_path / "edge.toml").write_text('exits = false\nfallback = "exit"\nplan = "fixed"\n')
    source = [
        json.dumps({"id": f"mine {i}", "text": f"w{i % 96} w{i * 7 % 96}"}) for i in range(40)
    ]
    command = [
        sys.executable,
        "-m",
        "offramp_common",
        "edge",
        "run",
        "--bundle",
        str(graphs_bundle.path),
    ]
    command += ["--config", str(tmp_path / "edge.toml"), "--spool", str(folder), "--output"]

    def run(cloud: str, name: Path, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, str(name), "--cloud", cloud, *more],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def whole_lines(path: Path) -> list[dict[str, Any]]:
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    # No cloud: all are answered short and kept; killed in the middle, with input left.
    process = run("127.0.0.1:1", output)
    assert process.stdin is not None
    process.stdin.write("\n".join(source).encode() + b"\n")
    process.stdin.flush()
    wait_until(lambda: len(whole_lines(output)) >= 25, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    told = [line["id"] for line in whole_lines(output) if line.get("spooled")]
    assert len(told) >= 25
    answers = folder / "answers.jsonl"
    # A cloud: the device is killed while it empties the spool, three times, then left alone.
    with serving(["--bundle", str(graphs_bundle.path), "--local", "--insecure"]) as cloud:
        for kill_after in (1, 6, 14, None):
            process = run(cloud.address, tmp_path / "rest.jsonl", "--spool-wait", "60")
            assert process.stdin is not None
            process.stdin.close()
            if kill_after is None:
                assert process.wait(90) == 0
            else:
                wait_until(lambda n=kill_after: len(whole_lines(answers)) >= n, 60)
                process.send_signal(signal.SIGKILL)
                process.wait()
    ids = [line["id"] for line in whole_lines(answers)]
    assert len(set(ids)) == len(ids), "answered twice"
    assert set(told) <= set(ids), "lost"
    assert all(line["complete"] for line in whole_lines(answers))
