"""Rules to compare the planner with: the same machinery with choices removed.

all on the device, send the input, any fixed split and codec   planning.FixedPlan
neurosurgeon   Kang et al., ASPLOS 2017: the split with the least predicted latency of the whole model
spinn          Laskaridis et al., MobiCom 2020, in part: the split that is best for the exits' mean rates
splitee        Bajpai et al., 2023, in part: a bandit learns the split from how long answers took
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from offramp_common.forecast import never
from offramp_edge.answers import Answer
from offramp_edge.forecast import Foreseen
from offramp_edge.menu import Menu
from offramp_edge.planner import AutoPlanner, World
from offramp_edge.planning import Choice, Standing
from offramp_edge.settings import SPINN


def static_rule(kind: str, menu: Menu, foreseen: Foreseen, world: World) -> AutoPlanner:
    """Neurosurgeon's or SPINN's rule. Both see the link as it is estimated, neither a sample's confidence nor
    the load; Neurosurgeon knows of no exits. That a choice is made anew at each exit changes nothing: without
    confidence nothing is learnt on the way."""
    forecast = foreseen.forecast
    seen = forecast.merged() if kind == SPINN else never(forecast.exits)
    return AutoPlanner(menu, Foreseen(seen), world, blind_to_load=True)


class SplitBandit:
    """UCB1 over split points: an arm's reward is how quick the answers were, scaled to [0, 1] by the slowest
    seen. A few samples in a row play one arm, for answers come back in any order."""

    def __init__(
        self, arms: Sequence[int], codec: str, n_layers: int, row: int = 4, seed: int = 0
    ) -> None:
        self._arms, self._codec, self._n, self._row = tuple(arms), codec, n_layers, row
        self._count = [0] * len(self._arms)
        self._ms = [0.0] * len(self._arms)
        self._slowest_ms = 1.0
        self._playing = random.Random(seed).randrange(len(self._arms))
        self._played = 0

    def choose(self, standing: Standing) -> Choice:
        if standing.depth == 0:
            if self._played >= self._row:
                self._playing, self._played = self._best(), 0
            self._played += 1
        arm = self._arms[self._playing] if standing.reachable else self._n
        return Choice(max(arm, standing.depth), self._codec)

    def answered(self, answer: Answer) -> None:
        self._count[self._playing] += 1
        self._ms[self._playing] += answer.ms
        self._slowest_ms = max(self._slowest_ms, answer.ms)

    def _best(self) -> int:
        unplayed = [arm for arm, count in enumerate(self._count) if not count]
        if unplayed:
            return unplayed[0]
        total = math.log(sum(self._count))

        def score(arm: int) -> float:
            count = self._count[arm]
            return -self._ms[arm] / count / self._slowest_ms + math.sqrt(2 * total / count)

        return max(range(len(self._arms)), key=score)
