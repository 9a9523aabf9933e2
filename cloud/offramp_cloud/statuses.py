"""Errors as gRPC statuses: the one table, and what crosses to the gateway instead of an exception."""

from __future__ import annotations

import logging
from typing import NamedTuple, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from offramp_common.errors import (
    BundleMismatch,
    CloudBusy,
    CloudUnavailable,
    DeadlineExceeded,
    RequestError,
    WireError,
)

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)


class ProtocolMismatch(RequestError):
    """The two tiers speak different versions of the contract."""


class UnknownBundle(RequestError):
    """No bundle of that name is served here."""


class Revoked(RequestError):
    """The device's certificate is on the revocation list."""


# The first entry that fits counts; proto/offload.proto says what each status means to a device.
_TABLE: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (BundleMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (ProtocolMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (UnknownBundle, grpc.StatusCode.NOT_FOUND),
    (Revoked, grpc.StatusCode.PERMISSION_DENIED),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (CloudBusy, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (CloudUnavailable, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
)
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


class Outcome(NamedTuple):
    """What became of a call: a reply's bytes, or a status and its message. Crosses processes.

    Errors cross as values, so that an exception on the way can only mean that a replica is gone.
    `retry_after_ms`: when one that was refused for load may come again, 0 where nothing is known.
    """

    payload: bytes = b""
    code: int = 0
    message: str = ""
    retry_after_ms: float = 0.0

    @property
    def status(self) -> grpc.StatusCode:
        return _BY_NUMBER[self.code]


def failure(error: Exception) -> Outcome:
    """The outcome of a call that raised; what is not one of ours is a bug and becomes INTERNAL."""
    for kind, status in _TABLE:
        if isinstance(error, kind):
            retry_after_ms = error.retry_after_ms if isinstance(error, CloudBusy) else 0.0
            return Outcome(b"", status.value[0], str(error), retry_after_ms)
    log.error("a request failed", exc_info=error)
    # The text of a stranger's exception may tell more than a device should know.
    message = f"a fault in the cloud ({type(error).__name__}); its log has the traceback"
    return Outcome(b"", grpc.StatusCode.INTERNAL.value[0], message)


def parsed(kind: type[M], data: bytes) -> M:
    """The message in `data`; raises WireError, where gRPC's own parser would say INTERNAL."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise WireError(f"{len(data)} bytes that are no {kind.DESCRIPTOR.name}") from None
