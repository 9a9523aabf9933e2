"""The worker's numbers for Prometheus: counted as answers come, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from offramp_edge.agent import Agent
from offramp_edge.answers import Answer
from offramp_edge.breaker import ASIDE, CONNECTING, REFUSED, UP
from offramp_edge.chooser import Chooser
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
        self._cloud_gauges(agent)
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

    def _cloud_gauges(self, agent: Agent) -> None:
        session = agent.session
        if session is None:
            return
        states = Gauge(
            "offramp_edge_cloud", "1 for the state it is in", ("state",), registry=self.registry
        )
        for state in _STATES:
            states.labels(state).set_function(partial(_is_state, session, state))
        nan = float("nan")
        self._gauge(
            "link_rtt_ms", "Round trip as estimated", lambda: session.link.estimate().rtt_ms or nan
        )
        self._gauge(
            "link_uplink_mbps",
            "Uplink goodput as estimated; NaN while unknown",
            lambda: session.link.estimate().uplink_mbps or nan,
        )
        self._gauge(
            "link_failures", "Exchanges without an answer", lambda: session.link.estimate().failures
        )

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


def _is_state(session: CloudSession, state: str) -> float:
    return float(session.breaker.state == state)
