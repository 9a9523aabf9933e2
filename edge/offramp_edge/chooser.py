"""Which exit each sample is to leave at, for methods that choose it before the sample runs: the bandit with
its counters kept in a file, so that a device that starts again goes on where it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offramp_common.bundle import Bundle
from offramp_common.errors import ConfigError
from offramp_common.runner import Knobs
from offramp_edge.answers import Answer
from offramp_edge.bandit import ExitBandit, layer_costs
from offramp_edge.settings import EdgeSettings

log = logging.getLogger("offramp.edge")

_SAVE_EVERY = 100  # answers; what a crash may cost


class Chooser:
    """`knobs` before a sample, `answered` after it. Used from one thread."""

    def __init__(
        self, bandit: ExitBandit, exits: tuple[int, ...], n_layers: int, knob: str
    ) -> None:
        """`knob` takes the depth of the exit that is chosen."""
        self.bandit, self.exits = bandit, exits
        self._file: Path | None = None
        self._model = ""
        self._unsaved = 0
        # Made once: the choice is on every sample's way.
        self._knobs: tuple[Knobs, ...] = tuple({knob: (float(d),) * n_layers} for d in exits)

    def knobs(self) -> Knobs:
        """The operating point of the sample that is about to run."""
        return self._knobs[self.bandit.choose()]

    def answered(self, answer: Answer) -> None:
        """Learn from an answer, wherever it was given: a fallback tells of the exits it passed."""
        self.bandit.learn(answer.exit_classes)
        self._unsaved += 1
        if self._unsaved >= _SAVE_EVERY:
            self.save()

    def keep_in(self, path: Path, model: str) -> None:
        """Go on from the counters in a file, if it is there and of the model called so, and keep it up to
        date from now on. Raises ConfigError for a file of something else, or one that cannot be written."""
        self._file, self._model = path, model
        try:
            text = path.read_text() if path.exists() else ""
            kept = json.loads(text) if text.strip() else None  # a power cut may leave it empty
            if kept is not None:
                observed_E, disagreed_E = _counters(kept, len(self.exits), model)
                self.bandit.observed_E[:] = observed_E
                self.bandit.disagreed_E[:] = disagreed_E
        except _OtherModel:
            log.warning("bandit_file %s: counters of another model, starting from nothing", path)
        except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"bandit_file {path}: no bandit's counters ({type(error).__name__}: {error}); name another "
                "file, or remove this one to start from nothing"
            ) from error
        try:
            self._write(
                path
            )  # at once, and not after a hundred answers, it shows if that cannot be
        except OSError as error:
            raise ConfigError(f"bandit_file {path}: cannot be written ({error})") from error

    def save(self) -> None:
        """Write the counters, if they have a file. Never raises: no sample is lost for them."""
        self._unsaved = 0
        if self._file is None:
            return
        try:
            self._write(self._file)
        except OSError as error:
            log.warning("bandit_file %s: cannot be written (%s)", self._file, error)

    def _write(self, path: Path) -> None:
        """Atomically: whoever reads it finds the old counters or the new."""
        counters = {
            "model": self._model,
            "observed": self.bandit.observed_E.tolist(),
            "disagreed": self.bandit.disagreed_E.tolist(),
        }
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(counters) + "\n")
        temporary.replace(path)

    def to_json(self) -> list[dict[str, Any]]:
        """What it has learnt, exit by exit; `played` is how often it was the deepest passed."""
        b = self.bandit
        played_E = b.observed_E - np.append(b.observed_E[1:], 0)
        columns = (self.exits, b.cost_E, b.observed_E, b.disagreed_E, b.disagreement_E, played_E)
        names = ("depth", "cost", "observed", "disagreed", "disagreement", "played")
        rows = zip(*(np.array(column).tolist() for column in columns), strict=True)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def words(self) -> str:
        """The same in a line, for people."""
        shown = (
            f"{row['depth']}: {row['played']} (differs {row['disagreement']:.1%})"
            for row in self.to_json()
        )
        return f"exit chosen {', '.join(shown)}"


def chooser_for(bundle: Bundle, settings: EdgeSettings, split: int) -> Chooser | None:
    """The chooser of a bundle whose method wants one, the device running `split` layers; None for other
    methods, and where the settings fix the operating point. Raises ConfigError for a wrong file."""
    manifest = bundle.manifest
    if not manifest.online:
        if settings.bandit_file is not None:
            raise ConfigError(
                f"bandit_file: {manifest.method} chooses no exits beforehand, drop it"
            )
        return None
    if settings.knobs is not None or not settings.exits:
        return None
    cost_E = layer_costs(
        manifest.exits, manifest.n_layers, split, settings.bandit_cost, settings.bandit_upload
    )
    bandit = ExitBandit(cost_E, settings.bandit_alpha)
    (knob,) = manifest.knobs
    chooser = Chooser(bandit, manifest.exits, manifest.n_layers, knob.name)
    if settings.bandit_file is not None:
        chooser.keep_in(Path(settings.bandit_file), bundle.digest(0).hex())
    return chooser


class _OtherModel(Exception):
    """The counters are of another model."""


def _counters(kept: Mapping[str, Any], n_exits: int, model: str) -> tuple[Any, Any]:
    """(observed_E, disagreed_E). Raises _OtherModel, or ValueError and the like unless they can be what
    was counted."""
    observed_E, disagreed_E = (np.array(kept[name], np.int64) for name in ("observed", "disagreed"))
    if kept["model"] != model:
        raise _OtherModel
    if observed_E.shape != (n_exits,) or disagreed_E.shape != (n_exits,):
        raise ValueError(f"counters of {observed_E.shape} exits, not {n_exits}")
    sane = (disagreed_E >= 0).all() and (disagreed_E <= observed_E).all() and not disagreed_E[0]
    if not sane or (np.diff(observed_E) > 0).any():
        raise ValueError("counters that no run can have counted")
    return observed_E, disagreed_E
