"""What the gateway lets in, before any replica hears of it."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from offramp_cloud.identity import Caller
from offramp_cloud.quotas import Quota, Quotas
from offramp_cloud.statuses import Revoked
from offramp_common.errors import CloudBusy
from offramp_common.revocation import Revocations


@dataclass(frozen=True, slots=True)
class Admission:
    """The gateway's limits.

    in_flight_per_stream   requests of one stream at work; reading stops there
    max_bytes_in_flight    of all requests at work; beyond it they are refused as CloudBusy
    max_wait_s             the longest that any request is waited for, deadline or not
    stall_timeout_s        how long a call's request may take to come, and a reply to be taken
    idle_timeout_s         how long a stream may ask for nothing
    quota                  of each device
    """

    in_flight_per_stream: int = 32
    max_bytes_in_flight: int = 256 * 2**20
    max_wait_s: float = 60.0
    stall_timeout_s: float = 30.0
    idle_timeout_s: float = 900.0
    quota: Quota = field(default_factory=Quota)


class Entrance:
    """Who may come in now, and what is inside."""

    def __init__(self, admission: Admission, revocations: Revocations | None = None) -> None:
        self._most = admission.max_bytes_in_flight
        self._revocations: Container[int] = () if revocations is None else revocations
        self._quotas = Quotas(admission.quota)
        self._bytes = 0

    def check(self, caller: Caller) -> None:
        """Raises Revoked. Asked for each request: streams outlive lists."""
        if caller.serial is not None and caller.serial in self._revocations:
            raise Revoked(
                f"the certificate of {caller.device!r} (serial {caller.serial:x}) has been "
                "revoked; have another one issued"
            )

    @contextmanager
    def room_for(self, caller: Caller, nbytes: int) -> Iterator[None]:
        """The request is inside meanwhile. Raises CloudBusy."""
        if self._bytes and self._bytes + nbytes > self._most:
            raise CloudBusy(
                f"{self._bytes} bytes of requests at work, at most {self._most}; retry later"
            )
        with self._quotas.request(caller.key):
            self._bytes += nbytes
            try:
                yield
            finally:
                self._bytes -= nbytes

    def charge(self, caller: Caller, layer_runs: int) -> None:
        self._quotas.charge(caller.key, layer_runs)
