"""Development certificates: what is written, what is refused, and who may talk to whom over TLS."""

from __future__ import annotations

import contextlib
import datetime
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from offramp_common import certs, certs_x509
from offramp_common.certs import KeyPair, pair_of
from offramp_common.errors import ConfigError

WHO = "/offramp.test/Who"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an authority, a server and the device cam-1; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    certs.init(folder)
    certs.issue(folder, "cam-1")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "certs"))


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def extension(cert: x509.Certificate, kind: type[Any]) -> Any:
    return cert.extensions.get_extension_for_class(kind).value


def days_from_now(days: int) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)


def write(pair: KeyPair, issued: certs_x509.Issued) -> None:
    pair.cert.write_bytes(issued.cert_pem())
    pair.key.touch(mode=0o600)
    pair.key.write_bytes(issued.key_pem())


def test_keys_are_for_their_owner_alone_and_nothing_else_is_left(made: Path) -> None:
    names = {"ca.pem", "ca.key", "server.pem", "server.key", "cam-1.pem", "cam-1.key"}
    assert {path.name for path in made.iterdir()} == names
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in made.glob("*.key"))


def test_the_authority_may_sign_leaves_and_the_leaves_nothing(made: Path) -> None:
    ca, server, device = (read(made / f"{who}.pem") for who in ("ca", "server", "cam-1"))
    assert extension(ca, x509.BasicConstraints) == x509.BasicConstraints(ca=True, path_length=0)
    assert extension(ca, x509.KeyUsage).key_cert_sign
    for leaf, purpose in (
        (server, ExtendedKeyUsageOID.SERVER_AUTH),
        (device, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        leaf.verify_directly_issued_by(ca)
        assert not extension(leaf, x509.BasicConstraints).ca
        assert not extension(leaf, x509.KeyUsage).key_cert_sign
        assert list(extension(leaf, x509.ExtendedKeyUsage)) == [purpose]
        assert (
            extension(leaf, x509.AuthorityKeyIdentifier).key_identifier
            == extension(ca, x509.SubjectKeyIdentifier).digest
        )
        assert leaf.public_key().curve.name == "secp256r1"  # type: ignore[union-attr]


def test_a_device_is_named_twice_in_its_certificate(made: Path) -> None:
    device = read(made / "cam-1.pem")
    assert device.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "cam-1"
    names = extension(device, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["cam-1"]


def test_the_server_is_named_by_hosts_and_addresses(tmp_path: Path) -> None:
    certs.init(tmp_path, ["cloud.example", "*.example.org", "10.0.0.1", "[::1]"], days=2)
    server = read(tmp_path / "server.pem")
    names = extension(server, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["cloud.example", "*.example.org"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["10.0.0.1", "::1"]
    life = server.not_valid_after_utc - server.not_valid_before_utc
    shorter = datetime.timedelta(days=2, minutes=5) - life
    # It ends with its authority at the latest, which was made a moment before.
    assert datetime.timedelta() <= shorter < datetime.timedelta(minutes=1)


def test_a_device_certificate_ends_with_its_authority_at_the_latest(tmp_path: Path) -> None:
    ca, _ = certs.init(tmp_path, days=2)
    device = certs.issue(tmp_path, "cam-1", days=100)
    assert read(device.cert).not_valid_after_utc == read(ca.cert).not_valid_after_utc


def test_nothing_is_overwritten_without_force(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"ca\.pem, .* exist already: --force"):
        certs.init(folder)
    with pytest.raises(ConfigError, match=r"cam-1\.pem, .* exist already: --force"):
        certs.issue(folder, "cam-1")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    certs.issue(folder, "cam-1", force=True)
    certs.init(folder, force=True)
    assert all(path.read_bytes() != before[path] for path in folder.iterdir())


@pytest.mark.parametrize(
    "name",
    ["", "a" * 65, "../cam", "cam 1", "cam/1", ".cam", "cam-", "kamera-ü", "ca", "Server", "a\n"],
)
def test_a_name_that_is_no_device_name_is_refused(made: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="device name"):
        certs.issue(made, name)


@pytest.mark.parametrize("host", ["", "cloud:50051", "https://cloud", "clöud", "a b", "host\n"])
def test_a_host_that_is_neither_name_nor_address_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="without port or scheme"):
        certs.init(tmp_path, [host])


def test_days_and_hosts_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    for days in (0, -1, 4000):
        with pytest.raises(ConfigError, match="valid for 1 to 3650"):
            certs.init(tmp_path, days=days)
    with pytest.raises(ConfigError, match="no host"):
        certs.init(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_issuing_without_an_authority_or_with_a_damaged_one_says_what_to_do(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.pem: cannot read it .*: offramp certs init"):
        certs.issue(folder / "none", "cam-2")
    shutil.copy(folder / "server.key", folder / "ca.key")
    with pytest.raises(ConfigError, match="the key is not that of the certificate"):
        certs.issue(folder, "cam-2")
    (folder / "ca.key").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"no authority of ours .* --force"):
        certs.issue(folder, "cam-2")


def test_a_directory_that_cannot_be_made_is_an_error_of_the_set_up(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write it"):
        certs.init(tmp_path / "file" / "certs")


def test_without_cryptography_the_extra_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(certs, "find_spec", lambda name: None)
    for make in (lambda: certs.init(tmp_path), lambda: certs.issue(tmp_path, "cam-1")):
        with pytest.raises(ConfigError, match=r"pip install 'offramp\[cloud\]'"):
            make()


def test_an_expired_authority_neither_issues_nor_is_trusted(tmp_path: Path) -> None:
    ca = certs_x509.new_authority(2, days_from_now(-3))
    write(pair_of(tmp_path, "ca"), ca)
    write(
        pair_of(tmp_path, "server"), certs_x509.new_server(ca, ["localhost"], 2, days_from_now(-3))
    )
    for use in (
        lambda: certs.issue(tmp_path, "cam-1"),
        lambda: certs.server_credentials(tmp_path),
        lambda: certs.channel_credentials(tmp_path / "ca.pem"),
    ):
        with pytest.raises(ConfigError, match=r"ca\.pem: expired on .*: make a new authority"):
            use()


def test_an_authority_from_the_future_points_to_the_clock(tmp_path: Path) -> None:
    write(pair_of(tmp_path, "ca"), certs_x509.new_authority(2, days_from_now(1)))
    with pytest.raises(ConfigError, match=r"not valid before .*: is the clock right"):
        certs.channel_credentials(tmp_path / "ca.pem")


def test_a_leaf_that_has_expired_or_is_not_valid_yet_is_refused(tmp_path: Path) -> None:
    ca = certs_x509.new_authority(10, days_from_now(-5))
    write(pair_of(tmp_path, "ca"), ca)
    for days, fault in ((-3, "has expired"), (1, "is not valid yet: is the clock right")):
        start = days_from_now(days)
        write(pair_of(tmp_path, "cam-1"), certs_x509.new_device(ca, "cam-1", 2, start))
        write(pair_of(tmp_path, "server"), certs_x509.new_server(ca, ["localhost"], 2, start))
        with pytest.raises(ConfigError, match=rf"cam-1\.pem: {fault}.*certs issue .* cam-1"):
            certs.channel_credentials(tmp_path / "ca.pem", *pair_of(tmp_path, "cam-1"))
        with pytest.raises(ConfigError, match=rf"server\.pem: {fault}.*certs init"):
            certs.server_credentials(tmp_path)


def test_files_that_do_not_fit_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    device, ca = pair_of(folder, "cam-1"), folder / "ca.pem"
    other_ca = certs.init(tmp_path / "other")[0].cert
    for files, fault in (
        ((ca, device.cert), "give both or neither"),
        ((ca, device.cert, folder / "server.key"), "the key is another certificate's"),
        ((other_ca, *device), r"cam-1\.pem: is not one of .*ca\.pem"),
        ((device.cert,), "no authority's certificate in it"),
        ((folder / "ca.key",), "no authority's certificate in it"),
        ((folder / "none.pem",), r"none\.pem: cannot read it .*: copy ca\.pem"),
        ((ca, folder / "no.pem", device.key), r"no\.pem: cannot read it .* --name no"),
        ((ca, *pair_of(folder, "server")), "unsuitable certificate purpose"),
    ):
        with pytest.raises(ConfigError, match=fault):
            certs.channel_credentials(*files)
    shutil.copy(other_ca, folder / "ca.pem")
    with pytest.raises(ConfigError, match=r"server\.pem: is not one of .*certs init"):
        certs.server_credentials(folder)
    (folder / "server.key").unlink()
    with pytest.raises(ConfigError, match=r"server\.key: cannot read it"):
        certs.server_credentials(folder)


def test_a_key_that_others_can_read_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "server.key").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        certs.server_credentials(folder)
    assert "server.key can be read by others" in caplog.text


@contextlib.asynccontextmanager
async def serving(
    folder: Path, *, require_client: bool = False
) -> AsyncIterator[Callable[[grpc.ChannelCredentials], Awaitable[bytes]]]:
    """A real server on loopback; what is yielded asks it who the caller is."""

    async def who(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return b",".join(context.peer_identities() or [b"somebody"])

    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(who)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("offramp.test", {"Who": method}),)
    )
    credentials = certs.server_credentials(folder, require_client=require_client)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()

    async def ask(credentials: grpc.ChannelCredentials) -> bytes:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
            call: Any = channel.unary_unary(WHO, None, None)
            return bytes(await call(b"", timeout=10))

    try:
        yield ask
    finally:
        await server.stop(None)


async def test_a_client_that_trusts_the_authority_is_answered(made: Path) -> None:
    async with serving(made) as ask:
        assert await ask(certs.channel_credentials(made / "ca.pem")) == b"somebody"


async def test_the_cloud_knows_a_device_by_the_name_in_its_certificate(made: Path) -> None:
    device = pair_of(made, "cam-1")
    async with serving(made, require_client=True) as ask:
        assert await ask(certs.channel_credentials(made / "ca.pem", *device)) == b"cam-1"


async def test_a_client_without_a_certificate_is_refused_where_one_is_required(
    made: Path,
) -> None:
    async with serving(made, require_client=True) as ask:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(certs.channel_credentials(made / "ca.pem"))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_device_of_another_authority_is_refused(made: Path, tmp_path: Path) -> None:
    certs.init(tmp_path)
    stranger = certs.issue(tmp_path, "cam-1")
    credentials = grpc.ssl_channel_credentials(
        (made / "ca.pem").read_bytes(), stranger.key.read_bytes(), stranger.cert.read_bytes()
    )
    async with serving(made, require_client=True) as ask:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(credentials)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_trusts_another_authority_refuses_the_server(
    made: Path, tmp_path: Path
) -> None:
    ca, _ = certs.init(tmp_path)
    async with serving(made) as ask:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(certs.channel_credentials(ca.cert))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "CERTIFICATE_VERIFY_FAILED" in str(refused.value.details())
