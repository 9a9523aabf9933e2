"""A Ray cluster of several nodes on this machine, in processes of their own, and toy bundles for it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from offramp_common.bundle import Bundle
from offramp_common.spec import TaskSpec
from offramp_model.backbones import backbone_from_config
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_model.store import About, save_model

WIDTH, LAYERS = 64, 3
_UP_S, _DOWN_S = 60.0, 10.0
_STORE_BYTES = 80 * 2**20


def tiny_bundle(path: Path, seed: int, broken: bool = False) -> Bundle:
    """Three random layers called "tiny", without a tokenizer worth the name. `broken`: its weights are
    no numbers, which no digest shows."""
    torch.manual_seed(seed)
    config = {
        "model_type": "bert",
        "vocab_size": 32,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    }
    method = METHODS["deebert"]
    task = TaskSpec("classification", ("no", "yes"))
    exits = tuple(range(1, LAYERS + 1))
    model = MultiExitModel(
        backbone_from_config(config), method, HeadSpec(task, WIDTH, LAYERS, exits, method.settings)
    ).eval()
    if broken:
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
    return save_model(path, model, "{}", About("tiny", 64, 1))


@dataclass
class Nodes:
    """The processes of `ray start`, by the nodes' addresses."""

    address: str
    environment: dict[str, str]
    folder: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, node: str, *arguments: str) -> None:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", *arguments]
        command += [f"--node-ip-address={node}", f"--object-store-memory={_STORE_BYTES}"]
        command += ["--disable-usage-stats", "--log-color=false"]
        with (self.folder / f"{node}.log").open("wb") as log:
            self.running[node] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def join(self, node: str, cpus: int) -> None:
        """Start a node beside the head, and wait until it is there: again, where it was too slow for
        Ray (30 s, on a busy machine)."""
        for _ in range(3):
            self.start(node, f"--address={self.address}", f"--num-cpus={cpus}")
            while self.running[node].poll() is None:
                if b"block forever" in (self.folder / f"{node}.log").read_bytes():
                    return
                time.sleep(0.1)
        raise SystemExit(f"{node}: {(self.folder / f'{node}.log').read_text()[-2000:]}")

    def kill(self, node: str) -> None:
        """All of a node's processes at once, as when its power is cut."""
        process = self.running.pop(node)
        for pid in (process.pid, *descendants(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for node in reversed(list(self.running)):
            family = descendants(self.running[node].pid)
            self.running[node].terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.running[node].wait(_DOWN_S)
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.kill(node)


@contextlib.contextmanager
def ray_nodes(workers: int, cpus: int) -> Iterator[Nodes]:
    """A head without CPUs, so that it holds no replica, and `workers` nodes of `cpus` each. Each node has
    a loopback address of its own: 127.0.0.1 the head, 127.0.0.2 and on the others."""
    port = _free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    folder = Path(
        tempfile.mkdtemp(prefix="offramp-", dir="/tmp")
    )  # Ray's sockets need a short path
    nodes = Nodes(f"127.0.0.1:{port}", environment, folder)
    try:
        head = ("--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={folder}")
        nodes.start("127.0.0.1", *head, "--include-dashboard=false")
        _await_port(port)
        for number in range(workers):
            nodes.join(f"127.0.0.{2 + number}", cpus)
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


def descendants(pid: int) -> list[int]:
    """Ids of the processes below `pid`."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        children: list[int] = []
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{waiting.pop()}/task").iterdir():
                with contextlib.suppress(OSError):
                    children += map(int, (task / "children").read_text().split())
        found += children
        waiting += children
    return found


def named(word: str, pids: list[int]) -> list[int]:
    """Those of the processes whose command line has the word in it."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _await_port(port: int) -> None:
    until_s = time.monotonic() + _UP_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() > until_s:
                raise SystemExit("Ray's head does not come up") from None
            time.sleep(0.1)
