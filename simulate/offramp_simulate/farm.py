"""The cloud: which engine a request goes to, which is refused, and how many engines there are.

As offramp_cloud's balance.py, rates.py and scaling.py: the less loaded of two at random, by layers x tokens;
refused where it would be late; as many replicas as get what waits done in time and keep up with what comes.
Left out: that a gateway hears of loads with a delay, and the forecast of a growing load.
"""

from __future__ import annotations

import heapq
import math
import random

from offramp_simulate.engine_model import Engine, Job
from offramp_simulate.engine_times import EngineTimes
from offramp_simulate.scenario_parts import Cloud

_TICK_S = 1.0  # how often the scaler looks
_KEPT = 0.2  # weight of the newest rate of arrivals


class Busy(Exception):
    """Refused; `retry_s`: for so long the cloud wants to be left alone, 0 if it does not say."""

    def __init__(self, reason: str, retry_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_s = retry_s


class Farm:
    """All engines. The owner of the clock asks for `next_s`, calls `advance` up to it, and offers jobs in
    order of time.

    held        jobs in the house;  replica_s  of engines that were there;  most  of them at once
    """

    def __init__(self, times: EngineTimes, cloud: Cloud, seed: int) -> None:
        self.cloud, self.times = cloud, times
        self.replica_s = 0.0
        self.most = 0
        self._rng = random.Random(seed)
        self._heap: list[tuple[float, int, int, Engine | None]] = []
        self._serial = self._numbers = 0
        self._counted_s = self._over_s = self._under_s = 0.0
        self._came, self._arriving = 0.0, 0.0
        self._gone: list[Engine] = []
        self.engines: list[Engine] = []
        for _ in range(cloud.replicas):
            self._add(0.0)
        if cloud.scales:
            self._push(_TICK_S, None)

    @property
    def next_s(self) -> float:
        """When something happens next by itself; infinity when nothing does."""
        return self._heap[0][0] if self._heap else math.inf

    @property
    def held(self) -> int:
        return sum(engine.held for engine in self.engines)

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
        self._came += job.tokens * (self.times.n_layers - job.depth)
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
            if not engine.alive or turn != engine.turn:
                continue
            left = engine.run(now_s)
            if left:
                done.append((now_s, left))
            if engine.ends_s < math.inf:
                self._push(engine.ends_s, engine)
        return done

    def kill(self, now_s: float) -> list[Job]:
        """An engine dies, the most loaded; what it held."""
        if not self.engines:
            return []
        engine = max(self.engines, key=lambda e: (e.held, -e.number))
        self._remove(engine, now_s)
        return engine.everybody()

    def replace(self, now_s: float) -> None:
        """Another takes its place."""
        self._count(now_s)
        self._add(now_s)

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

    def _add(self, starts_s: float) -> None:
        self.engines.append(Engine(self._numbers, self.times, self.cloud, starts_s))
        self._numbers += 1
        self.most = max(self.most, len(self.engines))

    def _remove(self, engine: Engine, now_s: float) -> None:
        self._count(now_s)
        engine.alive = False
        self.engines.remove(engine)
        self._gone.append(engine)

    def _count(self, now_s: float) -> None:
        self.replica_s += len(self.engines) * (now_s - self._counted_s)
        self._counted_s = now_s

    def _tick(self, now_s: float) -> None:
        """As many as get what waits done in time and keep up, once that has been so for long enough."""
        c, here = self.cloud, len(self.engines)
        self._arriving += _KEPT * (self._came / _TICK_S - self._arriving)
        self._came = 0.0
        work, busy_s = sum(e.work for e in self.engines), self.busy_s
        wanted = here
        if busy_s:
            done = sum(e.done_work for e in (*self.engines, *self._gone))
            need = self._arriving / c.busy + work / c.done_in_s
            wanted = min(max(math.ceil(need / (done / busy_s)), c.replicas), c.max_replicas)
        self._over_s = self._over_s + _TICK_S if wanted > here else 0.0
        self._under_s = self._under_s + _TICK_S if wanted < here else 0.0
        if self._over_s >= c.up_s:
            self._count(now_s)
            for _ in range(wanted - here):
                self._add(now_s + c.start_s)
            self._over_s = 0.0
        elif self._under_s >= c.down_s:
            for engine in [e for e in self.engines if not e.held][: here - wanted]:
                self._remove(engine, now_s)
            self._under_s = 0.0
        self._push(now_s + _TICK_S, None)
