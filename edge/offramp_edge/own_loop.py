"""The worker's event loop, which gRPC may speak to once more when it is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import TypeVarTuple

Ts = TypeVarTuple("Ts")

_GRPC = "grpc._cython.cygrpc"


class OwnLoop(asyncio.SelectorEventLoop):
    """gRPC's core tells the end of a call that was cancelled a moment later, to the loop that it was made in.

    Nobody waits for that any more. Where the loop is closed by then, gRPC's poller, in whichever event loop
    of the process it runs, would print a traceback for each."""

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        if self.is_closed() and getattr(callback, "__module__", "") == _GRPC:
            return asyncio.Handle(callback, args, self)
        return super().call_soon_threadsafe(callback, *args, context=context)
