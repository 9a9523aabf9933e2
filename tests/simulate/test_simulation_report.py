"""The report in a real browser: it loads without a complaint, and its sliders change what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHROMIUM, browser
from made_record import made_record, made_scenario

from offramp_simulate.outcome import outcome
from offramp_simulate.report import render
from offramp_simulate.report_tables import explorer_tables
from offramp_simulate.sweep import sweep

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

RECORD = made_record(300, tokens=None, layer_ms=20.0)
SCENARIO = made_scenario(
    about="With </script> in it.",
    sweep={"link.rtt_ms": [20.0, 200.0]},
    plans=[{"name": "all on the device", "split": 4}, {"name": "send the input", "split": 0}],
    faults=[{"what": "link", "at_s": 3.0, "for_s": 2.0}],
)  # fmt: skip

MOVE = """new Promise(done => {
  const slider = document.getElementById('%s');
  slider.value = %s; slider.dispatchEvent(new Event('input'));
  requestAnimationFrame(() => requestAnimationFrame(() => done(slider.value)));
})"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = sweep(SCENARIO, RECORD, lambda done, of, cell: None)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(outcome(SCENARIO, RECORD, cells), SCENARIO, RECORD))
    return path


def drawn(name: str) -> str:
    return f"document.getElementById('{name}').innerHTML"


@needs_browser
async def test_the_page_loads_without_a_complaint_and_draws_everything(report: Path) -> None:
    async with browser() as page:
        await page.open(report)
        for name in ("simCdf", "simPareto", "cdf", "heat", "pareto", "bars", "timeline"):
            assert "<svg" in await page.run(drawn(name)), name
        assert await page.run("document.querySelectorAll('#table tr').length") == 3
        assert await page.run("document.querySelectorAll('#heat rect').length") > 300
        assert await page.run("document.body.innerText.includes('NaN')") is False
        assert await page.run("document.body.innerHTML.includes('NaN')") is False
        assert page.complaints == []


@needs_browser
@pytest.mark.parametrize(
    ("slider", "value", "changed", "unchanged"),
    [
        ("mbps", "-0.9", ["cdf", "pareto", "bars", "heat"], ["timeline", "simCdf"]),
        ("rtt", "2.9", ["cdf", "pareto", "bars", "heat"], ["timeline", "simCdf"]),
        ("slow", "3.5", ["cdf", "pareto", "bars", "heat"], ["timeline", "simCdf"]),
        ("point", "1", ["cdf", "pareto", "bars", "heat"], ["timeline", "simCdf"]),
    ],
)
async def test_a_slider_changes_what_it_should_and_nothing_else(
    report: Path, slider: str, value: str, changed: list[str], unchanged: list[str]
) -> None:
    async with browser() as page:
        await page.open(report)
        names = [*changed, *unchanged]
        before = {name: await page.run(drawn(name)) for name in names}
        said = await page.run("document.getElementById('verdict').innerText")
        await page.run(MOVE % (slider, value))
        after = {name: await page.run(drawn(name)) for name in names}
        assert [name for name in names if before[name] != after[name]] == changed
        assert await page.run("document.getElementById('verdict').innerText") != said
        assert page.complaints == []


@needs_browser
async def test_the_input_can_be_kept_on_the_device(report: Path) -> None:
    async with browser() as page:
        await page.open(report)
        await page.run(MOVE % ("slow", "4"))
        await page.run(MOVE % ("rtt", "0.1"))
        assert "send the input" in await page.run("document.getElementById('verdict').innerText")
        box = "document.getElementById('noInput')"
        await page.run(f"{box}.checked = true")
        await page.run(MOVE % ("rtt", "0.2"))
        assert "send the input" not in await page.run(
            "document.getElementById('verdict').innerText"
        )


@needs_browser
async def test_the_swept_value_is_chosen_from_a_list(report: Path) -> None:
    async with browser() as page:
        await page.open(report)
        before = await page.run(drawn("simCdf"))
        await page.run(
            "(() => { const s = document.getElementById('axis0'); s.value = '1';"
            " s.dispatchEvent(new Event('change')); })()"
        )
        assert await page.run(drawn("simCdf")) != before
        assert page.complaints == []


@needs_browser
async def test_a_phone_sees_one_column_and_needs_no_sideways_scrolling(report: Path) -> None:
    async with browser(390, 800) as page:
        await page.call(
            "Emulation.setDeviceMetricsOverride",
            width=390,
            height=800,
            deviceScaleFactor=2,
            mobile=True,
        )
        await page.open(report)
        assert await page.run("document.documentElement.scrollWidth") <= 390
        widths = await page.run(
            "[...document.querySelectorAll('.plots figure')].map(f => f.getBoundingClientRect().width)"
        )
        assert min(widths) > 300


def test_the_pages_arithmetic_is_the_simulations_without_queues() -> None:
    """Its tables give the same mean bytes and right answers as a run of the same plan."""
    tables = explorer_tables(RECORD, SCENARIO)
    own = tables["points"][tables["own"]]
    cells = sweep(made_scenario(requests=20_000, arrivals={"rate_per_s": 0.01},
                                plans=[{"name": "p", "split": 2}]),
                  RECORD, lambda done, of, cell: None)  # fmt: skip
    summary = cells[0].ran.summary
    total = sum(group[3] for group in own["groups"])
    up = sum(
        count * tables["bytes"][2][0][length]
        for length, leaves, _, count in own["groups"]
        if leaves > 2
    )
    # 20,000 draws of 300 samples, half of which send some 13 KB: one percent of noise.
    assert up / total == pytest.approx(summary["bytes_up"], rel=0.04)
    assert own["right"][2][0] == pytest.approx(summary["right"], abs=0.015)
