"""The error tree, sorted by what the caller does about it.

    OfframpError                    catch this to catch all of ours
    +-- ConfigError                 fix the set-up: a setting, a file, a certificate, a missing package
    |   +-- BundleError             the bundle is damaged, incomplete or of another format
    |   +-- DataError               a data file has a bad row (names the file and the line)
    +-- RequestError                fix the request; sending it again cannot help
    |   +-- WireError               bytes that are not a well-formed frame within the limits
    |   +-- UnknownCodec            a codec that this side does not have
    |   +-- BundleMismatch          the two tiers hold different models for these layers
    +-- CloudUnavailable            retry later; answer here meanwhile
    |   +-- CloudBusy               the cloud is up and refused for load
    +-- DeadlineExceeded            answer here, now

A message names the value, the limit and the remedy.
"""


class OfframpError(Exception):
    """Base of all errors that offramp raises on purpose."""


class ConfigError(OfframpError):
    """The set-up is wrong: a setting, a file, a certificate or a missing package."""


class BundleError(ConfigError):
    """The bundle is damaged, incomplete or of a format that this version does not read."""


class DataError(ConfigError):
    """A data file has a bad row; the message names the file and the line."""


class RequestError(OfframpError):
    """The request is wrong: sending it again cannot help."""


class WireError(RequestError):
    """Bytes that are not a well-formed frame within the declared limits."""


class UnknownCodec(RequestError):
    """A codec that this side does not have."""


class BundleMismatch(RequestError):
    """The two tiers hold different models for the layers in question."""


class CloudUnavailable(OfframpError):
    """The cloud cannot be reached or cannot answer now: retry later, answer here meanwhile."""


class CloudBusy(CloudUnavailable):
    """The cloud is up and refused the request for load.

    retry_after_ms   when it asks to be tried again; 0 where it does not say
    """

    def __init__(self, message: str = "", retry_after_ms: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class DeadlineExceeded(OfframpError):
    """The time the caller gave has passed."""
