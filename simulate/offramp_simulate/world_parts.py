"""What the event kernel moves about: a request on its way, and a device with all that it believes.

Estimates, breaker, retry budget and planner are the live classes on the kernel's clock; what stands here
is only what the live agent keeps in coroutines.
"""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Any

from offramp_common.retry import Backoff, RetryBudget
from offramp_edge.breaker import Breaker
from offramp_edge.cloud_times import CloudTimes
from offramp_edge.device import LayerTimes
from offramp_edge.link import Link, Transfer
from offramp_edge.planning import Learns, Planner
from offramp_edge.settings import EdgeSettings
from offramp_edge.usual import UsualTime
from offramp_simulate.engine_model import Job
from offramp_simulate.world_lines import Line


class KernelClock:
    """The kernel's time, as the live classes read it."""

    __slots__ = ("now_s",)

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s


class Flight:
    """One request.

    until_s              answered by then, the margin taken off
    cloud_until_s        what is left then is needed for an answer here;  give_up_s  or the time-out before
    depth, passed        layers run here; depth of the deepest exit passed, 0 for none
    ready_s              it is encoded then
    left                 it left here, at `passed`
    cut, codec           where and how it was last sent; cut -1: never
    trip                 number of the attempt in the air; what comes of an older one is not heard
    stage                where it is: see below
    hedging              "" no, "timed", "waits", "runs": the rest here, while the cloud has it
    trouble              why it was sent again
    waited               it had to wait for the device
    """

    __slots__ = (
        "alone", "asked_s", "attempts", "began_s", "cloud_until_s", "codec", "cut", "depth", "deviation",
        "device_ms", "engine_deviation", "give_up_s", "hedging", "job", "late", "left", "number",
        "passed", "ready_s", "sample", "sent", "side", "stage", "transfer", "trip", "trouble", "until_s",
        "up_nbytes", "waited", "welcomes",
    )  # fmt: skip

    def __init__(
        self, side: Side, number: int, began_s: float, sample: int, deviations: tuple[float, float]
    ) -> None:
        self.side, self.number, self.began_s, self.sample = side, number, began_s, sample
        self.deviation, self.engine_deviation = deviations
        self.until_s = self.give_up_s = self.cloud_until_s = self.asked_s = self.ready_s = 0.0
        self.depth = self.passed = self.trip = self.attempts = self.up_nbytes = self.welcomes = 0
        self.cut, self.codec, self.device_ms = -1, "", 0.0
        self.left = self.late = self.sent = self.waited = False
        self.alone = self.hedging = self.trouble = ""
        self.stage = WAITING
        self.job: Any = None
        self.transfer: Transfer | None = None


WAITING, RUNNING, QUEUED, AIR, RETRY, DONE = range(6)
"""Of a flight: for the device; on it; for room in the air; in the air; before another attempt; answered."""


class Side:
    """One device. `samples` and `hedges` wait for its compute, which is `busy`. `times` are what it has
    measured of its own layers, where a planner asks for them. `greetings` are not answered yet, `greeted`
    counts them; `welcome`: one was answered while nobody listened; `connected`: the connection stands."""

    __slots__ = (
        "air", "asking", "at_air", "breaker", "budget", "busy", "cloud_times", "connected", "down",
        "greeted", "greeted_s", "greetings", "hedges", "in_flight", "learns", "link", "number", "planner",
        "probe", "probes", "put_aside", "queued", "samples", "times", "up", "usual", "usual_s", "wait_missed",
        "welcome",
    )  # fmt: skip

    def __init__(self, number: int, up: Line, down: Line, share: float, clock: KernelClock) -> None:
        self.number, self.up, self.down = number, up, down
        self.busy = False
        self.probe: Any = None  # the one that is in the air
        self.probes = self.put_aside = 0
        self.samples: deque[Flight] = deque()
        self.hedges: list[tuple[int, Flight]] = []
        self.air = self.in_flight = 0
        self.queued: deque[Flight] = deque()
        self.at_air: dict[int, Flight] = {}
        self.usual = UsualTime()
        self.usual_s: float | None = None
        self.budget = RetryBudget(share)
        self.cloud_times = CloudTimes(clock)
        self.link = Link(clock)
        self.breaker: Breaker | None = None
        self.planner: Planner | None = None
        self.learns: Learns | None = None
        self.times: LayerTimes | None = None
        self.greeted_s = -math.inf
        self.asking, self.greeted, self.welcome = IDLE, 0, False
        self.connected = True
        self.greetings: list[Any] = []
        self.wait_missed = 0


LOST = Job(None, 0, 1, 1, 1.0, -math.inf)
"""In place of a job: what was in the air when a fault began, and will not arrive."""

IDLE, PAUSED, GREETS = range(3)
"""What the device does about its handshake: nothing; it waits before one; one is in the air."""


class QuietBreaker(Breaker):
    """The live breaker, which tells a log of each loss: 10,000 devices would."""

    def tell(self, reason: str, message: str) -> None:
        """Nothing."""


def breaker_for(
    side: Side, agent: EdgeSettings, clock: KernelClock, seed: int, on_lost: Any
) -> Breaker:
    """Up from the start: the first handshake lies before the run."""
    backoff = Backoff(agent.backoff_ms / 1000, agent.backoff_max_ms / 1000)
    rng = random.Random(f"{seed}/{side.number}")
    breaker = QuietBreaker(backoff, rng, clock, on_lost, agent.return_ms / 1000)
    breaker.welcomed()
    return breaker
