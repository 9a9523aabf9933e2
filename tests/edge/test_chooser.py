"""Exits chosen before samples run: the worker, its bandit and a real gateway over gRPC on loopback."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer
from edge_cloud import TorchAsNumpy, cloud_of
from numpy.typing import NDArray
from toy_models import toy_bundle, toy_layers

from offramp_common.bundle import Bundle
from offramp_common.errors import ConfigError, WireError
from offramp_common.exit_classes import classes_of
from offramp_common.runner import Look
from offramp_common.runner import run as run_layers
from offramp_common.spec import never_exit
from offramp_common.text import TextEncoder
from offramp_common.transport import Completion, Offload
from offramp_edge import Answer, EdgeWorker
from offramp_edge.bandit import ExitBandit, layer_costs, play
from offramp_edge.chooser import Chooser
from offramp_edge.handshake import check_completion

N = 4
TEXTS = [f"w{i % 96} w{i * 7 % 96} w{i * 11 % 13}" for i in range(120)]
SETTINGS: dict[str, Any] = {
    "bandit_alpha": 0.5,
    "bandit_cost": 2.0,
    "codec": "fp32",
    "hedge_after": math.inf,  # on a busy machine the device would answer before the cloud
}
"""With which all exits are played: the toy's disagree with the first by 43, 79 and 80 %."""


@pytest.fixture(scope="module")
def layers(online_bundle: Bundle) -> TorchAsNumpy:
    return TorchAsNumpy(toy_layers(online_bundle))


@pytest.fixture(scope="module")
def classes_NE(online_bundle: Bundle, layers: TorchAsNumpy) -> NDArray[np.int64]:
    """What every exit predicts of every text, each run alone to full depth."""
    encode, never = TextEncoder(online_bundle), never_exit(online_bundle.manifest.knobs, N)
    rows = []
    for text in TEXTS:
        row: list[int] = []

        def look(depth: int, rows: Any, look: Look[Any], row: list[int] = row) -> None:
            row.append(int(classes_of(look.answer)[0]))

        run_layers(layers, encode([text]), N, never, look)
        rows.append(row)
    return np.array(rows)


def simulated(classes_NE: NDArray[np.int64], split: int = N, **costs: float) -> Any:
    """(chosen_N, the bandit) of the offline simulation at SETTINGS."""
    cost_E = layer_costs((1, 2, 3, 4), N, split, SETTINGS["bandit_cost"], **costs)
    bandit = ExitBandit(cost_E, SETTINGS["bandit_alpha"])
    return play(bandit, classes_NE), bandit


def counters(chooser: Chooser | ExitBandit | None) -> list[list[int]]:
    assert chooser is not None
    bandit = chooser.bandit if isinstance(chooser, Chooser) else chooser
    return [bandit.observed_E.tolist(), bandit.disagreed_E.tolist()]


def recounted(answers: Sequence[Answer]) -> list[list[int]]:
    """The counters that these answers, in any order, come to."""
    observed, disagreed = [0] * N, [0] * N
    for answer in answers:
        for exit, seen in enumerate(answer.exit_classes):
            observed[exit] += 1
            disagreed[exit] += seen != answer.exit_classes[0]
    return [observed, disagreed]


def test_the_toys_choices_vary_so_that_equal_counters_mean_something(
    classes_NE: NDArray[np.int64],
) -> None:
    chosen_N, bandit = simulated(classes_NE)
    assert len(set(chosen_N.tolist())) == N
    assert (bandit.disagreed_E[1:] > 0).all()


async def test_a_run_on_the_device_alone_is_the_simulation(
    online_bundle: Bundle, layers: TorchAsNumpy, classes_NE: NDArray[np.int64]
) -> None:
    chosen_N, bandit = simulated(classes_NE)
    async with EdgeWorker(online_bundle, layers=layers, **SETTINGS) as worker:
        answers = [await worker.answer_async(text) for text in TEXTS]
        assert counters(worker.chooser) == counters(bandit)
    assert [answer.exit_depth - 1 for answer in answers] == chosen_N.tolist()
    for answer, classes_E in zip(answers, classes_NE.tolist(), strict=True):
        assert answer.exit_classes == tuple(classes_E[: answer.exit_depth])
        assert answer.where == "device"


@pytest.mark.parametrize("split", range(N + 1))
async def test_device_and_cloud_come_to_the_counters_of_a_local_run(
    split: int, online_bundle: Bundle, layers: TorchAsNumpy, classes_NE: NDArray[np.int64]
) -> None:
    chosen_N, bandit = simulated(classes_NE)
    async with (
        cloud_of(online_bundle) as cloud,
        EdgeWorker(online_bundle, cloud.address, layers=layers, split=split, **SETTINGS) as worker,
    ):
        answers = [await worker.answer_async(text) for text in TEXTS]
        assert counters(worker.chooser) == counters(bandit)
        sent = [served for served in cloud.served if served.request_id]
    assert [answer.exit_depth - 1 for answer in answers] == chosen_N.tolist()
    for answer, classes_E in zip(answers, classes_NE.tolist(), strict=True):
        assert answer.exit_classes == tuple(classes_E[: answer.exit_depth])
        # The choice is made before the sample runs: what leaves here is never uploaded.
        assert answer.where == ("device" if answer.exit_depth <= split else "cloud")
    assert len(sent) == (chosen_N + 1 > split).sum()


async def test_with_many_in_flight_nothing_is_lost_or_counted_twice(
    online_bundle: Bundle, layers: TorchAsNumpy
) -> None:
    async with (
        cloud_of(online_bundle) as cloud,
        EdgeWorker(
            online_bundle, cloud.address, layers=layers, split=1, max_in_flight=16, **SETTINGS
        ) as worker,
    ):
        answers = [a async for a in worker.answer_many_async(TEXTS * 3)]
        assert all(isinstance(answer, Answer) for answer in answers)
        got = [answer for answer in answers if isinstance(answer, Answer)]
        assert counters(worker.chooser) == recounted(got)
        assert counters(worker.chooser)[0][0] == len(TEXTS) * 3
    assert all(len(answer.exit_classes) == answer.exit_depth for answer in got)
    assert {answer.where for answer in got} == {"device", "cloud"}


@pytest.mark.parametrize(("fallback", "seen"), [("finish", N), ("exit", 2)])
async def test_a_fallback_teaches_of_the_exits_that_were_really_passed(
    fallback: str, seen: int, online_bundle: Bundle, layers: TorchAsNumpy
) -> None:
    async with EdgeWorker(
        online_bundle, "127.0.0.1:1", layers=layers, fallback=fallback, **SETTINGS
    ) as worker:
        answer = await worker.answer_async(TEXTS[0])
        assert (answer.where, answer.reason) == ("fallback", "unavailable")
        assert (answer.exit_depth, len(answer.exit_classes)) == (seen, seen)
        assert counters(worker.chooser) == recounted([answer])


async def test_dear_uploads_keep_samples_here_and_without_a_cloud_there_are_none(
    online_bundle: Bundle, layers: TorchAsNumpy, classes_NE: NDArray[np.int64]
) -> None:
    dear = {**SETTINGS, "bandit_cost": 0.0, "bandit_upload": 3.0}
    async with (
        cloud_of(online_bundle) as cloud,
        EdgeWorker(online_bundle, cloud.address, layers=layers, split=2, **dear) as worker,
    ):
        answers = [await worker.answer_async(text) for text in TEXTS]
    assert sum(answer.where == "cloud" for answer in answers) == 1, "the first, which shows all"
    async with EdgeWorker(online_bundle, layers=layers, split=2, **dear) as worker:
        answers = [await worker.answer_async(text) for text in TEXTS]
    assert {answer.exit_depth for answer in answers} >= {3, 4}


@pytest.mark.parametrize(
    "classes_BE", [None, [[0]], [[0, 1, 2]], [[0, 5]], [[0, 1], [0, 1]]], ids=str
)
def test_a_reply_that_does_not_say_what_the_exits_predicted_is_refused(
    classes_BE: list[list[int]] | None, online_bundle: Bundle
) -> None:
    work = Offload("r1", "toy", b"", b"")
    done = Completion("r1", np.zeros((1, 5), np.float32), np.array([4]), np.ones(1, np.float32))
    good = replace(done, exit_classes_BE=np.array([[4, -1]], np.int32))
    check_completion(work, good, 2, online_bundle.manifest)
    bad = None if classes_BE is None else np.array(classes_BE, np.int32)
    with pytest.raises(WireError, match="which of 5 classes each of 2 exits predicted"):
        check_completion(work, replace(done, exit_classes_BE=bad), 2, online_bundle.manifest)


# The settings choose instead


@pytest.mark.parametrize(
    ("settings", "depth"), [({"exits": False}, N), ({"knobs": {"stop": 2}}, 2)]
)
async def test_settings_that_fix_the_exit_leave_no_choice(
    settings: dict[str, Any], depth: int, online_bundle: Bundle, layers: TorchAsNumpy
) -> None:
    async with EdgeWorker(online_bundle, layers=layers, **settings) as worker:
        answer = await worker.answer_async(TEXTS[0])
        assert worker.chooser is None
    assert (answer.exit_depth, answer.exit_classes) == (depth, ())
    assert "exit_classes" not in answer.to_json()


async def test_other_methods_choose_nothing_and_report_nothing(bundle: Bundle) -> None:
    layers = TorchAsNumpy(toy_layers(bundle))
    async with (
        cloud_of(bundle) as cloud,
        EdgeWorker(bundle, cloud.address, layers=layers) as worker,
    ):
        answer = await worker.answer_async(TEXTS[0])
        assert worker.chooser is None
    assert answer.exit_classes == ()
    with pytest.raises(ConfigError, match="pabee chooses no exits beforehand"):
        EdgeWorker(bundle, layers=layers, bandit_file="counters.json")


@pytest.mark.parametrize("wrong", [{"bandit_alpha": -1.0}, {"bandit_cost": float("nan")}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="must be finite, not negative"):
        EdgeWorker(bundle, **wrong)


# Counters in a file


def test_a_device_that_starts_again_goes_on_where_it_was(
    online_bundle: Bundle, layers: TorchAsNumpy, classes_NE: NDArray[np.int64], tmp_path: Path
) -> None:
    file = tmp_path / "counters.json"
    answers: list[Answer] = []
    for texts in (TEXTS[:45], TEXTS[45:50], TEXTS[50:]):
        with EdgeWorker(online_bundle, layers=layers, bandit_file=str(file), **SETTINGS) as worker:
            answers += [worker.answer(text) for text in texts]
    chosen_N, bandit = simulated(classes_NE)
    assert [answer.exit_depth - 1 for answer in answers] == chosen_N.tolist()
    kept = json.loads(file.read_text())
    assert [kept["observed"], kept["disagreed"]] == counters(bandit)
    assert [path.name for path in tmp_path.iterdir()] == ["counters.json"]


def test_a_crash_costs_at_most_a_hundred_answers(
    online_bundle: Bundle, layers: TorchAsNumpy, tmp_path: Path
) -> None:
    file = tmp_path / "counters.json"
    with EdgeWorker(online_bundle, layers=layers, bandit_file=str(file), **SETTINGS) as worker:
        for text in TEXTS[:101]:
            worker.answer(text)
        assert json.loads(file.read_text())["observed"][0] == 100


def test_counters_of_another_model_are_started_afresh(
    online_bundle: Bundle, layers: TorchAsNumpy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "counters.json"
    other = toy_bundle(tmp_path / "other", "uee_ucb", n_layers=N, seed=1)
    with EdgeWorker(other, layers=TorchAsNumpy(toy_layers(other)), bandit_file=str(file)) as worker:
        worker.answer(TEXTS[0])
    with EdgeWorker(online_bundle, layers=layers, bandit_file=str(file)) as worker:
        assert counters(worker.chooser) == [[0] * N, [0] * N]
    assert "counters of another model" in caplog.text
    assert json.loads(file.read_text())["model"] == online_bundle.digest(0).hex()


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '{"observed": [1]}',
        "not json",
        '{"model": "MODEL", "observed": [3, 4, 1, 1], "disagreed": [0, 0, 0, 0]}',
        '{"model": "MODEL", "observed": [3, 2, 1, 1], "disagreed": [0, 0, 0, 2]}',
        '{"model": "MODEL", "observed": [3, 2, 1, 1], "disagreed": [1, 0, 0, 0]}',
        '{"model": "MODEL", "observed": [3, 2, 1, -1], "disagreed": [0, 0, 0, 0]}',
        '{"model": "MODEL", "observed": [3, 2, 1], "disagreed": [0, 0, 0]}',
        '{"model": "MODEL", "observed": [[3], 2, 1, 1], "disagreed": [0, 0, 0, 0]}',
        '{"model": "MODEL", "observed": [1e99, 2, 1, 1], "disagreed": [0, 0, 0, 0]}',
    ],
)
def test_a_file_that_holds_no_counters_is_refused_and_left_alone(
    text: str, online_bundle: Bundle, layers: TorchAsNumpy, tmp_path: Path
) -> None:
    file = tmp_path / "counters.json"
    file.write_text(text.replace("MODEL", online_bundle.digest(0).hex()))
    before = file.read_text()
    with pytest.raises(ConfigError, match=r"no bandit's counters .* remove this one"):
        EdgeWorker(online_bundle, layers=layers, bandit_file=str(file))
    assert file.read_text() == before


def test_an_empty_file_is_a_start_and_a_place_that_cannot_be_written_is_refused(
    online_bundle: Bundle, layers: TorchAsNumpy, tmp_path: Path
) -> None:
    file = tmp_path / "counters.json"
    file.touch()
    with EdgeWorker(online_bundle, layers=layers, bandit_file=str(file)) as worker:
        worker.answer(TEXTS[0])
    assert json.loads(file.read_text())["observed"] == [1] * N
    with pytest.raises(ConfigError, match="cannot be written"):
        EdgeWorker(online_bundle, layers=layers, bandit_file=str(tmp_path / "none" / "c.json"))


def test_counters_that_can_no_longer_be_written_cost_no_answer(
    online_bundle: Bundle, layers: TorchAsNumpy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    file = folder / "counters.json"
    with EdgeWorker(online_bundle, layers=layers, bandit_file=str(file)) as worker:
        file.unlink()
        folder.rmdir()
        assert all(worker.answer(text).label for text in TEXTS[:101])
    with caplog.at_level(logging.WARNING):
        assert "cannot be written" in caplog.text


# What it says of itself


async def test_metrics_tell_what_was_learnt(
    online_bundle: Bundle, layers: TorchAsNumpy, bundle: Bundle
) -> None:
    from offramp_edge.service import Service

    async def shown(worker: EdgeWorker) -> str:
        async with TestClient(TestServer(Service(worker).app())) as client:
            await asyncio.gather(*map(worker.answer_async, TEXTS[:20]))
            async with client.get("/metrics") as response:
                return await response.text()

    async with EdgeWorker(online_bundle, layers=layers, **SETTINGS) as worker:
        text = await shown(worker)
        observed, disagreed = counters(worker.chooser)
    for exit in range(N):
        assert f'offramp_edge_bandit_observed{{exit="{exit + 1}"}} {observed[exit]}.0' in text
        assert f'offramp_edge_bandit_disagreed{{exit="{exit + 1}"}} {disagreed[exit]}.0' in text
    async with EdgeWorker(bundle, layers=TorchAsNumpy(toy_layers(bundle))) as worker:
        assert "bandit" not in await shown(worker)
