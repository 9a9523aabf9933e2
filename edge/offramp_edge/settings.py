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
AUTO, FIXED, NEUROSURGEON, SPINN, SPLITEE = "auto", "fixed", "neurosurgeon", "spinn", "splitee"
PLANS = (AUTO, FIXED, NEUROSURGEON, SPINN, SPLITEE)


@dataclass(frozen=True)
class EdgeSettings:
    """Everything a user may choose. None: the bundle's own choice, or no limit."""

    plan: str | None = (
        None  # who decides where samples are cut; None: "auto", or "fixed" with split
    )
    split: int | None = None  # for "fixed": layers the device runs; 0 sends the input, n none
    min_split: int = 0  # samples are sent no earlier: 1 never sends the input
    precision: str | None = None  # of the device's layers: "fp32", "int8"
    codec: str | None = None  # of hidden states; the cloud may lack it, then another is taken
    max_codec_cost: float = (
        0.5  # points of quality that a codec may cost, as the bundle states them
    )
    # What plan = "auto" makes small: milliseconds, and these times what else a sample costs.
    weight_energy: float = 0.0  # milliseconds that a millijoule of the device is worth
    weight_cloud: float = 0.0  # milliseconds that a layer run in the cloud is worth
    device_watts: float = 4.0  # while it computes, above idling
    radio_watts: float = 1.5  # while it sends, above idling
    probe_ms: float = 5000.0  # a link silent for 1 to 1.5 times as long is probed; 0: never
    exits: bool = True  # False: no sample leaves early
    knobs: Mapping[str, Any] | None = None  # operating point: a number, or one for each depth
    deadline_ms: float | None = (
        2000.0  # from taking a sample to its answer; None or inf: no deadline
    )
    margin_ms: float = 5.0  # kept free before the deadline for handing the answer over
    offload_timeout_ms: float = 2000.0  # longest wait for the cloud, with or without a deadline
    probe_timeout_ms: float = 3000.0  # longest wait for a handshake, connecting included
    backoff_ms: float = 200.0  # first wait after a failure; doubles, with full jitter
    backoff_max_ms: float = 10_000.0  # longest wait between handshakes
    return_ms: float = (
        1000.0  # the same while samples miss the cloud, unless it fails what it is sent
    )
    retry_share: float = 0.1  # of the samples that are sent, how many are sent again; 0: none
    retry_ms: float = 50.0  # first wait before that; doubles, with full jitter
    # Once the cloud is later than so many times its usual answer (mean and four deviations) the device runs
    # on too, and whoever is first answers; 0: at once, inf: never.
    hedge_after: float = 1.0
    fallback: str = FINISH  # "finish": the device runs on; "exit": the deepest exit answers
    min_uplink_mbps: float = 0.0  # offload only while the link is estimated at this or better
    link_expires_ms: float = 10_000.0  # an estimate older than this no longer keeps samples here
    max_in_flight: int = 8  # offloads in the air at once
    # A folder where samples without a complete answer wait for the cloud; their final answers come there.
    spool: str | None = None
    spool_mb: float = 64.0  # of samples at most; the oldest are dropped beyond
    threads: int = 1  # of the device's layers
    logits: bool = False  # answers carry their logits
    # For methods that choose a sample's exit before it runs; knobs or exits = false choose it here.
    bandit_alpha: float = 1.0  # exploration
    bandit_cost: float = 1.0  # of running all layers: 0.1 is worth ten points of accuracy
    bandit_upload: float = 0.0  # of exits beyond the split, on the same scale
    bandit_file: str | None = None  # where the counters are kept; None: forgotten at the end

    def __post_init__(self) -> None:
        _check_types(self)
        positive = ("offload_timeout_ms", "probe_timeout_ms", "backoff_ms", "retry_ms", "return_ms")
        for name in (
            *positive,
            "max_in_flight",
            "backoff_max_ms",
            "link_expires_ms",
            "spool_mb",
            "threads",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be above 0")
        if self.plan is not None and self.plan not in PLANS:
            raise ConfigError(f'plan = "{self.plan}": must be one of {", ".join(PLANS)}')
        if self.split is not None and self.plan not in (None, FIXED):
            raise ConfigError(
                f'split with plan = "{self.plan}", which chooses it: drop one of them'
            )
        for name in ("weight_energy", "weight_cloud", "device_watts", "radio_watts", "probe_ms"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be finite, not negative")
        for name in ("margin_ms", "min_uplink_mbps", "max_codec_cost", "hedge_after"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must not be negative")
        for name in ("bandit_alpha", "bandit_cost", "bandit_upload"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be finite, not negative")
        if not 0 <= self.retry_share <= 1:
            raise ConfigError(f"retry_share = {self.retry_share}: must be from 0 to 1")
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

    kind: str  # one of PLANS
    split: int  # where samples are cut, if kind is "fixed"
    depths: tuple[int, ...]  # at which samples may be cut for the cloud
    precision: str
    codecs: tuple[str, ...]  # of hidden states, best first
    knobs: Knobs


def plan_for(bundle: Bundle, settings: EdgeSettings) -> Plan:
    """Raises ConfigError for what this bundle cannot do."""
    manifest, n = bundle.manifest, bundle.n_layers
    # A sample whose exit is chosen before it runs is cut where the chooser reckons with.
    open_ = settings.split is None and not manifest.online
    kind = settings.plan or (AUTO if open_ else FIXED)
    split = manifest.split if settings.split is None else settings.split
    least = settings.min_split
    if not 0 <= split <= n:
        raise ConfigError(f"split {split}: must be 0 (send the input) to {n} (all on the device)")
    if not 0 <= least <= n:
        raise ConfigError(f"min_split {least}: must be 0 (the input may be sent) to {n}")
    if kind == FIXED and split < least:
        raise ConfigError(f"split {split} is below min_split {least}: raise one or lower the other")
    fixed = (split,) if split < n else ()
    depths = fixed if kind == FIXED else tuple(range(least, n))
    precision = settings.precision or manifest.precision
    knobs = _knobs(bundle, settings, precision)
    return Plan(kind, split, depths, precision, _codecs(bundle, settings, depths), knobs)


def _codecs(bundle: Bundle, settings: EdgeSettings, depths: tuple[int, ...]) -> tuple[str, ...]:
    """All names that a device may send by, the usual one first. A codec that was fitted to the bundle is
    usual only where samples are cut at one depth; else a planner names it where it fits."""
    wanted = settings.codec or bundle.manifest.codec
    travelling = [name for name, known in CODECS.items() if not known.integer]
    own = {c.label: c.name for c in bundle.fitted.values() if c.depth in depths}
    usual = wanted
    if wanted in own:
        usual = own[wanted] if len(depths) == 1 else "int8"
    elif wanted not in travelling:
        there = ", ".join((*travelling, *sorted(own)))
        raise ConfigError(f"codec {wanted!r}: hidden states travel as {there}")
    # A cloud that lacks int8+z is sent int8 rather than the first of the table.
    return tuple(dict.fromkeys((usual, usual.removesuffix("+z"), *travelling, *own.values())))


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
