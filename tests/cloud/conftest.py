"""What the cloud's tests share: a toy bundle, certificates, and the one Ray of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud_world import Served, World, serving
from toy_models import toy_bundle

from offramp_common import certs
from offramp_common.bundle import Bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Four layers, an exit after each; DeeBERT, so nothing is carried."""
    return toy_bundle(tmp_path_factory.mktemp("deebert") / "toy", "deebert", n_layers=4)


@pytest.fixture(scope="session")
def patient_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """PABEE, whose counts are carried from exit to exit."""
    path = tmp_path_factory.mktemp("pabee") / "patient"
    return toy_bundle(path, "pabee", name="patient", n_layers=4)


@pytest.fixture(scope="session")
def online_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """UEE-UCB, whose exit the device chooses before a sample runs."""
    path = tmp_path_factory.mktemp("uee_ucb") / "online"
    return toy_bundle(path, "uee_ucb", name="online", n_layers=4)


@pytest.fixture(scope="session")
def world(bundle: Bundle) -> World:
    return World(bundle)


@pytest.fixture(scope="session")
def tls_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of the cloud and of a device called kiosk-7."""
    path = tmp_path_factory.mktemp("certs")
    certs.init(path)
    certs.issue(path, "kiosk-7")
    return path


@pytest.fixture(scope="session")
def may_use_ray() -> None:
    """Skipped where it is not installed or not wanted."""
    if os.environ.get("OFFRAMP_NO_RAY"):
        pytest.skip("OFFRAMP_NO_RAY is set")
    pytest.importorskip("ray", reason="pip install 'offramp[cloud]'")


@pytest.fixture(scope="session")
def ray_cloud(may_use_ray: None, bundle: Bundle, tls_dir: Path) -> Iterator[Served]:
    """`offramp cloud serve` with two replicas in a Ray of its own, for the whole run."""
    arguments = ["--bundle", str(bundle.path), "--tls-dir", str(tls_dir), "--replicas", "2"]
    arguments += ["--metrics", "127.0.0.1:0"]
    with serving(arguments) as served:
        yield served
