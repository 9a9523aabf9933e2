"""Where a training run keeps what it needs to go on after a stop.

settings.json    what was asked for: another request must not go on from here
checkpoint.pt    weights, optimiser, random state and position; replaced atomically
best.pt          the weights of the best epoch so far
"""

from __future__ import annotations

import json
import pickle
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from offramp_common.errors import ConfigError


class Checkpoints:
    """The work directory of one run. Raises ConfigError when it belongs to a run with other settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(settings))
        path = folder / "settings.json"
        if path.is_file():
            found = json.loads(path.read_text())
            differs = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
            if differs:
                raise ConfigError(
                    f"{folder}: holds a stopped run with other settings (differs: "
                    f"{', '.join(sorted(differs))}); give the same command to continue it, --restart to "
                    "begin anew, or another --out"
                )
        path.write_text(json.dumps(wanted, indent=1) + "\n")

    def save(self, state: Mapping[str, Any]) -> None:
        _save(self.folder / "checkpoint.pt", state)

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint; None when there is none."""
        return _load(self.folder / "checkpoint.pt")

    def save_best(self, weights: Mapping[str, Tensor]) -> None:
        _save(self.folder / "best.pt", weights)

    def load_best(self) -> dict[str, Tensor]:
        weights = _load(self.folder / "best.pt")
        if weights is None:
            raise ConfigError(f"{self.folder}: best.pt is missing; begin anew with --restart")
        return weights


def _save(path: Path, state: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".new")
    torch.save(dict(state), temporary)
    temporary.replace(path)


def _load(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        # weights_only: tensors and plain values, no code.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path}: damaged ({error}); begin anew with --restart") from error
    return state


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and has saved a checkpoint."""


class StopSignal:
    """Becomes true on Ctrl-C, on SIGTERM or after `max_minutes`; a second signal stops at once."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self._until = None if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self._asked = False
        self._old: dict[signal.Signals, Any] = {}

    @property
    def wanted(self) -> bool:
        return self._asked or (self._until is not None and time.monotonic() > self._until)

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
