"""The names that users import, and that importing a package loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import offramp_edge

PACKAGES = ("common", "model", "edge", "cloud", "train", "simulate")


def test_the_device_api_is_these_names() -> None:
    assert offramp_edge.__all__ == [
        "Answer",
        "EdgeSettings",
        "EdgeWorker",
        "Failed",
        "Sample",
        "Stages",
        "load_bundle",
    ]


@pytest.mark.parametrize("name", offramp_edge.__all__)
def test_every_exported_name_is_there_and_says_what_it_is(name: str) -> None:
    exported = getattr(offramp_edge, name)
    assert exported.__module__.startswith("offramp_edge.")
    assert exported.__doc__


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        offramp_edge.__getattr__("nonsense")


def test_importing_the_packages_loads_nothing_heavy() -> None:
    script = f"""
import sys
for package in {PACKAGES!r}:
    __import__("offramp_" + package)
heavy = {{"torch", "transformers", "ray", "onnxruntime", "tokenizers", "grpc", "numpy", "aiohttp"}}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
