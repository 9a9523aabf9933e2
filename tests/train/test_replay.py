"""Replays equal real runs, and calibration keeps what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import make_checkpoint, sentences
from toy_models import eager

from offramp_common.activations import Activations, unpack
from offramp_common.errors import ConfigError
from offramp_common.runner import Knobs, run
from offramp_common.spec import TaskSpec, never_exit
from offramp_model.backbones import backbone_from_pretrained
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel, TorchLayers, to_torch
from offramp_train.calibrate import Goal, calibrate, grid, sweep
from offramp_train.metrics import METRICS, metric_of
from offramp_train.replay import Recording, Scorer, record, replay

N_LAYERS, N_ROWS = 4, 40
CLASSES = TaskSpec("classification", ("a", "b", "c"))
NUMBER = TaskSpec("regression")
CASES = [
    ("deebert", CLASSES),
    ("pabee", CLASSES),
    ("pabee", NUMBER),
    ("dact_bert", CLASSES),
    ("palbert", CLASSES),  # its branches read carried state
]


class Case:
    """A random model, rows, and their recording."""

    def __init__(self, checkpoint: Path, method: str, task: TaskSpec) -> None:
        torch.manual_seed(11)
        backbone = backbone_from_pretrained(str(checkpoint))
        exits = (1, 2, 4) if method == "deebert" else (1, 2, 3, 4)
        spec = HeadSpec(task, backbone.width, N_LAYERS, exits, METHODS[method].settings)
        self.model = MultiExitModel(backbone, METHODS[method], spec)
        with torch.no_grad():
            for name, weight in self.model.exits.named_parameters():
                if name.endswith("classifier.weight"):  # spread answers out, so that exits differ
                    weight.mul_(4.0)
        rng = np.random.default_rng(5)
        self.lengths = rng.integers(3, 12, N_ROWS)
        self.ids = [rng.integers(5, 25, (n, 1)) for n in self.lengths]
        self.layers = TorchLayers(self.model)
        self.recording = record(
            self.layers, self.start, self.lengths.tolist(), self.model.knobs, batch=7
        )

    def start(self, rows: Any) -> Activations[Any]:
        lengths = self.lengths[list(rows)]
        ids = np.concatenate([self.ids[i] for i in rows])
        return to_torch(Activations(unpack(ids, lengths), lengths, depth=0))

    def really(self, knobs: Knobs) -> tuple[np.ndarray, np.ndarray]:
        done = run(self.layers, self.start(range(N_ROWS)), N_LAYERS, knobs)
        depth_N = np.zeros(N_ROWS, dtype=np.int64)
        answer_NC = np.zeros((N_ROWS, self.model.spec.task.answer_width), dtype=np.float32)
        for left in done.left:
            depth_N[left.rows], answer_NC[left.rows] = left.depth, np.asarray(left.answer)
        return depth_N, answer_NC

    def scorer(self, recording: Recording | None = None, target: Any = None) -> Scorer:
        task = self.model.spec.task
        if target is None:
            rng = np.random.default_rng(3)
            target = (
                rng.integers(0, 3, N_ROWS)
                if task.labels
                else rng.normal(size=N_ROWS).astype(np.float32)
            )
        _, quality = metric_of(task)
        return Scorer(
            self.model.policy,
            recording or self.recording,
            self.model.knobs,
            task,
            quality,
            target,
            np.ones(len(target)),
        )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), layers=N_LAYERS)
    return [Case(checkpoint, method, task) for method, task in CASES]


def _knobs(case: Case, draws: list[float]) -> Knobs:
    """A random value of each knob for each depth, from numbers in [0, 1]."""
    out: dict[str, tuple[float, ...]] = {}
    for i, spec in enumerate(case.model.knobs):
        mine = draws[i * N_LAYERS : (i + 1) * N_LAYERS]
        if spec.integer:
            out[spec.name] = tuple(
                float(round(spec.low + d * (spec.high - spec.low))) for d in mine
            )
        else:
            out[spec.name] = tuple(min(spec.high, 2.0) * d for d in mine)
    return out


@pytest.mark.parametrize(
    "which", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{CASES[i][1].kind}"
)
@given(draws=st.lists(st.floats(0, 1), min_size=2 * N_LAYERS, max_size=2 * N_LAYERS))
@settings(max_examples=30, deadline=None)
def test_a_replay_equals_really_running_with_exits(
    cases: list[Case], which: int, draws: list[float]
) -> None:
    case = cases[which]
    knobs = _knobs(case, draws)
    depth_N, answer_NC = replay(case.model.policy, case.recording, knobs)
    real_depth_N, real_NC = case.really(knobs)
    # Rows run in batches of other sizes, so sums differ in the last bits; a row within that distance of a
    # threshold may leave elsewhere.
    same_N = depth_N == real_depth_N
    assert same_N.sum() >= N_ROWS - 1
    np.testing.assert_allclose(answer_NC[same_N], real_NC[same_N], atol=1e-5)


@pytest.mark.parametrize(
    "which", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{CASES[i][1].kind}"
)
@given(draws=st.lists(st.floats(0, 1), min_size=2 * N_LAYERS, max_size=2 * N_LAYERS))
@settings(max_examples=20, deadline=None)
def test_scores_from_memory_equal_scores_of_replays(
    cases: list[Case], which: int, draws: list[float]
) -> None:
    case = cases[which]
    scorer, knobs = case.scorer(), _knobs(case, draws)
    depth_N, answer_NC = replay(case.model.policy, case.recording, knobs)
    score = scorer.score(knobs)
    assert score.mean_depth == pytest.approx(depth_N.mean())
    prediction = answer_NC.argmax(1) if case.model.spec.task.labels else answer_NC[:, 0]
    _, quality = metric_of(case.model.spec.task)
    expected = quality(prediction.astype(np.float64), scorer.target_N, scorer.weight_N)
    assert score.quality == pytest.approx(expected)


@pytest.mark.parametrize(
    "which", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{CASES[i][1].kind}"
)
@pytest.mark.parametrize("max_drop", [0.0, 5.0, 100.0])
def test_calibration_respects_the_drop(cases: list[Case], which: int, max_drop: float) -> None:
    scorer = cases[which].scorer()
    point = calibrate(scorer, Goal(max_drop=max_drop))
    full = scorer.score(never_exit(scorer.specs, N_LAYERS))
    assert point.full == full
    assert scorer.score(point.knobs) == point.score
    assert point.drop <= max_drop + 1e-9
    assert point.score.mean_depth <= full.mean_depth
    if max_drop == 100.0:
        # With nothing at stake rows leave as soon as the method ever lets them.
        assert point.score.mean_depth == scorer.score(eager(cases[which].model)).mean_depth


@pytest.mark.parametrize(
    "which", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{CASES[i][1].kind}"
)
def test_calibration_keeps_within_a_mean_depth(cases: list[Case], which: int) -> None:
    scorer = cases[which].scorer()
    point = calibrate(scorer, Goal(mean_depth=3.6))
    assert point.score.mean_depth <= 3.6
    with pytest.raises(ConfigError, match="is the least"):
        calibrate(scorer, Goal(mean_depth=0.5))


def _hand_made(n: int = 400) -> tuple[Recording, np.ndarray]:
    """Exit 1 is sure and right on one half, sure and wrong on a tenth of it; exit 2 is never sure and often
    wrong; the last is right everywhere."""
    rng = np.random.default_rng(9)
    target = rng.integers(0, 3, n)

    def logits(chosen: np.ndarray, sure: np.ndarray) -> torch.Tensor:
        out = np.zeros((n, 3), np.float32)
        out[np.arange(n), chosen] = sure
        return torch.from_numpy(out)

    first = np.where(np.arange(n) % 20 == 0, (target + 1) % 3, target)
    sure = np.where(np.arange(n) < n // 2, 6.0, 0.5) + rng.uniform(0, 0.1, n)
    second = rng.integers(0, 3, n)
    outputs = {
        1: {"logits": logits(first, sure)},
        2: {"logits": logits(second, np.full(n, 0.5))},
        4: {"logits": logits(target, np.full(n, 5.0))},
    }
    return Recording(outputs, np.full(n, 4), N_LAYERS), target


def test_thresholds_are_found_exit_by_exit(cases: list[Case]) -> None:
    recording, target = _hand_made()
    scorer = cases[0].scorer(recording, target)
    point = calibrate(scorer, Goal(max_drop=3.0))
    # Half the rows leave at exit 1 with 5 % of them wrong; nobody can leave at exit 2 for that price.
    assert point.drop <= 3.0
    assert point.score.mean_depth <= 2.5 + 1e-9
    strict = calibrate(scorer, Goal(max_drop=3.0, margin=2.9))
    assert strict.drop <= 0.1 + 1e-9
    assert strict.score.mean_depth >= point.score.mean_depth


def test_one_threshold_for_all_exits_when_that_is_asked_for(cases: list[Case]) -> None:
    recording, target = _hand_made()
    scorer = cases[0].scorer(recording, target)
    point = calibrate(scorer, Goal(max_drop=3.0, per_exit=False))
    assert len(set(point.knobs["threshold"])) == 1
    assert point.drop <= 3.0


def test_weights_change_what_is_lost(cases: list[Case]) -> None:
    recording, target = _hand_made()
    scorer = cases[0].scorer(recording, target)
    scorer.weight_N = np.where(np.arange(len(target)) % 20 == 0, 10.0, 1.0)
    point = calibrate(scorer, Goal(max_drop=3.0))
    assert point.score.mean_depth > 2.5


def test_the_curve_runs_from_shallow_to_full_depth(cases: list[Case]) -> None:
    for case in cases:
        points = sweep(case.scorer())
        depths = [score.mean_depth for _, score in points]
        assert depths == sorted(depths)
        assert len(points) <= 12
    assert sweep(cases[0].scorer())[-1][1].mean_depth == N_LAYERS


def test_whole_number_knobs_are_enumerated(cases: list[Case]) -> None:
    scorer = cases[2].scorer()
    patience, tolerance = scorer.specs
    assert grid(scorer, patience) == (1.0, 2.0, 3.0, 4.0)
    # The tolerance's own range is unbounded; what is tried is what occurs.
    assert 0.0 < max(grid(scorer, tolerance)) < 100.0


def test_metrics_equal_their_definitions() -> None:
    one = np.ones(5)
    pearson, spearman = METRICS["regression"]["pearson"], METRICS["regression"]["spearman"]
    x, y = np.array([1.0, 2.0, 2.0, 4.0, 9.0]), np.array([1.0, 3.0, 2.0, 5.0, 4.0])
    assert pearson(x, y, one) == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks_x, ranks_y = np.array([1, 2.5, 2.5, 4, 5]), np.array([1, 3, 2, 5, 4])
    assert spearman(x, y, one) == pytest.approx(np.corrcoef(ranks_x, ranks_y)[0, 1])
    assert pearson(x, np.full(5, 2.0), one) == 0.0
    twice = np.array([2.0, 1, 1, 1, 1])
    assert pearson(x, y, twice) == pytest.approx(np.corrcoef(np.r_[x, x[0]], np.r_[y, y[0]])[0, 1])
    accuracy = METRICS["classification"]["accuracy"]
    assert accuracy(np.array([0, 1]), np.array([0, 0]), np.array([3.0, 1.0])) == 0.75


def test_the_toy_sentences_have_every_topic() -> None:
    assert {label for _, label in sentences(30, 1)} == {"animal", "food", "tool"}
