"""How the worker reaches its cloud: over TLS, or in the clear where that is safe or asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from pathlib import Path

from offramp_common.errors import ConfigError
from offramp_common.transport import Transport

Connect = Callable[[], Transport | None]
File = str | Path | None


def connector(cloud: str | None, ca: File, cert: File, key: File, insecure: bool) -> Connect:
    """A function that makes the transport, to be called in the event loop that will use it.

    Raises ConfigError for an address or a choice of security that cannot be meant."""
    if cloud is None:
        if ca or cert or key:
            raise ConfigError("TLS files without a cloud: give its HOST:PORT, or leave them out")
        return lambda: None
    host = split_address(cloud)[0]
    if ca is None and (cert or key):
        raise ConfigError("a device certificate without the authority's: give --ca FILE too")
    if ca is not None and insecure:
        raise ConfigError("--ca and --insecure exclude each other: drop one")
    if ca is None and not insecure and not is_loopback(host):
        raise ConfigError(
            f"{cloud} is another machine: give --ca FILE (the authority that signed the cloud's "
            "certificate), or --insecure to send everything in the clear"
        )

    def connect() -> Transport:
        from offramp_edge.grpc_transport import GrpcTransport

        if ca is None:
            return GrpcTransport(cloud)
        from offramp_common.certs import channel_credentials

        return GrpcTransport(cloud, channel_credentials(ca, cert, key))

    return connect


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT (IPv6 in brackets) as its two parts. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ConfigError(f"{address!r}: must be HOST:PORT, such as 127.0.0.1:8443 or [::1]:8443")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """True for addresses that no other machine can reach or listen on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
