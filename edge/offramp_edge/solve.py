"""Where to go on and where to send, as an optimal stopping problem (design.md 4), solved backwards:

    V(d, c) = min( send(d, c) by the best codec,   layer(d) + (1 - leave(c)) E[V(d', c')] )

c is the bin of the sample's confidence at the deepest exit it has passed. Costs are milliseconds of the
sample's own answer, plus what its use of the device and of the uplink costs those behind it, plus weights
for energy and cloud work. Pure arithmetic on numbers and tuples, a few hundred of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from offramp_common.forecast import Forecast
from offramp_edge.menu import Option

MISSED = 1e6
"""Cost of not having the answer by the deadline: above all else, so that the best of bad choices is
found."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Milliseconds are what costs are counted in.

    energy         of a millijoule of the device;  cloud: of a layer run in the cloud
    device_watts   while it computes;  radio_watts: while it sends; both above idling
    """

    energy: float = 0.0
    cloud: float = 0.0
    device_watts: float = 4.0
    radio_watts: float = 1.5


@dataclass(frozen=True, slots=True)
class Problem:
    """One sample, and the world as it is believed to be.

    depth           layers that have run
    layer_ms        of each layer on the device
    options         of each depth, empty where it must not be sent
    rtt_ms, ms_per_byte, queue_ms   the link, and what waits in front of its uplink now
    cloud_queue_ms, cloud_token_ms  the cloud: wait for its turn, a layer's time for each token
    left_ms         until the deadline;  spread: relative error of what is said of the link
    waiting, queued   samples behind this one for the device; in front of or beside it for the uplink
    busy    share of its time that the device is at work;  arrivals: samples that come in a millisecond
    """

    depth: int
    n_tokens: int
    layer_ms: tuple[float, ...]
    options: tuple[tuple[Option, ...], ...]
    rtt_ms: float
    ms_per_byte: float
    queue_ms: float
    cloud_queue_ms: float
    cloud_token_ms: float
    left_ms: float = float("inf")
    spread: float = 0.0
    waiting: int = 0
    queued: int = 0
    busy: float = 0.0
    arrivals: float = 0.0

    def delayed(self, rest_ms: Sequence[float]) -> list[float]:
        """How many others a millisecond of the device delays while so many of this sample are left: those who
        wait, those who will come meanwhile, and who comes behind them before the device is free again."""
        waiting, arrivals, free = self.waiting, self.arrivals, 1 - self.busy
        return [(waiting + arrivals * rest) / free for rest in rest_ms]


@dataclass(frozen=True, slots=True)
class Stage:
    """What was found for one depth, a value for each bin.

    send   cost of sending;  go: of going on;  option: the best to send, None where none is allowed
    """

    depth: int
    send: tuple[float, ...]
    go: tuple[float, ...]
    option: tuple[Option | None, ...]

    def sends(self, bin_: int) -> bool:
        return self.send[bin_] < self.go[bin_]


FEWEST_TOKENS = 16
"""Below this a layer costs about the same."""


class Solver:
    """Solves problems of one model; keeps what does not change from one to the next."""

    def __init__(self, forecast: Forecast, objective: Objective) -> None:
        self.objective = objective
        self.exits = forecast.exits
        self._n = forecast.exits[-1]
        # For each depth: the place of the deepest exit passed, which says what bins there are.
        depths = [outlook.depth for outlook in forecast.outlooks]
        self.place = [sum(d <= depth for d in depths) - 1 for depth in range(self._n)]
        self.outlooks = forecast.outlooks
        self._onward = [self._behind_exit(depth) for depth in range(self._n)]
        self._left = self._layers_left(forecast)

    def solve(self, problem: Problem) -> list[Stage]:
        """The stages from the problem's depth on; the first says what to do now."""
        stages: list[Stage] = []
        elapsed_ms = sum(problem.layer_ms[problem.depth :])
        behind: Sequence[float] = ()
        # Milliseconds of the device that are to be expected behind: they count where others will come.
        work: Sequence[float] = ()
        crowded = problem.arrivals > 0
        for depth in range(self._n - 1, problem.depth - 1, -1):
            arrives_ms, ms = elapsed_ms, problem.layer_ms[depth]
            elapsed_ms -= ms
            behind = self._ahead(depth, behind)
            if crowded:
                work = self._ahead(depth, work)
            go = self._go(problem, depth, arrives_ms, behind, work if crowded else None)
            send, option = self._send(problem, depth, max(elapsed_ms, 0.0))
            stages.append(Stage(depth, send, go, option))
            behind = list(map(min, send, go))
            if crowded:
                work = [
                    0.0 if sent < gone else ms + rest
                    for sent, gone, rest in zip(send, go, work, strict=True)
                ]
        stages.reverse()
        return stages

    def _ahead(self, depth: int, behind: Sequence[float]) -> Sequence[float]:
        """What is to be expected behind the next layer, for each bin here: nothing for those who leave."""
        if depth + 1 == self._n:
            return (0.0,) * len(self._left[depth])
        onward = self._onward[depth]
        if onward is None:
            return behind
        return [stay * sum(map(mul, shares, behind)) for stay, shares in onward]

    def _go(
        self,
        problem: Problem,
        depth: int,
        arrives_ms: float,
        behind: Sequence[float],
        work: Sequence[float] | None,
    ) -> tuple[float, ...]:
        """Run the next layer, leave if one may, else do the best behind it. Without `work` nobody will come
        meanwhile."""
        o, ms = self.objective, problem.layer_ms[depth]
        step = ms * (1 + o.energy * o.device_watts)
        if arrives_ms > problem.left_ms >= arrives_ms - ms:
            step += MISSED
        if work is None:
            step += ms * problem.waiting / (1 - problem.busy)
            return tuple([step + cost for cost in behind])
        delayed = problem.delayed([ms / 2 + rest for rest in work])
        return tuple([step + ms * many + cost for many, cost in zip(delayed, behind, strict=True)])

    def _send(
        self, problem: Problem, depth: int, elapsed_ms: float
    ) -> tuple[tuple[float, ...], tuple[Option | None, ...]]:
        """Send by the codec that is best for each bin; the queue has drained while layers ran."""
        left = self._left[depth]
        options = problem.options[depth]
        if not options:
            return (float("inf"),) * len(left), (None,) * len(left)
        o, delayed = self.objective, problem.waiting / (1 - problem.busy)
        queue_ms = max(0.0, problem.queue_ms - elapsed_ms)
        fixed_ms = problem.rtt_ms + queue_ms + problem.cloud_queue_ms
        priced = []
        for option in options:
            uplink_ms = option.nbytes * problem.ms_per_byte
            encode_ms = option.encode_ms
            own_ms = encode_ms + uplink_ms + fixed_ms
            beside = encode_ms * (delayed + o.energy * o.device_watts) + uplink_ms * (
                problem.queued + o.energy * o.radio_watts
            )
            layer_ms = problem.cloud_token_ms * max(option.tokens, FEWEST_TOKENS)
            priced.append((own_ms, beside, layer_ms, option))
        # A reply must come by the deadline though the link be worse than it is said to be.
        risky, left_ms, weight = 1 + 2 * problem.spread, problem.left_ms, o.cloud
        costs, best = [], []
        for layers in left:
            chosen, lowest = None, float("inf")
            for own_ms, beside, layer_ms, option in priced:
                ms = own_ms + layers * layer_ms
                cost = ms + beside + weight * layers
                if elapsed_ms + ms * risky > left_ms:
                    cost += MISSED
                if cost < lowest:
                    chosen, lowest = option, cost
            costs.append(lowest)
            best.append(chosen)
        return tuple(costs), tuple(best)

    def _behind_exit(self, depth: int) -> list[tuple[float, tuple[float, ...]]] | None:
        """Where an exit stands behind the next layer: for each bin here, the chance to stay and the shares of
        the bins fallen into there."""
        if depth + 1 == self._n or depth + 1 not in self.exits:
            return None
        outlook = self.outlooks[self.place[depth]]
        return [(1 - p, shares) for p, shares in zip(outlook.leave, outlook.next, strict=True)]

    def left_at(self, depth: int) -> tuple[float, ...]:
        """For each bin the layers expected to run in the cloud, if sent at `depth`."""
        return self._left[depth]

    def _layers_left(self, forecast: Forecast) -> list[tuple[float, ...]]:
        """For each depth and bin: layers expected to run in the cloud from there."""
        from_exits = forecast.layers_left()
        found = []
        for depth in range(self._n):
            place = self.place[depth]
            ran = depth - forecast.outlooks[place].depth
            found.append(tuple(max(1.0, layers - ran) for layers in from_exits[place]))
        return found
