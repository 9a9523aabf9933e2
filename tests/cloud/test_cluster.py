"""A real cluster of three Ray nodes: versions rolled in, and the deaths of all that can die, under load.

benchmarks/cluster_life.py does it, and here it is asked for fewer requests than where it is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cluster_life.py"


@pytest.fixture(scope="module")
def stages(
    may_use_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What became of each stage."""
    path = tmp_path_factory.mktemp("life") / "life.json"
    command = [sys.executable, str(SCRIPT), "--requests", "1500", "--settle-s", "1"]
    with subprocess.Popen(
        [*command, "--json", str(path)], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, said = process.communicate(timeout=380)
        except subprocess.TimeoutExpired:
            process.terminate()  # and it stops its Ray, which it could not when killed
            _, said = process.communicate(timeout=35)
    assert process.returncode == 0, said[-4000:]
    return {stage["stage"]: stage for stage in json.loads(path.read_text())["stages"]}


def test_a_version_is_rolled_in_and_every_device_gets_its_own(stages: Any) -> None:
    roll = stages["roll"]
    assert roll["exit_code"] == 0
    assert roll["requests"] >= 1500
    assert roll["of_newer"] > 100
    assert (roll["failed"], roll["wrong"], roll["again"]) == (0, 0, 0), roll["reasons"]


def test_a_bad_bundle_is_taken_back_and_no_device_notices(stages: Any) -> None:
    bad = stages["bad"]
    assert bad["exit_code"] == 1
    assert bad["deploy"]["status"] == "rolled back"
    assert "its answers are no numbers" in bad["deploy"]["reason"]
    assert (bad["failed"], bad["wrong"], bad["again"]) == (0, 0, 0), bad["reasons"]


@pytest.mark.parametrize("stage", ["replica", "controller", "node", "gateway"])
def test_every_request_is_answered_whatever_dies(stage: str, stages: Any) -> None:
    found = stages[stage]
    assert found["requests"] > 0
    assert (found["failed"], found["wrong"]) == (0, 0), found["reasons"]
    assert found["recovered"], found
