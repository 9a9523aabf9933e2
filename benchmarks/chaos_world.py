"""The cloud and the link that chaos.py breaks, each a process of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from offramp_common.bundle import Bundle
from offramp_simulate.processes import Child


@dataclass
class World:
    """Bundle, cloud and link; the last two can be made to fail."""

    bundle: Bundle
    profile: str
    stack: AsyncExitStack
    cloud: Child | None = None
    link: Child | None = None
    cloud_address: str = ""
    link_address: str = ""

    async def start(self) -> None:
        await self.start_cloud("127.0.0.1:0")
        link = await Child.start(
            "link", "link", "--to", self.cloud_address, "--profile", self.profile, "--control-stdin"
        )
        self.link = link
        self.stack.push_async_callback(link.stop)
        self.link_address = (await link.read(60))["listening"]

    async def start_cloud(self, listen: str) -> None:
        self.cloud = await Child.start(
            "cloud",
            *("cloud", "serve", "--bundle", str(self.bundle.path), "--listen", listen),
            *("--local", "--insecure"),
        )
        self.stack.push_async_callback(self.cloud.stop)
        self.cloud_address = (await self.cloud.read(120))["listening"]

    async def tell(self, command: str) -> None:
        assert self.link is not None
        said = await self.link.ask(command)
        if "error" in said:
            raise RuntimeError(said["error"])


Do = Callable[[World], Awaitable[None]]


def fault(text: str) -> Do:
    async def begin(world: World) -> None:
        await world.tell(f"fault {text}")

    return begin


async def heal(world: World) -> None:
    await world.tell("heal")


async def kill(world: World) -> None:
    assert world.cloud is not None
    world.cloud._process.kill()
    await world.cloud._process.wait()


async def restart(world: World) -> None:
    await world.start_cloud(world.cloud_address)
