"""The planner: for each sample at each exit, go on here or send it, and as what.

It believes the link's estimate, the cloud's reports, the device's own layer times and what confidence says
of later exits, solves the problem of solve.py over them, and keeps what it found until one of them has
moved. No clock, no event loop: the simulator runs the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from offramp_edge.answers import FALLBACK, Answer
from offramp_edge.crowd import Crowd
from offramp_edge.forecast import Foreseen
from offramp_edge.menu import Menu
from offramp_edge.planning import Choice, Standing
from offramp_edge.solve import FEWEST_TOKENS, Objective, Problem, Solver, Stage

_MOVED = 0.08  # relative change of an estimate that makes it worth solving again
_MOVED_MS = 0.1  # smaller changes never are
_MANY_BYTES = 1e5
_MOST_KEPT = 4096  # solutions
_TOKENS = 4  # lengths are told apart in steps of so many
_SURELY = 1 + 1e-9  # beyond rounding
_PER_OCTAVE = 4  # queues and deadlines are told apart in steps of a quarter of an octave


class LayerMs(Protocol):
    """Device.times, or what a simulator has in its place."""

    def ms(self, start: int, stop: int, n_tokens: int) -> float: ...


class LinkCosts(Protocol):
    """Link, or what a simulator has in its place."""

    def costs(self) -> tuple[float, float]: ...
    def queue_ms(self) -> float: ...
    @property
    def spread(self) -> float: ...


class CloudCosts(Protocol):
    """CloudTimes, or what a simulator has in its place."""

    @property
    def queue_ms(self) -> float: ...
    def layer_ms(self, n_tokens: int, otherwise: float = 0.0) -> float: ...


@dataclass(frozen=True, slots=True)
class World:
    """Whom the planner asks. `device` is a function, for a device times its layers anew when it warms up."""

    device: Callable[[], LayerMs]
    link: LinkCosts
    cloud: CloudCosts


@dataclass(frozen=True, slots=True)
class _Believed:
    """The estimates that the kept solutions were found with. A layer's device time is for one token."""

    rtt_ms: float
    ms_per_byte: float
    spread: float
    cloud_queue_ms: float
    cloud_token_ms: float
    device_ms: float

    def near(self, other: _Believed) -> bool:
        return (
            _near(self.rtt_ms, other.rtt_ms)
            and _near(_MANY_BYTES * self.ms_per_byte, _MANY_BYTES * other.ms_per_byte)
            and _near(self.device_ms, other.device_ms)
            and _near(self.cloud_queue_ms, other.cloud_queue_ms)
            and _near(FEWEST_TOKENS * self.cloud_token_ms, FEWEST_TOKENS * other.cloud_token_ms)
            and abs(self.spread - other.spread) < 0.1
        )


class AutoPlanner:
    """A `Planner`. Asked in the device's thread, told in the event loop's: what passes between them are
    single references."""

    def __init__(
        self,
        menu: Menu,
        foreseen: Foreseen,
        world: World,
        objective: Objective | None = None,
        *,
        blind_to_load: bool = False,
    ) -> None:
        """`blind_to_load`: as if every sample came alone, which is how published rules decide."""
        self.menu, self.world, self.objective = menu, world, objective or Objective()
        self._foreseen, self._blind = foreseen, blind_to_load
        self.on_asked: Callable[[], None] = lambda: None
        self.solver = Solver(foreseen.forecast, self.objective)
        self._n = menu.n_layers
        self.crowd = Crowd()
        self._believed: _Believed | None = None
        self._seen: tuple[float, ...] = ()  # the estimates when they were last looked at
        self._layer_ms: tuple[float, ...] = ()
        self._kept: dict[tuple[int, ...], list[Stage]] = {}
        self._slowest_ms: tuple[float, ...] = ()  # of each layer and those behind it, a token
        self._next_exit = [min(e for e in self.solver.exits if e > d) for d in range(self._n)]
        self.solved = self.asked = 0
        self.usual_tokens = 16.0  # of a sample, a moving average

    def choose(self, standing: Standing) -> Choice:
        self.asked += 1
        if not standing.depth:
            self.usual_tokens += 0.05 * (standing.n_tokens - self.usual_tokens)
            self.crowd.came(standing.waiting, standing.waited)
        self.on_asked()
        self._look()
        if self._stays(standing):
            return Choice(self._next_exit[standing.depth])
        stages = self._stages(standing)
        outlook = self.solver.outlooks[self.solver.place[standing.depth]]
        bin_ = outlook.bin_of(standing.confidence)
        for stage in stages:
            if stage.depth > standing.depth and stage.depth in self.solver.exits:
                return Choice(stage.depth)  # there it is known better
            if stage.sends(bin_):
                option = stage.option[bin_]
                return Choice(stage.depth, "" if option is None else option.codec)
        return Choice(self._n)

    def answered(self, answer: Answer) -> None:
        """Where a sample left, and what it took, tells of those to come."""
        self.crowd.took(answer.stages_ms.device)
        if answer.where != FALLBACK and self._foreseen.left(answer.exit_depth):
            self.solver = Solver(self._foreseen.forecast, self.objective)
            self._kept = {}

    def stages(self, standing: Standing) -> list[Stage]:
        """What was found for a sample that stands there, from its depth on."""
        self._look()
        return self._stages(standing)

    def _stays(self, standing: Standing) -> bool:
        """Whether no solution would send it before the next exit, seen without solving: there is time for all
        layers here, and sending costs more than those that it is expected to run if it never leaves the
        device. Only for those who hold up nobody."""
        if not self._blind and (standing.waiting or self.crowd.fifths()):
            return False
        if standing.left_ms < math.inf and self._here_ms(standing) > standing.left_ms:
            return False
        if not standing.reachable:
            return True
        outlook = self.solver.outlooks[self.solver.place[standing.depth]]
        bin_ = outlook.bin_of(standing.confidence)
        n_tokens = -(-standing.n_tokens // _TOKENS) * _TOKENS
        exit_ = self._next_exit[standing.depth]
        return all(self._dearer(d, bin_, n_tokens) for d in range(standing.depth, exit_))

    def _dearer(self, depth: int, bin_: int, n_tokens: int) -> bool:
        believed, o, layers = self._believed, self.objective, self.solver.left_at(depth)[bin_]
        assert believed is not None
        here_ms = layers * self._slowest_ms[depth] * max(n_tokens, FEWEST_TOKENS)
        here_ms *= (1 + o.energy * o.device_watts) * _SURELY
        away_ms = believed.rtt_ms + believed.cloud_queue_ms + o.cloud * layers
        for option in self.menu.at(n_tokens)[depth]:
            cloud_ms = layers * believed.cloud_token_ms * max(option.tokens, FEWEST_TOKENS)
            sent_ms = option.encode_ms + option.nbytes * believed.ms_per_byte
            if sent_ms + cloud_ms + away_ms <= here_ms:
                return False
        return True

    def _here_ms(self, standing: Standing) -> float:
        """All layers that are left, on the device."""
        return sum(self._layer_ms[standing.depth :]) * max(standing.n_tokens, FEWEST_TOKENS)

    def _stages(self, standing: Standing) -> list[Stage]:
        key = self._key(standing)
        stages = self._kept.get(key)
        if stages is None:
            stages = self._solved(key, -1)
        here = stages[standing.depth - key[0] :]
        if standing.left_ms < math.inf and self._longest_ms(standing, here) > standing.left_ms:
            key = (standing.depth, *key[1:])
            step = math.floor(_PER_OCTAVE * math.log2(max(standing.left_ms, 0.0) + 1))
            return self._kept.get((*key, step)) or self._solved(key, step)
        return here

    def problem(self, standing: Standing) -> Problem:
        """As `stages` sees it, for those who explain."""
        self._look()
        return self._problem((standing.depth, *self._key(standing)[1:]), -1)

    def _key(self, standing: Standing) -> tuple[int, ...]:
        """All that a solution depends on, beside what is believed. Where nothing drains while layers run, one
        solution serves all depths."""
        tokens = -(-standing.n_tokens // _TOKENS) * _TOKENS
        waiting = 0 if self._blind else standing.waiting
        busy, arrivals = (0, 0) if self._blind else self._crowd_steps()
        queue_ms, queued, depth = self.world.link.queue_ms(), 0, 0
        if queue_ms:
            depth, queued = standing.depth, 0 if self._blind else standing.in_flight
        return depth, tokens, waiting, queued, _step(queue_ms), busy, arrivals, standing.reachable

    def _crowd_steps(self) -> tuple[int, int]:
        """(fifths of its time that the device is at work, the step of those who come in a second)."""
        busy = self.crowd.fifths()
        return busy, _step(1000 * self.crowd.arrivals()) if busy else 0

    def _solved(self, key: tuple[int, ...], left_step: int) -> list[Stage]:
        stages = self.solver.solve(self._problem(key, left_step))
        self.solved += 1
        if len(self._kept) >= _MOST_KEPT:
            self._kept = {}
        self._kept[key if left_step < 0 else (*key, left_step)] = stages
        return stages

    def _problem(self, key: tuple[int, ...], left_step: int) -> Problem:
        depth, n_tokens, waiting, queued, queue_step, busy, arrivals, reachable = key
        believed, tokens = self._believed, max(n_tokens, FEWEST_TOKENS)
        assert believed is not None
        nothing: tuple[()] = ()
        return Problem(
            depth,
            n_tokens,
            tuple(ms * tokens for ms in self._layer_ms),
            self.menu.at(n_tokens) if reachable else (nothing,) * self._n,
            believed.rtt_ms,
            believed.ms_per_byte,
            _value(queue_step),
            believed.cloud_queue_ms,
            believed.cloud_token_ms,
            math.inf if left_step < 0 else _value(left_step),
            believed.spread,
            waiting,
            queued,
            busy / 5,
            _value(arrivals) / 1000,
        )

    def _longest_ms(self, standing: Standing, stages: list[Stage]) -> float:
        """What a sample may take in the worst case: all layers here, or sent as the stages say."""
        bins = len(stages[0].send)
        sent_ms = max(
            (s.send[b] for s in stages for b in range(min(bins, len(s.send))) if s.sends(b)),
            default=0.0,
        )
        assert self._believed is not None
        risky = 1 + 2 * self._believed.spread
        return self._here_ms(standing) + sent_ms * risky

    def _look(self) -> None:
        """Forget what was found once an estimate has moved."""
        rtt_ms, ms_per_byte = self.world.link.costs()
        device, cloud = self.world.device(), self.world.cloud
        device_ms = device.ms(0, self._n, FEWEST_TOKENS)
        cloud_token_ms = cloud.layer_ms(1, device_ms / self._n) / FEWEST_TOKENS
        spread, queue_ms = self.world.link.spread, cloud.queue_ms
        seen = (rtt_ms, ms_per_byte, spread, queue_ms, cloud_token_ms, device_ms)
        if seen == self._seen:
            return
        self._seen, believed = seen, _Believed(*seen)
        if self._believed is not None and believed.near(self._believed):
            return
        self._believed = believed
        self._layer_ms = tuple(
            device.ms(depth, depth + 1, FEWEST_TOKENS) / FEWEST_TOKENS for depth in range(self._n)
        )
        self._slowest_ms = tuple(accumulate(reversed(self._layer_ms), max))[::-1]
        self._kept = {}


def _near(one: float, other: float) -> bool:
    moved = abs(one - other)
    return moved <= _MOVED_MS or moved <= _MOVED * other


def _step(ms: float) -> int:
    return round(_PER_OCTAVE * math.log2(ms + 1)) if ms > 0 else 0


def _value(step: int) -> float:
    return float(2 ** (step / _PER_OCTAVE) - 1)
