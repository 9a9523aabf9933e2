"""docs/methods.md, the methods' pages and the report are what the table and the results say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest
import write_docs
from docstrings import method_doc, recipe_doc
from method_page import commands

from offramp_common.cli import build_parser
from offramp_model.methods import METHODS
from offramp_train.recipes import RECIPES

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return write_docs.pages()


def test_the_pages_are_what_the_generator_writes(pages: dict[str, str]) -> None:
    changed = write_docs.differing(pages)
    assert changed == [], "run: python benchmarks/methods/write_docs.py"


def test_the_generator_writes_the_same_bytes_again(pages: dict[str, str]) -> None:
    assert write_docs.pages() == pages


def test_every_method_has_a_page_that_the_overview_links(pages: dict[str, str]) -> None:
    for name in METHODS:
        assert f"methods/{name}.md" in pages
        assert f"(methods/{name}.md)" in pages["methods.md"]


def test_links_between_files_lead_somewhere(pages: Mapping[str, str]) -> None:
    for page, text in pages.items():
        if not page.endswith(".md"):
            continue
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if not link.startswith("https://"):
                path = (write_docs.DOCS / page).parent / link
                assert path.resolve().exists(), f"{page}: {link}"


def test_pictures_are_svg_and_small(pages: Mapping[str, str]) -> None:
    pictures = {name: text for name, text in pages.items() if name.endswith(".svg")}
    for name, text in pictures.items():
        assert ElementTree.fromstring(text).tag.endswith("svg"), name
        assert len(text.encode()) < 150_000, name


def test_the_report_is_one_small_file_that_needs_no_network(pages: Mapping[str, str]) -> None:
    report = pages["methods/report.html"]
    assert len(report.encode()) < 600_000
    assert not re.findall(r"(?:src|srcset|data)=[\"']?https?:", report)
    assert "<link" not in report
    assert "@import" not in report
    assert "url(http" not in report
    ids = re.findall(r'\bid="([^"]+)"', report)
    assert len(ids) == len(set(ids))


def test_pages_name_no_file_of_this_machine(pages: Mapping[str, str]) -> None:
    for name, text in pages.items():
        assert str(REPOSITORY) not in text, name
        assert "/tmp/" not in text, name


@pytest.mark.parametrize("name", list(METHODS))
def test_the_commands_on_a_methods_page_are_ones_that_the_program_takes(
    name: str, pages: Mapping[str, str]
) -> None:
    parser = build_parser()
    for command in commands(METHODS[name]):
        assert f"    {command}\n" in pages[f"methods/{name}.md"]
        program, *arguments = shlex.split(command)
        assert program == "offramp"
        parser.parse_args(arguments)  # exits where it is wrong


@pytest.mark.parametrize("name", list(METHODS))
def test_a_methods_docstring_has_all_parts(name: str) -> None:
    doc = method_doc(name)
    assert doc.rule
    assert doc.differs.startswith(("1.", "The paper"))
    assert doc.unverified
    assert "Differs from" not in doc.rule + doc.unverified


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipes_docstring_says_what_differs(name: str) -> None:
    doc = recipe_doc(name)
    assert doc.rule
    # Our own recipe has no paper.
    assert bool(doc.differs) == bool(RECIPES[name].source)
