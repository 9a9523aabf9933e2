"""Records: what is in them is what the graphs do, and a damaged one says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from made_record import made_record

from offramp_common.activations import NumpyArray
from offramp_common.bundle import Bundle
from offramp_common.errors import ConfigError, DataError
from offramp_common.frames import encode_frame
from offramp_common.runner import Layers, run
from offramp_common.text import TextEncoder
from offramp_edge.runtime import OnnxLayers
from offramp_simulate import record_build
from offramp_simulate.labelled import field, read_rows
from offramp_simulate.record import NEVER, OWN, Record
from offramp_simulate.record_build import behaviour, points_of, read_labelled
from offramp_simulate.record_engine import rests_of

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "assistant-intents"
UTTERANCES = ROOT / "examples" / "assistant-utterances.jsonl"


def quiet(what: str, done: int, of: int) -> None:
    """No progress."""


def test_what_is_saved_is_what_is_loaded_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    record = made_record(tokens=None)
    for name in ("one.npz", "other.npz"):
        record.save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()
    loaded = Record.load(tmp_path / "one.npz")
    assert loaded.header == record.header
    np.testing.assert_array_equal(loaded.leaves_PKN, record.leaves_PKN)
    assert loaded.bundle.n_layers == 4
    assert not list(tmp_path.glob("*.part"))


def test_a_file_that_is_no_record_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record there; make one with `offramp record"):
        Record.load(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.npz: not a record of this version"):
        Record.load(tmp_path / "text.npz")
    whole = tmp_path / "whole.npz"
    made_record().save(whole)
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(DataError, match="not a record"):
        Record.load(tmp_path / "cut.npz")


def test_a_record_that_says_nothing_of_rests_is_read_as_before(tmp_path: Path) -> None:
    """Format 2 had no word for them: the record that is shipped is one."""
    made_record().save(tmp_path / "now.npz")
    with np.load(tmp_path / "now.npz") as file:
        arrays = {name: file[name] for name in file.files if not name.startswith("rest_")}
    header = json.loads(bytes(arrays["header"]))
    for written, remedy in ((2, ""), (1, "make it again with `offramp record`")):
        text = json.dumps({**header, "format": written}).encode()
        arrays["header"] = np.frombuffer(text, np.uint8)
        np.savez(tmp_path / "then.npz", **arrays)
        if remedy:
            with pytest.raises(DataError, match=remedy):
                Record.load(tmp_path / "then.npz")
        else:
            assert not Record.load(tmp_path / "then.npz").rest_ms_WS.any()


def test_longer_rests_cost_no_less_than_shorter_ones_and_the_table_s_own_nothing_more() -> None:
    layers = 5
    layer_S = np.array([1.0, 2.0, 2.0, 2.5, 2.3, 2.4])
    run_S = np.array([0.5, 0.5, 0.7, 0.9, 0.9, 0.9])
    found = rests_of(run_S + (layers + 1) * layer_S, run_S + layer_S, layers)
    np.testing.assert_allclose(found[1], [-1.0, 0.0, 0.0, 0.4, 0.4, 0.4])
    np.testing.assert_allclose(found[0], [-0.2, -0.2, 0.0, 0.2, 0.2, 0.2], atol=0.11)
    assert (np.diff(found) >= 0).all()


def test_a_record_that_contradicts_itself_is_refused() -> None:
    record = made_record()
    with pytest.raises(DataError, match="leave at depths without an exit"):
        Record(**{**vars(record), "leaves_PKN": np.full_like(record.leaves_PKN, 3)})
    with pytest.raises(DataError, match="target_N has shape"):
        Record(**{**vars(record), "target_N": record.target_N[:-1]})


def test_names_that_are_not_recorded_are_answered_with_those_that_are() -> None:
    with pytest.raises(DataError, match="operating point 'brave': the record has own, never"):
        made_record().point("brave")
    with pytest.raises(DataError, match="precision 'int2': the record has fp32"):
        made_record().precision("int2")


def test_the_record_of_a_bundle_is_what_its_graphs_do() -> None:
    bundle = Bundle.read(BUNDLE)
    labelled = read_labelled(UTTERANCES, bundle, 12)
    assert len(labelled.texts) == 12
    names = ("fp32", "int8")
    graphs = {name: OnnxLayers(bundle, name) for name in names}
    layers: dict[str, Layers[NumpyArray]] = dict(graphs)
    points = points_of(bundle, names, 1)
    assert [point.name for point in points[:2]] == [OWN, NEVER]
    found = behaviour(bundle, layers, labelled, points, "int8", ("fp32", "int4+z"), quiet)
    codecs = record_build.travelling()
    for row, text in enumerate(labelled.texts):
        acts = TextEncoder(bundle)([text])
        assert found.tokens_N[row] == acts.n_tokens
        (left,) = run(graphs["int8"], acts, bundle.n_layers, bundle.knobs("int8")).left
        assert found.leaves_PKN[1, 0, row] == left.depth
        column = bundle.manifest.exits.index(left.depth)
        assert found.predicted_PNE[1, row, column] == left.answer[0].argmax()
        assert found.confidence_PNE[1, row, column] == pytest.approx(float(left.confidence_B[0]))
        # Bytes are those of a real frame, plus the message around it, which is some 60.
        frame = len(encode_frame(acts, bundle.cuts[0], "int8"))
        assert 0 < found.request_CON[0, codecs.index("int8"), row] - frame < 120
    assert (found.leaves_PKN[:, 1] == bundle.n_layers).all()
    # Sent without loss at any cut, the cloud's answers to the device's int8 states are nearly fp32's.
    lossless = found.through_QCNE[0, 3, :, -1]
    assert (lossless == found.predicted_PNE[0, :, -1]).mean() >= 0.9
    assert (found.through_QCNE[0, 3, :, :3] == -1).all()


def test_labels_that_the_bundle_does_not_know_are_named(tmp_path: Path) -> None:
    bundle = Bundle.read(BUNDLE)
    path = tmp_path / "data.tsv"
    path.write_text("text\tlabel\nwake me at seven\talarm\nwhatever\tno_such_intent\n")
    with pytest.raises(DataError, match=r"data\.tsv:3: label 'no_such_intent'"):
        read_labelled(path, bundle, None)
    path.write_text("")
    with pytest.raises(DataError, match="no labelled line"):
        read_labelled(path, bundle, None)
    path.write_text("text\tlabel\nwake me\tat seven\talarm\n")
    with pytest.raises(DataError, match=r"data\.tsv:2: 3 fields, the header has 2"):
        read_labelled(path, bundle, None)
    path.write_text("label\nalarm\n")
    with pytest.raises(DataError, match=r"data\.tsv:2: no text"):
        read_labelled(path, bundle, None)
    path.write_text("{broken\n")
    with pytest.raises(DataError, match=r"data\.tsv:1: not JSON"):
        read_labelled(path, bundle, None)


def test_a_text_may_hold_other_line_ends_than_its_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    text = "wake me\u2028at\x85seven"
    path.write_text(json.dumps({"text": text, "label": "alarm"}, ensure_ascii=False) + "\n\n")
    (row,) = read_rows(path)
    assert field(path, row, "text") == text


def test_rows_are_taken_from_all_of_a_file_and_not_its_start(tmp_path: Path) -> None:
    bundle = Bundle.read(BUNDLE)
    path = tmp_path / "data.jsonl"
    rows = [{"text": f"sentence {i}", "label": "alarm"} for i in range(100)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert read_labelled(path, bundle, 4).texts == [f"sentence {i}" for i in (0, 25, 50, 75)]


def test_codecs_of_token_ids_are_not_measured() -> None:
    with pytest.raises(ConfigError, match="carries token ids"):
        record_build.check_through(["int8", "tokens"])
