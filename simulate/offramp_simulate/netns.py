"""Two network namespaces of this process, each with one end of a TUN device; needs root and Linux.

Their names carry the process's id, so that what a killed process left can be told apart and removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import re
import shutil
import socket
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from offramp_common.errors import ConfigError

DEVICE_ADDRESS = "10.70.0.1"  # no namespace but these two knows them, so that links never clash
CLOUD_ADDRESS = "10.70.0.2"
MTU_NBYTES = 1500
INTERFACE = "link0"  # the name of the link in either namespace

_NAMED = Path("/run/netns")  # where `ip netns` keeps the names
_NAME = re.compile(r"offramp-(\d+)-\d+-(device|cloud)")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_NEEDED_CAPABILITIES = 1 << 12 | 1 << 21  # CAP_NET_ADMIN, CAP_SYS_ADMIN
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


@dataclass(frozen=True)
class End:
    """One end of a link: a namespace, its address and the descriptor that its packets go through."""

    namespace: str
    address: str
    tun_fd: int  # a read gives the next IP packet sent here, a write has one received here

    @property
    def enter(self) -> tuple[str, ...]:
        """What to put before a command, so that it runs at this end."""
        return ("ip", "netns", "exec", self.namespace)

    def set_up(self, is_up: bool) -> None:
        """Bring the interface up, or down: then programs here find the network unreachable."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "up" if is_up else "down")


def why_not() -> str:
    """What keeps this process from making a link; empty when nothing does, as far as can be seen."""
    if shutil.which("ip") is None:
        return "there is no `ip` command: install iproute2"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun: load the kernel module tun, or pass the device on"
    if not _capable():
        return "network namespaces need CAP_NET_ADMIN and CAP_SYS_ADMIN: run as root"
    return ""


def _capable() -> bool:
    """Whether this process may make namespaces and devices; root in a container often may not."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return int(value, 16) & _NEEDED_CAPABILITIES == _NEEDED_CAPABILITIES
    return False


def make_ends() -> tuple[End, End]:
    """The device's end and the cloud's, up and with their addresses.

    ConfigError, and nothing left behind, when the system does not let us.
    """
    if reason := why_not():
        raise ConfigError(f"layer-3 link: {reason} (the TCP proxy, --to, needs none of it)")
    number = next(_numbers)
    stem = f"offramp-{os.getpid()}-{number}"
    ends: list[End] = []
    try:
        for side, address in (("device", DEVICE_ADDRESS), ("cloud", CLOUD_ADDRESS)):
            ends.append(_make_end(f"{stem}-{side}", f"o{os.getpid()}.{number}{side[0]}", address))
    except BaseException:
        remove_ends(ends)
        raise
    return ends[0], ends[1]


def remove_ends(ends: list[End] | tuple[End, End]) -> None:
    """Close the devices and take the namespaces' names away; programs in them lose the link."""
    with contextlib.ExitStack() as all_of_them:  # each, whatever becomes of the others
        for end in ends:
            all_of_them.callback(_ip, "netns", "delete", end.namespace)
            all_of_them.callback(os.close, end.tun_fd)


def remove_stale() -> list[str]:
    """Take away the namespaces of processes that have ended without doing it; returns their names."""
    removed = []
    for path in sorted(_NAMED.glob("offramp-*")):
        named = _NAME.fullmatch(path.name)
        if named and not Path(f"/proc/{named[1]}").exists():
            _ip("netns", "delete", path.name)
            removed.append(path.name)
    return removed


def socket_in(namespace: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """An IPv4 socket of this namespace for the calling process, which stays where it is.

    A socket belongs to the namespace of the thread that made it, and any thread can use it.
    """

    def make() -> socket.socket:
        fd = os.open(_NAMED / namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # os.setns is there from Python 3.12 on
            if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
                raise ConfigError(f"cannot enter {namespace}: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(fd)
        return socket.socket(socket.AF_INET, kind)

    with ThreadPoolExecutor(max_workers=1) as thread:  # it ends in the other namespace
        return thread.submit(make).result()


def _make_end(namespace: str, device: str, address: str) -> End:
    _ip("netns", "add", namespace)
    try:
        tun_fd = _open_tun(device)
    except BaseException:
        _ip("netns", "delete", namespace)
        raise
    end = End(namespace, address, tun_fd)
    try:
        # The descriptor goes on to work when the device is in another namespace.
        _ip("link", "set", device, "netns", namespace, "name", INTERFACE)
        _ip("-n", namespace, "link", "set", "lo", "up")
        # No IPv6 address of its own, whose announcements would use the link.
        _ip(
            "-n", namespace, "link", "set", INTERFACE, "mtu", str(MTU_NBYTES), "addrgenmode", "none"
        )
        _ip("-n", namespace, "address", "add", f"{address}/30", "dev", INTERFACE)
        end.set_up(True)
    except BaseException:
        remove_ends([end])
        raise
    return end


def _open_tun(name: str) -> int:
    """A new TUN device: whole IP packets with valid checksums, none larger than the MTU.

    Without a header for offloads the kernel segments and sums before it hands a packet over.
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"layer-3 link: cannot make a TUN device: {error}: run as root"
        ) from error
    return fd


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"layer-3 link: ip {' '.join(arguments)}: {done.stderr.strip() or done.returncode}: "
            "it needs root with CAP_NET_ADMIN and CAP_SYS_ADMIN"
        )
