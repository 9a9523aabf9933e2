"""The record that describes one published exit method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from offramp_common.spec import KnobSpec
from offramp_model.exits import HeadSpec, Policy


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    venue: str
    link: str


@dataclass(frozen=True, slots=True)
class Method:
    """One published exit method.

    rule       when a sample leaves, in two sentences
    tasks      the task kinds it can decide on
    policy     builds the exit policy
    branches   builds the branch of each exit, keyed by str(depth), final head included
    knobs      what calibration may move, for a task
    recipe     name of the training recipe of the paper (offramp_train.recipes)
    settings   structural settings with their defaults; a bundle stores them
    """

    name: str
    paper: Paper
    rule: str
    tasks: tuple[str, ...]
    policy: Callable[[HeadSpec], Policy]
    branches: Callable[[HeadSpec], nn.ModuleDict]
    knobs: Callable[[HeadSpec], tuple[KnobSpec, ...]]
    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)
