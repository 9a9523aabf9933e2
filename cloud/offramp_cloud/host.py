"""Engines behind bytes: what a gateway's process or a Serve replica hosts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from offramp_cloud.engine import Engine
from offramp_cloud.statuses import Outcome, UnknownBundle, failure, parsed
from offramp_common.messages import (
    completion_to_pb,
    hello_from_pb,
    offload_from_pb,
    welcome_to_pb,
)
from offramp_common.wire import offload_pb2 as pb


class Host:
    """Takes and gives protobuf bytes; never raises for what a device sent."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        """Raises ValueError when two engines hold bundles of one name."""
        listed = list(engines)
        self._engines = {engine.name: engine for engine in listed}
        if len(self._engines) != len(listed):
            raise ValueError(f"two of {[engine.name for engine in listed]} share a name")

    @property
    def bundles(self) -> tuple[str, ...]:
        return tuple(self._engines)

    @property
    def engines(self) -> tuple[Engine, ...]:
        return tuple(self._engines.values())

    async def complete(self, request: bytes, budget_ms: float | None) -> Outcome:
        """`budget_ms`: what the gateway knows of the caller's patience; the shorter one counts."""
        try:
            work = offload_from_pb(parsed(pb.OffloadRequest, request))
            known = [ms for ms in (work.deadline_ms, budget_ms) if ms is not None]
            work = replace(work, deadline_ms=min(known, default=None))
            done = await self._engine(work.bundle).complete(work)
            return Outcome(completion_to_pb(done).SerializeToString())
        except Exception as error:  # noqa: BLE001 - becomes a status; a bug is logged there
            return failure(error)

    def hello(self, request: bytes) -> Outcome:
        try:
            hello = hello_from_pb(parsed(pb.HelloRequest, request))
            welcome = self._engine(hello.bundle).welcome(hello)
            return Outcome(welcome_to_pb(welcome).SerializeToString())
        except Exception as error:  # noqa: BLE001
            return failure(error)

    def counters(self) -> dict[str, dict[str, Any]]:
        """Bundle -> its engine's counters and `work_left`, as plain data."""
        return {
            name: engine.counters.to_json() | {"work_left": engine.queued_layer_tokens}
            for name, engine in self._engines.items()
        }

    async def close(self) -> None:
        for engine in self._engines.values():
            await engine.close()

    def _engine(self, bundle: str) -> Engine:
        engine = self._engines.get(bundle)
        if engine is None:
            served = ", ".join(self._engines)
            raise UnknownBundle(f"bundle {bundle!r:.80} is not served here; served: {served}")
        return engine
