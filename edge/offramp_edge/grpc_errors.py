"""gRPC's status codes as errors of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

from offramp_common.errors import (
    BundleMismatch,
    CloudBusy,
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    OfframpError,
    RequestError,
)

_PUSHBACK = "grpc-retry-pushback-ms"
_ERRORS: Mapping[grpc.StatusCode, type[OfframpError]] = {
    grpc.StatusCode.CANCELLED: CloudUnavailable,
    grpc.StatusCode.UNKNOWN: CloudUnavailable,
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: BundleMismatch,
    grpc.StatusCode.ALREADY_EXISTS: RequestError,
    grpc.StatusCode.PERMISSION_DENIED: ConfigError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: CloudBusy,
    grpc.StatusCode.FAILED_PRECONDITION: BundleMismatch,
    grpc.StatusCode.ABORTED: CloudUnavailable,
    grpc.StatusCode.OUT_OF_RANGE: RequestError,
    grpc.StatusCode.UNIMPLEMENTED: ConfigError,
    grpc.StatusCode.INTERNAL: CloudUnavailable,
    grpc.StatusCode.UNAVAILABLE: CloudUnavailable,
    grpc.StatusCode.DATA_LOSS: CloudUnavailable,
    grpc.StatusCode.UNAUTHENTICATED: ConfigError,
}
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def numbered(code: int, message: str, retry_after_ms: float) -> OfframpError:
    """For a status that came as a number, in a message."""
    return error_of(_BY_NUMBER.get(code), message, retry_after_ms)


def translated(error: grpc.aio.AioRpcError) -> OfframpError:
    said: Any = error.trailing_metadata() or ()
    pushback = dict(said).get(_PUSHBACK, "")
    text = pushback.decode() if isinstance(pushback, bytes) else pushback
    retry_after_ms = (
        float(text) if text.isdecimal() else 0.0
    )  # negative: "do not retry", by gRPC's rules
    return error_of(error.code(), error.details() or "no details", retry_after_ms)


def error_of(
    code: grpc.StatusCode | None, message: str, retry_after_ms: float = 0.0
) -> OfframpError:
    name = "an unknown status" if code is None else code.name
    if "SSL_ERROR_SSL" in message:  # no status of its own: gRPC says UNAVAILABLE
        return ConfigError(f"{message}; check --ca, and that the cloud serves TLS for this address")
    if "Socket closed" in message:
        message += (
            " (a cloud with TLS ends so who comes without, or without a certificate it wants)"
        )
    kind = CloudUnavailable if code is None else _ERRORS.get(code, CloudUnavailable)
    if kind is CloudBusy:
        return CloudBusy(f"{name}: {message}", retry_after_ms)
    return kind(f"{name}: {message}")
