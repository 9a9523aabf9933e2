"""The input of `offramp edge run`."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_edge.answers import Failed, Sample
from offramp_edge.lines import MAX_LINE_BYTES, Input


def read(tmp_path: Path, content: bytes, pair: bool = False) -> tuple[list[object], Input]:
    path = tmp_path / "input"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        given = Input(fd, pair)
        return list(given), given
    finally:
        os.close(fd)


def test_plain_lines_are_texts(tmp_path: Path) -> None:
    items, given = read(tmp_path, "wake me\r\n\n  gr\u00fc\u00df dich \nno end".encode())
    assert items == [
        Sample("wake me", "1"),
        Sample("gr\u00fc\u00df dich", "3"),
        Sample("no end", "4"),
    ]
    assert given.asked["3"].line == 3


def test_plain_lines_of_pairs_have_a_tab_between(tmp_path: Path) -> None:
    items, _ = read(tmp_path, b"a premise\ta hypothesis\nonly one\n", pair=True)
    assert items == [Sample(("a premise", "a hypothesis"), "1"), Sample("only one", "2")]


def test_json_lines_carry_id_label_and_deadline(tmp_path: Path) -> None:
    items, given = read(
        tmp_path,
        b'\xef\xbb\xbf{"id": 7, "text": "x", "label": "alarm"}\n'
        b'{"text": ["a", "b"], "deadline_ms": 20}\n',
    )
    assert items == [Sample("x", "1", ref=7), Sample(("a", "b"), "2", 20)]
    assert (given.asked["1"].id, given.asked["1"].label) == (7, "alarm")
    assert (given.asked["2"].id, given.asked["2"].label) == ("2", None)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b"7",
        b"{}",
        b'{"text": 3}',
        b'{"text": ["a"]}',
        b'{"text": "x", "label": []}',
        b'{"text": "x", "deadline_ms": "soon"}',
        b'{"text": "x", "deadline_ms": -1}',
        b'{"text": "\xff"}',
        b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}',
    ],
)
def test_a_bad_line_is_named_and_the_rest_is_read(tmp_path: Path, line: bytes) -> None:
    items, _ = read(tmp_path, b'{"text": "first"}\n' + line + b'\n{"text": "last"}\n')
    first, bad, last = items
    assert first == Sample("first", "1")
    assert isinstance(bad, Failed)
    assert (bad.line, bad.id) == (2, "2")
    assert bad.error.startswith("line 2: ")
    assert len(bad.error) < 300
    assert last == Sample("last", "3")


def test_text_that_looks_like_json_later_on_is_still_text(tmp_path: Path) -> None:
    items, _ = read(tmp_path, b'plain\n{"text": "x"}\n')
    assert items == [Sample("plain", "1"), Sample('{"text": "x"}', "2")]


@given(st.lists(st.text(st.characters(exclude_characters="\n\r", codec="utf-8")), max_size=30))
def test_any_text_comes_through_in_any_pieces(lines: list[str]) -> None:
    reader, writer = os.pipe()
    content = "".join(line + "\n" for line in ["plain", *lines]).encode()

    def write() -> None:
        for at in range(0, len(content), 7):
            os.write(writer, content[at : at + 7])
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    got = [item.text for item in Input(reader, False) if isinstance(item, Sample)]
    thread.join()
    os.close(reader)
    stripped = [line.encode().strip().decode() for line in lines]
    assert got == ["plain", *(line for line in stripped if line)]


def test_a_reader_that_waits_for_input_can_be_stopped() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"first\nhalf a line")
    given = Input(reader, False)
    items = iter(given)
    assert next(items) == Sample("first", "1")
    given.stop.set()
    assert list(items) == []
    os.close(reader)
    os.close(writer)
