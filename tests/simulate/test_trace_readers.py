"""The forms of trace files: read exactly, told apart by themselves, refused with line and remedy."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp_common.errors import DataError
from offramp_simulate.traces import RateTrace, load_trace

# The examples that the data sets' own pages give.
HSDPA = """\
1289406399 549692 59.851754 10.781778 248069 1008
1289406400 550772 59.851864 10.781833 191698 1080
"""
GHENT = """\
1453121790686 39287 51.0386528885778 3.73220785642186 2493100 1000
1453121791687 40288 51.0386532820580 3.73222847166054 2763504 1001
1453121792686 41287 51.0386553301824 3.73225142858955 2728896 0999
"""


def read(folder: Path, text: str, name: str = "trace.log") -> RateTrace:
    (folder / name).write_text(text, encoding="utf-8")
    return load_trace(folder / name)


def test_an_hsdpa_log_is_bytes_over_the_milliseconds_of_each_line(tmp_path: Path) -> None:
    trace = read(tmp_path, HSDPA, "report.2010-11-10.log")
    assert trace.name == "report.2010-11-10.log"
    assert trace.edges_s == pytest.approx((0.0, 1.008, 2.088))
    assert trace.mbps == pytest.approx((248069 * 8 / 1008e3, 191698 * 8 / 1080e3))


def test_a_ghent_log_is_read_alike(tmp_path: Path) -> None:
    trace = read(tmp_path, GHENT)
    assert trace.edges_s == pytest.approx((0.0, 1.0, 2.001, 3.0))
    assert trace.mbps == pytest.approx((19.9448, 2763504 * 8 / 1001e3, 2728896 * 8 / 999e3))


@pytest.mark.parametrize("separator", [" ", "\t", ",", ", "])
@pytest.mark.parametrize("head", ["", "time{s}mbps\n", "# seconds and Mbit/s\n\n"])
def test_columns_hold_until_the_next_row_and_may_have_names(
    tmp_path: Path, separator: str, head: str
) -> None:
    rows = [(10.5, 1.0), (11.0, 2.5), (13.0, 0.0)]
    text = "".join(f"{time_s}{separator}{mbps}\n" for time_s, mbps in rows)
    trace = read(tmp_path, head.format(s=separator) + text)
    assert (trace.edges_s, trace.mbps) == ((0.0, 0.5, 2.5, 4.5), (1.0, 2.5, 0.0))


def test_mahimahi_times_are_packets_of_1500_bytes_in_bins_and_the_last_is_the_period(
    tmp_path: Path,
) -> None:
    trace = read(tmp_path, "1\n1\n20\n21\n50\n", "cell.down")
    assert trace.edges_s == pytest.approx((0.0, 0.02, 0.04, 0.05))
    # 3, 1 and 1 packets of 12 kbit in 20, 20 and 10 ms.
    assert trace.mbps == pytest.approx((1.8, 0.6, 1.2))


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(0, 40), min_size=1, max_size=300).filter(any))
def test_a_mahimahi_trace_delivers_all_its_packets_and_by_each_bin_those_up_to_it(
    tmp_path_factory: pytest.TempPathFactory, pauses_ms: list[int]
) -> None:
    times_ms = list(accumulate(pauses_ms))
    folder = tmp_path_factory.mktemp("traces")
    trace = read(folder, "".join(f"{time_ms}\n" for time_ms in times_ms))
    assert trace.period_s == pytest.approx(times_ms[-1] / 1e3)
    assert trace.mean_mbps * 1e6 * trace.period_s == pytest.approx(len(times_ms) * 12_000)
    for edge_s in trace.edges_s[1:-1]:
        packets = sum(time_ms <= round(edge_s * 1e3) for time_ms in times_ms)
        assert trace.bits_by(edge_s) == pytest.approx(packets * 12_000, abs=1)


rates = st.floats(0.0, 1000.0, allow_subnormal=False)
samples = st.lists(st.tuples(st.integers(1, 100_000), rates), min_size=2, max_size=50).filter(
    lambda rows: any(mbps for _, mbps in rows)
)


@settings(deadline=None)  # the machine may be busy
@given(samples)
def test_columns_and_json_lines_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, float]]
) -> None:
    times_s = list(accumulate(span_ms / 1e3 for span_ms, _ in rows))
    mbps = [rate for _, rate in rows]
    folder = tmp_path_factory.mktemp("traces")
    columns = read(folder, "".join(f"{t!r} {m!r}\n" for t, m in zip(times_s, mbps, strict=True)))
    lines = read(folder, json.dumps({"trace": "trace.log", "t_s": times_s, "mbps": mbps}))
    assert columns == lines


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 10**7)), min_size=1).filter(
    lambda rows: any(nbytes for _, nbytes in rows)
))  # fmt: skip
def test_a_log_delivers_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]]
) -> None:
    text = "".join(f"1 2 59.8 10.7 {nbytes} {span_ms}\n" for span_ms, nbytes in rows)
    trace = read(tmp_path_factory.mktemp("traces"), text)
    assert trace.period_s == pytest.approx(sum(span_ms for span_ms, _ in rows) / 1e3)
    total = sum(nbytes for _, nbytes in rows)
    assert trace.mean_mbps * 1e6 * trace.period_s == pytest.approx(total * 8)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("1 2 3\n", 1, "'1 2 3' is none of the known forms: an object of JSON"),
        ("10\n1.5\n", 2, "'1.5': give a whole number of milliseconds"),
        ("10\n\n# a pause\n9\n", 4, "9 after 10: times must not fall"),
        ("0\n0\n", 2, "a period of 0 ms"),
        ("0 1\n1 2\n1 3\n", 3, "1 s after 1 s: times must rise"),
        ("0 1\n1 two\n", 2, "'two' is not a finite number"),
        ("0 1\n1 nan\n", 2, "'nan' is not a finite number"),
        ("0 1\n1 2 3\n2 3\n", 2, "'1 2 3' is none of the known forms"),
        ("0 1\n1 2\n2 3 4\n", 3, "3 columns: give two"),
        ("s mbps\n1 2\n", 2, "one sample: give two at least"),
        ("0 1\n1 -2\n", 1, r"\"mbps\"\[1\] is -2"),
        ("0 0\n1 0\n", 1, "every rate is 0"),
        (HSDPA + "1289406401 551773 59.85 10.78 280579 0\n", 3, "a sample of 0 ms"),
        (HSDPA + "1289406401 551773 59.85 10.78 280579\n", 3, "5 columns: six"),
        (HSDPA + "1289406401 551773 59.85 10.78 many 1001\n", 3, "'many' is not a finite"),
    ],
)
def test_a_malformed_file_is_reported_with_its_line_and_what_to_do(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    with pytest.raises(DataError, match=rf"trace\.log:{line}: .*{message}"):
        read(tmp_path, text)


def test_a_file_of_comments_has_no_trace(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no trace in it"):
        read(tmp_path, "# nothing\n")
