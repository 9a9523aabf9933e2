"""The tables of a scenario: one frozen dataclass each, one line a setting, its unit in its name."""

from __future__ import annotations

import math
from dataclasses import dataclass

from offramp_common.errors import ConfigError
from offramp_edge.settings import FIXED, PLANS
from offramp_simulate.links import PROFILES
from offramp_simulate.settings_tables import above, at_least, meant, one_of

PRECISION_OF_RECORD = ""


@dataclass(frozen=True)
class Devices:
    """count       devices
    slowdown       this device's layers take so many times what the record says
    precision      of its layers; empty: the record's own
    jitter         draw each run's time from the record's deviations; false: always the median
    """

    count: int = 1
    slowdown: float = 1.0
    precision: str = PRECISION_OF_RECORD
    jitter: bool = True

    def __post_init__(self) -> None:
        at_least(self.count, 1, "count")
        above(self.slowdown, 0, "slowdown")


@dataclass(frozen=True)
class Arrivals:
    """kind "poisson": `rate_per_s` of each device, at random times
    "regular"       evenly spaced, each device with a phase of its own
    "bursts"        each device is quiet (`rate_per_s`) or busy (`busy_rate_per_s`); how long, is exponential
                    with means `quiet_s` and `busy_s`
    "recorded"      times (seconds, rising) and devices of a file: lines `TIME` or `TIME DEVICE`
    "closed"        each device asks `think_s` after its answer, one question at a time
    """

    kind: str = "poisson"
    rate_per_s: float = 1.0
    busy_rate_per_s: float = 10.0
    quiet_s: float = 60.0
    busy_s: float = 5.0
    file: str = ""
    think_s: float = 0.0

    def __post_init__(self) -> None:
        one_of(self.kind, ("poisson", "regular", "bursts", "recorded", "closed"), "kind")
        above(self.rate_per_s, 0, "rate_per_s")
        at_least(self.busy_rate_per_s, 0, "busy_rate_per_s")
        above(self.quiet_s, 0, "quiet_s")
        above(self.busy_s, 0, "busy_s")
        at_least(self.think_s, 0, "think_s")
        if self.kind == "recorded" and not self.file:
            raise ConfigError('file is missing: kind "recorded" reads its times from one')


@dataclass(frozen=True)
class LinkChoice:
    """A profile of `offramp link` by name, or values of one's own; a trace or Markov states vary the rate.

    trace          file of recorded rates, `trace_name` one in it (default: the first)
    trace_scale    times the recorded rates: most recordings are of downlinks, so say what you scale by
    downlink_factor   downlink over uplink, with a trace of one direction
    downlink_trace, downlink_trace_name   the downlink's own recorded rates; it starts where the other does
    markov_mbps, markov_s   uplink rates, and how long each lasts on average; the next one is any other
    shared         all devices share one link, as in a cell; false: one each
    same_phase     traces start at the same place for every device; false: each at a place of its own
    trace_start_s  how far into the trace a run begins, for a single device or with same_phase
    tcp            each connection has TCP's window, slow start after idle, and recovery of losses
    loss, loss_burst   share of packets lost, and how many in a row on average (0: one by one); with tcp
    beside_nbytes  what HTTP/2, gRPC and TLS put beside each message: see beside.py
    """

    profile: str = ""
    uplink_mbps: float = math.inf
    downlink_mbps: float = math.inf
    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    trace: str = ""
    trace_name: str = ""
    trace_scale: float = 1.0
    downlink_factor: float = 4.0
    downlink_trace: str = ""
    downlink_trace_name: str = ""
    markov_mbps: tuple[float, ...] = ()
    markov_s: tuple[float, ...] = ()
    tcp: bool = False
    loss: float = 0.0
    loss_burst: float = 0.0
    shared: bool = False
    same_phase: bool = False
    trace_start_s: float = 0.0
    beside_nbytes: int = 64

    def __post_init__(self) -> None:
        if self.profile and self.profile not in PROFILES:
            raise ConfigError(f"profile = {self.profile!r}{meant(self.profile, list(PROFILES))}")
        for name in ("uplink_mbps", "downlink_mbps", "trace_scale"):
            above(getattr(self, name), 0, name)
        if self.loss and not self.tcp:
            raise ConfigError("loss without tcp: nothing sends a lost packet again; set tcp = true")
        for name in ("rtt_ms", "jitter_ms", "loss_burst", "trace_start_s"):
            at_least(getattr(self, name), 0, name)
        above(self.downlink_factor, 0, "downlink_factor")
        at_least(self.beside_nbytes, 0, "beside_nbytes")
        if len(self.markov_mbps) != len(self.markov_s):
            raise ConfigError(
                f"markov_mbps has {len(self.markov_mbps)} states, markov_s {len(self.markov_s)}: as many"
            )
        if bool(self.markov_mbps) and bool(self.trace):
            raise ConfigError("both a trace and Markov states: leave one of them out")
        if self.downlink_trace and not self.trace:
            raise ConfigError("downlink_trace without trace: name the uplink's too")
        if self.downlink_trace_name and not self.downlink_trace:
            raise ConfigError("downlink_trace_name without downlink_trace: name its file too")


@dataclass(frozen=True)
class Cloud:
    """replicas       engines
    slowdown          their layers take so many times what the record says; 0.05 for a GPU 20 times as fast
    floor_ms          a layer never takes less: what launching its kernels costs on a GPU, else 0
    gateway_ms        of each request, beside the engine; below 0: the record's own
    max_batch, max_batch_tokens, max_padding, max_waiting_rows, max_age_s   as of the live engine
    max_replicas      above `replicas`: scaled so that what waits is done in `done_in_s` and replicas work
                      `busy` of their time, with `up_s` and `down_s` of patience and `start_s` until a new
                      one is there
    """

    replicas: int = 1
    slowdown: float = 1.0
    floor_ms: float = 0.0
    gateway_ms: float = -1.0
    max_batch: int = 32
    max_batch_tokens: int = 1024
    max_padding: float = 1.5
    max_waiting_rows: int = 1024
    max_age_s: float = 0.25
    max_replicas: int = 0
    done_in_s: float = 2.0
    busy: float = 0.7
    up_s: float = 2.0
    down_s: float = 30.0
    start_s: float = 5.0

    def __post_init__(self) -> None:
        for name in (
            "replicas",
            "max_batch",
            "max_batch_tokens",
            "max_padding",
            "max_waiting_rows",
        ):
            at_least(getattr(self, name), 1, name)
        above(self.slowdown, 0, "slowdown")
        at_least(self.floor_ms, 0, "floor_ms")
        for name in ("max_age_s", "done_in_s", "busy", "up_s", "down_s"):
            above(getattr(self, name), 0, name)
        at_least(self.start_s, 0, "start_s")

    @property
    def scales(self) -> bool:
        return self.max_replicas > self.replicas


@dataclass(frozen=True)
class Plan:
    """What to compare: a fixed plan (split, codec, exits), or one of the live planners.

    name      unique among the scenario's
    planner   "fixed", or as the agent's `plan`: "auto", "neurosurgeon", "spinn", "splitee"
    split     of "fixed": layers on the device; below 0: the record's own
    codec     of hidden states; empty: the record's own, or the planner's choice
    point     operating point of the record: "own", "never" (no early exits), or one of its sweep
    min_split of a planner: samples are sent no earlier
    """

    name: str
    planner: str = FIXED
    split: int = -1
    codec: str = ""
    point: str = "own"
    min_split: int = 0

    def __post_init__(self) -> None:
        one_of(self.planner, PLANS, "planner")
        at_least(self.min_split, 0, "min_split")
        if self.planner != FIXED and self.split >= 0:
            raise ConfigError(
                f'split with planner = "{self.planner}", which chooses it: drop one of them'
            )


@dataclass(frozen=True)
class Fault:
    """what "cloud": nothing answers, and connections are refused (how = "refused") or left hanging ("silent")
    "link"     the same, of the link
    "replica"  one engine dies with what it holds, and another takes its place after `for_s`
    """

    what: str
    at_s: float
    for_s: float
    how: str = "refused"

    def __post_init__(self) -> None:
        one_of(self.what, ("cloud", "link", "replica"), "what")
        one_of(self.how, ("refused", "silent"), "how")
        at_least(self.at_s, 0, "at_s")
        above(self.for_s, 0, "for_s")


@dataclass(frozen=True)
class Costs:
    """Energy: the device's watts while it computes, the radio's while it sends or receives, and what
    waking the radio costs. Money: an hour of a replica, a gigabyte of traffic. Round figures of ours:
    give your own.
    """

    compute_w: float = 3.0
    radio_w: float = 1.2
    radio_wake_j: float = 0.05
    replica_usd_per_hour: float = 0.10
    traffic_usd_per_gb: float = 0.05
