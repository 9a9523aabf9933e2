"""Credentials between gateways and replicas: TLS both ways, for whoever holds the cluster's secret.

No certificate is handed around: from the secret everybody makes the same authority, and a pair of
their own below it. What lies within the same cluster, and only that, can then talk to a replica's port.
"""

from __future__ import annotations

import grpc

from offramp_common import certs_x509

SECRET_BYTES = 32
_NAME = "replica.offramp.internal"  # the one name in all certificates: addresses say nothing here
_DAYS = 3650  # of certificates that end with their process

CHANNEL_OPTIONS = (("grpc.ssl_target_name_override", _NAME),)


def server_credentials(secret: bytes) -> grpc.ServerCredentials:
    """For a replica's port: only holders of the secret are let in."""
    ca_pem, key_pem, cert_pem = _own_pair(secret)
    return grpc.ssl_server_credentials(
        [(key_pem, cert_pem)], root_certificates=ca_pem, require_client_auth=True
    )


def channel_credentials(secret: bytes) -> grpc.ChannelCredentials:
    """For a gateway's channel, with CHANNEL_OPTIONS."""
    ca_pem, key_pem, cert_pem = _own_pair(secret)
    return grpc.ssl_channel_credentials(ca_pem, key_pem, cert_pem)


def _own_pair(secret: bytes) -> tuple[bytes, bytes, bytes]:
    if len(secret) < SECRET_BYTES:
        raise ValueError(f"a cluster's secret of {len(secret)} bytes: must be {SECRET_BYTES}")
    authority = certs_x509.shared_authority(secret, _DAYS)
    pair = certs_x509.new_peer(authority, _NAME, _DAYS)
    return authority.cert_pem(), pair.key_pem(), pair.cert_pem()
