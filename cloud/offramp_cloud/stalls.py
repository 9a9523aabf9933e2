"""Devices that stop in the middle: a call begun without its request, a reply that is not taken; and streams
that nothing is asked on.

gRPC's Python waits for either for ever, and the call keeps its place meanwhile. A call without its request
is refused. One whose reply is not taken cannot be: a status queues behind the reply. Its connection is
shut, which ends it as the device's going away would. An idle stream ends well (DeviceStream does it).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import Counter
from typing import Any
from urllib.parse import unquote

import grpc

from offramp_cloud.identity import Caller

log = logging.getLogger(__name__)

REQUEST, REPLY, IDLE = "request", "reply", "idle"
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_LAST_CHANCE_S = 1.0  # for a status to be read by who begins to take replies again


class Stalls:
    """One event loop.

    timeout_s   how long a request may take to come, and a reply to be taken
    ended       calls that were ended for it, by REQUEST and REPLY, and streams for being IDLE
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.ended: Counter[str] = Counter({REQUEST: 0, REPLY: 0, IDLE: 0})

    async def request(self, context: Any) -> bytes:
        """The call's one request; ends the call when it does not come."""
        try:
            async with asyncio.timeout(self.timeout_s):
                raw = await context.read()
        except TimeoutError:
            self.ended[REQUEST] += 1
            late = f"the call's request has not come in {self.timeout_s:g} s; send it at once"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, late)
        if raw is _EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a call without a request")
        return bytes(raw)

    def replies(self, context: Any, caller: Caller) -> None:
        """The call is about to send its one reply and its end."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.timeout_s, self._shut, caller)
        context.add_done_callback(lambda _: timer.cancel())

    async def end(self, context: Any, caller: Caller) -> None:
        """End a stream with a reply that has not been taken: by a status, if that still gets through."""
        gone = (
            f"no reply was taken for {self.timeout_s:g} s; open another stream and read replies as "
            "they come"
        )
        aborting = asyncio.create_task(context.abort(grpc.StatusCode.UNAVAILABLE, gone))
        await asyncio.wait({aborting}, timeout=_LAST_CHANCE_S)
        if aborting.done():
            self.ended[REPLY] += 1
        else:
            self._shut(caller)
        with contextlib.suppress(
            grpc.aio.InternalError
        ):  # the status went down with the connection
            await aborting

    def _shut(self, caller: Caller) -> None:
        self.ended[REPLY] += 1
        shut = shut_connection(caller.peer)
        log.warning(
            "no reply taken for %g s by %r at %s; %s",
            self.timeout_s,
            caller.device,
            caller.peer,
            "its connection is shut" if shut else "its connection was not found",
        )


def shut_connection(peer: str) -> bool:
    """Shut this process's connection to `peer`, as gRPC writes it; False where there is none.

    gRPC finds it ended by the other side. It hands out no connection: hence the look through all files."""
    host, _, port = unquote(peer.partition(":")[2]).rpartition(":")
    there = (host.strip("[]"), port)
    for number in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # no socket, not connected, or closed since
            copy = os.dup(int(number))
            try:
                one = socket.socket(fileno=copy)
            except OSError:
                os.close(copy)
                continue
            with one:
                address = one.getpeername()
                # gRPC listens for both kinds of addresses on IPv6 sockets.
                known = isinstance(address, tuple) and address[0].removeprefix("::ffff:")
                if known and (known, str(address[1])) == there:
                    one.shutdown(socket.SHUT_RDWR)
                    return True
    return False
