"""A development CA, certificates for a cloud and its devices, and the gRPC credentials made of them.

`init` and `issue` write PEM files into one directory and need the package `cryptography`:

    ca.pem      the authority's certificate, for every device     ca.key   who has it can issue
    server.pem  the cloud's certificate                           server.key
    NAME.pem    a device's certificate                            NAME.key

`server_credentials` and `channel_credentials` need neither that package nor ca.key. They first try
the files out in a TLS handshake in memory: what gRPC would only show as a connection that fails is
reported as a file, a fault and a remedy.

revocation.py keeps the list of those that are no longer good. For development and closed test beds:
keys are not encrypted.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import ssl
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from offramp_common.errors import ConfigError

if TYPE_CHECKING:
    import grpc

_log = logging.getLogger(__name__)

DEFAULT_HOSTS = ("localhost", "127.0.0.1", "::1")
DEFAULT_DAYS = 365
_MAX_DAYS = 3650
_DEVICE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")  # RFC 5280: at most 64
_HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?")
_EXPIRED, _NOT_YET_VALID = 10, 9  # X509_V_ERR_CERT_... of OpenSSL


class KeyPair(NamedTuple):
    """Where a certificate and its private key are."""

    cert: Path
    key: Path


def init(
    directory: Path | str,
    hosts: Iterable[str] = DEFAULT_HOSTS,
    days: int = DEFAULT_DAYS,
    force: bool = False,
) -> tuple[KeyPair, KeyPair]:
    """Create the authority and the server's certificate for `hosts`; returns both, in this order.

    Hosts are names or IP addresses as clients will write them, without a port. Both certificates
    are valid for `days` days. `force` replaces what is there; every device then needs a new
    certificate. ConfigError when a file is there (without `force`), when a host or the days are no
    good, when the directory cannot be written, or without `cryptography`.
    """
    _need_cryptography()
    from offramp_common import certs_x509

    names = [_checked_host(host) for host in hosts]
    if not names:
        raise ConfigError("no host for the server's certificate: give one, such as localhost")
    _check_days(days)
    ca, server = pair_of(directory, "ca"), pair_of(directory, "server")
    _check_free((*ca, *server), force)
    authority = certs_x509.new_authority(days)
    _write(ca, authority.key_pem(), authority.cert_pem())
    issued = certs_x509.new_server(authority, names, days)
    _write(server, issued.key_pem(), issued.cert_pem())
    return ca, server


def issue(
    directory: Path | str, name: str, days: int = DEFAULT_DAYS, force: bool = False
) -> KeyPair:
    """Create a device's certificate, signed by the directory's authority; returns its files.

    The name is what the cloud will know the device by: letters, digits, dashes and dots, 64 at
    most, the first and the last a letter or a digit. Valid for `days` days, but no longer than the
    authority. ConfigError as for `init`, and when the authority is missing, damaged or expired.
    """
    _need_cryptography()
    from offramp_common import certs_x509

    if not _DEVICE_NAME.fullmatch(name) or name.lower() in ("ca", "server"):
        raise ConfigError(
            f"device name {name!r}: use letters, digits, dashes and dots, at most 64, a letter or "
            f"digit at both ends, and neither 'ca' nor 'server'"
        )
    _check_days(days)
    ca, device = pair_of(directory, "ca"), pair_of(directory, name)
    cert_pem, key_pem = (_read(path, f"offramp certs init {directory}") for path in ca)
    try:
        authority = certs_x509.load(cert_pem, key_pem)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{ca.cert} and {ca.key} are no authority of ours ({error}): make a new one with "
            f"`offramp certs init {directory} --force`"
        ) from error
    _check_authority(ca.cert)
    _check_free(device, force)
    issued = certs_x509.new_device(authority, name, days)
    _write(device, issued.key_pem(), issued.cert_pem())
    return device


def server_credentials(
    directory: Path | str, require_client: bool = False
) -> grpc.ServerCredentials:
    """Credentials for a gRPC server from a directory that `init` has filled.

    With `require_client`, only clients with a certificate of the same authority are let in, and
    `context.peer_identities()` is their device's name. ConfigError when a file is missing, expired
    or does not fit the others.
    """
    import grpc

    ca, pair = pair_of(directory, "ca").cert, pair_of(directory, "server")
    remedy = f"offramp certs init {directory} --force"
    ca_pem, cert_pem, key_pem = (_read(path, remedy) for path in (ca, *pair))
    _check_authority(ca)
    _rehearse(ca, pair, remedy, server_side=True)
    return grpc.ssl_server_credentials(
        [(key_pem, cert_pem)],
        root_certificates=ca_pem if require_client else None,
        require_client_auth=require_client,
    )


def channel_credentials(
    ca: Path | str, cert: Path | str | None = None, key: Path | str | None = None
) -> grpc.ChannelCredentials:
    """Credentials for a gRPC channel: whom to trust, and who we are if the server wants to know.

    `cert` and `key` go together. ConfigError when a file is missing, expired or does not fit the
    others.
    """
    import grpc

    if (cert is None) != (key is None):
        raise ConfigError("a client certificate and its key go together: give both or neither")
    ca = Path(ca)
    ca_pem = _read(ca, "copy ca.pem from the cloud's certificate directory")
    _check_authority(ca)
    if cert is None or key is None:
        return grpc.ssl_channel_credentials(ca_pem)
    pair = KeyPair(Path(cert), Path(key))
    remedy = f"offramp certs issue {pair.cert.parent} --name {pair.cert.stem} --force"
    cert_pem, key_pem = (_read(path, remedy) for path in pair)
    _rehearse(ca, pair, remedy, server_side=False)
    return grpc.ssl_channel_credentials(ca_pem, key_pem, cert_pem)


def pair_of(directory: Path | str, name: str) -> KeyPair:
    """Where the certificate called `name` and its key are kept, whether or not they exist."""
    return KeyPair(Path(directory) / f"{name}.pem", Path(directory) / f"{name}.key")


def _need_cryptography() -> None:
    if find_spec("cryptography") is None:
        raise ConfigError(
            "making certificates needs the package cryptography: pip install 'offramp[cloud]'"
        )


def _checked_host(host: str) -> str:
    host = host.removeprefix("[").removesuffix("]")
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    if not _HOST_NAME.fullmatch(host):
        raise ConfigError(f"host {host!r}: give a name or an IP address, without port or scheme")
    return host


def _check_days(days: int) -> None:
    if not 1 <= days <= _MAX_DAYS:
        raise ConfigError(f"{days} days: a certificate is valid for 1 to {_MAX_DAYS}")


def _check_free(paths: Iterable[Path], force: bool) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        raise ConfigError(f"{', '.join(there)} exist already: --force replaces them")


def _read(path: Path, remedy: str) -> bytes:
    try:
        data = path.read_bytes()
        if path.suffix == ".key" and path.stat().st_mode & 0o077:
            _log.warning("%s can be read by others: chmod 600 %s", path, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it ({error.strerror}): {remedy}") from error
    return data


def _write(pair: KeyPair, key_pem: bytes, cert_pem: bytes) -> None:
    """Each file appears whole or not at all, and a key is never readable by others."""
    for path, data, mode in ((pair.key, key_pem, 0o600), (pair.cert, cert_pem, 0o644)):
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.unlink(missing_ok=True)  # of a run that was interrupted; its mode may be another
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
            part.replace(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot write it: {error.strerror}") from error


def _check_authority(ca: Path) -> None:
    """ConfigError unless the file holds an authority's certificate that is valid now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with suppress(ssl.SSLError):
        context.load_verify_locations(ca)
    found = context.get_ca_certs()
    if not found:
        raise ConfigError(f"{ca}: no authority's certificate in it: give the ca.pem of the cloud")
    starts_s, ends_s = (
        [ssl.cert_time_to_seconds(str(each[when])) for each in found]
        for when in ("notBefore", "notAfter")
    )
    if min(starts_s) > time.time():  # as on a device that has no battery for its clock
        raise ConfigError(f"{ca}: not valid before {found[0]['notBefore']}: is the clock right?")
    if max(ends_s) <= time.time():
        raise ConfigError(
            f"{ca}: expired on {found[0]['notAfter']}: make a new authority with `offramp certs "
            f"init {ca.parent} --force`, then new certificates for the devices"
        )


def _rehearse(ca: Path, pair: KeyPair, remedy: str, *, server_side: bool) -> None:
    """A handshake in memory in which `pair` is presented to a peer that trusts `ca`."""
    presenter, verifier = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if serves else ssl.PROTOCOL_TLS_CLIENT)
        for serves in (server_side, not server_side)
    )
    for context in (presenter, verifier):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        try:
            # Both show the pair, since whoever serves must show one; only the presenter's is judged.
            # The empty password keeps OpenSSL from asking for one on the terminal.
            context.load_cert_chain(*pair, password=lambda: "")
        except ssl.SSLError as error:
            why = "the key is another certificate's" if "KEY_VALUES" in str(error) else str(error)
            raise ConfigError(f"{pair.cert} and {pair.key}: {why}: {remedy}") from error
    verifier.load_verify_locations(ca)
    verifier.verify_mode = ssl.CERT_REQUIRED
    try:
        _shake_hands(*((presenter, verifier) if server_side else (verifier, presenter)))
    except ssl.SSLCertVerificationError as error:
        faults = {
            _EXPIRED: "has expired",
            _NOT_YET_VALID: "is not valid yet: is the clock right?",
        }
        fault = faults.get(error.verify_code, f"is not one of {ca} ({error.verify_message})")
        raise ConfigError(f"{pair.cert}: {fault}: {remedy}") from error


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(3):  # flights; TLS 1.3 needs two
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
