"""UEE-UCB's bandit: it learns from disagreement alone which exit is worth its cost (no labels, no torch).

Hari Narayan N U, Hanawal, Bhardwaj. Unsupervised Early Exit in DNNs with Multiple Exits. AIMLSystems 2022.
https://arxiv.org/abs/2209.09480 (offramp_model.methods.uee_ucb says what it is part of)

Where deeper exits are right whenever shallower ones are (strong dominance), an exit's error falls short of
the first one's by P(they disagree). Play exit argmax_j P_j + c_1 - c_j + sqrt(alpha ln(t + 1) / O_j).

Axes: N samples, E exits, shallowest first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offramp_common.exit_classes import NO_CLASS


class ExitBandit:
    """Counts, and the choice they lead to. Feedback may come late or never: only counts matter.

    observed_E    O_j, how often exit j's prediction was seen; the first one's is t, the rounds played
    disagreed_E   D_j, how often it was not the first exit's
    """

    def __init__(self, cost_E: Sequence[float] | NDArray[np.float64], alpha: float = 1.0) -> None:
        """`cost_E`: c_j, on the scale of error rates: 0.1 is worth ten points of accuracy."""
        self.cost_E = np.array(cost_E, np.float64)
        self.alpha = alpha
        self.observed_E = np.zeros(self.cost_E.size, np.int64)
        self.disagreed_E = np.zeros(self.cost_E.size, np.int64)

    @property
    def disagreement_E(self) -> NDArray[np.float64]:
        """P_j; 0 for an exit that was never seen."""
        return self.disagreed_E / np.maximum(self.observed_E, 1)

    def choose(self) -> int:
        """Index of the exit to play next: the shallowest of the best, the deepest until all are known."""
        if not self.observed_E[-1]:
            return self.cost_E.size - 1
        bonus_E = np.sqrt(self.alpha * np.log(self.observed_E[0] + 1) / self.observed_E)
        score_E = self.disagreement_E + self.cost_E[0] - self.cost_E + bonus_E
        return int(score_E.argmax())

    def learn(self, classes: Sequence[int]) -> None:
        """What the exits that a sample passed predicted, from the first on. Of one without a class
        (logits that were not numbers) and of those behind it nothing is learnt."""
        seen = np.array(classes, np.int64)
        seen = seen[: int((np.append(seen, NO_CLASS) < 0).argmax())]
        self.observed_E[: seen.size] += 1
        self.disagreed_E[: seen.size] += seen != seen[:1]


def layer_costs(
    exits: Sequence[int], n_layers: int, split: int, scale: float = 1.0, upload: float = 0.0
) -> NDArray[np.float64]:
    """c_j of exits at these depths: the share of layers run times `scale` (the paper's CS-1), and `upload`
    on top where the exit lies beyond the split."""
    depth_E = np.array(exits)
    cost_E: NDArray[np.float64] = scale * depth_E / n_layers + upload * (depth_E > split)
    return cost_E


def play(bandit: ExitBandit, classes_NE: NDArray[np.int64], delay: int = 0) -> NDArray[np.int64]:
    """chosen_N: the index of the exit that the bandit plays for each sample in turn, learning as it goes.

    classes_NE   what each exit predicts of each sample; those behind the chosen one stay hidden
    delay        rounds that feedback is late: samples that are in the air meanwhile
    """
    chosen_N = np.zeros(len(classes_NE), np.int64)
    late: deque[NDArray[np.int64]] = deque()
    for sample, classes_E in enumerate(classes_NE):
        if len(late) > delay:
            bandit.learn(late.popleft().tolist())
        chosen_N[sample] = bandit.choose()
        late.append(classes_E[: chosen_N[sample] + 1])
    for classes in late:
        bandit.learn(classes.tolist())
    return chosen_N


def regret(
    chosen_N: NDArray[np.int64], error_E: NDArray[np.float64], cost_E: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cumulative regret after each round against the best fixed exit; `error_E` needs labels."""
    total_E = error_E + cost_E
    regret_N: NDArray[np.float64] = np.cumsum(total_E[chosen_N] - total_E.min())
    return regret_N
