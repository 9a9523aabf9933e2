"""A headless Chromium, spoken to over its own debugging protocol: what a page drew, what it complained of."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(
    (p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None
)
_START_S, _ANSWER_S = 60.0, 60.0


class Page:
    """One page. `complaints`: exceptions and errors on its console, so far."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        self._socket, self._number = socket, 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        async with asyncio.timeout(_ANSWER_S):
            while True:
                told = json.loads((await self._socket.receive()).data)
                if told.get("id") == self._number:
                    assert "error" not in told, told
                    result: dict[str, Any] = told["result"]
                    return result
                self._hear(told)

    async def run(self, script: str) -> Any:
        """The value of an expression; a promise is awaited."""
        told = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def open(self, path: Path) -> None:
        """Until its scripts have run."""
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=_address(path))
        async with asyncio.timeout(_ANSWER_S):
            loaded = "document.readyState + location.protocol"
            while await self.run(loaded) != "completefile:":  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.05)

    def _hear(self, told: dict[str, Any]) -> None:
        params = told.get("params", {})
        if told.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        if told.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"]["text"])


@asynccontextmanager
async def browser(width: int = 1150, height: int = 900) -> AsyncIterator[Page]:
    """A fresh browser with one empty page, ended with the block. It reaches no network."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="offramp-browser-") as folder:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"),
            *(f"--user-data-dir={folder}", f"--window-size={width},{height}"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", "about:blank"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            port = await _port(Path(folder) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as reply:
                    pages = [page for page in await reply.json() if page["type"] == "page"]
                address = pages[0]["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _port(file: Path, process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(_START_S):
        while not (text := _text(file)):
            assert process.returncode is None, "the browser did not start"
            await asyncio.sleep(0.05)
    return int(text.split()[0])


def _text(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""


def _address(path: Path) -> str:
    return path.resolve().as_uri()
