"""The engine in-process: the same answers as on the device, and nobody harmed by anybody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from cloud_world import WatchedLayers, World, assert_same

from offramp_cloud import riders
from offramp_cloud.engine import Engine, load_engine
from offramp_cloud.statuses import ProtocolMismatch
from offramp_cloud.waiting import Load
from offramp_common.bundle import Bundle
from offramp_common.errors import (
    BundleMismatch,
    CloudBusy,
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    UnknownCodec,
    WireError,
)
from offramp_common.frames import Limits
from offramp_common.transport import Completion, Hello, Offload
from offramp_model.packed_layers import PackedLayers


@pytest.fixture
async def engines() -> AsyncIterator[list[Engine]]:
    """Engines put here are closed."""
    made: list[Engine] = []
    yield made
    for engine in made:
        await engine.close()


@pytest.fixture
def watched(world: World) -> WatchedLayers:
    return WatchedLayers(world.layers)


@pytest.fixture
def engine(world: World, watched: WatchedLayers, engines: list[Engine]) -> Engine:
    """Over watched layers, at most 8 rows in a batch."""
    engines.append(world.engine(watched, load=Load(max_batch=8)))
    return engines[-1]


async def behind(
    engine: Engine, watched: WatchedLayers, first: Offload, *others: Offload
) -> list[Completion | BaseException]:
    """All outcomes, where `others` arrive while the first layer of `first` is being run."""
    with watched.held():
        tasks = [asyncio.create_task(engine.complete(first))]
        await asyncio.to_thread(watched.entered.wait)
        tasks += [asyncio.create_task(engine.complete(work)) for work in others]
        await asyncio.sleep(0)  # each runs up to where it waits
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("method", ["deebert", "pabee"])
async def test_a_request_alone_gets_the_devices_own_answers_bit_for_bit(
    method: str, depth: int, bundle: Bundle, patient_bundle: Bundle, engines: list[Engine]
) -> None:
    world = World(bundle if method == "deebert" else patient_bundle)
    engines.append(world.engine())
    for seed, lengths in enumerate([(7,), (3, 12, 5, 9, 1, 30), (64, 63)]):
        acts = world.rows(lengths, depth, seed)
        got = await engines[-1].complete(world.offload_of(acts))
        assert_same(got, world.local(acts))
    assert got.compute_ms > 0
    assert got.queue_ms >= 0


async def test_requests_that_wait_together_run_together_and_answer_the_same(
    world: World, engine: Engine, watched: WatchedLayers
) -> None:
    parts = [world.rows((10 + i % 3,), 1, seed=i) for i in range(6)]
    work = [world.offload_of(acts, request_id=f"r{i}") for i, acts in enumerate(parts)]
    got = await behind(engine, watched, *work)
    for i, (acts, completion) in enumerate(zip(parts, got, strict=True)):
        assert isinstance(completion, Completion), completion
        assert_same(completion, world.local(acts, request_id=f"r{i}"), exactly=False)
    entered = [rows for depth, rows in watched.runs if depth == 1]
    assert entered == [1, 5]
    assert engine.counters.batches[5] == 1


async def test_the_codec_costs_only_its_own_error(world: World, engine: Engine) -> None:
    acts = world.rows((9, 4, 11), 2)
    wanted = world.local(acts)
    got = await engine.complete(world.offload_of(acts, codec="int8"))
    # int8 per token errs by up to 1/254 of a token's largest value; two toy layers make it 100 times
    # larger at most. A wrong row or a lost scale would be off by several units.
    np.testing.assert_allclose(got.answers, wanted.answers, atol=0.5)


async def test_a_frame_with_more_rows_than_a_batch_is_run_in_pieces(
    world: World, engine: Engine, watched: WatchedLayers
) -> None:
    lengths = [3 + i % 5 for i in range(21)]
    acts = world.rows(lengths, 0)
    got = await engine.complete(world.offload_of(acts))
    assert_same(got, world.local(acts), exactly=False)
    assert max(engine.counters.batches) == 8


async def test_a_large_frame_is_decoded_like_a_small_one(world: World, engine: Engine) -> None:
    acts = world.rows([64] * 40, 1)
    work = world.offload_of(acts)
    assert len(work.frame) > 256 * 2**10
    assert_same(await engine.complete(work), world.local(acts), exactly=False)


@pytest.mark.parametrize("depth", range(4))
async def test_where_the_device_chooses_exits_it_is_told_what_each_predicted(
    depth: int, online_bundle: Bundle, engines: list[Engine]
) -> None:
    world = World(online_bundle)
    engines.append(world.engine(load=Load(max_batch=2)))  # in pieces
    acts = world.rows([3, 12, 5], depth)
    at = {stop: {"stop": (float(stop),) * 4} for stop in (1, 2, 3, 4)}
    exits = range(depth + 1, 5)
    told = {stop: world.local(acts, at[stop]).answers.argmax(axis=1).tolist() for stop in exits}
    for stop in exits:
        got = await engines[-1].complete(world.offload_of(acts, knobs=at[stop]))
        assert_same(got, world.local(acts, at[stop]), exactly=False)
        assert got.exit_classes_BE is not None
        passed = [[told[e][row] if e <= stop else -1 for e in exits] for row in range(3)]
        assert got.exit_classes_BE.tolist() == passed


async def test_each_of_several_requests_gets_the_exit_classes_of_its_own_rows(
    online_bundle: Bundle, engines: list[Engine]
) -> None:
    world = World(online_bundle)
    watched = WatchedLayers(world.layers)
    engines.append(world.engine(watched))
    parts = [world.rows((10,) * (i + 1), 1, seed=i) for i in range(3)]
    work = [world.offload_of(acts, request_id=f"r{i}") for i, acts in enumerate(parts)]
    got = await behind(engines[-1], watched, world.offload(depth=1), *work)
    assert engines[-1].counters.batches[6] > 0
    for acts, request, completion in zip(parts, work, got[1:], strict=True):
        alone = await engines[-1].complete(request)
        assert isinstance(completion, Completion), completion
        assert completion.exit_classes_BE is not None
        assert alone.exit_classes_BE is not None
        assert completion.exit_classes_BE.shape == (acts.batch_size, 3)
        assert completion.exit_classes_BE.tolist() == alone.exit_classes_BE.tolist()


async def test_other_methods_devices_are_told_nothing_of_the_exits(
    world: World, engine: Engine
) -> None:
    assert (await engine.complete(world.offload(depth=1))).exit_classes_BE is None


async def test_requests_with_knobs_of_their_own_share_layers_and_keep_their_exits(
    world: World, engines: list[Engine]
) -> None:
    layers = PackedLayers(world.layers.model)
    watched = WatchedLayers(layers)
    engines.append(world.engine(watched))
    never = {"threshold": (0.0,) * 4}
    acts = world.rows((8,), 1, seed=3)
    got = await behind(
        engines[-1],
        watched,
        world.offload(depth=3),
        world.offload_of(acts, request_id="own"),
        world.offload_of(acts, request_id="never", knobs=never),
        world.offload_of(acts, request_id="named", knobs=world.knobs),
    )
    own, with_never, named = got[1:]
    assert isinstance(own, Completion)
    assert isinstance(with_never, Completion)
    assert isinstance(named, Completion)
    assert with_never.exit_depth_B.tolist() == [4]
    assert_same(with_never, world.local(acts, never, "never"), exactly=False)
    assert_same(own, world.local(acts, request_id="own"), exactly=False)
    assert_same(named, replace(own, request_id="named"), exactly=False)
    # All three in one layer; the cloud's own knobs, said or left out, are the same knobs.
    assert [rows for depth, rows in watched.runs if depth == 1] == [1, 2]
    assert engines[-1].counters.batches[3] > 0


async def test_a_poisonous_request_fails_alone(
    world: World, engine: Engine, watched: WatchedLayers, caplog: pytest.LogCaptureFixture
) -> None:
    good = [world.rows((6,), 1, seed=i) for i in range(3)]
    poison = world.rows((6,), 1, seed=9)
    poison.hidden_BTD[0, 2, 3] = WatchedLayers.POISON
    work = [world.offload_of(acts, request_id=f"r{i}") for i, acts in enumerate(good)]
    work.insert(2, world.offload_of(poison, request_id="poison"))
    got = await behind(engine, watched, *work)
    assert isinstance(got[2], RuntimeError)
    for i, (acts, completion) in enumerate(zip(good, got[:2] + got[3:], strict=True)):
        assert isinstance(completion, Completion), completion
        assert_same(completion, world.local(acts, request_id=f"r{i}"), exactly=False)
    assert engine.counters.failed == 1
    assert "request 'poison' failed in the engine" in caplog.text


async def test_nan_and_infinite_hidden_states_disturb_no_other_row(
    world: World, engine: Engine, watched: WatchedLayers
) -> None:
    good = world.rows((6,), 1, seed=1)
    broken = world.rows((6, 6), 1, seed=2)
    broken.hidden_BTD[0] = np.nan
    broken.hidden_BTD[1, 0] = np.inf
    got = await behind(
        engine,
        watched,
        world.offload(depth=3),
        world.offload_of(broken, request_id="broken"),
        world.offload_of(good),
    )
    assert [rows for depth, rows in watched.runs if depth == 1] == [3]
    assert isinstance(got[1], Completion)
    assert isinstance(got[2], Completion)
    assert_same(got[2], world.local(good), exactly=False)
    assert np.isnan(got[1].answers[0]).all()
    assert got[1].exit_depth_B[0] == 4  # a row without a number is never sure


async def test_a_deadline_passes_on_time_and_the_request_is_never_run(
    world: World, engine: Engine, watched: WatchedLayers
) -> None:
    with watched.held():
        first = asyncio.create_task(engine.complete(world.offload()))
        await asyncio.to_thread(watched.entered.wait)
        with pytest.raises(DeadlineExceeded, match="20 ms passed before the answer was ready"):
            await engine.complete(world.offload((5, 5), deadline_ms=20.0))
    await first
    await engine.complete(world.offload((4, 4, 4)))
    assert (1, 2) not in watched.runs


async def test_a_request_whose_deadline_passes_while_it_runs_is_answered_too_late(
    world: World, engine: Engine, watched: WatchedLayers
) -> None:
    with watched.held(), pytest.raises(DeadlineExceeded):
        await engine.complete(world.offload(deadline_ms=20.0))
    assert_same(await engine.complete(world.offload()), world.local(world.rows((5,), 1)))


async def test_who_has_priority_goes_first_where_not_all_find_room(
    world: World, watched: WatchedLayers, engines: list[Engine]
) -> None:
    engine = world.engine(watched, load=Load(max_batch=1))
    engines.append(engine)
    finished: list[str] = []

    async def ask(name: str, priority: int) -> None:
        await engine.complete(world.offload(depth=3, request_id=name, priority=priority))
        finished.append(name)

    with watched.held():
        tasks = [asyncio.create_task(ask("first", 0))]
        await asyncio.to_thread(watched.entered.wait)
        for name, priority in (("plain", 0), ("low", -1), ("urgent", 2)):
            tasks.append(asyncio.create_task(ask(name, priority)))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert finished == ["first", "urgent", "plain", "low"]


async def test_the_work_in_the_house_is_told_and_gone_in_the_end(
    world: World, engine: Engine, watched: WatchedLayers
) -> None:
    never = {"threshold": (0.0,) * 4}
    assert engine.queued_layer_tokens == 0
    with watched.held():
        first = asyncio.create_task(engine.complete(world.offload((5,), 1, knobs=never)))
        await asyncio.to_thread(watched.entered.wait)
        second = asyncio.create_task(engine.complete(world.offload((7, 2), 2, knobs=never)))
        await asyncio.sleep(0)
        assert engine.queued_layer_tokens == 3 * 5 + 2 * 9
    await asyncio.gather(first, second)
    assert engine.queued_layer_tokens == 0


async def test_a_bug_of_ours_leaves_nobody_waiting_and_the_engine_at_work(
    world: World, engine: Engine, watched: WatchedLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(riders.Riders, "leave", broken)
        got = await asyncio.gather(
            *(engine.complete(world.offload(seed=i)) for i in range(3)), return_exceptions=True
        )
    assert [str(outcome) for outcome in got] == ["a bug"] * 3
    assert_same(await engine.complete(world.offload()), world.local(world.rows((5,), 1)))


async def test_a_cancelled_request_is_never_run(
    world: World, engine: Engine, watched: WatchedLayers
) -> None:
    with watched.held():
        first = asyncio.create_task(engine.complete(world.offload()))
        await asyncio.to_thread(watched.entered.wait)
        second = asyncio.create_task(engine.complete(world.offload((5, 5))))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
    await first
    await engine.complete(world.offload((4, 4, 4)))
    assert (1, 2) not in watched.runs


async def test_a_full_house_refuses_and_has_room_again(
    world: World, watched: WatchedLayers, engines: list[Engine]
) -> None:
    engine = world.engine(watched, load=Load(max_waiting_rows=4))
    engines.append(engine)
    got = await behind(
        engine, watched, world.offload((5, 5, 5)), world.offload(), world.offload((4, 4))
    )
    assert isinstance(got[0], Completion)
    assert isinstance(got[1], Completion)
    assert isinstance(got[2], CloudBusy)
    assert "4 rows wait, at most 4" in str(got[2])
    assert isinstance(await engine.complete(world.offload((4, 4))), Completion)


async def test_closing_fails_what_waits_finishes_what_runs_and_refuses_the_rest(
    world: World, watched: WatchedLayers
) -> None:
    engine = world.engine(watched)
    with watched.held():
        running = asyncio.create_task(engine.complete(world.offload()))
        await asyncio.to_thread(watched.entered.wait)
        waiting = asyncio.create_task(engine.complete(world.offload((5, 5))))
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close())
        with pytest.raises(CloudUnavailable, match="shutting down"):
            await waiting
    assert_same(await running, world.local(world.rows((5,), 1)))
    await closing
    with pytest.raises(CloudUnavailable, match="shutting down"):
        await engine.complete(world.offload())


async def test_an_unknown_digest_is_refused_with_what_to_do(world: World, engine: Engine) -> None:
    work = replace(world.offload(), digest=b"\x01" * 16)
    with pytest.raises(BundleMismatch, match=r"digest 0101.*say Hello again \(`offramp bundle dig"):
        await engine.complete(work)
    with pytest.raises(BundleMismatch, match=r"\(empty\)"):
        await engine.complete(replace(work, digest=b""))


async def test_a_frame_of_another_depth_than_its_digest_is_refused(
    world: World, engine: Engine
) -> None:
    work = replace(world.offload(depth=2), digest=world.bundle.digest(1))
    with pytest.raises(WireError, match=r"depth 2: this model accepts frames at depths \[1\]"):
        await engine.complete(work)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"patience": (1.0,) * 4}, "this method has"),
        ({"threshold": (0.5,) * 3}, "3 values for 4 layers"),
        ({"threshold": (0.5, 0.5, 0.5, 99.0)}, "must lie in"),
        ({"threshold": (0.5, 0.5, 0.5, float("nan"))}, "must lie in"),
    ],
)
async def test_knobs_that_the_method_does_not_have_are_refused(
    knobs: dict[str, tuple[float, ...]], message: str, world: World, engine: Engine
) -> None:
    with pytest.raises(WireError, match=message):
        await engine.complete(world.offload(knobs=knobs))


async def test_a_knob_on_its_bound_survives_the_wires_float32(world: World, engine: Engine) -> None:
    high = world.bundle.manifest.knobs[0].high
    for value in (high, float(np.float32(high))):
        got = await engine.complete(world.offload(knobs={"threshold": (value,) * 4}))
        assert got.exit_depth_B.tolist() == [2]


async def test_what_is_no_frame_within_the_limits_is_refused(
    world: World, engines: list[Engine]
) -> None:
    engine = world.engine(limits=Limits(max_frame_bytes=10_000, max_rows=2, max_tokens=512))
    engines.append(engine)
    assert engine.limits.max_tokens == 64  # the model's own
    good = world.offload()
    for frame, message in (
        (b"", "not a frame"),
        (good.frame[:-1], "cut short"),
        (good.frame + b"\0", "after its end"),
        (b"\0" * 10_001, "at most 10000"),
        (world.offload((3, 3, 3)).frame, "must be 1 to 2"),
    ):
        with pytest.raises(WireError, match=message):
            await engine.complete(replace(good, frame=frame))
    with pytest.raises(UnknownCodec, match="zip"):
        await engine.complete(replace(good, frame=good.frame.replace(b"\xa4fp32", b"\xa3zip")))
    assert_same(await engine.complete(good), world.local(world.rows((5,), 1)))


async def test_counters_tell_what_was_done(world: World, engine: Engine) -> None:
    never = {"threshold": (0.0,) * 4}
    await engine.complete(world.offload((5, 7), knobs=never))
    await engine.complete(world.offload((3,), depth=3))
    told = engine.counters.to_json()
    assert told.pop("compute_s") > 0
    assert told.pop("overhead_s") > 0
    assert told == {
        "requests": 2,
        "failed": 0,
        "dropped": 0,
        "rows": 3,
        "tokens": 15,
        "layer_rows": 2 * 3 + 1,
        "layer_tokens": 12 * 3 + 3,
        "exits": {4: 3},
        "batches": {2: 3, 1: 1},
    }
    assert engine.queued_layer_tokens == 0


class TestWelcome:
    """The handshake."""

    def hello(self, world: World) -> Hello:
        digests = {depth: world.bundle.digest(depth) for depth in world.bundle.cuts}
        return Hello("toy", digests, ("int8", "fp16"))

    async def test_equal_sides_are_welcome(self, world: World, engine: Engine) -> None:
        welcome = engine.welcome(self.hello(world))
        assert {"fp32", "fp16", "int8", "tokens"} <= set(welcome.codecs)
        assert welcome.limits == engine.limits
        rounded = tuple(float(np.float32(v)) for v in world.knobs["threshold"])
        assert welcome.knobs == {"threshold": rounded}

    async def test_another_protocol_is_told_which_side_to_update(
        self, world: World, engine: Engine
    ) -> None:
        hello = self.hello(world)
        with pytest.raises(ProtocolMismatch, match="update offramp on the cloud"):
            engine.welcome(replace(hello, protocol=2))
        with pytest.raises(ProtocolMismatch, match="update offramp on the device"):
            engine.welcome(replace(hello, protocol=0))

    async def test_a_difference_is_told_by_depth(self, world: World, engine: Engine) -> None:
        hello = self.hello(world)
        digests = {**hello.digests, 2: b"\x02" * 16}
        with pytest.raises(BundleMismatch, match=r"differs from depth 2 on.*0202.*bundle digest"):
            engine.welcome(replace(hello, digests=digests))
        with pytest.raises(BundleMismatch, match=r"depth 9: .* at depths \[0, 1, 2, 3\]"):
            engine.welcome(replace(hello, digests={9: b"\x02" * 16}))

    async def test_a_device_that_cuts_deep_need_not_hold_the_same_shallow_layers(
        self, world: World, engine: Engine
    ) -> None:
        hello = self.hello(world)
        engine.welcome(replace(hello, digests={3: world.bundle.digest(3)}))

    async def test_codecs_without_a_common_one_are_refused(
        self, world: World, engine: Engine
    ) -> None:
        with pytest.raises(UnknownCodec, match="this cloud decodes fp32"):
            engine.welcome(replace(self.hello(world), codecs=("int3", "zip")))
        engine.welcome(replace(self.hello(world), codecs=("int3", "fp16")))


async def test_a_bundle_on_disk_becomes_an_engine(
    bundle: Bundle, world: World, engines: list[Engine]
) -> None:
    engine = load_engine(bundle.path, threads=1)
    engines.append(engine)
    assert engine.name == "toy"
    acts = world.rows((6, 7), 2)
    assert_same(await engine.complete(world.offload_of(acts)), world.local(acts), exactly=False)
    with pytest.raises(ConfigError, match=r"engine of 'toy' on cpu: precision 'fp8': must be one"):
        load_engine(bundle.path, precision="fp8")


async def test_brain_floats_are_a_setting(
    bundle: Bundle, world: World, engines: list[Engine]
) -> None:
    never = {"threshold": (0.0,) * 4}
    engines.append(load_engine(bundle.path, precision="bf16"))
    acts = world.rows((6, 7), 2)
    got = await engines[-1].complete(world.offload_of(acts, knobs=never))
    # 8 bits a value over two layers; logits of the toys are below 20.
    np.testing.assert_allclose(got.answers, world.local(acts, never).answers, atol=0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
async def test_a_graphics_card_gives_the_same_answers(
    bundle: Bundle, world: World, engines: list[Engine]
) -> None:
    engines.append(load_engine(bundle.path, device="cuda"))
    for depth in range(4):
        acts = world.rows((6, 7, 30), depth)
        got = await engines[-1].complete(world.offload_of(acts))
        assert_same(got, world.local(acts), exactly=False)
