"""Standard output for what is meant for it, where a library prints as it likes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def stdout_alone() -> Iterator[TextIO]:
    """Standard output for our one line; what else writes there, Ray's processes too, goes to
    standard error meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with open(kept, "w", closefd=False) as stdout:
            yield stdout
    finally:
        os.dup2(kept, 1)
        os.close(kept)
