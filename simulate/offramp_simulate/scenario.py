"""A scenario: who asks, from what devices, over what link, which cloud, what fails; and what to compare.

Read from TOML. Everything that a user may choose is a field of one of the dataclasses below, with its
unit and its default; a table or key that is not there is an error.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from offramp_common.errors import ConfigError
from offramp_edge.settings import EdgeSettings
from offramp_simulate.links import PROFILES, LinkProfile
from offramp_simulate.loss import GilbertElliott
from offramp_simulate.markov import markov_trace
from offramp_simulate.scenario_parts import (
    Arrivals,
    Cloud,
    Costs,
    Devices,
    Fault,
    LinkChoice,
    Plan,
)
from offramp_simulate.settings_tables import at_least, build, meant
from offramp_simulate.traces import RateTrace, load_trace

DATA = "data:"
"""Before a file's name: in the folder that OFFRAMP_DATA names."""


@dataclass(frozen=True)
class Scenario:
    """All of it. `agent` holds the live agent's own settings. `requests` ends a run (or the recorded arrivals
    do); the first `warm_up` of them are not counted."""

    title: str
    about: str = ""
    record: str = ""
    seed: int = 1
    requests: int = 20_000
    warm_up: int = 0
    devices: Devices = field(default_factory=Devices)
    arrivals: Arrivals = field(default_factory=Arrivals)
    link: LinkChoice = field(default_factory=LinkChoice)
    cloud: Cloud = field(default_factory=Cloud)
    agent: EdgeSettings = field(default_factory=EdgeSettings)
    costs: Costs = field(default_factory=Costs)
    plans: tuple[Plan, ...] = ()
    faults: tuple[Fault, ...] = ()
    sweep: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    folder: Path = Path()

    def __post_init__(self) -> None:
        at_least(self.requests, 1, "requests")
        at_least(self.warm_up, 0, "warm_up")
        if self.warm_up >= self.requests:
            raise ConfigError(f"warm_up = {self.warm_up}: must be below requests = {self.requests}")
        for key in _NOT_THE_AGENTS:
            if getattr(self.agent, key) != getattr(EdgeSettings(), key):
                raise ConfigError(f"[agent]: {key}: not simulated there; {_NOT_THE_AGENTS[key]}")
        names = [plan.name for plan in self.plans]
        if not names:
            raise ConfigError("no [[plans]]: name at least one, such as name = 'all local'")
        if len(set(names)) != len(names):
            raise ConfigError(f"[[plans]] named {sorted(names)}: give each a name of its own")

    @property
    def deadline_ms(self) -> float:
        """Infinity without one."""
        ms = self.agent.deadline_ms
        return math.inf if ms is None else ms

    def file(self, name: str) -> Path:
        """Where a file of the scenario is: beside it, or in OFFRAMP_DATA after `data:`."""
        if not name.startswith(DATA):
            return self.folder / name
        folder = os.environ.get("OFFRAMP_DATA")
        if not folder:
            raise ConfigError(
                f"{name}: is in the data folder, and OFFRAMP_DATA is not set: set it to that folder"
            )
        return Path(folder) / name.removeprefix(DATA)

    def changed(self, key: str, value: Any) -> Scenario:
        """With one value of one table instead, such as "link.rtt_ms". ConfigError for what is not there."""
        table, _, name = key.partition(".")
        if not name or table not in _TABLES:
            raise ConfigError(
                f"sweep: {key!r}: must be TABLE.KEY, TABLE one of {', '.join(_TABLES)}"
            )
        old = getattr(self, table)
        values = {f.name: getattr(old, f.name) for f in fields(old)} | {name: value}
        if name not in {f.name for f in fields(old)}:
            raise ConfigError(f"sweep: {key!r}{meant(name, [f.name for f in fields(old)])}")
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return replace(self, **{table: build(_TABLES[table], plain, f"sweep: [{table}]")})

    def profile(self) -> LinkProfile:
        """The link as the emulator's own class; a trace or Markov states are in it."""
        choice, trace = self.link, self._trace()
        if trace is not None:
            base = LinkProfile.from_trace(
                trace, rtt_ms=choice.rtt_ms, downlink_factor=choice.downlink_factor
            )
            base = replace(base, jitter_ms=choice.jitter_ms)
            if choice.downlink_trace:
                down = self._read(choice.downlink_trace, choice.downlink_trace_name)
                base = replace(base, downlink_trace=down, downlink_mbps=down.mean_mbps)
        elif choice.profile:
            base, default = PROFILES[choice.profile], LinkChoice()
            names = ("uplink_mbps", "downlink_mbps", "rtt_ms", "jitter_ms")
            given = {name: getattr(choice, name) for name in names}
            base = replace(base, **{k: v for k, v in given.items() if v != getattr(default, k)})
        else:
            base = LinkProfile(
                "own",
                choice.uplink_mbps,
                choice.downlink_mbps,
                choice.rtt_ms,
                jitter_ms=choice.jitter_ms,
            )
        loss = GilbertElliott.of(choice.loss, choice.loss_burst or None) if choice.loss else None
        return replace(base, seed=self.seed, loss=loss)

    def _trace(self) -> RateTrace | None:
        choice = self.link
        if choice.markov_mbps:
            return markov_trace(choice.markov_mbps, choice.markov_s, self.seed)
        if not choice.trace:
            return None
        return self._read(choice.trace, choice.trace_name)

    def _read(self, file: str, name: str) -> RateTrace:
        return load_trace(self.file(file), name or None).scaled(self.link.trace_scale)


_TABLES: dict[str, type[Any]] = {
    "devices": Devices,
    "arrivals": Arrivals,
    "link": LinkChoice,
    "cloud": Cloud,
    "agent": EdgeSettings,
    "costs": Costs,
}


_PLANS, _DEVICES, _NOT = "name it in [[plans]]", "set it in [devices]", "leave it out"
_NOT_THE_AGENTS = {
    "plan": _PLANS, "split": _PLANS, "min_split": _PLANS, "codec": _PLANS, "exits": _PLANS, "knobs": _PLANS,
    "precision": _DEVICES, "threads": _DEVICES, "spool": _NOT, "min_uplink_mbps": _NOT,
    "bandit_file": _NOT,
}  # fmt: skip
"""Settings of the agent that mean nothing in [agent] of a scenario, and the remedy."""


def load_scenario(path: Path) -> Scenario:
    """ConfigError names the file, the table, the key and the remedy."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    try:
        return scenario_of(values, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def scenario_of(values: Mapping[str, Any], folder: Path = Path()) -> Scenario:
    """A scenario from what a TOML file holds; every cell of the sweep is checked too."""
    given = dict(values)
    for name, kind in _TABLES.items():
        if name in given:
            given[name] = build(kind, given[name], f"[{name}]")
    for name, kind in (("plans", Plan), ("faults", Fault)):
        if name in given:
            entries = given[name]
            if not isinstance(entries, list):
                raise ConfigError(f"{name}: write [[{name}]], once for each")
            given[name] = tuple(build(kind, entry, f"[[{name}]]") for entry in entries)
    sweep = given.pop("sweep", {})
    known = {f.name for f in fields(Scenario)} - {"folder", "sweep"}
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}{meant(key, sorted(known | {'sweep'}))}")
    if "title" not in given:
        raise ConfigError('title is missing: say in a line what this is, title = "..."')
    scenario = Scenario(**given, folder=folder)
    for key, entries in sweep.items():
        if not isinstance(entries, list) or not entries:
            raise ConfigError(f"[sweep]: {key} = {entries!r}: must be a list with an entry")
        for entry in entries:
            scenario.changed(key, entry)
    return replace(scenario, sweep={key: tuple(entries) for key, entries in sweep.items()})
