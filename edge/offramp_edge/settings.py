"""How a device works: one frozen dataclass, one line a setting, loadable from TOML."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from offramp_common.bundle import Bundle
from offramp_common.codecs import CODECS
from offramp_common.errors import ConfigError
from offramp_common.runner import Knobs
from offramp_common.spec import never_exit

FINISH, EXIT = "finish", "exit"


@dataclass(frozen=True)
class EdgeSettings:
    """Everything a user may choose. None: the bundle's own choice, or no limit."""

    split: int | None = None  # layers the device runs; 0 sends the input, n keeps all here
    precision: str | None = None  # of the device's layers: "fp32", "int8"
    codec: str | None = None  # of hidden states; the cloud may lack it, then another is taken
    exits: bool = True  # False: no sample leaves early
    knobs: Mapping[str, Any] | None = None  # operating point: a number, or one for each depth
    deadline_ms: float | None = None  # from taking a sample to its answer; None: no deadline
    margin_ms: float = 5.0  # kept free before the deadline for handing the answer over
    offload_timeout_ms: float = 2000.0  # longest wait for the cloud, with or without a deadline
    probe_timeout_ms: float = 3000.0  # longest wait for a handshake, connecting included
    backoff_ms: float = 200.0  # first wait after a failure; doubles, with full jitter
    backoff_max_ms: float = 10_000.0  # longest wait between handshakes
    fallback: str = FINISH  # "finish": the device runs on; "exit": the deepest exit answers
    min_uplink_mbps: float = 0.0  # offload only while the link is estimated at this or better
    link_expires_ms: float = 10_000.0  # an estimate older than this no longer keeps samples here
    max_in_flight: int = 8  # offloads in the air at once
    threads: int = 1  # of the device's layers
    logits: bool = False  # answers carry their logits
    # For methods that choose a sample's exit before it runs; knobs or exits = false choose it here.
    bandit_alpha: float = 1.0  # exploration
    bandit_cost: float = 1.0  # of running all layers: 0.1 is worth ten points of accuracy
    bandit_upload: float = 0.0  # of exits beyond the split, on the same scale
    bandit_file: str | None = None  # where the counters are kept; None: forgotten at the end

    def __post_init__(self) -> None:
        _check_types(self)
        positive = ("offload_timeout_ms", "probe_timeout_ms", "backoff_ms", "max_in_flight")
        for name in (*positive, "backoff_max_ms", "link_expires_ms", "threads"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be above 0")
        for name in ("margin_ms", "min_uplink_mbps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must not be negative")
        for name in ("bandit_alpha", "bandit_cost", "bandit_upload"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be finite, not negative")
        if self.deadline_ms is not None and not self.deadline_ms > 0:
            raise ConfigError(f"deadline_ms = {self.deadline_ms}: must be above 0")
        if self.backoff_ms > self.backoff_max_ms:
            raise ConfigError(f"backoff_ms = {self.backoff_ms}: above backoff_max_ms")
        if self.fallback not in (FINISH, EXIT):
            raise ConfigError(f'fallback = "{self.fallback}": must be "{FINISH}" or "{EXIT}"')
        if self.knobs is not None and not self.exits:
            raise ConfigError("knobs with exits = false: no sample leaves early, drop one of them")

    @classmethod
    def from_toml(cls, path: str | Path) -> EdgeSettings:
        """The settings in a TOML file of exactly these names. Raises ConfigError, naming what is
        wrong."""
        try:
            values = tomllib.loads(Path(path).read_text())
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
        try:
            return cls().changed(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def changed(self, values: Mapping[str, Any]) -> EdgeSettings:
        """With these fields instead; raises ConfigError for a name that is no setting."""
        known = [field.name for field in fields(self)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}; there are: {', '.join(known)}")
        return replace(self, **values)


@dataclass(frozen=True)
class Plan:
    """The settings made definite for one bundle."""

    split: int
    precision: str
    codecs: tuple[str, ...]  # of hidden states, best first
    knobs: Knobs


def plan_for(bundle: Bundle, settings: EdgeSettings) -> Plan:
    """Raises ConfigError for what this bundle cannot do."""
    manifest, n = bundle.manifest, bundle.n_layers
    split = manifest.split if settings.split is None else settings.split
    if not 0 <= split <= n:
        raise ConfigError(f"split {split}: must be 0 (send the input) to {n} (all on the device)")
    precision = settings.precision or manifest.precision
    codec = settings.codec or manifest.codec
    travelling = [name for name, known in CODECS.items() if not known.integer]
    if codec not in travelling:
        raise ConfigError(f"codec {codec!r}: hidden states travel as {', '.join(travelling)}")
    # A cloud that lacks int8+z is sent int8 rather than the first of the table.
    codecs = tuple(dict.fromkeys((codec, codec.removesuffix("+z"), *travelling)))
    return Plan(split, precision, codecs, _knobs(bundle, settings, precision))


def _knobs(bundle: Bundle, settings: EdgeSettings, precision: str) -> Knobs:
    specs, n = bundle.manifest.knobs, bundle.n_layers
    if not settings.exits:
        return never_exit(specs, n)
    if settings.knobs is None:
        return bundle.knobs(precision)
    names = [spec.name for spec in specs]
    if sorted(settings.knobs) != sorted(names):
        raise ConfigError(f"knobs {sorted(settings.knobs)}: this bundle's method has {names}")
    knobs = {}
    for name, value in settings.knobs.items():
        values = list(value) if isinstance(value, list | tuple) else [value] * n
        if len(values) != n or not all(isinstance(v, int | float) for v in values):
            raise ConfigError(f"knob {name} = {value!r}: a number, or {n} of them (one a layer)")
        knobs[name] = tuple(float(v) for v in values)
    return knobs


def _check_types(settings: EdgeSettings) -> None:
    """A file's "true" or "10" must not pass as a number."""
    for name, hint in get_type_hints(EdgeSettings).items():
        value = getattr(settings, name)
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = tuple(get_origin(option) or option for option in options)
        if float in kinds:
            kinds = (*kinds, int)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{name} = {value!r}: must be {hint}")
