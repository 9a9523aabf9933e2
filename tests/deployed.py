"""What the files under deploy/ start, read as the machinery that starts it reads them."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from offramp_common.cli import build_parser

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def dockerfile(tier: str) -> str:
    """Its text, with continued lines joined."""
    return (DEPLOY / f"Dockerfile.{tier}").read_text().replace("\\\n", " ")


def entry_point(tier: str) -> list[str]:
    return _list_of("ENTRYPOINT", tier)


def command(tier: str) -> list[str]:
    return _list_of("CMD", tier)


def parsed(words: Sequence[str]) -> Namespace:
    """The arguments of an `offramp` command line. SystemExit for one that is not taken."""
    assert Path(words[0]).name == "offramp", words
    return build_parser().parse_args(list(words[1:]))


def _list_of(instruction: str, tier: str) -> list[str]:
    found = re.search(rf"^{instruction} (\[.*\])", dockerfile(tier), re.MULTILINE)
    assert found is not None, f"Dockerfile.{tier} has no {instruction}"
    words: list[str] = json.loads(found[1])
    return words
