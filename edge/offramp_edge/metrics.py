"""The worker's numbers for Prometheus: counted as answers come, read when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from offramp_edge.agent import Agent
from offramp_edge.answers import Answer
from offramp_edge.breaker import ASIDE, CONNECTING, REFUSED, UP
from offramp_edge.chooser import Chooser
from offramp_edge.contract_metrics import add_contract_gauges
from offramp_edge.link import Link, LinkEstimate
from offramp_edge.session import CloudSession

_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_STATES = (CONNECTING, UP, ASIDE, REFUSED)


class Metrics:
    """Counts an agent's answers from now on; `registry` is what /metrics shows."""

    def __init__(self, agent: Agent, n_layers: int, chooser: Chooser | None = None) -> None:
        self.registry = CollectorRegistry()
        self._answers = self._counter("answers", "Answers by place", ("where",))
        self._fallbacks = self._counter(
            "fallbacks", "Answers the cloud failed to give", ("reason",)
        )
        self._up = self._counter("bytes_up", "Bytes of requests to the cloud, as serialized")
        self._down = self._counter("bytes_down", "Bytes of the cloud's replies, as serialized")
        self._depth = self._histogram(
            "exit_depth", "Layers that decided an answer", tuple(range(1, n_layers + 1))
        )
        self._ms = self._histogram(
            "answer_ms", "Milliseconds from sample to answer", _MS, ("where",)
        )
        self._stage = self._histogram(
            "stage_ms", "Milliseconds in a stage, of the answers that passed it", _MS, ("stage",)
        )
        self._cloud_gauges(agent)
        add_contract_gauges(self.registry, agent)
        if chooser is not None:
            self._bandit_gauges(chooser)
        agent.on_answer.append(self._answered)

    def _answered(self, answer: Answer) -> None:
        self._answers.labels(answer.where).inc()
        if answer.reason:
            self._fallbacks.labels(answer.reason).inc()
        self._up.inc(answer.bytes_up)
        self._down.inc(answer.bytes_down)
        self._depth.observe(answer.exit_depth)
        self._ms.labels(answer.where).observe(answer.ms)
        for stage, ms in asdict(answer.stages_ms).items():
            if ms:
                self._stage.labels(stage).observe(ms)

    def _cloud_gauges(self, agent: Agent) -> None:
        session = agent.session
        if session is None:
            return
        states = Gauge(
            "offramp_edge_cloud", "1 for the state it is in", ("state",), registry=self.registry
        )
        for state in _STATES:
            states.labels(state).set_function(partial(_is_state, session, state))
        self._link_gauges(session.link)
        times = session.cloud_times
        for name, text, read in (
            ("queue_ms", "What samples wait in the cloud, as it reports", lambda: times.queue_ms),
            (
                "layer_ms",
                "Of a layer in the cloud, for 16 tokens; NaN while unknown",
                lambda: times.layer_ms(16, math.nan),
            ),
        ):
            self._gauge(f"cloud_{name}", text, read)

    def _link_gauges(self, link: Link) -> None:
        """What the device believes of its link."""
        reads: tuple[tuple[str, str, Callable[[LinkEstimate], float | None]], ...] = (
            ("rtt_ms", "Round trip as estimated", lambda now: now.rtt_ms),
            (
                "uplink_mbps",
                "Uplink goodput as estimated; NaN while unknown",
                lambda now: now.uplink_mbps,
            ),
            (
                "queue_ms",
                "Until what was sent before has left, as estimated",
                lambda now: now.queue_ms,
            ),
            ("spread", "Typical relative error of a predicted time", lambda now: now.spread),
            (
                "stalls",
                "Exchanges that took four times what was expected",
                lambda now: now.stalls,
            ),
            ("failures", "Exchanges without an answer", lambda now: now.failures),
        )
        for name, text, read in reads:
            self._gauge(f"link_{name}", text, partial(_told, link, read))

    def _bandit_gauges(self, chooser: Chooser) -> None:
        bandit = chooser.bandit
        for name, text, count_E in (
            ("observed", "Samples that passed an exit, as far as is known", bandit.observed_E),
            ("disagreed", "Of them, with another class than the first exit's", bandit.disagreed_E),
        ):
            gauge = Gauge(f"offramp_edge_bandit_{name}", text, ("exit",), registry=self.registry)
            for index, depth in enumerate(chooser.exits):
                gauge.labels(depth).set_function(partial(count_E.item, index))

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"offramp_edge_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        return Histogram(
            f"offramp_edge_{name}", text, labels, buckets=buckets, registry=self.registry
        )

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(f"offramp_edge_{name}", text, registry=self.registry).set_function(read)


def _told(link: Link, read: Callable[[LinkEstimate], float | None]) -> float:
    value = read(link.estimate())
    return math.nan if value is None else value


def _is_state(session: CloudSession, state: str) -> float:
    return float(session.breaker.state == state)
