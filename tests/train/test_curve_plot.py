"""The picture of a curve: the same bytes everywhere, all that a reader needs in it, refused early."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from offramp_common.bundle import Bundle
from offramp_common.cli import USAGE, main
from offramp_common.errors import ConfigError
from offramp_train.curve_plot import Line, check_picture, draw
from offramp_train.quality import CURVE, plot

SHIPPED = Path(__file__).parents[2] / "bundles" / "assistant-intents"
ENDINGS = (".svg", ".png", ".pdf")
POINTS = [
    {"precision": precision, **point}
    for precision, full in (("fp32", 0.91), ("int8", 0.9))
    for point in (
        {"kind": "operating point", "mean_depth": 1.7, "accuracy": 0.87654, "full_depth": full},
        {"kind": "exit", "depth": 1, "accuracy": 0.8},
        {"kind": "sweep", "mean_depth": 1.0, "accuracy": 0.8},
        {"kind": "sweep", "mean_depth": 6.0, "accuracy": full},
    )
]
LINES = {
    "fp32": Line(((1.0, 80.0), (2.5, 89.5), (6.0, 91.0)), (1.8, 87.5), 91.0),
    "int8": Line(((1.0, 79.5), (2.5, 89.0), (6.0, 90.0)), (1.7, 87.0), 90.0),
}
# Another process, as on another machine: no font cache yet, settings of the user's own, no screen.
_ELSEWHERE = f"""
import sys
from pathlib import Path
from offramp_train.curve_plot import Line, draw
for ending in {ENDINGS}:
    draw(Path(sys.argv[1] + ending), "toy", "accuracy", 6, {LINES})
"""


def _drawn(path: Path) -> Path:
    plot(path, "toy & <curve> for $5 or $6", "accuracy", 6, POINTS)
    return path


def _texts(svg: Path) -> list[str]:
    root = ElementTree.parse(svg).getroot()
    return [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_two_machines_draw_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsavefig.dpi: 50\nsvg.fonttype: path\n")
    machine = {"MPLCONFIGDIR": str(tmp_path), "MPLBACKEND": "tkagg", "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _ELSEWHERE, tmp_path / "there"],
        env={**os.environ, **machine},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for ending in ENDINGS:
        draw(tmp_path / f"here{ending}", "toy", "accuracy", 6, LINES)
        here = (tmp_path / f"here{ending}").read_bytes()
        assert here == (tmp_path / f"there{ending}").read_bytes(), ending
        assert b"matplotlib.org" not in here, ending


def test_the_kind_of_file_is_its_endings(tmp_path: Path) -> None:
    assert _drawn(tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    assert _drawn(tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert "<svg" in _drawn(tmp_path / "a.svg").read_text()


def test_the_picture_says_in_words_what_it_shows(tmp_path: Path) -> None:
    svg = _drawn(tmp_path / "a.svg")
    texts = _texts(svg)
    for text in (
        "toy & <curve> for $5 or $6",
        "mean depth (layers run per input, of 6)",
        "accuracy (% of inputs)",
        "int8: 87.65 at 1.70 layers",
        "operating point, fp32",
        "full depth, int8: 90.00",
        "full depth, fp32: 91.00",
    ):
        assert text in texts
    # A dashed line for each precision, and its entry in the legend.
    assert svg.read_text().count("stroke-dasharray") == 4


def test_a_correlation_has_its_name_on_the_axis(tmp_path: Path) -> None:
    points = [
        {("pearson" if key == "accuracy" else key): value for key, value in point.items()}
        for point in POINTS
    ]
    plot(tmp_path / "a.svg", "pairs", "pearson", 6, points)
    assert "Pearson's correlation \u00d7 100" in _texts(tmp_path / "a.svg")


@pytest.mark.parametrize("name", ["curve.gif", "curve", ".svg"])
def test_an_ending_that_cannot_be_drawn_is_refused_with_those_that_can(name: str) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.svg, \.png, \.pdf"):
        check_picture(name)


def test_a_picture_without_a_directory_to_be_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make it first"):
        check_picture(tmp_path / "none" / "curve.svg")


def test_evaluate_refuses_a_picture_before_it_looks_at_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(tmp_path / "no bundle"), "--data", "none.tsv", "--plot"]
    assert main([*command, "curve.jpg"]) == USAGE
    assert "must end in" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # how Python marks what is not installed
    assert main([*command, str(tmp_path / "curve.svg")]) == USAGE
    assert "needs matplotlib; install it with: pip install 'offramp[train]'" in (
        capsys.readouterr().err
    )


def test_the_shipped_picture_is_the_shipped_curves(tmp_path: Path) -> None:
    if not (SHIPPED / CURVE).is_file():
        pytest.skip("bundles/assistant-intents is not here; `make train-bundle` makes it")
    m = Bundle.read(SHIPPED).manifest
    plot(tmp_path / CURVE, f"{m.name}: accuracy against depth (test)", "accuracy", 6, m.curve)
    number = re.compile(r"-?\d+\.\d+")
    drawn, shipped = ((path / CURVE).read_text() for path in (tmp_path, SHIPPED))
    assert number.sub("#", drawn) == number.sub("#", shipped)
    # Half a point: a matplotlib built with another FreeType may put the legend a little elsewhere.
    there = np.array(number.findall(shipped), float)
    np.testing.assert_allclose(np.array(number.findall(drawn), float), there, rtol=0, atol=0.5)
