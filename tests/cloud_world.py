"""A device's side of the cloud's tests: requests, the answers they should get, and `offramp cloud
serve` as a process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from toy_models import toy_activations, toy_layers

from offramp_cloud.engine import Engine
from offramp_common.activations import Activations, NumpyArray, Rows
from offramp_common.bundle import Bundle
from offramp_common.frames import encode_frame
from offramp_common.runner import Knobs, Step, run
from offramp_common.transport import Completion, Offload
from offramp_model.packed_layers import PackedLayers
from offramp_model.split_model import TorchLayers, join_rows, to_torch

_STARTS_S = 120.0
_ENDS_S = 40.0


class World:
    """A bundle and its reference layers."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.layers = toy_layers(bundle)
        self.knobs = bundle.knobs("fp32")

    def rows(
        self, lengths: Sequence[int], depth: int = 0, seed: int = 0
    ) -> Activations[NumpyArray]:
        return toy_activations(self.bundle, lengths, depth, seed=seed, layers=self.layers)

    def offload(
        self,
        lengths: Sequence[int] = (5,),
        depth: int = 1,
        *,
        seed: int = 0,
        request_id: str = "r",
        codec: str = "fp32",
        **settings: Any,
    ) -> Offload:
        acts = self.rows(lengths, depth, seed)
        return self.offload_of(acts, request_id=request_id, codec=codec, **settings)

    def offload_of(
        self,
        acts: Activations[NumpyArray],
        *,
        request_id: str = "r",
        codec: str = "fp32",
        **settings: Any,
    ) -> Offload:
        frame = encode_frame(acts, self.bundle.cuts[acts.depth], codec)
        digest = self.bundle.digest(acts.depth)
        work = Offload(request_id, self.bundle.manifest.name, digest, frame)
        return replace(work, **settings)

    def local(
        self, acts: Activations[NumpyArray], knobs: Knobs | None = None, request_id: str = "r"
    ) -> Completion:
        """What the device itself would answer, in torch."""
        whole = run(self.layers, to_torch(acts), self.bundle.n_layers, knobs or self.knobs)
        rows = acts.batch_size
        answers = np.zeros((rows, *whole.left[0].answer.shape[1:]), np.float32)
        depth_B, confidence_B = np.zeros(rows, np.int64), np.zeros(rows, np.float32)
        for leaving in whole.left:
            answers[leaving.rows] = leaving.answer.numpy()
            depth_B[leaving.rows] = leaving.depth
            confidence_B[leaving.rows] = leaving.confidence_B
        return Completion(request_id, answers, depth_B, confidence_B)

    def engine(self, layers: Any = None, **settings: Any) -> Engine:
        return Engine(self.bundle, layers or self.layers, **settings)


def assert_same(got: Completion, wanted: Completion, *, exactly: bool = True) -> None:
    """`exactly` where a request ran alone; in a batch the order of float32 sums differs."""
    assert got.request_id == wanted.request_id
    np.testing.assert_array_equal(got.exit_depth_B, wanted.exit_depth_B)
    if exactly:
        np.testing.assert_array_equal(got.answers, wanted.answers)
        np.testing.assert_array_equal(got.confidence_B, wanted.confidence_B)
        return
    # Logits of the toys are below 20, so 1e-4 is 1e2 units in the last place.
    np.testing.assert_allclose(got.answers, wanted.answers, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(got.confidence_B, wanted.confidence_B, atol=1e-4)


class WatchedLayers:
    """The real layers; notes what they are given, can be held, and chokes on poisoned rows."""

    POISON = 12345.0

    def __init__(self, layers: TorchLayers | PackedLayers) -> None:
        self._layers = layers
        self.runs: list[tuple[int, int]] = []
        """(depth, rows) of each batch of each step."""
        self.knobs: list[Knobs] = []
        self.entered = threading.Event()
        self.free = threading.Event()
        self.free.set()

    @property
    def n_layers(self) -> int:
        return self._layers.n_layers

    def step(self, acts: Activations[Tensor], knobs: Knobs) -> Step[Tensor]:
        return self.steps([(Rows.of(acts), knobs)])[0]

    def steps(self, parts: Sequence[tuple[Rows[Tensor], Knobs]]) -> list[Step[Tensor]]:
        for rows, knobs in parts:
            self.runs.append((rows.depth, rows.batch_size))
            self.knobs.append(knobs)
        self.entered.set()
        assert self.free.wait(30), "the test never let the layers go on"
        if any(bool((join_rows(rows).hidden_BTD == self.POISON).any()) for rows, _ in parts):
            raise RuntimeError("poisoned row")
        if isinstance(self._layers, PackedLayers):
            return self._layers.steps(parts)
        return [self._layers.step(join_rows(rows), knobs) for rows, knobs in parts]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No layer gets past its start."""
        self.entered.clear()
        self.free.clear()
        try:
            yield
        finally:
            self.free.set()


@dataclass
class Served:
    """A running `offramp cloud serve`: its ready line, and what it logged."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    log: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.ready["listening"])

    def family(self) -> set[int]:
        """This process and all its descendants, by id."""
        return {self.process.pid, *descendants(self.process.pid)}

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal once; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(_ENDS_S)


@contextlib.contextmanager
def serving(arguments: Sequence[str]) -> Iterator[Served]:
    """`offramp cloud serve` with these arguments on a free loopback port, until the block ends."""
    command = [sys.executable, "-m", "offramp_common", "cloud", "serve", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    log: list[str] = []
    reader = threading.Thread(target=_collect, args=(process.stderr, log), daemon=True)
    reader.start()
    hangs = threading.Timer(_STARTS_S, process.kill)
    hangs.start()
    line = process.stdout.readline()
    hangs.cancel()
    hangs.join()
    served = Served(process, json.loads(line) if line else {}, log)
    try:
        assert line, f"no ready line, exit code {process.wait()}: {''.join(log)}"
        yield served
    finally:
        try:
            served.stop()
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            reader.join()
            process.stdout.close()
            process.stderr.close()


def descendants(pid: int) -> set[int]:
    """Ids of the processes below `pid`."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                # The command's name stands in parentheses and may hold anything.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found.update(children)
        waiting.extend(children)
    return found


def alive(pids: set[int]) -> dict[int, str]:
    """Those of the processes that still run, with their command lines; zombies do not count."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if command:
                found[pid] = command
    return found


def replicas(served: Served) -> set[int]:
    """Process ids of the replicas that answered lately."""
    with urllib.request.urlopen(f"http://{served.ready['metrics']}/metrics", timeout=10) as page:
        found = re.findall(r'offramp_engine_requests_total{.*replica="(\d+)@', page.read().decode())
    return {int(pid) for pid in found} & alive(set(map(int, found))).keys()


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    """Poll until the condition holds."""
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.02)


def _collect(stream: Any, log: list[str]) -> None:
    log.extend(stream)
