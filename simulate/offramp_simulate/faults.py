"""Faults of a link, as data: what goes wrong, when, for how long and in which direction.

A fault is written as `kind=delay, ms=200, direction=down, at=5, for=3`, as keys of a table `[[fault]]`
in a TOML file, or as an object in a JSON file's list; the keys are the same. `at` counts from when
the link starts (or the command is given), in seconds; without `for` a fault lasts until it is healed.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from offramp_common.errors import ConfigError, DataError
from offramp_simulate.loss import GilbertElliott

Kind = Literal["blackhole", "cut", "reset", "stall", "delay", "corrupt", "loss", "rate"]
Towards = Literal["both", "up", "down"]

# kind: what it does, the keys it needs, the keys it may have beside at, for and direction
_KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "blackhole": ("nothing comes through and nobody is told; connections stay open", (), ()),
    "cut": ("connections are reset, new ones too", (), ()),
    "reset": ("connections are reset, once or every so many seconds; new ones work", (), ("every",)),
    "stall": ("nothing comes out; at its end all that is due comes at once", (), ()),
    "delay": ("so many ms more, each way named", ("ms",), ()),
    "corrupt": ("one byte in so many is inverted", ("bytes",), ()),
    "loss": ("this share of packets is lost, in runs of `burst`", ("rate",), ("burst", "seed")),
    "rate": ("the bandwidth is so many Mbit/s, or the link's times a factor", (), ("mbps", "factor")),
}  # fmt: skip
_WHOLE_LINK = ("cut", "reset")  # these know no direction
FAULT_HELP = "\n".join(
    f"  {' '.join([f'kind={kind}', *(f'{key}=' for key in (*needs, *may))]):<30} {what}"
    for kind, (what, needs, may) in _KINDS.items()
)


@dataclass(frozen=True)
class Fault:
    """One fault. ConfigError when a value is out of range or does not belong to its kind."""

    kind: Kind
    at_s: float = 0.0  # from when it is injected
    for_s: float = math.inf  # infinity: until it is healed
    direction: Towards = "both"
    every_s: float | None = None  # reset: again and again; None: once
    ms: float | None = None  # delay: added one-way delay
    nbytes: int | None = None  # corrupt: one byte in so many
    loss: GilbertElliott | None = None
    seed: int = 0  # of the loss
    mbps: float | None = None  # rate: constant, even where the link follows a trace
    factor: float | None = None  # rate: times the link's own

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"fault: kind is {self.kind!r}: one of {', '.join(get_args(Kind))}")
        if self.direction not in get_args(Towards):
            raise ConfigError(
                f"fault {self.kind}: direction is {self.direction!r}: give both, up or down"
            )
        self._check_ranges()
        if self.direction != "both" and self.kind in _WHOLE_LINK:
            raise ConfigError(f"fault {self.kind}: it takes the whole link: leave direction out")
        if self.kind == "reset" and self.every_s is None and self.for_s < math.inf:
            raise ConfigError("fault reset: `for` needs `every`: without, it happens once")
        own = {"delay": self.ms, "corrupt": self.nbytes, "loss": self.loss}
        if self.kind in own and own[self.kind] is None:
            raise ConfigError(f"fault {self.kind}: give {_KINDS[self.kind][1][0]}")
        if self.kind == "rate" and (self.mbps is None) == (self.factor is None):
            raise ConfigError("fault rate: give either mbps or factor")

    def _check_ranges(self) -> None:
        if not 0 <= self.at_s < math.inf:
            raise ConfigError(f"fault {self.kind}: at is {self.at_s}: give 0 or more seconds")
        for name, value in (("for", self.for_s), ("every", self.every_s), ("ms", self.ms),
                            ("bytes", self.nbytes), ("mbps", self.mbps),
                            ("factor", self.factor)):  # fmt: skip
            endless = name == "for"
            if value is not None and not (0 < value < math.inf or (endless and value == math.inf)):
                raise ConfigError(f"fault {self.kind}: {name} is {value}: give more than 0")


@dataclass(frozen=True)
class Conditions:
    """What all faults of a moment do to one direction."""

    blackhole: bool = False
    stalled: bool = False
    delay_s: float = 0.0
    corrupt_nbytes: int | None = None  # one byte in so many is inverted
    loss: tuple[GilbertElliott, int] | None = None  # and its seed; None: the link's own
    mbps: float | None = None  # None: the link's own rate
    factor: float = 1.0


def conditions(faults: Iterable[Fault], direction: Literal["up", "down"]) -> Conditions:
    """Delays add up and factors multiply; of several losses, rates or corruptions the last counts."""
    here = [fault for fault in faults if fault.direction in ("both", direction)]
    factors = [fault.factor for fault in here if fault.factor is not None]
    corrupt = [fault.nbytes for fault in here if fault.nbytes is not None]
    losses = [(fault.loss, fault.seed) for fault in here if fault.loss is not None]
    rates = [fault.mbps for fault in here if fault.mbps is not None]
    return Conditions(
        blackhole=any(fault.kind == "blackhole" for fault in here),
        stalled=any(fault.kind == "stall" for fault in here),
        delay_s=sum(fault.ms or 0.0 for fault in here) / 1e3,
        corrupt_nbytes=corrupt[-1] if corrupt else None,
        loss=losses[-1] if losses else None,
        mbps=rates[-1] if rates else None,
        factor=math.prod(factors),
    )


def parse_fault(text: str) -> Fault:
    """A fault from `key=value` words, between them commas or blanks. ConfigError says what is wrong."""
    row: dict[str, Any] = {}
    for word in text.replace(",", " ").split():
        key, equals, value = word.partition("=")
        if not equals or not key or not value:
            raise ConfigError(f"fault {text!r}: {word!r} is not key=value, such as kind=blackhole")
        if key in row:
            raise ConfigError(f"fault {text!r}: {key} is there twice: leave one")
        row[key] = value
    return _fault(row)


def load_faults(path: Path) -> tuple[Fault, ...]:
    """A timetable: TOML with tables `[[fault]]`, or (named *.json) a list of objects.

    DataError names the file and the fault by its number, from 1.
    """
    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        rows = json.loads(text) if is_json else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the faults: {error}") from error
    if isinstance(rows, dict):
        if unknown := sorted(set(rows) - {"fault"}):
            raise DataError(f"{path}: unknown key {unknown[0]!r}: write tables [[fault]]")
        rows = rows.get("fault")
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: no fault in it: write tables [[fault]], or a JSON list")
    faults = []
    for number, row in enumerate(rows, start=1):
        try:
            faults.append(_fault(row))
        except ConfigError as error:
            raise DataError(f"{path}: fault {number}: {error}") from error
    return tuple(faults)


def _fault(row: Any) -> Fault:
    if not isinstance(row, Mapping) or "kind" not in row:
        raise ConfigError(f"fault: no kind given: one of {', '.join(_KINDS)}")
    kind = row["kind"]
    if kind not in _KINDS:
        raise ConfigError(f"fault: kind is {kind!r}: one of {', '.join(_KINDS)}")
    _, needs, may = _KINDS[kind]
    allowed = ("kind", "at", "for", "direction", *needs, *may)
    if unknown := [key for key in row if key not in allowed]:
        raise ConfigError(f"fault {kind}: it has no {unknown[0]!r}: one of {', '.join(allowed)}")
    number = {
        key: _number(kind, key, value)
        for key, value in row.items()
        if key not in ("kind", "direction")
    }
    if missing := [key for key in needs if key not in number]:
        raise ConfigError(f"fault {kind}: give {missing[0]}")
    loss = GilbertElliott.of(number["rate"], number.get("burst")) if kind == "loss" else None
    return Fault(
        kind=kind,
        at_s=number.get("at", 0.0),
        for_s=number.get("for", math.inf),
        direction=row.get("direction", "both"),
        every_s=number.get("every"),
        ms=number.get("ms"),
        nbytes=int(number["bytes"]) if "bytes" in number else None,
        loss=loss,
        seed=int(number.get("seed", 0)),
        mbps=number.get("mbps"),
        factor=number.get("factor"),
    )


def _number(kind: str, key: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"fault {kind}: {key} is {value!r}, not a number") from error
