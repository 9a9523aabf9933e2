"""Bundles that runs of the comparison left in the work folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comparison import SETS, Run, found
from one_run import data_folder

from offramp_common.bundle import MANIFEST, Bundle
from offramp_model.export import add_graphs
from offramp_train.data import read_splits
from offramp_train.measure import has_graphs
from offramp_train.tables import Rows


def kept(run: Run, work: Path) -> tuple[Bundle, dict[str, Any]] | None:
    """The bundle of a run that is done, and its result; None without either.

    A folder's name ends with the digest of the method's file when the run was made, which may be another now.
    """
    result = found(run)
    if result is None or result["status"] != "done":
        return None
    made = run.folder(work).name.rpartition("-")[0]
    folders = [p for p in (work / run.set).glob(f"{made}-*") if (p / "bundle" / MANIFEST).is_file()]
    if not folders:
        return None
    exact = [path for path in folders if path.name.endswith(result["code"][:8])]
    newest = max(folders, key=lambda path: path.stat().st_mtime)
    return Bundle.read((exact or [newest])[0] / "bundle"), result


def with_graphs(bundle: Bundle) -> Bundle:
    """With fp32 graphs, made in the kept bundle if they are missing: the comparison does not need them."""
    return bundle if has_graphs(bundle, "fp32") else add_graphs(bundle, ("fp32",))


def test_rows(run: Run, data: Path, work: Path, result: dict[str, Any]) -> Rows:
    """The rows that the run was measured on."""
    chosen = SETS[run.set]
    share = result["training"]["settings"]["dev_share"]
    folder = data_folder(chosen, data, work)
    splits = read_splits(folder, task=chosen.kind, dev_share=share, seed=run.seed)
    assert splits.test is not None, "every set of the comparison has a test split"
    return splits.test
