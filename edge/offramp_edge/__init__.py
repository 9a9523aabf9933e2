"""The device's agent: shallow layers here, deep ones in the cloud, an answer whatever happens.

    from offramp_edge import EdgeWorker, load_bundle

Needs neither torch, transformers nor ray. Names are loaded when they are used, so that commands
which only want one of them start quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp_edge.answers import Answer, Failed, Sample, Stages
    from offramp_edge.settings import EdgeSettings
    from offramp_edge.worker import EdgeWorker, load_bundle

_HOME = {
    "Answer": "answers",
    "EdgeSettings": "settings",
    "EdgeWorker": "worker",
    "Failed": "answers",
    "Sample": "answers",
    "Stages": "answers",
    "load_bundle": "worker",
}

__all__ = [
    "Answer",
    "EdgeSettings",
    "EdgeWorker",
    "Failed",
    "Sample",
    "Stages",
    "load_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
