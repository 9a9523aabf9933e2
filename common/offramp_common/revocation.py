"""Certificates that are no longer good: a list that is read again when it changes.

The file is either text, one serial number (hex) a line with what follows a `#` for people, as
`offramp certs revoke` writes it; or a PEM revocation list (CRL) of the same authority.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

from offramp_common import certs
from offramp_common.errors import ConfigError

log = logging.getLogger(__name__)

FILE_NAME = "revoked.txt"
_LOOK_S = 1.0  # how often the file's date is looked at
_SERIAL = re.compile(r"[0-9A-Fa-f]{1,40}")  # RFC 5280: at most 20 bytes
_PEM = b"-----BEGIN X509 CRL-----"


class Revocations:
    """The list in a file. A file that is not there revokes nothing; one that is damaged keeps the last
    list that was read, and is complained of."""

    def __init__(self, path: Path, ca: Path | None = None) -> None:
        """`ca`: whose signature a CRL must have. Raises ConfigError for a damaged file."""
        self._path, self._ca = path, ca
        self._serials: frozenset[int] = frozenset()
        self._stamp: tuple[int, int] | None = None
        self._looked_s = time.monotonic()
        self._read(self._stamp_now())

    def __contains__(self, serial: object) -> bool:
        now_s = time.monotonic()
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            self.look()
        return serial in self._serials

    def look(self) -> None:
        """Read the file again if it has changed."""
        stamp = self._stamp_now()
        if stamp != self._stamp:
            try:
                self._read(stamp)
                log.info("%s: %d certificates are revoked", self._path, len(self._serials))
            except ConfigError as error:
                log.error("%s; the last list stays in force", error)

    def _stamp_now(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size

    def _read(self, stamp: tuple[int, int] | None) -> None:
        self._stamp = stamp
        self._serials = frozenset() if stamp is None else serials_in(self._path, self._ca)


def serials_in(path: Path, ca: Path | None = None) -> frozenset[int]:
    """The revoked serial numbers. Raises ConfigError for what is no such list."""
    try:
        data = path.read_bytes()
        if _PEM in data:
            from offramp_common.certs_x509 import revoked_in

            return revoked_in(data, None if ca is None else ca.read_bytes())
        lines = [line.partition("#")[0].strip() for line in data.decode().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a list of revoked certificates: {error}") from error
    wrong = [line for line in lines if line and not _SERIAL.fullmatch(line)]
    if wrong:
        raise ConfigError(
            f"{path}: {wrong[0][:80]!r} is no serial number: give one a line, in hex digits"
        )
    return frozenset(int(line, 16) for line in lines if line)


def revoke(directory: Path | str, name: str) -> Path:
    """Put a device's certificate on the directory's list; returns the list's file.

    Gateways that use the directory refuse it within about a second. Raises ConfigError when there is
    no such certificate.
    """
    from offramp_common.certs_x509 import serial_of

    cert, path = certs.pair_of(directory, name).cert, Path(directory) / FILE_NAME
    try:
        serial = serial_of(cert.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{cert}: no certificate to revoke: {error}") from error
    before = path.read_text() if path.exists() else ""
    if not path.exists() or serial not in serials_in(path):
        part = path.with_name(f".{path.name}.part")
        part.write_text(f"{before.rstrip()}\n{serial:x}  # {name}\n".lstrip())
        part.replace(path)
    return path
