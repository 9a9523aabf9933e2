"""What the deadline contract costs and saves, for Prometheus: read when it is asked for."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Gauge

from offramp_edge.agent import Agent


def add_contract_gauges(registry: CollectorRegistry, agent: Agent) -> None:
    """Of an agent with a cloud."""

    def gauge(name: str, text: str) -> Gauge:
        return Gauge(f"offramp_edge_{name}", text, registry=registry)

    session, offloads, hedges = agent.session, agent.offloads, agent.hedges
    if session is None or offloads is None:
        return
    for name, text in (
        ("begun", "Samples that the device ran on with while the cloud was late"),
        ("won", "Of them, those that left here before the cloud's answer came"),
        ("layers", "Layers run for them"),
        ("wasted", "Of these, layers that decided no answer"),
    ):
        gauge(f"hedges_{name}", text).set_function(partial(getattr, hedges, name))
    gauge("in_flight", "Samples sent, or waiting for room in the air").set_function(
        lambda: offloads.in_flight
    )
    gauge("retries", "Samples sent again").set_function(lambda: offloads.budget.retries)
    gauge("late_replies", "Replies that nobody waited for any more").set_function(
        lambda: session.late_replies
    )
    if agent.resender is None:
        return
    resender, spool = agent.resender, agent.resender.spool
    gauge("spool_samples", "Samples that wait on disk").set_function(lambda: spool.waiting)
    gauge("spool_bytes", "Their size").set_function(lambda: spool.nbytes)
    gauge("spool_answered", "Final answers written").set_function(lambda: spool.final)
    gauge("spool_dropped", "Samples dropped for want of room").set_function(lambda: spool.dropped)
    gauge("spool_lost", "Samples that the disk did not take").set_function(lambda: resender.lost)
