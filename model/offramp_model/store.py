"""MultiExitModel <-> bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp_common import bundle as layout
from offramp_common.activations import NumpyArray
from offramp_common.bundle import Bundle, write_manifest
from offramp_common.errors import BundleError, ConfigError
from offramp_common.manifest import Manifest
from offramp_common.runner import Knobs
from offramp_common.spec import never_exit
from offramp_common.weights import Stored, quantise_linear, quantise_table, unpack_weights
from offramp_model.backbones import backbone_from_config
from offramp_model.exits import HeadSpec
from offramp_model.methods import METHODS
from offramp_model.split_model import MultiExitModel

_BACKBONE_PREFIX = "backbone."
_SMALLEST_MATRIX = 2**14  # smaller ones stay float32: nothing to save


@dataclass(frozen=True, slots=True)
class About:
    """What a bundle says beside its weights; see Manifest."""

    name: str
    max_tokens: int
    split: int
    operating_points: Mapping[str, Knobs] = field(default_factory=dict)
    curve: tuple[Mapping[str, Any], ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)


def save_model(path: Path, model: MultiExitModel, tokenizer_json: str, about: About) -> Bundle:
    """Write the bundle (without graphs: offramp_model.export adds them) with its matrices as int8."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    # Graphs of other weights must not outlive them: their initialisers point into the new file.
    shutil.rmtree(path / layout.GRAPHS, ignore_errors=True)
    (path / layout.CODEC_WEIGHTS).unlink(missing_ok=True)  # fitted to the weights that were
    tensors, stored, aliases = _pack(model)
    save_file(tensors, path / layout.WEIGHTS)
    (path / layout.TOKENIZER).write_text(tokenizer_json)
    config = model.backbone.config.to_dict()
    for transient in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(transient, None)
    (path / layout.BACKBONE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    n = model.n_layers
    points = dict(about.operating_points) or {"fp32": never_exit(model.knobs, n)}
    manifest = Manifest(
        name=about.name,
        task=model.spec.task,
        family=model.backbone.family,
        n_layers=n,
        max_tokens=about.max_tokens,
        cuts=tuple(model.cut(depth) for depth in range(n)),
        method=model.method.name,
        settings=model.spec.settings,
        exits=model.spec.exits,
        knobs=model.knobs,
        operating_points=points,
        split=about.split,
        stored=stored,
        aliases=aliases,
        curve=about.curve,
        training=about.training,
        online=model.method.online,
    )
    write_manifest(path, manifest)
    return Bundle.read(path)


def load_model(bundle: Bundle) -> MultiExitModel:
    """The model of a bundle, in float32, in evaluation mode. Raises BundleError."""
    m = bundle.manifest
    if m.method not in METHODS:
        raise BundleError(
            f"{bundle.path}: exit method {m.method!r} is unknown to this version; known: {', '.join(METHODS)}"
        )
    tensors = bundle.tensors
    try:
        backbone = backbone_from_config(json.loads((bundle.path / layout.BACKBONE).read_text()))
        spec = HeadSpec(m.task, backbone.width, m.n_layers, m.exits, m.settings)
        model = MultiExitModel(backbone, METHODS[m.method], spec)
        weights = unpack_weights(tensors, m.stored)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{bundle.path}: manifest, {layout.BACKBONE} and {layout.WEIGHTS} do not fit each other "
            f"({type(error).__name__}: {error}); `offramp bundle verify` finds a damaged file"
        ) from error
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            value = weights.pop(name, None)
            if value is None or tuple(value.shape) != tuple(tensor.shape):
                have = "missing" if value is None else f"of shape {value.shape}"
                raise BundleError(
                    f"{bundle.path}: tensor {name} is {have}, must be {tuple(tensor.shape)}"
                )
            tensor.copy_(torch.from_numpy(value))
    if weights:
        raise BundleError(f"{bundle.path}: tensor {min(weights)} belongs to no part of the model")
    return model.eval()


def named_tensors(model: MultiExitModel) -> dict[str, Tensor]:
    """All weights by the name they have in a bundle, shared ones once, under their first name."""
    pairs = [*model.named_parameters(), *_persistent_buffers(model)]
    return {name.removeprefix(_BACKBONE_PREFIX): tensor for name, tensor in pairs}


def stored_kinds(model: MultiExitModel) -> dict[str, str]:
    """Name -> "linear" or "table" for the matrices that a bundle keeps as int8."""
    kinds: dict[str, str] = {}
    for prefix, module in model.named_modules():
        kind = {nn.Linear: "linear", nn.Embedding: "table"}.get(type(module))
        weight = getattr(module, "weight", None)
        if kind and isinstance(weight, Tensor) and weight.numel() >= _SMALLEST_MATRIX:
            kinds[f"{prefix}.weight".removeprefix(_BACKBONE_PREFIX)] = kind
    return kinds


def _pack(
    model: MultiExitModel,
) -> tuple[dict[str, NumpyArray], dict[str, Stored], dict[str, str]]:
    """(tensors as stored, how the matrices are, aliases)."""
    kinds = stored_kinds(model)
    tensors: dict[str, NumpyArray] = {}
    stored: dict[str, Stored] = {}
    names = named_tensors(model)
    for name, tensor in names.items():
        value = tensor.detach().cpu().float().numpy()
        if name in kinds:
            quantise = quantise_linear if kinds[name] == "linear" else quantise_table
            tensors[name], tensors[name + ".scale"] = quantise(value)
            stored[name] = Stored(kinds[name], name + ".scale")
        else:
            tensors[name] = value.copy()
    first = {id(tensor): name for name, tensor in names.items()}
    every = {
        name.removeprefix(_BACKBONE_PREFIX): tensor
        for name, tensor in model.named_parameters(remove_duplicate=False)
    }
    aliases = {name: first[id(tensor)] for name, tensor in every.items() if name not in names}
    return tensors, stored, aliases


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to the weights; position counters and the like are rebuilt."""
    keep = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in keep]
