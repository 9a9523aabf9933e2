"""A method's or recipe's module docstring, taken apart into what its page shows."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

_DIFFERS, _UNVERIFIED = "Differs from the paper", "Not verified"


@dataclass(frozen=True, slots=True)
class Doc:
    """Markdown. rule: all before the differences, the head of title and authors left out."""

    rule: str
    differs: str
    unverified: str


def method_doc(name: str) -> Doc:
    return _taken_apart(_docstring(f"offramp_model.methods.{name}"), head=2)


def recipe_doc(name: str) -> Doc:
    return _taken_apart(_docstring(f"offramp_train.recipes.{name.replace('-', '_')}"), head=0)


def _docstring(module: str) -> str:
    doc = importlib.import_module(module).__doc__
    assert doc is not None, f"{module} has no docstring"
    return doc.strip("\n")


def _taken_apart(doc: str, head: int) -> Doc:
    """head: paragraphs to leave out at the beginning."""
    parts: dict[str, list[str]] = {"": [], _DIFFERS: [], _UNVERIFIED: []}
    here = ""
    for line in doc.splitlines():
        begins = [mark for mark in (_DIFFERS, _UNVERIFIED) if line.startswith(mark)]
        # "Differs from the paper: nothing known. Not verified: ..." is one line.
        if begins and _UNVERIFIED in line and begins[0] == _DIFFERS:
            first, _, rest = line.partition(f" {_UNVERIFIED}")
            parts[_DIFFERS].append(first)
            here, line = _UNVERIFIED, _UNVERIFIED + rest
        here = begins[0] if begins and here != _UNVERIFIED else here
        parts[here].append(line)
    paragraphs = "\n".join(parts[""]).strip("\n").split("\n\n")
    return Doc(
        _markdown("\n\n".join(paragraphs[head:]).removeprefix("The rule: ")),
        _markdown(_after_colon(parts[_DIFFERS])),
        _markdown(_after_colon(parts[_UNVERIFIED])),
    )


def _after_colon(lines: list[str]) -> str:
    text = "\n".join(lines).strip()
    text = re.sub(r"^(Differs from the paper|Not verified)[:,]?\s*", "", text)
    return re.sub("^of which", "The paper, of which", text)


def _markdown(text: str) -> str:
    """Docstrings are nearly Markdown: lists want an empty line around them, angle brackets an escape."""
    text = re.sub(r"(?m)(?<!\n)\n(?=1\. )", "\n\n", text.strip("\n"))
    # What follows the last item without an indent is a paragraph, and not the item's end.
    text = re.sub(r"(?m)^(\d+\. .*(?:\n   .*)*)\n(?=[^\s\d])", r"\1\n\n", text)
    lines = [
        line if line.startswith("    ") else line.replace("<", "&lt;") for line in text.splitlines()
    ]
    text = "\n".join(lines)
    return text[:1].upper() + text[1:]
