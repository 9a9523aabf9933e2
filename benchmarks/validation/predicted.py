"""The same cell by the simulator's event kernel, answer by answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from offramp_simulate import device_model
from offramp_simulate.record import Record
from offramp_simulate.results import REASONS, WHERE, Answers, Tally
from offramp_simulate.scenario import Scenario
from offramp_simulate.world import World


class Kept(Tally):
    """A tally that keeps every answer, too."""

    answers: list[Answers]
    probe_nbytes: int

    def add(self, a: Answers) -> None:
        self.__dict__.setdefault("answers", []).append(a)
        super().add(a)

    def probed(self, nbytes: int) -> None:
        self.probe_nbytes = self.__dict__.get("probe_nbytes", 0) + nbytes
        super().probed(nbytes)


def run(scenario: Scenario, record: Record) -> dict[str, Any]:
    """Rows in order of asking, as `live.run` has them, without stages."""
    scenario = replace(scenario, warm_up=0)
    plan, profile = scenario.plans[0], scenario.profile()
    resolved = device_model.resolve(plan, scenario, record)
    kept = Kept(record.header.n_layers, scenario.costs, profile, scenario.deadline_ms)
    make = None
    if plan.planner != "fixed":
        from offramp_simulate.planners import maker

        make = maker(plan, scenario, record, resolved)
    World(scenario, record, profile, resolved, kept, make, plan.min_split).run()
    one = kept.answers
    columns = {
        name: np.concatenate([getattr(a, name) for a in one])
        for name in (
            "began_s_N",
            "ended_s_N",
            "where_N",
            "reason_N",
            "exit_N",
            "cut_N",
            "up_N",
            "down_N",
        )
    }
    rows = []
    for at in np.argsort(columns["began_s_N"], kind="stable"):
        began_s, ended_s, where, reason, exit, cut, up, down = (
            columns[name][at].item() for name in columns
        )
        ms, n = 1e3 * (ended_s - began_s), record.header.n_layers
        row = [began_s, ms, WHERE[where], REASONS[reason], exit, n if cut < 0 else cut, up, down]
        rows.append(row)
    up, down = (int(columns[name].sum()) for name in ("up_N", "down_N"))
    return {
        "rows": rows,
        "bytes_up": up,
        "bytes_down": down,
        "probes": kept.__dict__.get("probe_nbytes", 0),
    }
