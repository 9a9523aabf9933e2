"""What a training run is told: TOML file and flags. Unknown keys are errors; checks name the value."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from offramp_common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Training:
    """[training]: the optimisation of every stage of the recipe.

    epochs             of each stage;  stage_epochs: one number a stage instead, where given
    batch              rows of one forward pass;  accumulate: passes to one update
    lr                 peak learning rate;  head_lr: of the exit heads, 0 means lr
    stage_lr           one rate a stage for all that learns, in place of both, where given
    extra_lr           of what a recipe learns beside the model
    weight_decay       of matrices; biases and norms have none
    warmup             share of the updates over which the rate rises; then it falls linearly to 0
    clip               largest gradient norm
    dropout            in the exit heads
    freeze_embeddings  leave the embeddings as they are
    bf16               forward in bfloat16 (fast where the processor has it), update in float32
    quantise_epochs    so many last epochs see the weights as the bundle will store them (int8)
    ema                decay of a running mean of the weights that is kept instead of them; 0: off
    keep               "best" epoch on dev (of those that see quantised weights, if any do) or "last"
    poolers            exit heads' poolers start "pretrained" (where the checkpoint has one) or "fresh";
                       "auto": pretrained where the first token is read, as the checkpoint's own pooler does
    checkpoint_steps   updates between two checkpoints
    """

    epochs: int = 3
    batch: int = 32
    accumulate: int = 1
    lr: float = 2e-5
    head_lr: float = 0.0
    stage_epochs: tuple[int, ...] = ()
    stage_lr: tuple[float, ...] = ()
    extra_lr: float = 1e-2
    weight_decay: float = 0.0
    warmup: float = 0.0
    clip: float = 1.0
    dropout: float = 0.1
    freeze_embeddings: bool = False
    bf16: bool = False
    quantise_epochs: int = 0
    ema: float = 0.0
    keep: str = "last"
    poolers: str = "auto"
    checkpoint_steps: int = 300

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "lr", "extra_lr", "clip", "checkpoint_steps"):
            _require(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "above 0")
        for name in ("stage_epochs", "stage_lr"):
            values = getattr(self, name)
            _require(all(v > 0 for v in values), f"training.{name}", values, "all above 0")
        for name in ("warmup", "ema", "dropout"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"training.{name}", value, "at least 0 and below 1")
        for name in ("quantise_epochs", "head_lr", "weight_decay"):
            _require(
                getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "at least 0"
            )
        _require(self.keep in ("best", "last"), "training.keep", self.keep, "best or last")
        allowed = ("auto", "pretrained", "fresh")
        _require(self.poolers in allowed, "training.poolers", self.poolers, " or ".join(allowed))


@dataclass(frozen=True, slots=True)
class Augment:
    """[augment]: what is done to the training rows in each epoch.

    repeat         label -> how often its rows are seen in an epoch
    weights        label -> weight of its rows in the loss
    word_dropout   chance of a word piece to be replaced by the unknown one
    mix_label      label of made-up rows: half the word pieces of one row, half of another whose label
                   differs, neither of this label; "" makes none
    mix_share      how many, as a share of the rows of other labels;  mix_weight: their weight
    last_epochs    word dropout and mixing are for so many last epochs; 0: for all
    """

    repeat: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    word_dropout: float = 0.0
    mix_label: str = ""
    mix_share: float = 0.0
    mix_weight: float = 1.0
    last_epochs: int = 0

    def __post_init__(self) -> None:
        for name in ("repeat", "weights"):
            for label, value in getattr(self, name).items():
                _require(value > 0, f"augment.{name}.{label}", value, "above 0")
        _require(0 <= self.word_dropout < 1, "augment.word_dropout", self.word_dropout, "in [0, 1)")
        _require(self.last_epochs >= 0, "augment.last_epochs", self.last_epochs, "at least 0")
        _require(self.mix_share >= 0, "augment.mix_share", self.mix_share, "at least 0")


@dataclass(frozen=True, slots=True)
class Calibration:
    """[calibration]: the operating point that the bundle gets, found on dev.

    max_drop       points of quality it may cost;  margin: points kept in hand
    epsilon        risk of the guaranteed calibration, for methods that offer one; 0 goes by max_drop
    per_exit       whether each exit may have a value of its own (see calibrate.Goal)
    label_weights  label -> weight of its rows, where dev has another mix of labels than real use
    shift_label    a label (out of scope) whose logit is lowered at every exit, after training, until the rows
                   of all others have the accuracy `shift_others` (in percent) on dev at full depth; "": none
    """

    max_drop: float = 1.0
    margin: float = 0.0
    epsilon: float = 0.0
    per_exit: bool = True
    label_weights: Mapping[str, float] = field(default_factory=dict)
    shift_label: str = ""
    shift_others: float = 0.0

    def __post_init__(self) -> None:
        _require(self.max_drop >= 0, "calibration.max_drop", self.max_drop, "at least 0")
        within = 0 <= self.epsilon < 1
        _require(within, "calibration.epsilon", self.epsilon, "at least 0 and below 1")
        _require(self.margin >= 0, "calibration.margin", self.margin, "at least 0")
        within = 0 <= self.shift_others <= 100
        _require(within, "calibration.shift_others", self.shift_others, "a percentage")


@dataclass(frozen=True, slots=True)
class Card:
    """[card]: what the model card says that the program cannot know. Plain text."""

    title: str = ""
    description: str = ""
    license: str = ""
    language: str = ""
    base_model: str = ""
    base_model_license: str = ""
    dataset: str = ""
    dataset_license: str = ""
    limits: str = ""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The whole of a training run's settings, paths of data and output left out.

    recipe     "" takes the method's own
    exits      depths with an exit head; empty: after every layer
    settings   the method's structural settings;  loss: the recipe's (recipe_check.loss_settings)
    split      layers that the device runs unless told otherwise; -1: half of them
    precision  what the device runs unless told otherwise: "fp32" or "int8"
    columns    see tables.read_rows
    task       "classification", "regression" or "" (look at the labels)
    """

    name: str = ""
    backbone: str = ""
    method: str = "deebert"
    recipe: str = ""
    seed: int = 42
    max_tokens: int = 128
    split: int = -1
    precision: str = "fp32"
    exits: tuple[int, ...] = ()
    columns: tuple[str, ...] = ()
    task: str = ""
    dev_share: float = 0.1
    settings: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    augment: Augment = field(default_factory=Augment)
    calibration: Calibration = field(default_factory=Calibration)
    card: Card = field(default_factory=Card)

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 4, "max_tokens", self.max_tokens, "at least 4")
        _require(0 < self.dev_share < 1, "dev_share", self.dev_share, "above 0 and below 1")
        tasks = ("", "classification", "regression")
        _require(self.precision in ("fp32", "int8"), "precision", self.precision, "fp32 or int8")
        _require(self.task in tasks, "task", self.task, "classification or regression")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def for_stage(self, index: int, n_stages: int) -> Training:
        """[training] as the recipe's stage of this index has it. Raises ConfigError."""
        settings = self.training
        for name in ("stage_epochs", "stage_lr"):
            given = getattr(settings, name)
            if given and len(given) != n_stages:
                raise ConfigError(
                    f"training.{name}: {len(given)} values for {n_stages} stages of recipe {self.recipe}"
                )
        if settings.stage_epochs:
            settings = replace(settings, epochs=settings.stage_epochs[index])
        if settings.stage_lr:
            settings = replace(settings, lr=settings.stage_lr[index], head_lr=0.0)
        return settings


_SECTIONS = {
    "training": Training,
    "augment": Augment,
    "calibration": Calibration,
    "card": Card,
}
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "tuple[int, ...]": (list,),
    "tuple[float, ...]": (list,),
    "tuple[str, ...]": (list,),
    "Mapping[str, int]": (dict,),
    "Mapping[str, float]": (dict,),
    "Mapping[str, Any]": (dict,),
}


def read_table(path: Path) -> dict[str, Any]:
    """A TOML file as nested dictionaries. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error


def merge(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Later tables win, key by key, sections merged; a mapping inside a section is replaced whole."""
    out: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            nested = isinstance(value, Mapping) and key in (*_SECTIONS, "settings", "loss")
            out[key] = {**out.get(key, {}), **value} if nested else value
    return out


def config_from(table: Mapping[str, Any], where: str) -> TrainConfig:
    """Raises ConfigError that names the key and what is allowed."""
    table = dict(table)
    sections = {}
    for name, kind in _SECTIONS.items():
        section = table.pop(name, {})
        if not isinstance(section, Mapping):
            raise ConfigError(f"{where}: {name} is a section: write [{name}]")
        sections[name] = _build(kind, section, where, name + ".")
    config: TrainConfig = _build(TrainConfig, table, where, "")
    return replace(config, **sections)


def _build(kind: type, table: Mapping[str, Any], where: str, prefix: str) -> Any:
    known = {f.name: str(f.type) for f in fields(kind) if f.name not in _SECTIONS}
    values = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {prefix}{key}; known: {', '.join(known)}")
        allowed = _KINDS[known[key]]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ConfigError(f"{where}: {prefix}{key} = {value!r}: must be of type {known[key]}")
        values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value!r}: must be {allowed}")
