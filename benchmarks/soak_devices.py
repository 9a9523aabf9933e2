"""The devices of soak.py: they come, ask steadily and say goodbye, or are killed at work."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from offramp_cloud.waiting import Load as EngineLoad
from offramp_common import certs
from offramp_common.activations import Activations, NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.frames import encode_frame
from offramp_common.runner import Layers
from offramp_common.transport import Offload
from offramp_edge import EdgeWorker
from offramp_edge.answers import Answer
from offramp_edge.grpc_transport import GrpcTransport
from offramp_model.backbones.packed import padded_to

_PAUSE_S = 1.0
_TEXT = "play some music set an alarm for seven what is the weather in paris tomorrow book a table"
_SENT = {"plan": "fixed", "split": 2}  # most samples are: a planner might find that none need be


@dataclass
class Load:
    """What the devices are to do, and what became of it."""

    bundle: Path
    layers: Layers[NumpyArray]
    address: str
    tls: Path
    rate: float  # requests a second of one device; 0: it only greets
    life_s: float  # the longest of one device
    seed: int
    stop: threading.Event = field(default_factory=threading.Event)
    where: Counter[str] = field(default_factory=Counter)
    devices: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def until_s(self, rng: random.Random) -> float:
        """The end of a device that begins now."""
        return time.monotonic() + rng.uniform(self.life_s / 8, self.life_s)

    def goes_on(self, rng: random.Random, until_s: float) -> bool:
        """Wait for a device's next request; False where there is none before its end."""
        left_s = until_s - time.monotonic()
        pause_s = rng.expovariate(self.rate) if self.rate else left_s
        return not self.stop.wait(max(0.0, min(pause_s, left_s))) and pause_s < left_s

    def note(self, answer: Answer) -> None:
        with self.lock:
            self.where[f"{answer.where} {answer.reason}".strip()] += 1


def sizes() -> list[int]:
    """How many tokens a layer's matrix products may be given, in an engine as it is shipped."""
    return sorted({padded_to(tokens) for tokens in range(1, EngineLoad().max_batch_tokens + 1)})


async def ask_for_all_sizes(bundle: Bundle, address: str, tls: Path) -> None:
    """A request of each, one after the other, through all layers."""
    files = (tls / "ca.pem", tls / "kiosk.pem", tls / "kiosk.key")
    transport = GrpcTransport(address, certs.channel_credentials(*files))
    never = {spec.name: (spec.never,) * bundle.n_layers for spec in bundle.manifest.knobs}
    cut, longest = bundle.cuts[0], bundle.manifest.max_tokens
    for tokens in reversed(
        sizes()
    ):  # the largest first: what is kept of them leaves no holes behind
        lengths_B = np.full(-(-tokens // longest), longest)
        lengths_B[-1] = tokens - longest * (lengths_B.size - 1)
        ids = np.zeros((lengths_B.size, int(lengths_B.max()), cut.width), np.int64)
        frame = encode_frame(Activations(ids, lengths_B, depth=0), cut, "fp32")
        work = Offload(f"size {tokens}", bundle.manifest.name, bundle.digest(0), frame, never)
        await transport.complete(work, timeout_s=60)
    await transport.close()


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(_TEXT.split(), k=rng.randint(3, 16)))


def device(load: Load, slot: int) -> None:
    """One device after another, in this thread."""
    rng = random.Random(f"{load.seed} {slot}")
    tls = {"ca": load.tls / "ca.pem", "cert": load.tls / "kiosk.pem", "key": load.tls / "kiosk.key"}
    while not load.stop.is_set():
        until_s = load.until_s(rng)
        # Layers are loaded once for all of them: a device loads its own once, too.
        options: dict[str, Any] = {"layers": load.layers, "deadline_ms": 3000.0, **tls, **_SENT}
        with EdgeWorker(load.bundle, load.address, **options) as worker:
            load.devices += 1
            worker.agent.on_answer.append(load.note)
            while load.goes_on(rng, until_s):
                worker.answer(text(rng))
        load.stop.wait(_PAUSE_S)


def rude_devices(load: Load) -> None:
    """Devices that are killed while they have requests in the air."""
    rng = random.Random(f"{load.seed} rude")
    command = [sys.executable, "-m", "offramp_common", "edge", "run", "--bundle", str(load.bundle)]
    command += ["--cloud", load.address, "--output", os.devnull, "--plan", "fixed", "--split", "2"]
    command += ["--ca", str(load.tls / "ca.pem"), "--cert", str(load.tls / "kiosk.pem")]
    command += ["--key", str(load.tls / "kiosk.key")]
    while not load.stop.is_set():
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdin is not None
        until_s = load.until_s(rng)
        with contextlib.suppress(BrokenPipeError):
            while load.goes_on(rng, until_s):
                process.stdin.write(json.dumps({"text": text(rng)}) + "\n")
                process.stdin.flush()
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        load.devices += 1
        load.stop.wait(_PAUSE_S)
