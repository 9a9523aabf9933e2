"""`offramp link` as a process, and the two ends of its link, for the benchmarks of the emulator."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offramp_simulate.netns import socket_in

Row = dict[str, Any]

_PORT = 7000  # on the layer-3 link, where nobody else is
CUBIC = b"cubic"  # Linux's own default; some machines are set to another congestion control
_EMULATE = """
import argparse, sys
from offramp_simulate.link_cli import add_link_command
parser = argparse.ArgumentParser()
add_link_command(parser.add_subparsers())
args = parser.parse_args(sys.argv[1:])
sys.exit(args.run(args))
"""


class LinkProcess:
    """A running link of either form; `listen` at the cloud's end, then `open` at the device's."""

    def __init__(self, form: str, options: list[str], control: bytes = CUBIC) -> None:
        self._control = control  # of the layer-3 link's two ends
        self._target = socket.create_server(("127.0.0.1", 0)) if form == "proxy" else None
        where = ["--layer3"]
        if self._target:
            where = ["--to", f"127.0.0.1:{self._target.getsockname()[1]}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _EMULATE, "link", *where, *options, "--control-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._said = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._target):
            if pipe:
                pipe.close()

    def ask(self, command: str) -> Row:
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        return self._read()

    def cpu_s(self) -> float:
        """Processor time of the emulator so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def listen(self) -> socket.socket:
        """The listening socket of the cloud's end."""
        if self._target:
            return self._target
        listener = socket_in(self._said["cloud"]["namespace"])
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._control)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", _PORT))
        listener.listen(16)
        return listener

    def open(self) -> socket.socket:
        """A connection from the device's end to the cloud's."""
        if self._target:
            host, port = self._said["listening"].split(":")
            end = socket.create_connection((host, int(port)))
        else:
            end = socket_in(self._said["device"]["namespace"])
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._control)
            end.connect((self._said["cloud"]["address"], _PORT))
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return end

    @contextlib.contextmanager
    def flood(self, feed: str, mbps: float, stop: threading.Event) -> Iterator[None]:
        """Keep the downlink full: by TCP, or by UDP at a pace above the link's."""
        if feed == "tcp":
            with self.listen() as listener:
                threading.Thread(target=accept, args=(listener, pour), daemon=True).start()
                with self.open() as end:
                    threading.Thread(target=drain, args=(end,), daemon=True).start()
                    yield
            return
        device = self._said["device"]
        with (
            socket_in(device["namespace"], socket.SOCK_DGRAM) as sink,
            socket_in(self._said["cloud"]["namespace"], socket.SOCK_DGRAM) as source,
        ):
            sink.bind((device["address"], _PORT))  # never read: the emulator counts
            source.connect((device["address"], _PORT))
            pouring = threading.Thread(target=pour_datagrams, args=(source, mbps, stop))
            pouring.start()
            try:
                yield
            finally:
                stop.set()
                pouring.join()

    def _read(self) -> Row:
        assert self._process.stdout is not None
        row: Row = json.loads(self._process.stdout.readline())
        return row


def accept(listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    """Take connections, a thread for each, until the listener is closed."""
    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


def answer(end: socket.socket) -> None:
    """Answer requests of two 8-byte numbers: so many bytes follow, send so many back."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with end, contextlib.suppress(OSError):  # the emulator of a run has ended
        while len(head := end.recv(16, socket.MSG_WAITALL)) == 16:
            receive(end, int.from_bytes(head[:8], "big"))
            end.sendall(bytes(int.from_bytes(head[8:], "big")))


def pour(end: socket.socket) -> None:
    """Send without an end."""
    with end, contextlib.suppress(OSError):
        while True:
            end.sendall(bytes(65536))


def drain(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while end.recv(1 << 20):
            pass


def pour_datagrams(source: socket.socket, mbps: float, stop: threading.Event) -> None:
    """Packets of 1500 bytes at this pace, a bunch every five milliseconds."""
    bunch = max(1, round(mbps * 1e6 / 8 / 1500 * 0.005))
    pause_s = bunch * 1500 * 8 / (mbps * 1e6)
    next_s = time.perf_counter()
    payload = bytes(1472)
    while not stop.is_set():
        for _ in range(bunch):
            source.send(payload)
        next_s += pause_s
        time.sleep(max(0.0, next_s - time.perf_counter()))


def receive(end: socket.socket, nbytes: int) -> None:
    """Take exactly so many bytes; ConnectionError when the other end closes before."""
    while nbytes:
        data = end.recv(min(nbytes, 1 << 20))
        if not data:
            raise ConnectionError("the link was closed")
        nbytes -= len(data)


def ask(end: socket.socket, up_nbytes: int, down_nbytes: int) -> float:
    """Seconds from the first byte sent to the last received."""
    start_s = time.perf_counter()
    end.sendall(up_nbytes.to_bytes(8, "big") + down_nbytes.to_bytes(8, "big"))
    end.sendall(bytes(up_nbytes))
    receive(end, down_nbytes)
    return time.perf_counter() - start_s


def connect(link: LinkProcess) -> tuple[socket.socket, float]:
    """A new connection, and the seconds until its first answer."""
    start_s = time.perf_counter()
    end = link.open()
    ask(end, 0, 1)
    return end, time.perf_counter() - start_s
