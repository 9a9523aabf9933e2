"""Who calls: the device's name and its certificate's serial number, from the TLS connection."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from offramp_common.certs_x509 import serial_of

_MAX_SHOWN = 64  # characters of a stranger's name


@dataclass(frozen=True, slots=True)
class Caller:
    """One end of a connection.

    device   common name in its certificate, else the first alternative name; "" without one
    serial   of its certificate, None without one
    peer     its address, as gRPC writes it
    """

    device: str = ""
    serial: int | None = None
    peer: str = ""

    @property
    def key(self) -> str:
        """Who it is for quotas: the device, or the address of one that has no name."""
        return self.device or self.peer.rpartition(":")[0]


def caller_of(context: Any) -> Caller:
    """The caller of a gRPC call; the names were checked in the handshake, when its certificate was."""
    seen = context.auth_context()
    names = [*seen.get("x509_common_name", ()), *seen.get("x509_subject_alternative_name", ())]
    pems = seen.get("x509_pem_cert", ())
    device = names[0].decode(errors="replace")[:_MAX_SHOWN] if names else ""
    return Caller(device, _serial(pems[0]) if pems else None, context.peer())


_serial = lru_cache(maxsize=4096)(serial_of)
