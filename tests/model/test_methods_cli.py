from __future__ import annotations

import json

import pytest

from offramp_common.cli import USAGE, main
from offramp_model.methods import METHODS
from offramp_model.methods.method import _MEANINGS
from offramp_model.methods_cli import carried_words, table
from offramp_train.recipes import RECIPES


def test_the_table_has_every_method_with_a_recipe_that_exists() -> None:
    rows = table()
    assert [row["name"] for row in rows] == list(METHODS)
    assert all(row["recipe"] in RECIPES for row in rows)
    assert all(row["rule"] and row["venue"] and row["link"].startswith("https://") for row in rows)


def test_carried_bytes_are_those_of_the_state() -> None:
    rows = {row["name"]: row for row in table()}
    assert rows["deebert"]["carried"] == {}
    assert rows["deebert"]["carried_bytes_per_row"] == 0
    # count (uint8) and previous (int16)
    assert rows["pabee"]["carried_bytes_per_row"] == 3
    assert rows["pabee"]["knobs"]["patience"]["tasks"] == ["classification", "regression"]
    assert rows["pabee"]["knobs"]["tolerance"]["tasks"] == ["regression"]


def test_json_goes_to_standard_output_and_the_table_for_people_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["methods", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert [row["name"] for row in json.loads(out)] == list(METHODS)
    assert main(["methods"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "deebert" in err


def test_the_table_for_people_has_a_row_for_every_method(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().err.splitlines()
    for row in table():
        mine = [line for line in lines if line.split()[:1] == [row["name"]]]
        assert len(mine) == 1, row["name"]
        assert row["recipe"] in mine[0]
        assert carried_words(row) in mine[0]
        assert row["venue"].split()[0] in mine[0]
        assert ("values" in mine[0]) == ("regression" in row["tasks"])


def test_bytes_for_each_sample_and_each_token_are_told_apart() -> None:
    record = {"carried_bytes_per_row": 3, "carried_bytes_per_token": 0}
    assert carried_words(record) == "3 B"
    assert carried_words({**record, "carried_bytes_per_token": 8}) == "3 B + 8 B a token"
    assert carried_words({**record, "carried_bytes_per_row": 0}) == "-"


@pytest.mark.parametrize("name", list(METHODS))
def test_the_details_of_a_method_say_all_that_its_record_does(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods", name]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    said = " ".join(err.split())  # however lines were broken
    method = METHODS[name]
    for text in (method.paper.title, method.rule, method.use, method.avoid, method.reported):
        assert text in said
    assert all(
        f"{knob}:" in said for row in table() if row["name"] == name for knob in row["knobs"]
    )


def test_details_as_json_are_one_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "pabee", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "pabee"


def test_an_unknown_method_is_an_error_that_names_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["methods", "peebert"]) == USAGE
    err = capsys.readouterr().err
    assert "'peebert' is unknown" in err
    assert "deebert" in err


def test_every_setting_has_a_meaning_and_every_meaning_a_setting() -> None:
    own = {(m["name"], s) for m in table() for s in m["settings"] if s != "pooling"}
    assert own == set(_MEANINGS)
