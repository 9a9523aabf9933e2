"""The cloud: which engine a request goes to, which is refused, and how many engines there are.

As offramp_cloud's balance.py: the less loaded of two at random, by layers x tokens; refused where it would be
late. Engines that start take no requests yet. Left out: that a gateway hears of loads with a delay.
"""

from __future__ import annotations

import heapq
import math
import random

from offramp_simulate.engine_model import Engine, Job
from offramp_simulate.engine_times import EngineTimes
from offramp_simulate.scaler import Scaler, WorkScaler
from offramp_simulate.scenario_parts import Cloud


class Busy(Exception):
    """Refused; `retry_s`: for so long the cloud wants to be left alone, 0 if it does not say."""

    def __init__(self, reason: str, retry_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_s = retry_s


class Farm:
    """All engines. The owner of the clock asks for `next_s`, calls `advance` up to it, and offers jobs in
    order of time.

    engines     that take jobs;  held  jobs in the house
    next_s      when something happens next by itself; infinity when nothing does
    came        layers x tokens that were let in, to the top
    replica_s   of engines that were there or started;  most  of them at once
    """

    def __init__(
        self, times: EngineTimes, cloud: Cloud, seed: int, scaler: Scaler | None = None
    ) -> None:
        """`scaler` says how many engines there are to be; without one the scenario's settings do."""
        self.cloud, self.times = cloud, times
        self.came, self.next_s = 0.0, math.inf
        self.replica_s = 0.0
        self.most = 0
        self._rng = random.Random(seed)
        self._heap: list[tuple[float, int, int, Engine | None]] = []
        self._serial = self._numbers = 0
        self._counted_s = 0.0
        self._gone: list[Engine] = []
        self._starting: list[Engine] = []
        self._owed = 0  # engines that died, and that `replace` will bring back
        self.engines: list[Engine] = []
        for _ in range(cloud.replicas):
            self._add(0.0, 0.0)
        self._scaler = scaler or (WorkScaler(cloud) if cloud.scales else None)
        if self._scaler is not None:
            self._push(self._scaler.every_s, None)

    @property
    def held(self) -> int:
        return sum(engine.held for engine in self.engines)

    @property
    def here(self) -> int:
        """Engines that work or start."""
        return len(self.engines) + len(self._starting)

    @property
    def done_work(self) -> int:
        """Layers x tokens that were run, also by engines that have gone."""
        return sum(engine.done_work for engine in (*self.engines, *self._gone))

    @property
    def busy_s(self) -> float:
        return sum(engine.busy_s for engine in (*self.engines, *self._gone))

    @property
    def rows_a_layer(self) -> float | None:
        """How many rows shared a layer, on average."""
        every = (*self.engines, *self._gone)
        layers = sum(engine.layers for engine in every)
        return sum(engine.rows for engine in every) / layers if layers else None

    def offer(self, job: Job, now_s: float) -> None:
        """A job arrives; nothing that happens before `now_s` may be outstanding. Raises Busy."""
        engines = self.engines
        if len(engines) == 1:
            engine = engines[0]
        elif engines:
            draw, count = self._rng.random, len(engines)
            first = int(draw() * count)
            second = (first + 1 + int(draw() * (count - 1))) % count
            engine, other = engines[first], engines[second]
            if other.work < engine.work:
                engine = other
        else:
            raise Busy("unavailable")
        if engine.held and job.wanted_s < math.inf:
            engine = self._in_time(engine, job.wanted_s - now_s)
        if engine.held >= self.cloud.max_waiting_rows:
            raise Busy("busy")
        self.came += job.tokens * (self.times.n_layers - job.depth)
        engine.board(job, now_s)
        if not engine.running:
            engine.run(now_s)
        if engine.ends_s < math.inf:
            self._push(engine.ends_s, engine)

    def advance(self, until_s: float) -> list[tuple[float, list[Job]]]:
        """What is finished up to and at `until_s`: (when, jobs), in order of time."""
        done: list[tuple[float, list[Job]]] = []
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            now_s, _, turn, engine = heapq.heappop(heap)
            if engine is None:
                self._tick(now_s)
                continue
            if engine in self._starting:
                self._starting.remove(engine)
                self.engines.append(engine)
                continue
            if not engine.alive or turn != engine.turn:
                continue
            left = engine.run(now_s)
            if left:
                done.append((now_s, left))
            if engine.ends_s < math.inf:
                self._push(engine.ends_s, engine)
        self.next_s = heap[0][0] if heap else math.inf
        return done

    def kill(self, now_s: float) -> list[Job]:
        """An engine dies, the most loaded; what it held."""
        if not self.engines:
            return []
        engine = max(self.engines, key=lambda e: (e.held, -e.number))
        self._remove(engine, now_s)
        self._owed += 1
        return engine.everybody()

    def replace(self, now_s: float) -> None:
        """Another takes its place."""
        self._count(now_s)
        self._owed = max(0, self._owed - 1)
        self._add(now_s, now_s)

    def closed(self, now_s: float) -> None:
        """Count replicas up to the end."""
        self._count(now_s)

    def _in_time(self, engine: Engine, left_s: float) -> Engine:
        """The engine, or the least loaded where that would be late. Raises Busy."""
        late_s = engine.work / self._capacity(engine) - left_s
        if late_s <= 0:
            return engine
        engine = min(self.engines, key=lambda each: each.work)
        late_s = engine.work / self._capacity(engine) - left_s
        if late_s > 0:
            raise Busy("busy", late_s)
        return engine

    def _capacity(self, engine: Engine) -> float:
        """Layers x tokens a second of computing; unknown at first."""
        return engine.done_work / engine.busy_s if engine.busy_s else math.inf

    def _push(self, when_s: float, engine: Engine | None) -> None:
        self._serial += 1
        turn = 0 if engine is None else engine.turn
        heapq.heappush(self._heap, (when_s, self._serial, turn, engine))
        self.next_s = self._heap[0][0]

    def _add(self, starts_s: float, now_s: float) -> None:
        engine = Engine(self._numbers, self.times, self.cloud, starts_s)
        self._numbers += 1
        if starts_s > now_s:
            self._starting.append(engine)
            self._push(starts_s, engine)
        else:
            self.engines.append(engine)
        self.most = max(self.most, self.here)

    def _remove(self, engine: Engine, now_s: float) -> None:
        self._count(now_s)
        engine.alive = False
        self.engines.remove(engine)
        self._gone.append(engine)

    def _count(self, now_s: float) -> None:
        self.replica_s += self.here * (now_s - self._counted_s)
        self._counted_s = now_s

    def _tick(self, now_s: float) -> None:
        """As many as the scaler says; of too many those go that have nothing to do."""
        assert self._scaler is not None
        wanted, here = self._scaler.wanted(self, now_s), self.here + self._owed
        if wanted > here:
            self._count(now_s)
            for _ in range(wanted - here):
                self._add(now_s + self.cloud.start_s, now_s)
        elif wanted < here:
            for engine in [e for e in self.engines if not e.held][: here - wanted]:
                self._remove(engine, now_s)
        self._push(now_s + self._scaler.every_s, None)
