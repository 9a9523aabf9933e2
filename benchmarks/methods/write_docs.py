"""Pages of the comparison, from the table of methods and the results that are there.

    python benchmarks/methods/write_docs.py [--check]

Writes docs/methods.md, and in docs/methods/ a page and a picture for each method, a picture for each data set
and report.html. The same table and results give the same bytes. --check writes nothing and fails where a
file is not what it would write.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import html_report
import method_page
import method_results
import overview
from comparison import HERE, RESULTS, SETS
from costs import read_costs
from reading import Results, all_runs, read_results, set_numbers

from offramp_model.methods import METHODS
from offramp_model.methods_cli import table

DOCS = HERE.parents[1] / "docs"
GUARANTEE = RESULTS / "conformal_validity.json"  # what conformal_validity.py --json writes


def pages() -> dict[str, str]:
    """Path under docs/ -> content."""
    results = read_results()
    sets, costs = {name: set_numbers(name, results) for name in SETS}, read_costs()
    progress = progress_of(results)
    out = {
        "methods.md": overview.page(sets, costs, progress),
        "methods/report.html": html_report.page(sets, costs, progress),
    }
    for numbers in sets.values():
        picture = overview.set_picture(numbers)
        if picture is not None:
            out[f"methods/curves-{numbers.name}.svg"] = picture
    for about in table():
        method = METHODS[about["name"]]
        out[f"methods/{method.name}.md"] = method_page.page(about, sets, costs, _guarantee())
        picture = method_results.picture(method, sets)
        if picture is not None:
            out[f"methods/{method.name}.svg"] = picture
    return out


def progress_of(results: Results) -> str:
    """How much of the comparison has been run."""
    by_status: dict[str, int] = {}
    for result in results.values():
        by_status[result["status"]] = by_status.get(result["status"], 0) + 1
    done = by_status.pop("done", 0)
    rest = "".join(f", {count} {status}" for status, count in sorted(by_status.items()))
    return f"{done} of {len(all_runs())} runs are done{rest}."


def differing(wanted: Mapping[str, str]) -> list[str]:
    """Paths under docs/ that are missing, that differ, or that should not be there."""
    there = {"methods.md", *(f"methods/{path.name}" for path in (DOCS / "methods").glob("*"))}
    stale = sorted(there - set(wanted))
    return stale + [
        name
        for name, text in wanted.items()
        if name not in there
        or not (DOCS / name).is_file()
        or (DOCS / name).read_text(encoding="utf-8") != text
    ]


def _guarantee() -> dict[str, Any] | None:
    if not GUARANTEE.is_file():
        return None
    record: dict[str, Any] = json.loads(GUARANTEE.read_text(encoding="utf-8"))
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say what would change, and fail")
    args = parser.parse_args()
    wanted = pages()
    changed = differing(wanted)
    for name in changed:
        path = DOCS / name
        print(name, file=sys.stderr)
        if args.check:
            continue
        if name in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[name], encoding="utf-8")
        else:
            path.unlink()
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
