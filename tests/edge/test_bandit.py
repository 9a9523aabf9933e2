"""UEE-UCB's bandit against its sheet, on predictions made up with known error rates, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from offramp_edge.bandit import ExitBandit, layer_costs, play, regret

ERRORS = np.array([0.40, 0.20, 0.15, 0.12])
COSTS = np.array([0.0, 0.1, 0.2, 0.3])
"""err + cost = 0.40, 0.30, 0.35, 0.42: the second exit is best, by 0.05."""
BEST = 1


def nested(
    error_E: NDArray[np.float64], n: int, seed: int, classes: int = 3
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(classes_NE, label_N) under strong dominance: where an exit is right, all deeper ones are."""
    rng = np.random.default_rng(seed)
    label_N = rng.integers(0, classes, n)
    other_N = (label_N + rng.integers(1, classes, n)) % classes
    wrong_NE = rng.random(n)[:, None] < error_E
    return np.where(wrong_NE, other_N[:, None], label_N[:, None]), label_N


# The sheet's "How to test"


@pytest.mark.parametrize("seed", range(3))
def test_under_strong_dominance_it_comes_to_play_the_best_exit(seed: int) -> None:
    chosen_N = play(ExitBandit(COSTS), nested(ERRORS, 16_000, seed)[0])
    # Others are tried in bursts, ever more rarely.
    early, late = (chosen_N[:2000] == BEST).mean(), (chosen_N[8000:] == BEST).mean()
    # Seen over 12 seeds: 0.56 to 0.76, then 0.88 to 0.98.
    assert early < late
    assert late > 0.85


def test_regret_grows_like_the_logarithm_of_time_and_not_like_time() -> None:
    rounds, runs = 16_000, []
    for seed in range(6):
        chosen_N = play(ExitBandit(COSTS), nested(ERRORS, rounds, seed)[0])
        runs.append(regret(chosen_N, ERRORS, COSTS))
    regret_N = np.mean(runs, axis=0)
    doubled = np.diff([regret_N[n - 1] for n in (500, 1000, 2000, 4000, 8000, 16_000)])
    # log t adds the same with each doubling; t would add 16 times as much with the last as with the first.
    assert doubled[-1] < 3 * doubled[0]
    gap_E = ERRORS + COSTS - (ERRORS + COSTS).min()
    assert regret_N[-1] < sum(np.log(rounds) / gap for gap in gap_E if gap > 0)
    assert regret_N[-1] < 0.2 * rounds * gap_E[gap_E > 0].min(), "less than any other fixed exit"


def test_where_no_exit_costs_anything_it_comes_to_play_the_deepest() -> None:
    chosen_N = play(ExitBandit(np.zeros(4)), nested(ERRORS, 3000, 0)[0])
    assert (chosen_N[100:] == 3).all()


def test_where_deeper_exits_cost_far_too_much_it_plays_the_first() -> None:
    chosen_N = play(ExitBandit([0.0, 10.0, 20.0, 30.0]), nested(ERRORS, 3000, 0)[0])
    assert chosen_N[0] == 3, "the first round must show every exit"
    assert (chosen_N[1:] == 0).all()


@pytest.mark.parametrize("delay", [0, 7])
def test_the_first_exit_is_seen_in_every_round_and_deeper_ones_never_more_often(delay: int) -> None:
    bandit = ExitBandit(COSTS)
    chosen_N = play(bandit, nested(ERRORS, 2000, 3)[0], delay)
    assert bandit.observed_E[0] == 2000
    assert (np.diff(bandit.observed_E) <= 0).all()
    assert bandit.observed_E.tolist() == [(chosen_N >= exit).sum() for exit in range(4)]


def test_the_same_shuffle_gives_the_same_sequence_of_exits() -> None:
    def sequence(seed: int) -> list[int]:
        classes_NE, _ = nested(ERRORS, 1000, 0)
        np.random.default_rng(seed).shuffle(classes_NE)
        return [int(exit) for exit in play(ExitBandit(COSTS), classes_NE)]

    assert sequence(1) == sequence(1)
    assert sequence(1) != sequence(2)


# The published numbers


def test_with_the_published_error_rates_it_plays_the_published_exit_as_often() -> None:
    """IMDb, exits after layers 1, 3, 7 and 12, cost of a layer 1/12: err + cost and the rounds of 50,000 at
    exit 2 are the official notebook's; predictions are drawn with its error rates."""
    error_E = np.array([0.388, 0.193, 0.171, 0.154])
    cost_E = layer_costs((1, 3, 7, 12), 12, split=12)
    # The notebook's, rounded to four places from errors we have to three.
    np.testing.assert_allclose(error_E + cost_E, [0.4710, 0.4430, 0.7542, 1.1539], atol=5e-4)
    for seed in range(3):
        classes_NE, label_N = nested(error_E, 50_000, seed, classes=2)
        # Drawn: 50,000 samples err by 0.002 (one standard deviation).
        measured_E = (classes_NE != label_N[:, None]).mean(axis=0)
        np.testing.assert_allclose(measured_E, error_E, atol=0.008)
        chosen_N = play(ExitBandit(cost_E), classes_NE)
        # "About 49,900" there, where dominance holds but nearly; 49,790 to 49,885 seen here.
        assert (chosen_N == 1).sum() > 49_700


def test_stale_counts_cost_little() -> None:
    """Eight samples are in the air at once by default."""
    classes_NE, _ = nested(ERRORS, 8000, 0)
    late, prompt = (play(ExitBandit(COSTS), classes_NE, delay) for delay in (8, 0))
    assert (late[:9] == 3).all(), "nothing is known until the first feedback"
    worse = regret(late, ERRORS, COSTS)[-1] - regret(prompt, ERRORS, COSTS)[-1]
    # Eight rounds at the deepest exit are 8 * 0.12; the rest is chance.
    assert worse < 40


# By hand, and its pitfalls


def test_scores_worked_out_by_hand() -> None:
    bandit = ExitBandit([0.1, 0.2, 0.5])
    bandit.observed_E[:] = 10, 8, 4
    bandit.disagreed_E[:] = 0, 2, 2
    assert bandit.disagreement_E.tolist() == [0.0, 0.25, 0.5]
    # sqrt(ln 11 / O) = 0.4897, 0.5475, 0.7743; scores 0.4897, 0.25 - 0.1 + 0.5475 = 0.6975,
    # 0.5 - 0.4 + 0.7743 = 0.8743.
    assert bandit.choose() == 2
    # A hundredth of alpha is a tenth of the bonus: 0.0490, 0.2048, 0.1774.
    bandit.alpha = 0.01
    assert bandit.choose() == 1
    # A third more cost between exits 1 and 2 alone: 0.0490, 0.0448.
    bandit.cost_E[:] = 0.1, 0.36, 0.9
    assert bandit.choose() == 0


def test_ties_go_to_the_shallower_exit() -> None:
    bandit = ExitBandit([0.0, 0.0, 0.0])
    bandit.learn([1, 1, 1])
    assert bandit.choose() == 0


def test_all_exits_up_to_the_chosen_one_are_learnt_from() -> None:
    bandit = ExitBandit(np.zeros(4))
    bandit.learn([2, 2, 1])
    bandit.learn([0, 1])
    bandit.learn([1, 0, 1, 0])
    assert bandit.observed_E.tolist() == [3, 3, 2, 1]
    # Against the first exit, not the one before.
    assert bandit.disagreed_E.tolist() == [0, 2, 1, 1]


def test_the_deepest_is_played_until_it_has_been_seen() -> None:
    bandit = ExitBandit(COSTS)
    for _ in range(5):
        assert bandit.choose() == 3
        bandit.learn([0, 0])  # such as when the cloud did not answer
    bandit.learn([0, 0, 0, 0])
    assert bandit.choose() != 3


def test_nothing_is_learnt_from_logits_that_were_not_numbers() -> None:
    bandit = ExitBandit(np.zeros(3))
    for classes in ([], [-1, 2, 2], [1, -1, 0]):
        bandit.learn(classes)
    assert bandit.observed_E.tolist() == [1, 0, 0]
    assert bandit.disagreed_E.tolist() == [0, 0, 0]


def test_exits_beyond_the_split_cost_the_upload_too() -> None:
    assert layer_costs((1, 3, 7, 12), 12, split=3, scale=0.6, upload=0.5).tolist() == pytest.approx(
        [0.05, 0.15, 0.35 + 0.5, 0.6 + 0.5]
    )


def test_dear_uploads_keep_samples_on_the_device() -> None:
    classes_NE, _ = nested(ERRORS, 4000, 0)
    chosen_N = play(ExitBandit(layer_costs((1, 2, 3, 4), 4, 2, 0.1, 0.0)), classes_NE)
    assert (chosen_N[-500:] >= 2).mean() > 0.5
    chosen_N = play(ExitBandit(layer_costs((1, 2, 3, 4), 4, 2, 0.1, 0.5)), classes_NE)
    assert (chosen_N[-500:] < 2).mean() > 0.95, "but for a look now and then"


def test_regret_is_what_was_lost_to_the_best_fixed_exit() -> None:
    chosen_N = np.array([3, 1, 0, 1])
    np.testing.assert_allclose(regret(chosen_N, ERRORS, COSTS), [0.12, 0.12, 0.22, 0.22])
