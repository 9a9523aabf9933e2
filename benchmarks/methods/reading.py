"""The results' files, and the numbers of a data set made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comparison import FULL, N_LAYERS, SETS, TREC_SEEDS, TRUNCATED, VARIANTS, Run, found, runs
from derived import NOT_RUN, Baselines, Line, Seed, SetNumbers, seed_numbers

from offramp_model.methods import METHODS

ONLINE = "online"  # a method whose exits are chosen beforehand, by the bandit itself (online.py)

Results = Mapping[tuple[str, str, int], Mapping[str, Any]]
"""(set, entry, seed) -> the file's content."""


def read_results() -> Results:
    """Of all runs that were made with the settings of today."""
    wanted = {(run.set, run.entry, run.seed): run for run in all_runs()}
    read = {key: found(run) for key, run in wanted.items()}
    return {key: result for key, result in read.items() if result is not None}


def all_runs() -> list[Run]:
    return list(runs(list(SETS), [], TREC_SEEDS))


def set_numbers(name: str, results: Results) -> SetNumbers:
    """Everything about one data set."""
    seeds = sorted({run.seed for run in all_runs() if run.set == name})
    bases = {seed: base for seed in seeds if (base := _baselines(name, seed, results))}
    lines = []
    for method in METHODS.values():
        for line in lines_of(method.name, SETS[name].kind):
            status = _status(name, method.name, seeds, results)
            done: tuple[Seed, ...] = ()
            if SETS[name].kind not in method.tasks:
                status = f"not for {SETS[name].kind}"
            elif status == "done":
                done = _seeds(name, method.name, line, bases, results)
                if not done:
                    status = f"its full model is {NOT_RUN}" if not bases else NOT_RUN
            lines.append(Line(line, method.name, status, done))
    return SetNumbers(name, len(seeds), bases, tuple(lines))


def lines_of(method: str, kind: str = "classification") -> list[str]:
    """A method's lines in the results: its own rule, others on the same weights, the bandit's pass."""
    names = [method]
    if kind == "classification":
        names += [f"{method} ({variant})" for variant in VARIANTS.get(method, {})]
        names += [f"{method} ({ONLINE})"] if METHODS[method].online else []
    return names


def _status(name: str, entry: str, seeds: Sequence[int], results: Results) -> str:
    here = [results[name, entry, seed] for seed in seeds if (name, entry, seed) in results]
    if not here or any(result["status"] == "done" for result in here):
        return "done" if here else NOT_RUN
    return f"{here[0]['status']}: {here[0]['reason']}"


def _baselines(name: str, seed: int, results: Results) -> Baselines | None:
    full = results.get((name, FULL, seed))
    if full is None or full["status"] != "done":
        return None
    whole = full["measured"][FULL]["full_depth"]
    static = {N_LAYERS: (1.0, whole["quality"])}
    for depth in range(1, N_LAYERS):
        entry = f"{TRUNCATED}-{depth}"
        result = results.get((name, entry, seed))
        if result is not None and result["status"] == "done":
            point = result["measured"][entry]["full_depth"]
            static[depth] = (point["flops"] / whole["flops"], point["quality"])
    return Baselines(whole["quality"], whole["flops"], dict(sorted(static.items())))


def _seeds(
    name: str, entry: str, line: str, bases: Mapping[int, Baselines], results: Results
) -> tuple[Seed, ...]:
    out = []
    for seed, base in bases.items():
        result = results.get((name, entry, seed))
        if result is None or result["status"] != "done":
            continue
        if line in result["measured"]:
            out.append(seed_numbers(seed, result["measured"][line], base))
        elif line == f"{entry} ({ONLINE})" and ONLINE in result:
            points = result[ONLINE]["points"]
            shown = {**result["measured"][entry], "points": points, ONLINE: result[ONLINE]}
            out.append(seed_numbers(seed, shown, base, [*points]))
    return tuple(out)
