"""Child processes of the demo: started, spoken to by lines, and always ended.

Each child has a session of its own, so that Ctrl-C reaches the parent alone, which ends its children in
order; should the parent die, the kernel ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections import deque
from typing import Any

from offramp_common.errors import ConfigError

_TERM_TIMEOUT_S = 20.0  # Ray needs a few seconds to shut down
_PR_SET_PDEATHSIG = 1
_LINE_LIMIT = 2**20


class Child:
    """An offramp command as a process, with JSON lines on its standard output."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._said: deque[str] = deque(maxlen=20)  # the end of its standard error
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, name: str, *arguments: str, env: dict[str, str] | None = None) -> Child:
        """Run `offramp ARGUMENTS` in this Python."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "offramp_common",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **(env or {})},
            limit=_LINE_LIMIT,
            preexec_fn=_end_with_parent,
            start_new_session=True,
        )
        return cls(name, process)

    async def read(self, timeout_s: float) -> dict[str, Any]:
        """Its next line of JSON. Raises ConfigError, with what it said, when it has ended or is silent."""
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
        except TimeoutError:
            raise ConfigError(
                f"{self.name}: no answer within {timeout_s:.0f} s{self._words()}"
            ) from None
        if not line:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._listening), 2)
            raise ConfigError(f"{self.name}: ended{self._words()}")
        message: dict[str, Any] = json.loads(line)
        return message

    async def write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        await self._process.stdin.drain()

    async def ask(self, line: str, timeout_s: float = 5.0) -> dict[str, Any]:
        """Write a line and read the answer to it."""
        await self.write(line)
        return await self.read(timeout_s)

    async def stop(self) -> None:
        """End it: politely, then by force, whatever else of its session is left too."""
        process = self._process
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _TERM_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        self._listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._listening

    async def _listen(self) -> None:
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            self._said.append(line.decode(errors="replace").rstrip())

    def _words(self) -> str:
        return ":\n  " + "\n  ".join(self._said) if self._said else ""


def _end_with_parent() -> None:
    # Linux only; elsewhere a parent killed outright leaves its children, as any shell does.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
