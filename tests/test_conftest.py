"""The rules in conftest.py, on a small suite that breaks them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SUITE = """
import subprocess, sys, threading
import pytest

@pytest.mark.slow
def test_marked_and_skipped():
    pytest.skip("no reason")

@pytest.mark.data
def test_asks_for_data(data_dir):
    assert data_dir.is_dir()

def test_unmarked_and_skipped():
    pytest.skip("no reason")

def test_expected_to_fail():
    pytest.xfail("known")

def test_leaves_a_child():
    global child
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)

def test_leaves_a_thread():
    global ended
    ended = threading.Event()
    threading.Thread(target=ended.wait).start()

def test_cleans_up():
    thread = threading.Thread(target=lambda: None)
    thread.start()

def test_zz_the_end():
    ended.set()
    child.communicate()
"""


def outcomes(tmp_path: Path, **env: str) -> dict[str, str]:
    """Name -> outcome of the tests of the suite, in the order in which they ran."""
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "test_small.py").write_text(_SUITE)
    markers = "".join(f"  {name}: -\n" for name in ("ray", "data", "weights", "mpnet", "slow"))
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers =\n{markers}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rA", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "OFFRAMP_DATA": str(tmp_path / "none"), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    ran = re.findall(r"::test_(\w+) (PASSED|FAILED|SKIPPED|XFAIL|ERROR)\b", done.stdout)
    assert ran, done.stdout
    found = dict(ran)
    found.update(dict.fromkeys(re.findall(r"^ERROR .*::test_(\w+)", done.stdout, re.M), "ERROR"))
    return found


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With nothing required."""
    return outcomes(tmp_path_factory.mktemp("free"), OFFRAMP_REQUIRE="")


def test_tests_may_skip_unless_their_marker_is_required(
    free: dict[str, str], tmp_path: Path
) -> None:
    assert free["marked_and_skipped"] == free["asks_for_data"] == "SKIPPED"
    strict = outcomes(tmp_path, OFFRAMP_REQUIRE="data,slow")
    assert strict["marked_and_skipped"] == "FAILED"
    assert strict["asks_for_data"] == "ERROR", "it is its fixture that would skip it"
    assert strict["unmarked_and_skipped"] == "SKIPPED"
    assert strict["expected_to_fail"] == "XFAIL"


def test_tests_that_leave_something_behind_are_errors(free: dict[str, str]) -> None:
    assert free["leaves_a_child"] == "ERROR"
    assert free["leaves_a_thread"] == "ERROR"
    assert free["cleans_up"] == free["zz_the_end"] == "PASSED"


def test_what_is_marked_runs_last(free: dict[str, str]) -> None:
    assert list(free)[-2:] == ["asks_for_data", "marked_and_skipped"]
