"""Every exit method on the same data, with the same budget: trained, measured, one JSON a run.

    python benchmarks/methods/compare.py [--only METHOD,...] [--sets trec,clinc150,sst2,stsb] [--seeds N]
                                         [--minutes M] [--jobs N] [--work FOLDER] [--again] [--list]
    python benchmarks/methods/compare.py --timings [SET] | --online     on the weights that runs have left

Results go to results/SET/ENTRY-seedS.json beside this file. A run whose result is there, made with the
settings of comparison.py, is skipped; one that was stopped goes on from its checkpoint in the work folder
(Ctrl-C and --minutes stop them so), which also keeps the weights. Each run is a process with one thread. A
run that is refused or crashes is on record with its reason, and is tried again once its method's or recipe's
file has changed. write_docs.py makes pages of the results.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from comparison import HERE, SETS, TREC_SEEDS, Run, found, known_entries, runs
from one_run import STOPPED
from online import online_pass
from timings import time_method

from offramp_model.methods import METHODS
from offramp_train.progress import Report

_LOOK_S = 0.5  # between two looks at the running processes


@dataclass(frozen=True, slots=True)
class Started:
    run: Run
    process: subprocess.Popen[bytes]
    began: float


def wanted(candidates: Iterable[Run], again: bool) -> list[Run]:
    """The runs that have to be made. Those of older code are named, and stand."""
    out = []
    for run in candidates:
        result = None if again else found(run)
        if result is None or (result["status"] != "done" and result["code"] != run.code()):
            out.append(run)
        elif result["code"] != run.code():
            print(f"{run.set}/{run.name}: its method's file has changed since", file=sys.stderr)
    return out


def start(run: Run, work: Path, data: Path, again: bool) -> Started:
    folder = run.folder(work)
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / "one_run.py"), run.set, run.entry, str(run.seed)]
    command += ["--work", str(work), "--data", str(data)]
    with (folder / "log.txt").open("ab") as log:
        # A session of its own: a Ctrl-C reaches this process alone, which then asks each run once.
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, **threads, **quiet},
            start_new_session=True,
        )
    return Started(run, process, time.monotonic())


def ended(started: Started) -> None:
    """Say what became of a run."""
    run, code = started.run, started.process.returncode
    took, result = time.monotonic() - started.began, found(started.run)
    name = f"{run.set}/{run.name}"
    if code == STOPPED or code < 0:
        says = "stopped; the same command goes on"
    elif code or result is None:
        says = f"ended with code {code} and no result; see log.txt in its work folder"
    elif result["status"] == "done":
        full = next(iter(result["measured"].values()))["full_depth"]
        says = f"{100 * full['quality']:.2f} at full depth"
    else:
        says = f"{result['status']}: {result['reason']}"
    print(f"{name}: {says} ({took:.0f} s)", file=sys.stderr, flush=True)


def make(todo: list[Run], args: argparse.Namespace) -> bool:
    """Run them, --jobs at a time; False when stopped before the end."""
    until = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    running: list[Started] = []
    try:
        while (todo or running) and time.monotonic() < until:
            while todo and len(running) < args.jobs:
                running.append(start(todo.pop(0), args.work, args.data, args.again))
            time.sleep(_LOOK_S)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                ended(one)
    except KeyboardInterrupt:
        print("stopping; checkpoints are being saved", file=sys.stderr)
    stopped = bool(todo or running)
    for one in running:
        one.process.terminate()
    for one in running:
        one.process.wait()
        ended(one)
    return not stopped


def on_kept(args: argparse.Namespace, only: list[str]) -> int:
    """Timings of methods, or the bandit's pass, on the bundles in the work folder."""
    entries = [m for m in METHODS.values() if not only or m.name in only]
    if args.timings:
        for method in entries:
            says = time_method(args.timings, method.name, args.work, args.data)
            print(f"{args.timings}/{method.name}: {says}", flush=True)
    else:
        for run in runs(args.sets.split(","), [m.name for m in entries if m.online], args.seeds):
            done = online_pass(run, args.work, args.data, Report())
            print(f"{run.set}/{run.name}: {'played' if done else 'no kept bundle'}", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="methods and baselines, separated by commas")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", type=int, default=TREC_SEEDS, help="of TREC; the others have 1")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--again", action="store_true", help="make runs anew that have a result")
    parser.add_argument("--list", action="store_true", help="say what would be run, and stop")
    parser.add_argument(
        "--timings", nargs="?", const="sst2", choices=list(SETS), help="of which set"
    )
    parser.add_argument("--online", action="store_true", help="the pass of UEE-UCB's bandit")
    work = Path(tempfile.gettempdir()) / "offramp-methods"
    parser.add_argument("--work", type=Path, default=work, help=f"default: {work}")
    data = Path(os.environ.get("OFFRAMP_DATA", HERE.parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=data)
    args = parser.parse_args()
    only = args.only.split(",") if args.only else []
    for given, known in ((only, known_entries()), (args.sets.split(","), list(SETS))):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{unknown[0]!r} is unknown; known: {', '.join(known)}")
    if args.timings or args.online:
        return on_kept(args, only)
    todo = wanted(runs(args.sets.split(","), only, args.seeds), args.again)
    print(f"{len(todo)} runs to make", file=sys.stderr)
    if args.list:
        print("\n".join(f"{run.set}/{run.name}" for run in todo))
        return 0
    return 0 if make(todo, args) else STOPPED


if __name__ == "__main__":
    sys.exit(main())
