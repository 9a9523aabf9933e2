"""Which certificates are no longer good: a list that is read again when it changes."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest

from offramp_common import certs
from offramp_common.cli import main
from offramp_common.errors import ConfigError
from offramp_common.revocation import Revocations, revoke, serials_in

pytest.importorskip("cryptography", reason="pip install 'offramp[cloud]'")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from offramp_common.certs_x509 import serial_of


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """An authority, and the devices cam-1 and cam-2."""
    certs.init(tmp_path)
    for name in ("cam-1", "cam-2"):
        certs.issue(tmp_path, name)
    return tmp_path


def serial(directory: Path, name: str) -> int:
    return serial_of((directory / f"{name}.pem").read_bytes())


def crl(directory: Path, signer: Path, revoked: int) -> bytes:
    """A revocation list by `signer`'s authority."""
    ca = x509.load_pem_x509_certificate((signer / "ca.pem").read_bytes())
    key = serialization.load_pem_private_key((signer / "ca.key").read_bytes(), None)
    now = datetime.datetime.now(datetime.UTC)
    entry = x509.RevokedCertificateBuilder().serial_number(revoked).revocation_date(now).build()
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.subject)
    builder = builder.last_update(now).next_update(now + datetime.timedelta(days=1))
    signed = builder.add_revoked_certificate(entry).sign(key, hashes.SHA256())  # type: ignore[arg-type]
    return signed.public_bytes(serialization.Encoding.PEM)


def test_a_list_that_is_not_there_revokes_nothing_until_it_is(made: Path) -> None:
    listed = Revocations(made / "revoked.txt")
    assert serial(made, "cam-1") not in listed
    assert revoke(made, "cam-1") == made / "revoked.txt"
    listed.look()
    assert serial(made, "cam-1") in listed
    assert serial(made, "cam-2") not in listed
    revoke(made, "cam-2")
    revoke(made, "cam-1")  # once more changes nothing
    assert len((made / "revoked.txt").read_text().splitlines()) == 2
    listed.look()
    assert serial(made, "cam-2") in listed
    (made / "revoked.txt").unlink()
    listed.look()
    assert serial(made, "cam-1") not in listed


def test_a_list_of_the_authority_counts_and_one_of_another_does_not(
    made: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    certs.init(other)
    path = made / "crl.pem"
    path.write_bytes(crl(made, made, serial(made, "cam-1")))
    assert serials_in(path, made / "ca.pem") == {serial(made, "cam-1")}
    path.write_bytes(crl(made, other, serial(made, "cam-1")))
    with pytest.raises(ConfigError, match="not signed by this authority"):
        Revocations(path, made / "ca.pem")


def test_a_damaged_list_is_refused_at_the_start_and_later_leaves_the_last_one_in_force(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = revoke(made, "cam-1")
    listed = Revocations(path)
    path.write_text("not a number\n")
    os.utime(path, (1, 1))
    listed.look()
    assert serial(made, "cam-1") in listed
    assert "stays in force" in caplog.text
    with pytest.raises(ConfigError, match="'not a number' is no serial number"):
        Revocations(path)


def test_the_command_revokes_and_says_whom_it_does_not_know(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certs", "revoke", str(made), "--name", "cam-2"]) == 0
    assert serials_in(made / "revoked.txt") == {serial(made, "cam-2")}
    assert main(["certs", "revoke", str(made), "--name", "cam-9"]) == 2
    assert "cam-9.pem: no certificate to revoke" in capsys.readouterr().err
