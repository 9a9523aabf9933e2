"""A session that serves every depth it may be sent at, by the codec asked for, and learns of the link."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from edge_world import DIGEST, LAYERS, RTT_S, FakeCloud, N, encode, toy_bundle
from virtual_time import VirtualLoop, run_virtual

from offramp_common.frames import Limits, decode_frame
from offramp_common.runner import run
from offramp_common.spec import CutSpec, StateField, never_exit
from offramp_common.transport import Completion, Offload
from offramp_edge.not_answered import NotAnswered
from offramp_edge.requests import blank, nbytes_of
from offramp_edge.session import CloudSession
from offramp_edge.settings import EdgeSettings, plan_for

NEVER = never_exit(toy_bundle().manifest.knobs, N)


class CountingCloud(FakeCloud):
    """Says how long its messages were, as gRPC does."""

    async def complete(self, work: Offload, *, timeout_s: float) -> Completion:
        done = await super().complete(work, timeout_s=timeout_s)
        return replace(done, bytes_up=1234, bytes_down=56)


def in_session(
    scenario: Callable[[CloudSession, FakeCloud], Awaitable[None]],
    kind: type[FakeCloud] = FakeCloud,
    cloud: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Run `scenario` with a session that has been welcomed."""
    loop = VirtualLoop()
    chosen = EdgeSettings(**{"exits": False, **settings})
    bundle = toy_bundle()
    fake = kind(loop, **(cloud or {}))

    async def main() -> None:
        session = CloudSession(
            fake, bundle, plan_for(bundle, chosen), chosen, loop, random.Random(0)
        )
        keeping = asyncio.create_task(session.keep())
        await session.breaker.settled.wait()
        try:
            await scenario(session, fake)
        finally:
            keeping.cancel()
            await session.close()

    run_virtual(main(), loop)


def at_depth(depth: int) -> Any:
    acts = encode(["3 14 15 92"])
    return run(LAYERS, acts, depth, NEVER).rest if depth else acts


def whole() -> np.ndarray:
    (left,) = run(LAYERS, encode(["3 14 15 92"]), N, NEVER).left
    return left.answer


@pytest.mark.parametrize("least", [0, 2])
def test_one_session_finishes_samples_from_every_depth_it_may_be_sent_at(least: int) -> None:
    async def scenario(session: CloudSession, cloud: FakeCloud) -> None:
        for depth in range(least, N):
            done = await session.finish(at_depth(depth), 1.0, codec="fp32")
            np.testing.assert_array_equal(done.completion.answers, whole())
        ((_, hello),) = cloud.hellos
        assert hello.digests == dict.fromkeys(range(least, N), DIGEST)
        assert ("tokens" in hello.codecs) == (least == 0)

    in_session(scenario, plan="auto", min_split=least)


def test_a_fixed_plan_greets_for_its_own_depth_alone() -> None:
    async def scenario(session: CloudSession, cloud: FakeCloud) -> None:
        await session.finish(at_depth(3), 1.0)
        assert list(cloud.hellos[0][1].digests) == [3]

    in_session(scenario, split=3)


def test_each_sample_travels_by_the_codec_that_was_asked_for_if_the_cloud_has_it() -> None:
    async def scenario(session: CloudSession, cloud: FakeCloud) -> None:
        assert session.codecs() == ("fp32", "fp16", "int8", "tokens")
        for asked, used in (("int8", "int8"), ("fp16", "fp16"), ("int4+z", "fp32"), ("", "fp32")):
            await session.finish(at_depth(3), 1.0, codec=asked)
            assert used.encode() in cloud.works[-1][1].frame

    in_session(scenario, plan="auto")


def test_bytes_are_those_that_the_transport_counted() -> None:
    async def scenario(session: CloudSession, cloud: FakeCloud) -> None:
        done = await session.finish(at_depth(3), 1.0)
        assert (done.bytes_up, done.bytes_down) == (1234, 56)

    in_session(scenario, CountingCloud, plan="auto")


def test_link_and_cloud_times_are_learnt_from_what_is_sent() -> None:
    async def scenario(session: CloudSession, cloud: FakeCloud) -> None:
        for depth in (0, 3, 1, 5):
            await session.finish(at_depth(depth), 1.0)
        estimate = session.link.estimate()
        assert estimate.transfers == 4
        # The cloud says that 3 of the 40 ms are its own.
        assert estimate.rtt_ms == pytest.approx(1000 * RTT_S - 3, rel=0.1)
        assert session.cloud_times.queue_ms == pytest.approx(1.0)
        assert session.cloud_times.known

    in_session(scenario, plan="auto")


def test_a_probe_tells_of_the_link_and_its_answer_goes_nowhere() -> None:
    async def scenario(session: CloudSession, cloud: FakeCloud) -> None:
        session.probe()
        session.probe()  # one at a time
        await asyncio.sleep(2 * RTT_S)
        assert len(cloud.works) == 1
        acts = decode_frame(cloud.works[0][1].frame, LAYERS.cuts, Limits())
        assert acts.depth == 1  # the input would tell little, and might not be sent at all
        assert session.link.estimate().transfers == 1

    in_session(scenario, plan="auto")


def test_a_probe_that_fails_harms_nobody_and_a_cloud_put_aside_gets_none() -> None:
    async def scenario(session: CloudSession, cloud: FakeCloud) -> None:
        cloud.mode = "gone"
        session.probe()
        await asyncio.sleep(RTT_S)
        assert session.breaker.state == "aside"
        works = len(cloud.works)
        session.probe()
        await asyncio.sleep(RTT_S)
        assert len(cloud.works) == works
        with pytest.raises(NotAnswered):
            await session.finish(at_depth(3), 1.0)

    in_session(scenario, plan="auto")


def test_a_blank_sample_is_one_that_the_cut_allows() -> None:
    state = {"seen": StateField("int32", (2,)), "each": StateField("float32", (3,), per_token=True)}
    cut = CutSpec(2, integer=False, width=8, state=state)
    acts = blank(cut, 5)
    assert acts.hidden_BTD.shape == (1, 5, 8)
    assert (acts.state["seen"].shape, acts.token_state["each"].shape) == ((1, 2), (1, 5, 3))


def test_what_a_request_takes_is_told_within_a_tenth_before_it_is_serialized() -> None:
    from offramp_common.messages import offload_to_pb

    work = Offload("0123456789ab-1f", "assistant-intents", bytes(16), bytes(700), NEVER, 900.0)
    assert nbytes_of(work) == pytest.approx(offload_to_pb(work).ByteSize(), rel=0.1)
