"""X.509 certificates of the development CA; the one module here that imports `cryptography`.

Keys are on the curve P-256. An authority may sign leaves only (path length 0); a server's
certificate is good for serving, a device's for calling, and neither for the other's part.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# The clock of a device may be a little behind that of the machine that issues.
_CLOCK_SKEW = datetime.timedelta(minutes=5)
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # FIPS 186-5

_SERVER, _CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH

Now = datetime.datetime | None  # from when on a certificate is valid; None: the machine's clock


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def cert_pem(self) -> bytes:
        return self.cert.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def new_authority(days: int, now: Now = None) -> Issued:
    """A self-signed authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    return _authority(now, "offramp development CA", days, key)


def new_server(authority: Issued, hosts: Sequence[str], days: int, now: Now = None) -> Issued:
    """A server's certificate for these names and IP addresses."""
    names = [_general_name(host) for host in hosts]
    return _leaf(now, authority, "offramp development server", days, [_SERVER], names)


def new_device(authority: Issued, name: str, days: int, now: Now = None) -> Issued:
    """A device's certificate; its common name and its one alternative name (DNS) are `name`."""
    return _leaf(now, authority, name, days, [_CLIENT], [x509.DNSName(name)])


def shared_authority(secret: bytes, days: int, now: Now = None) -> Issued:
    """The authority that everybody makes who holds the secret (32 random bytes): its key follows from
    it, so that its certificates, made anywhere, vouch for each other's leaves."""
    number = int.from_bytes(hashlib.sha512(b"offramp shared authority" + secret).digest())
    key = ec.derive_private_key(number % (_P256_ORDER - 1) + 1, ec.SECP256R1())
    return _authority(now, "offramp cluster", days, key)


def new_peer(authority: Issued, name: str, days: int, now: Now = None) -> Issued:
    """A certificate that is good for both parts; its common and its alternative name are `name`."""
    return _leaf(now, authority, name, days, [_SERVER, _CLIENT], [x509.DNSName(name)])


def serial_of(cert_pem: bytes) -> int:
    """The certificate's serial number. ValueError when it is none."""
    return x509.load_pem_x509_certificate(cert_pem).serial_number


def revoked_in(crl_pem: bytes, ca_pem: bytes | None = None) -> frozenset[int]:
    """The serial numbers in a revocation list. ValueError when it is none, or not of this authority."""
    crl = x509.load_pem_x509_crl(crl_pem)
    if ca_pem is not None:
        key = x509.load_pem_x509_certificate(ca_pem).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not crl.is_signature_valid(key):
            raise ValueError("it is not signed by this authority")
    return frozenset(entry.serial_number for entry in crl)


def load(cert_pem: bytes, key_pem: bytes) -> Issued:
    """An authority read back. ValueError when it is not one that `new_authority` has made."""
    cert = x509.load_pem_x509_certificate(cert_pem)
    key = serialization.load_pem_private_key(key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not an elliptic-curve key")
    if key.public_key() != cert.public_key():
        raise ValueError("the key is not that of the certificate")
    return Issued(cert, key)


def _authority(now: Now, name: str, days: int, key: ec.EllipticCurvePrivateKey) -> Issued:
    return _issue(
        now,
        None,
        name,
        days,
        key,
        x509.BasicConstraints(ca=True, path_length=0),
        _key_usage(key_cert_sign=True, crl_sign=True),
    )


def _leaf(
    now: Now,
    authority: Issued,
    name: str,
    days: int,
    parts: Sequence[x509.ObjectIdentifier],
    names: Sequence[x509.GeneralName],
) -> Issued:
    """`parts`: what it is good for, of _SERVER and _CLIENT;  `names`: its alternative names."""
    return _issue(
        now,
        authority,
        name,
        days,
        ec.generate_private_key(ec.SECP256R1()),
        x509.BasicConstraints(ca=False, path_length=None),
        _key_usage(digital_signature=True),
        x509.ExtendedKeyUsage(parts),
        x509.SubjectAlternativeName(names),
    )


def _issue(
    now: Now,
    authority: Issued | None,
    common_name: str,
    days: int,
    key: ec.EllipticCurvePrivateKey,
    *extensions: x509.ExtensionType,
) -> Issued:
    """A certificate for `key`, signed by `authority`, or by itself without one."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    signer = key if authority is None else authority.key
    now = now or datetime.datetime.now(datetime.UTC)
    until = now + datetime.timedelta(days=days)
    if authority is not None:  # a leaf that outlives its authority is of no use
        until = min(until, authority.cert.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if authority is None else authority.cert.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(until)
    )
    identifiers = (
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
    )
    for extension in (*extensions, *identifiers):
        critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)  # RFC 5280, 4.2.1
        builder = builder.add_extension(extension, critical)
    return Issued(builder.sign(signer, hashes.SHA256()), key)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
