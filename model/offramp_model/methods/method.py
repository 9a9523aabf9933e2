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
    use, avoid   when to take it, and when not to: for the method's page
    reported   what the paper reports of quality and speed; "not verified" where nobody has read it there
    settings   structural settings with their defaults; a bundle stores them
    learned    the branch outputs that training must teach, for given settings; a recipe that teaches fewer
               is refused
    every_layer  branches stand after every layer, wherever exits are: the others only add to the state
    guarantee  the guaranteed calibration it offers (offramp_train.calibrate), or ""
    online     the device chooses a sample's exit before it runs, and learns from what the exits said
    """

    name: str
    paper: Paper
    rule: str
    tasks: tuple[str, ...]
    policy: Callable[[HeadSpec], Policy]
    branches: Callable[[HeadSpec], nn.ModuleDict]
    knobs: Callable[[HeadSpec], tuple[KnobSpec, ...]]
    recipe: str
    use: str
    avoid: str
    reported: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    learned: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda settings: ("logits",)
    every_layer: bool = False
    guarantee: str = ""
    online: bool = False
