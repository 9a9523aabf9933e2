"""The agent in virtual time: every sample is answered, whatever link and cloud do."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Iterator

import numpy as np
import pytest
from edge_world import (
    LAYER_S,
    LAYERS,
    RTT_S,
    N,
    World,
    encode,
    in_world,
    local,
    texts,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from toy import NEVER

from offramp_common.errors import RequestError
from offramp_common.frames import Limits
from offramp_common.spec import never_exit
from offramp_edge.answers import REASONS, Answer, Failed, Sample

HARD = next(text for text in texts(50) if local(text, LAYERS.knobs())[0] == N)
"""Runs to full depth, so that every cut sends it."""
EASY = next(text for text in texts(50) if local(text, LAYERS.knobs())[0] == 2)
"""Leaves at the first exit."""
FIRST_EXIT = LAYERS.exits[0]


def label_of(text: str, depth: int) -> str:
    """What the exit at `depth` says."""
    acts = encode([text])
    for _ in range(depth):
        step = LAYERS.step(acts, LAYERS.knobs(NEVER))
        acts = step.acts
    assert step.look is not None
    return f"class {int(np.argmax(step.look.answer[0]))}"


@pytest.mark.parametrize("split", range(N + 1))
def test_every_split_gives_the_whole_models_answers(split: int) -> None:
    given = texts(60)

    async def scenario(world: World) -> None:
        for text, answer in zip(given, await world.all(given), strict=True):
            assert isinstance(answer, Answer)
            depth, logits = local(text, LAYERS.knobs())
            assert answer.exit_depth == depth
            assert np.array(answer.logits, np.float32).tobytes() == logits
            assert answer.where == ("device" if depth <= split else "cloud")
            assert answer.reason == ""
            assert answer.split == (split if answer.where == "cloud" else N)
            assert answer.complete
            assert (answer.bytes_up > 0) == (answer.where == "cloud")

    in_world(scenario, split=split, logits=True)


def test_an_answer_says_where_its_time_went() -> None:
    async def scenario(world: World) -> None:
        answer = await world.answer(HARD)
        stages = answer.stages_ms
        assert answer.where == "cloud"
        assert stages.device == pytest.approx(3 * LAYER_S * 1000)
        assert stages.cloud == pytest.approx(3.0)
        assert stages.network == pytest.approx(RTT_S * 1000 - 3)
        assert answer.ms == pytest.approx(3 * LAYER_S * 1000 + RTT_S * 1000)

    in_world(scenario)


REASON_OF = {
    "gone": "unavailable",
    "silent": "timeout",
    "greets": "timeout",
    "slow": "timeout",
    "busy": "busy",
    "mismatch": "mismatch",
    "codec": "codec",
    "refused": "refused",
    "malformed": "malformed",
    "expired": "timeout",
    "setup": "setup",
    "bug": "internal",
}


@pytest.mark.parametrize("mode", REASON_OF)
def test_a_failure_in_flight_is_answered_here_to_the_end(mode: str) -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode = mode
        answer = await world.answer(HARD)
        assert (answer.where, answer.reason) == ("fallback", REASON_OF[mode])
        assert answer.exit_depth == local(HARD, LAYERS.knobs())[0]
        # What was sent in vain was spent all the same.
        assert (answer.bytes_up > 0) == (mode != "gone")

    in_world(scenario)


@pytest.mark.parametrize("mode", REASON_OF)
def test_with_fallback_exit_the_deepest_exit_answers_at_once(mode: str) -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode = mode
        runs = world.layers.runs
        answer = await world.answer(HARD)
        assert (answer.where, answer.reason) == ("fallback", REASON_OF[mode])
        assert answer.exit_depth == 3
        assert answer.label == label_of(HARD, 3)
        assert world.layers.runs == runs + 3

    in_world(scenario, fallback="exit")


@pytest.mark.parametrize("split", [0, 1])
def test_with_no_exit_passed_the_first_one_is_run_to(split: int) -> None:
    async def scenario(world: World) -> None:
        world.cloud.mode = "gone"
        answer = await world.answer(HARD)
        assert (answer.where, answer.exit_depth) == ("fallback", FIRST_EXIT)
        assert answer.label == label_of(HARD, FIRST_EXIT)

    in_world(scenario, split=split, fallback="exit")


@pytest.mark.parametrize("split", range(N))
@pytest.mark.parametrize("mode", ["slow", "silent", "greets"])
@pytest.mark.parametrize("deadline_ms", [75, 200])
def test_a_deadline_is_kept(split: int, mode: str, deadline_ms: float) -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode = mode
        answer = await world.answer(HARD, deadline_ms=deadline_ms)
        assert answer.ms <= deadline_ms
        assert (answer.where, answer.reason) == ("fallback", "deadline")
        assert answer.exit_depth >= FIRST_EXIT

    in_world(scenario, split=split)


def test_a_deadline_too_short_for_the_devices_layers_stops_at_the_exit_it_allows() -> None:
    async def scenario(world: World) -> None:
        answer = await world.answer(HARD, deadline_ms=38)
        assert (answer.where, answer.reason, answer.exit_depth) == ("fallback", "deadline", 3)
        assert answer.ms <= 38
        # Before the first exit there is nothing to answer with: late is better than never.
        answer = await world.answer(HARD, deadline_ms=6)
        assert (answer.where, answer.reason, answer.exit_depth) == ("fallback", "deadline", 2)

    in_world(scenario, split=N)


def test_the_deadline_holds_for_the_layers_run_after_a_failure() -> None:
    async def scenario(world: World) -> None:
        world.cloud.mode = "gone"
        answer = await world.answer(HARD, deadline_ms=62)
        assert answer.ms <= 62
        assert (answer.reason, answer.exit_depth) == ("unavailable", 5)

    in_world(scenario)


def test_a_sample_that_fails_while_the_device_is_busy_does_not_wait_past_its_deadline() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        first = asyncio.create_task(world.answer(HARD, deadline_ms=90))
        await asyncio.sleep(0)
        world.cloud.mode = "busy"
        others = [asyncio.create_task(world.answer(HARD)) for _ in range(5)]
        answer = await first
        assert answer.ms <= 90
        await asyncio.gather(*others)

    in_world(scenario)


def test_the_cloud_is_told_how_long_its_answer_is_worth_something() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD, deadline_ms=1000)
        (_, work) = world.cloud.works[-1]
        assert work.deadline_ms == pytest.approx(1000 - 5 - 3 * LAYER_S * 1000)
        await world.answer(HARD)
        (_, work) = world.cloud.works[-1]
        assert work.deadline_ms == pytest.approx(world.settings.offload_timeout_ms)

    in_world(scenario)


def test_a_lost_cloud_comes_back_by_itself_without_traffic() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode = "gone"
        assert (await world.answer(HARD)).reason == "unavailable"
        assert world.breaker.state == "aside"
        await asyncio.sleep(60)
        assert world.breaker.state == "aside"
        world.cloud.mode = "up"
        await asyncio.sleep(10.0)  # the longest wait between handshakes, and a round trip
        await asyncio.sleep(RTT_S)
        assert world.breaker.state == "up"
        assert (await world.answer(HARD)).where == "cloud"

    in_world(scenario)


def test_handshakes_with_a_lost_cloud_become_rare() -> None:
    async def scenario(world: World) -> None:
        await asyncio.sleep(600)
        times = [at for at, _ in world.cloud.hellos]
        assert 60 < len(times) < 240  # 10 s and half of it on average, after the first few
        assert max(np.diff(times)) <= 10

    in_world(scenario, mode="gone")


def test_while_the_cloud_is_aside_samples_do_not_wait_for_it() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode = "gone"
        await world.answer(HARD)
        sent = len(world.cloud.works)
        answer = await world.answer(HARD)
        assert (answer.where, answer.reason) == ("fallback", "unavailable")
        assert answer.ms == pytest.approx(N * LAYER_S * 1000)
        assert len(world.cloud.works) == sent

    in_world(scenario)


def test_a_link_that_swallows_everything_is_found_out_before_the_timeout() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        await asyncio.sleep(2)  # doubts are settled once a second at most
        world.cloud.mode = "silent"
        began = world.loop.time()
        reasons = [(await world.answer(HARD)).reason for _ in range(20)]
        # The first one's silence was unusual after 0.25 s; the handshake then had 0.5 s.
        assert reasons == ["timeout"] * 20
        assert world.breaker.state == "aside"
        assert world.loop.time() - began < 0.25 + 0.5 + 20 * N * LAYER_S + 0.01

    in_world(scenario)


def test_a_cloud_that_greets_but_does_not_answer_is_put_aside_all_the_same() -> None:
    async def scenario(world: World) -> None:
        world.cloud.mode = "greets"
        began, count = world.loop.time(), 400
        for _ in range(count):
            await world.answer(HARD)
        # Trusted again after each handshake, but ever more rarely.
        assert len(world.cloud.works) < 60
        assert world.loop.time() - began < count * N * LAYER_S + 60 * 2.0

    in_world(scenario)


def test_one_late_reply_does_not_put_the_cloud_aside() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode = "greets"
        assert (await world.answer(HARD)).reason == "timeout"
        world.cloud.mode = "up"
        assert world.breaker.state == "up"
        assert (await world.answer(HARD)).where == "cloud"

    in_world(scenario)


def test_a_failure_from_before_the_last_handshake_does_not_count() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode = "slow"
        late = asyncio.create_task(world.answer(HARD))
        await asyncio.sleep(1.0)
        world.cloud.mode = "gone"
        await world.answer(HARD)
        assert world.breaker.state == "aside"
        answer = await late  # given up at once, not at its time-out
        assert answer.ms < 1500
        assert answer.reason == "unavailable"

    in_world(scenario)


@pytest.mark.parametrize("mode", ["mismatch", "setup"])
def test_sides_that_do_not_fit_are_told_once_and_asked_again_rarely(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(world: World) -> None:
        for _ in range(30):
            answer = await world.answer(HARD)
            assert (answer.where, answer.reason) == ("fallback", mode)
        assert world.breaker.state == "refused"
        assert not world.cloud.works
        hellos = len(world.cloud.hellos)
        await asyncio.sleep(100)
        assert 10 <= len(world.cloud.hellos) - hellos <= 20
        world.cloud.mode = "up"
        await asyncio.sleep(11)
        assert (await world.answer(HARD)).where == "cloud"

    in_world(scenario, mode=mode)
    loud = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(loud) == 1


def test_a_cloud_that_changes_its_model_is_refused_from_then_on() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)
        world.cloud.mode = "mismatch"
        assert (await world.answer(HARD)).reason == "mismatch"
        sent = len(world.cloud.works)
        assert (await world.answer(HARD)).reason == "mismatch"
        assert len(world.cloud.works) == sent

    in_world(scenario)


def test_another_protocol_is_refused() -> None:
    async def scenario(world: World) -> None:
        assert (await world.answer(HARD)).reason == "mismatch"

    in_world(scenario, cloud={"protocol": 2})


def test_the_first_codec_that_both_have_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        answer = await world.answer(HARD)
        assert answer.where == "cloud"
        assert b"int8" in world.cloud.works[-1][1].frame

    in_world(scenario, codec="fp16", cloud={"codecs": ("int8", "tokens")})
    assert "lacks codec fp16" in caplog.text


def test_without_a_common_codec_the_device_answers() -> None:
    async def scenario(world: World) -> None:
        assert (await world.answer(HARD)).reason == "codec"

    in_world(scenario, cloud={"codecs": ("tokens",)})


@pytest.mark.parametrize("limits", [Limits(max_tokens=2), Limits(max_frame_bytes=20)])
def test_a_sample_beyond_the_clouds_limits_stays_here_and_harms_no_other(limits: Limits) -> None:
    short, long = "3", "3 14 15 92 65 35 89 79"

    async def scenario(world: World) -> None:
        answer = await world.answer(long)
        assert (answer.where, answer.reason) == ("fallback", "limits")
        assert world.breaker.state == "up"
        if limits.max_tokens == 2:
            assert (await world.answer(short)).where == "cloud"

    in_world(scenario, exits=False, cloud={"limits": limits})


def test_knobs_travel_only_where_they_differ_from_the_clouds() -> None:
    async def same(world: World) -> None:
        await world.answer(HARD)
        assert world.cloud.works[-1][1].knobs == {}

    async def other(world: World) -> None:
        await world.answer(HARD)
        session = world.agent.session
        assert session is not None
        assert world.cloud.works[-1][1].knobs == never_exit(session._manifest.knobs, N)

    async def shallow_only(world: World) -> None:
        await world.answer(HARD)
        assert world.cloud.works[-1][1].knobs == {}

    in_world(same)
    in_world(other, exits=False)
    # What differs before the cut is none of the cloud's business.
    in_world(shallow_only, knobs={"threshold": [0.9, 0.9, 0.9, 0.25, 0.25, 0.25]})


def test_without_exits_every_sample_runs_to_full_depth() -> None:
    async def scenario(world: World) -> None:
        for answer in await world.all(texts(20)):
            assert isinstance(answer, Answer)
            assert (answer.exit_depth, answer.where) == (N, "cloud")

    in_world(scenario, exits=False)


def test_while_one_frame_is_in_the_air_the_device_computes_the_next() -> None:
    count = 50

    async def scenario(world: World) -> None:
        await world.answer(HARD)
        began = world.loop.time()
        answers = await world.all([HARD] * count)
        took = world.loop.time() - began
        assert took == pytest.approx(count * 3 * LAYER_S + RTT_S, rel=0.02)
        # None waited in a queue with its clock running.
        assert max(a.ms for a in answers if isinstance(a, Answer)) < 1000 * (
            3 * LAYER_S + RTT_S + 3 * LAYER_S
        )

    in_world(scenario)


def test_no_more_than_max_in_flight_are_in_the_air() -> None:
    async def scenario(world: World) -> None:
        world.cloud.mode = "slow"
        world.cloud.slow_s = 1.0
        answers = await world.all([HARD] * 30)
        assert all(a.where == "cloud" for a in answers if isinstance(a, Answer))
        assert world.cloud.most_in_air == 4

    in_world(scenario, max_in_flight=4)


def test_the_source_is_read_only_as_there_is_room() -> None:
    read = 0

    def source() -> Iterator[str]:
        nonlocal read
        for text in [HARD] * 100:
            read += 1
            yield text

    async def scenario(world: World) -> None:
        world.cloud.mode = "slow"
        world.cloud.slow_s = 1.5
        stream = world.stream(source())
        await stream.following()
        # Those in the air, the one on the device, and the one asked for next.
        assert read <= 4 + 3

    in_world(scenario, max_in_flight=4)


def test_answers_come_in_order_or_as_they_finish() -> None:
    given = [HARD, EASY, HARD, EASY, EASY]

    async def ordered(world: World) -> None:
        samples = [Sample(text, str(i)) for i, text in enumerate(given)]
        assert [r.id for r in await world.all(samples)] == list("01234")

    async def unordered(world: World) -> None:
        samples = [Sample(text, str(i)) for i, text in enumerate(given)]
        ids = [r.id for r in await world.all(samples, ordered=False)]
        assert sorted(ids) == list("01234")
        assert ids.index("1") < ids.index("0")

    in_world(ordered)
    in_world(unordered)


@pytest.mark.parametrize("bad", [("a", "pair"), 7, None, ["a", "b"], ("a", 3)])
def test_a_bad_input_fails_alone(bad: object) -> None:
    async def scenario(world: World) -> None:
        results = await world.all([EASY, bad, HARD])
        assert [type(r) for r in results] == [Answer, Failed, Answer]
        with pytest.raises(RequestError):
            await world.answer(bad)  # type: ignore[arg-type]
        assert (await world.answer(EASY)).where == "device"

    in_world(scenario)


def test_a_failed_item_passes_through_in_its_place() -> None:
    async def scenario(world: World) -> None:
        results = await world.all([HARD, Failed("x", "bad line", 2), EASY])
        assert results[1] == Failed("x", "bad line", 2)

    in_world(scenario)


def test_what_the_source_raises_comes_after_the_answers_before_it() -> None:
    def source() -> Iterator[str]:
        yield HARD
        yield EASY
        raise OSError("the disk is gone")

    async def scenario(world: World) -> None:
        stream = world.stream(source())
        for where in ("cloud", "device"):
            answer = await stream.following()
            assert isinstance(answer, Answer)
            assert answer.where == where
        with pytest.raises(OSError, match="the disk is gone"):
            await stream.following()

    in_world(scenario)


def test_a_stream_that_is_dropped_leaves_no_work_behind() -> None:
    async def scenario(world: World) -> None:
        stream = world.stream([HARD] * 100)
        await stream.following()
        await stream.close()
        assert world.cloud.in_air == 0
        assert (await world.answer(EASY)).where == "device"

    in_world(scenario)


def test_a_provisional_answer_comes_first_when_it_is_asked_for() -> None:
    async def scenario(world: World) -> None:
        first: list[Answer] = []
        final = await world.agent.answer(Sample(HARD), first.append)
        (provisional,) = first
        assert (provisional.reason, provisional.exit_depth) == ("provisional", 3)
        assert provisional.id == final.id
        assert provisional.ms < final.ms
        assert final.where == "cloud"
        await world.agent.answer(Sample(EASY), first.append)  # final at once
        assert len(first) == 1

    in_world(scenario)


def test_samples_stay_here_while_the_link_is_worse_than_asked_for() -> None:
    async def scenario(world: World) -> None:
        session = world.agent.session
        assert session is not None
        await world.answer(HARD)
        for nbytes in (1000, 5000, 20000, 3000, 9000):
            transfer = session.link.sent(nbytes)
            world.loop.jump(0.040 + nbytes * 8e-6 / 0.5)  # 0.5 Mbit/s
            session.link.answered(transfer, 0.0)
        answer = await world.answer(HARD)
        assert (answer.where, answer.reason, answer.exit_depth) == ("device", "", N)
        # An old estimate keeps nobody here for ever.
        await asyncio.sleep(11)
        assert (await world.answer(HARD)).where == "cloud"

    in_world(scenario, min_uplink_mbps=1.0)


def test_a_sample_waits_for_the_first_handshake_but_not_past_its_deadline() -> None:
    async def scenario(world: World) -> None:
        assert world.breaker.state == "connecting"
        world.cloud.mode = "up"
        assert (await world.answer(HARD)).where == "cloud"

    async def slow(world: World) -> None:
        answer = await world.answer(HARD, deadline_ms=300)
        assert (answer.where, answer.reason) == ("fallback", "deadline")
        assert answer.ms <= 300

    in_world(scenario, mode="slow", cloud={"slow_s": 0.5})
    in_world(slow, mode="slow")


def test_the_transport_is_closed_with_the_agent() -> None:
    async def scenario(world: World) -> None:
        await world.answer(HARD)

    assert in_world(scenario).cloud.closed


MODES = ("up", *REASON_OF)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, float]]:
    """(mode of the cloud, samples, seconds of pause) one after another."""
    step = st.tuples(st.sampled_from(MODES), st.integers(0, 8), st.sampled_from([0.0, 0.3, 15.0]))
    return draw(st.lists(step, min_size=1, max_size=6))


@given(
    history=histories(),
    split=st.integers(0, N - 1),
    fallback=st.sampled_from(["finish", "exit"]),
    deadline_ms=st.sampled_from([None, 60.0, 120.0, 1000.0]),
    ordered=st.booleans(),
    in_flight=st.integers(1, 4),
    hedge_after=st.sampled_from([math.inf, 0.0, 1.0]),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_whatever_fails_and_when_no_sample_is_lost(
    history: list[tuple[str, int, float]],
    split: int,
    fallback: str,
    deadline_ms: float | None,
    ordered: bool,
    in_flight: int,
    hedge_after: float,
) -> None:
    async def scenario(world: World) -> None:
        count = sum(samples for _, samples, _ in history)
        words = texts(count, seed=len(history))

        async def source() -> AsyncGenerator[Sample, None]:
            index = 0
            for mode, samples, pause_s in history:
                world.cloud.mode = mode
                for _ in range(samples):
                    yield Sample(words[index], str(index))
                    index += 1
                await asyncio.sleep(pause_s)

        results = await world.all(source(), ordered)
        ids = [result.id for result in results]
        assert ids == [str(i) for i in range(count)] if ordered else len(set(ids)) == count
        for answer in results:
            assert isinstance(answer, Answer)
            check(answer, words[int(answer.id)])
        world.cloud.mode = "up"
        await asyncio.sleep(12)
        assert world.breaker.state == "up"

    def check(answer: Answer, text: str) -> None:
        depth, _ = local(text, LAYERS.knobs())
        assert answer.label == label_of(text, answer.exit_depth)
        assert (answer.reason != "") == (answer.where == "fallback")
        assert answer.reason == "" or answer.reason in REASONS
        assert answer.complete == (answer.exit_depth == depth)
        if answer.where == "fallback":
            assert answer.exit_depth <= depth
        else:
            assert answer.exit_depth == depth
        if deadline_ms is not None:
            assert answer.ms <= deadline_ms or answer.exit_depth == FIRST_EXIT
        assert math.isfinite(answer.ms)

    in_world(
        scenario,
        split=split,
        fallback=fallback,
        deadline_ms=deadline_ms,
        max_in_flight=in_flight,
        hedge_after=hedge_after,
    )


# Exits that are chosen before a sample runs


def test_each_samples_own_knobs_are_used_here_and_sent_along() -> None:
    chosen = iter([LAYERS.knobs(value) for value in (NEVER, 0.0, 0.25)])
    text = EASY

    async def scenario(world: World) -> None:
        for knob, depth in ((NEVER, N), (0.0, FIRST_EXIT), (0.25, FIRST_EXIT)):
            before = len(world.cloud.works)
            answer = await world.answer(text)
            assert answer.exit_depth == depth, knob
            sent = [dict(work.knobs) for _, work in world.cloud.works[before:]]
            assert sent == ([LAYERS.knobs(NEVER)] if depth == N else [])

    in_world(scenario, choose=lambda: next(chosen))


def test_a_deadline_leaves_the_classes_of_the_exits_that_were_passed() -> None:
    async def scenario(world: World) -> None:
        # Four layers fit in 45 ms less the margin of 5: exits 2 and 3 of 2, 3, 5 and 6.
        answer = await world.answer(HARD, deadline_ms=45)
        assert (answer.where, answer.reason, answer.exit_depth) == ("fallback", "deadline", 3)
        classes = [int(label_of(HARD, depth).split()[1]) for depth in (2, 3)]
        assert list(answer.exit_classes) == classes

    in_world(scenario, split=N, choose=lambda: LAYERS.knobs(NEVER))


def test_a_sample_that_runs_on_after_the_cloud_failed_keeps_its_choice() -> None:
    async def scenario(world: World) -> None:
        world.cloud.mode = "gone"
        answer = await world.answer(EASY)
        assert (answer.where, answer.exit_depth) == ("fallback", N), "its own knobs let none leave"
        classes = [int(label_of(EASY, depth).split()[1]) for depth in LAYERS.exits]
        assert list(answer.exit_classes) == classes

    in_world(scenario, choose=lambda: LAYERS.knobs(NEVER))
