"""The encoder families: BERT (and MiniLM), RoBERTa, DistilBERT, ALBERT, ELECTRA, MPNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from offramp_common.errors import ConfigError
from offramp_model.backbones.backbone import Backbone
from offramp_model.backbones.mpnet import mpnet


def _bert(model: Any) -> Backbone:
    config = model.config
    return Backbone(
        model.embeddings,
        model.encoder.layer,
        config,
        width=config.hidden_size,
        max_tokens=config.max_position_embeddings,
        segments=config.type_vocab_size,
    )


class _Roberta(Backbone):
    family = "roberta"


def _roberta(model: Any) -> Backbone:
    config = model.config
    return _Roberta(
        model.embeddings,
        model.encoder.layer,
        config,
        width=config.hidden_size,
        # Positions are counted from the padding id + 1.
        max_tokens=config.max_position_embeddings - config.pad_token_id - 1,
        # RoBERTa marks pairs by separators; its one segment id carries nothing.
        segments=config.type_vocab_size if config.type_vocab_size > 1 else 0,
    )


class _DistilBert(Backbone):
    family = "distilbert"

    def embed_ids(self, ids_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
        hidden: Tensor = self.embeddings(ids_BT)
        return hidden


def _distilbert(model: Any) -> Backbone:
    config = model.config
    return _DistilBert(
        model.embeddings,
        model.transformer.layer,
        config,
        width=config.dim,
        max_tokens=config.max_position_embeddings,
    )


class _Projected(nn.Module):
    """Embeddings narrower than the hidden states, and the map between."""

    def __init__(self, embeddings: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.narrow, self.projection = embeddings, projection

    def forward(self, **inputs: Tensor) -> Tensor:
        hidden: Tensor = self.projection(self.narrow(**inputs))
        return hidden


class _Albert(Backbone):
    family = "albert"


def _albert(model: Any) -> Backbone:
    config, encoder = model.config, model.encoder
    per_group = config.num_hidden_layers / config.num_hidden_groups
    groups = [
        encoder.albert_layer_groups[int(i / per_group)] for i in range(config.num_hidden_layers)
    ]
    return _Albert(
        _Projected(model.embeddings, encoder.embedding_hidden_mapping_in),
        nn.ModuleList(groups),
        config,
        width=config.hidden_size,
        max_tokens=config.max_position_embeddings,
        segments=config.type_vocab_size,
    )


class _Electra(Backbone):
    family = "electra"


def _electra(model: Any) -> Backbone:
    config = model.config
    projection = getattr(model, "embeddings_project", None)
    embeddings = (
        model.embeddings if projection is None else _Projected(model.embeddings, projection)
    )
    return _Electra(
        embeddings,
        model.encoder.layer,
        config,
        width=config.hidden_size,
        max_tokens=config.max_position_embeddings,
        segments=config.type_vocab_size,
    )


FAMILIES: dict[str, Callable[[Any], Backbone]] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "albert": _albert,
    "electra": _electra,
    "mpnet": mpnet,
}


def backbone_from_pretrained(name_or_path: str) -> Backbone:
    """A pretrained checkpoint, by hub name or local path. Raises ConfigError when it cannot be had."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(name_or_path)
        take_apart = _family(config.model_type)
        model, info = AutoModel.from_pretrained(
            name_or_path, config=config, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"backbone {name_or_path!r}: cannot be loaded ({error}); give a directory that holds "
            "config.json and model.safetensors, or a hub name with the network up"
        ) from error
    backbone = take_apart(model)
    # A pooler that the checkpoint lacks is filled with random values by the library: no use.
    if not any("pooler" in name for name in info["missing_keys"]):
        backbone.pretrained_pooler = _pooler(model)
    return backbone


def backbone_from_config(config: dict[str, Any]) -> Backbone:
    """The same architecture with fresh weights, from a configuration's dictionary.

    Raises ConfigError for a family that is not supported and for settings that do not fit it.
    """
    from transformers import AutoConfig, AutoModel

    settings = dict(config)
    family = str(settings.pop("model_type", None))
    take_apart = _family(family)
    try:
        built = AutoConfig.for_model(family, **settings)
        model = AutoModel.from_config(built)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ConfigError(f"configuration of a {family} backbone: {error}") from error
    return take_apart(model)


def _pooler(model: Any) -> tuple[Tensor, Tensor] | None:
    pooler = getattr(model, "pooler", None)
    dense = getattr(pooler, "dense", pooler)  # ALBERT's pooler is the linear layer itself
    if not isinstance(dense, nn.Linear):
        return None
    return dense.weight.detach().clone(), dense.bias.detach().clone()


def _family(name: str) -> Callable[[Any], Backbone]:
    take_apart = FAMILIES.get(name)
    if take_apart is None:
        raise ConfigError(
            f"backbone family {name!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return take_apart
