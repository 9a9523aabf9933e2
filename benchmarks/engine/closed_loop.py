"""Closed-loop clients: each has one request under way, and sends the next the moment it is answered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rivals import Clock, Server
from workload import Item


@dataclass(frozen=True)
class Measured:
    """requests/s, latencies in ms, and how many requests left where they do not when alone."""

    rate: float
    p50_ms: float
    p95_ms: float
    answered: int
    other_exits: int


def closed_loop(
    server: Server, stream: Iterator[Item], clients: int, seconds: float, clock: Clock
) -> Measured:
    """At least `seconds` after every client has been answered once, which is not counted."""
    sent_s: dict[int, float] = {}
    items: dict[int, Item] = {}
    number = 0

    def send() -> None:
        nonlocal number
        items[number], sent_s[number] = next(stream), clock()
        server.submit(number, items[number])
        number += 1

    for _ in range(clients):
        send()
    first = set(range(clients))
    latencies: list[float] = []
    other = 0
    began_s: float | None = None
    while began_s is None or clock() - began_s < seconds:
        for done, depth in server.work():
            if began_s is not None:
                latencies.append(clock() - sent_s[done])
                other += depth != items[done].exit_depth
            first.discard(done)
            del items[done], sent_s[done]
            send()
        if began_s is None and not first:
            began_s = clock()
    took_s = clock() - began_s
    p50, p95 = np.percentile(np.array(latencies) * 1e3, [50, 95])
    return Measured(len(latencies) / took_s, float(p50), float(p95), len(latencies), other)
