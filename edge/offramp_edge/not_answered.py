"""Why the cloud did not answer: whatever network and cloud do leaves the session as NotAnswered."""

from __future__ import annotations

from offramp_common.errors import (
    BundleMismatch,
    CloudBusy,
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    RequestError,
    UnknownCodec,
    WireError,
)

# The first that fits names the reason: the tree's leaves stand before their bases.
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (BundleMismatch, "mismatch"),
    (UnknownCodec, "codec"),
    (WireError, "malformed"),
    (RequestError, "refused"),
    (CloudBusy, "busy"),
    (CloudUnavailable, "unavailable"),
    (DeadlineExceeded, "timeout"),
    (TimeoutError, "timeout"),
    (ConfigError, "setup"),
)


class NotAnswered(Exception):
    """The cloud did not answer; `reason` is a key of answers.REASONS, `bytes_up` what was spent."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason
        self.bytes_up = 0


def reason_of(error: Exception) -> str:
    """The key of answers.REASONS for what a transport raised."""
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), "internal")
