from __future__ import annotations

from pathlib import Path

import pytest

from offramp_common.errors import DataError
from offramp_common.spec import TaskSpec
from offramp_train.data import detect_task, read_splits, row_weights, targets_of
from offramp_train.tables import read_rows


def _file(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", 'text\tlabel\nhe said "hi\tx\na, b\ty\n'),
        ("a.csv", 'text,label\n"he said ""hi",x\n"a, b",y\n'),
        ("a.csv", '\ufefftext,label\r\n"he said ""hi",x\r\n"a, b",y\r\n'),
        ("a.jsonl", '{"text": "he said \\"hi", "label": "x"}\n\n{"text": "a, b", "label": "y"}\n'),
    ],
)
def test_the_three_forms_give_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    rows = read_rows(_file(tmp_path, name, text))
    assert rows.texts == ('he said "hi', "a, b")
    assert rows.labels == ("x", "y")


def test_pairs_are_found_by_the_names_of_their_columns(tmp_path: Path) -> None:
    rows = read_rows(_file(tmp_path, "a.tsv", "sentence1\tsentence2\tscore\na\tb\t1.5\n"))
    assert rows.pair
    assert rows.texts == (("a", "b"),)
    assert rows.labels == ("1.5",)


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.csv", "left,grade,right,label\na,3,b,x\n")
    assert read_rows(path, ("left", "right", "grade")).labels == ("3",)
    assert read_rows(path, ("right", "label")).texts == ("b",)


@pytest.mark.parametrize(
    ("name", "text", "line", "says"),
    [
        ("a.tsv", "text\tlabel\nfine\tx\nno tab here\n", 3, "1 fields, the header has 2"),
        ("a.tsv", "text\tlabel\n\tx\n", 2, "text is ''"),
        ("a.tsv", b"text\tlabel\nfine\tx\n\xff\ty\n", 3, "not UTF-8"),
        ("a.csv", 'text,label\nfine,x\n"open,y\n', 3, "not CSV"),
        ("a.csv", "text,label\nfine,x,more\n", 2, "3 fields"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', 2, "not JSON"),
        ("a.jsonl", "[1]\n", 1, "one JSON object"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', 2, "no column 'label'"),
        ("a.jsonl", '{"text": ["a"], "label": "x"}\n', 1, "text is ['a']"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, name: str, text: str | bytes, line: int, says: str
) -> None:
    path = _file(tmp_path, name, text)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert says in str(caught.value)


def test_unknown_columns_say_how_to_name_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--columns TEXT,LABEL"):
        read_rows(_file(tmp_path, "a.tsv", "foo\tbar\na\tb\n"))


def test_numeric_labels_with_many_values_are_a_scale(tmp_path: Path) -> None:
    scale = "".join(f"s\t{i / 10}\n" for i in range(50))
    task, said = detect_task(read_rows(_file(tmp_path, "a.tsv", "text\tlabel\n" + scale)), None)
    assert task.kind == "regression"
    assert "50 values from 0 to 4.9" in said
    grades = "".join(f"s\t{i % 5}\n" for i in range(50))
    rows = read_rows(_file(tmp_path, "b.tsv", "text\tlabel\n" + grades))
    assert detect_task(rows, None)[0].labels == ("0", "1", "2", "3", "4")
    assert detect_task(rows, "regression")[0].kind == "regression"


def test_labels_are_sorted_and_unknown_ones_are_named_by_line(tmp_path: Path) -> None:
    _file(tmp_path, "train.tsv", "text\tlabel\na\tz\nb\ta\n")
    dev = _file(tmp_path, "dev.tsv", "text\tlabel\na\tz\nb\tother\n")
    with pytest.raises(DataError, match=f"{dev}:3: label 'other' is not one of a, z"):
        read_splits(tmp_path)
    _file(tmp_path, "dev.tsv", "text\tlabel\na\tz\n")
    splits = read_splits(tmp_path)
    assert splits.task.labels == ("a", "z")
    assert targets_of(splits.train, splits.task).tolist() == [1, 0]


def test_a_word_among_numbers_is_named_by_line_when_the_task_is_regression(tmp_path: Path) -> None:
    rows = read_rows(_file(tmp_path, "a.tsv", "text\tlabel\na\t1\nb\tmany\n"))
    with pytest.raises(DataError, match=r"a\.tsv:3: 'many' is not a number"):
        targets_of(rows, TaskSpec("regression"))


def test_without_a_dev_file_some_training_rows_are_set_apart(tmp_path: Path) -> None:
    lines = "".join(f"row {i}\t{'xy'[i % 2]}\n" for i in range(100))
    path = _file(tmp_path, "only.tsv", "text\tlabel\n" + lines)
    splits = read_splits(path, dev_share=0.2, seed=3)
    assert (len(splits.train), len(splits.dev), splits.test) == (80, 20, None)
    assert not set(splits.train.texts) & set(splits.dev.texts)
    assert any("set apart" in note for note in splits.notes)
    assert read_splits(path, dev_share=0.2, seed=3).fingerprint() == splits.fingerprint()
    assert read_splits(path, dev_share=0.2, seed=4).fingerprint() != splits.fingerprint()


def test_a_directory_must_hold_one_training_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no train"):
        read_splits(tmp_path)
    _file(tmp_path, "train.tsv", "text\tlabel\na\tx\n")
    with pytest.raises(DataError, match="every label is 'x'"):
        detect_task(read_rows(tmp_path / "train.tsv"), None)
    _file(tmp_path, "train.csv", "text,label\na,x\n")
    with pytest.raises(DataError, match="keep one"):
        read_splits(tmp_path)


def test_row_weights_name_labels_that_are_not_there(tmp_path: Path) -> None:
    rows = read_rows(_file(tmp_path, "a.tsv", "text\tlabel\na\tx\nb\ty\n"))
    assert row_weights(rows, {"y": 3.0}).tolist() == [1.0, 3.0]
    with pytest.raises(DataError, match="'z'"):
        row_weights(rows, {"z": 2.0})
