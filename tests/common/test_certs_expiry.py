"""The end of a certificate, as `cryptography` reads it too."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from offramp_common import certs
from offramp_common.certs_expiry import expires_s
from offramp_common.errors import ConfigError


@pytest.mark.parametrize("days", [1, 30, 3650])
def test_all_of_a_directorys_certificates_end_when_they_say(tmp_path: Path, days: int) -> None:
    certs.init(tmp_path, days=days)
    certs.issue(tmp_path, "kiosk-7", days=days)
    for name in ("ca", "server", "kiosk-7"):
        path = tmp_path / f"{name}.pem"
        wanted = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        assert expires_s(path) == wanted.timestamp()


@pytest.mark.parametrize("year", [1960, 1999, 2049, 2050, 2120])
def test_years_in_both_of_the_standards_forms_are_read(tmp_path: Path, year: int) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a name " * 8)])
    until = datetime.datetime(year, 7, 31, 23, 59, 58, tzinfo=datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(datetime.datetime(1955, 1, 1)).not_valid_after(until)
    pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (tmp_path / "cert.pem").write_bytes(b"words before it\n" + pem)
    assert expires_s(tmp_path / "cert.pem") == until.timestamp()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing of the kind",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
        "-----BEGIN CERTIFICATE-----\n????\n-----END CERTIFICATE-----",
        "-----END CERTIFICATE-----\n-----BEGIN CERTIFICATE-----",
    ],
)
def test_a_file_without_a_certificate_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cert.pem"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"cert\.pem: no certificate in PEM"):
        expires_s(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"away\.pem: cannot read it"):
        expires_s(tmp_path / "away.pem")
