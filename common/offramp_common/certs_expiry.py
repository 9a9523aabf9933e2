"""When a certificate ends, read with the standard library alone: devices have no `cryptography`.

Only the two dates are looked for, along the fixed path that RFC 5280 (4.1) gives them; nothing is
verified here.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge

from offramp_common.errors import ConfigError

_SEQUENCE, _VERSION, _UTC_TIME = 0x30, 0xA0, 0x17
_END = "-----END CERTIFICATE-----"


def expires_s(path: Path | str) -> float:
    """Seconds since 1970 when the (first) certificate in a PEM file ends; ConfigError for a file
    without one."""
    try:
        text = Path(path).read_text()
        first = text[text.index("-----BEGIN CERTIFICATE-----") : text.index(_END) + len(_END)]
        return _not_after(ssl.PEM_cert_to_DER_cert(first))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it ({error.strerror})") from error
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{path}: no certificate in PEM ({error})") from error


def show_expiry(registry: CollectorRegistry, files: Mapping[str, Path | str]) -> None:
    """A gauge of when certificates end, by what each is for. They are read once: what counts is what
    this process has loaded. Raises ConfigError as `expires_s`."""
    gauge = Gauge(
        "offramp_certificate_expiry_timestamp_seconds",
        "When a certificate ends that was loaded at the start, in seconds since 1970.",
        ["file"],
        registry=registry,
    )
    for name, path in files.items():
        gauge.labels(name).set(expires_s(path))


def _not_after(der: bytes) -> float:
    _, certificate, _ = _element(der)
    _, body, _ = _element(certificate)
    tag, _, rest = _element(body)
    if tag == _VERSION:  # optional; the serial number comes next
        _, _, rest = _element(rest)
    _, _, rest = _element(rest)  # the signature's algorithm
    _, _, rest = _element(rest)  # the issuer
    tag, validity, _ = _element(rest)
    if tag != _SEQUENCE:
        raise ValueError("no period of validity where it belongs")
    _, _, rest = _element(validity)  # not before
    tag, until, _ = _element(rest)
    digits = until.decode("ascii").removesuffix("Z")
    if tag == _UTC_TIME:  # two digits of a year, from 1950 to 2049
        digits = ("19" if digits >= "50" else "20") + digits
    return datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp()


def _element(data: bytes) -> tuple[int, bytes, bytes]:
    """(tag, content, what follows) of the DER element at the start."""
    length, at = data[1], 2
    if length & 0x80:
        at += length & 0x7F
        length = int.from_bytes(data[2:at])
    if len(data) < at + length:
        raise ValueError("cut off")
    return data[0], data[at : at + length], data[at + length :]
