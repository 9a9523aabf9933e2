"""The seam between device and cloud: what is asked, what comes back, and the protocol that carries it.

The worker takes any `Transport`: gRPC in production (edge/offramp_edge/grpc_transport.py), a function in
tests and in the simulator.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offramp_common.frames import Limits
from offramp_common.runner import Knobs

PROTOCOL_VERSION = 1
MAX_REQUEST_ID = 64
MAX_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Hello:
    """What the device holds: `digests` maps each depth it may cut at to the digest of the rest."""

    bundle: str
    digests: Mapping[int, bytes]
    codecs: tuple[str, ...]
    protocol: int = PROTOCOL_VERSION
    software: str = ""


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the cloud accepts, and the operating point it runs at."""

    codecs: tuple[str, ...]
    limits: Limits
    knobs: Knobs
    protocol: int = PROTOCOL_VERSION
    software: str = ""


@dataclass(frozen=True, slots=True)
class Offload:
    """Samples to finish.

    digest       of the layers that the cloud is to run (as in Hello)
    knobs        the operating point; empty means the cloud's own
    deadline_ms  milliseconds left when it is sent; None means no deadline
    priority     higher goes first where not all can; from -MAX_PRIORITY to MAX_PRIORITY
    """

    request_id: str
    bundle: str
    digest: bytes
    frame: bytes
    knobs: Knobs = field(default_factory=dict)
    deadline_ms: float | None = None
    traceparent: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """The answers of an Offload's rows, in their order: answers (B, ...) float32, exit_depth_B int64.

    queue_ms          in the cloud while none of its rows was run;  compute_ms  while layers ran for it
    exit_classes_BE   int32, what each exit deeper than the cut predicted, NO_CLASS (exit_classes.py) where a
                      row did not pass it; None but for methods that choose exits beforehand
    bytes_up, bytes_down   of the two messages as serialized, told by a transport that counts them
    """

    request_id: str
    answers: NDArray[np.float32]
    exit_depth_B: NDArray[np.int64]
    confidence_B: NDArray[np.float32]
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    exit_classes_BE: NDArray[np.int32] | None = None
    bytes_up: int = 0
    bytes_down: int = 0


class Transport(Protocol):
    """Carries work to the cloud.

    Both calls raise CloudUnavailable (retry later), DeadlineExceeded, or a RequestError that sending again
    cannot cure; nothing else for anything that the network or the cloud does.
    """

    async def hello(self, hello: Hello, *, timeout_s: float) -> Welcome: ...

    async def complete(self, work: Offload, *, timeout_s: float) -> Completion: ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class FunctionTransport:
    """A transport made of functions: the in-process cloud of tests and of the simulator."""

    on_complete: Callable[[Offload], Awaitable[Completion]]
    on_hello: Callable[[Hello], Awaitable[Welcome]]

    async def hello(self, hello: Hello, *, timeout_s: float) -> Welcome:
        return await self.on_hello(hello)

    async def complete(self, work: Offload, *, timeout_s: float) -> Completion:
        return await self.on_complete(work)

    async def close(self) -> None:
        """Nothing to close."""
