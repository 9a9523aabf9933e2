"""What the worker's tests share: a toy bundle with graphs, and certificates."""

from __future__ import annotations

from pathlib import Path

import pytest
from edge_cloud import TorchAsNumpy
from toy_models import toy_bundle, toy_layers

from offramp_common import certs
from offramp_common.bundle import Bundle
from offramp_model.export import add_graphs


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Four layers, an exit after each, carried state (PABEE)."""
    return toy_bundle(tmp_path_factory.mktemp("worker") / "toy", "pabee", n_layers=4, split=2)


@pytest.fixture(scope="session")
def graphs_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What `offramp edge` needs: the same with graphs. DeeBERT, so that some leave at depth 1."""
    made = toy_bundle(tmp_path_factory.mktemp("graphs") / "toy", "deebert", n_layers=4, split=2)
    add_graphs(made)
    return Bundle.read(made.path)


@pytest.fixture(scope="session")
def online_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same with exits that are chosen before a sample runs (UEE-UCB), and graphs."""
    made = toy_bundle(tmp_path_factory.mktemp("online") / "toy", "uee_ucb", n_layers=4, split=2)
    add_graphs(made, precisions=["fp32"])
    return Bundle.read(made.path)


@pytest.fixture(scope="session")
def layers(bundle: Bundle) -> TorchAsNumpy:
    return TorchAsNumpy(toy_layers(bundle))


@pytest.fixture(scope="session")
def tls_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of the cloud and of a device called kiosk-7."""
    path = tmp_path_factory.mktemp("certs")
    certs.init(path)
    certs.issue(path, "kiosk-7")
    return path
