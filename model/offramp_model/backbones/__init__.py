"""Pretrained families taken apart into embeddings and layers. Each adapter is thin: the layers are
transformers' own modules, and tests hold every family equal to the whole transformers model."""

from __future__ import annotations

from offramp_model.backbones.backbone import Backbone
from offramp_model.backbones.encoders import (
    FAMILIES,
    backbone_from_config,
    backbone_from_pretrained,
)

__all__ = ["FAMILIES", "Backbone", "backbone_from_config", "backbone_from_pretrained"]
