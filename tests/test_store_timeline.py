"""The hot timeline on a real server."""

import asyncio
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from store.connection import StoreRedis, connect
from store.format import TokenFormat
from store.hot import Entry, FrameNotKept, has_tokens
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.pages import BadCursor
from store.segments import Segments
from store.source import StreamExists, StreamNotFound
from store.timeline import StaleEpoch, Timeline

SEGMENTS = Segments("memory://segments")  # where nothing is sealed

FORMAT = TokenFormat(fingerprint="0123456789abcdef", dtype="float16", tokens_per_frame=2, width=8, vector_width=4)
NOON = 1_800_000_000  # a live stream's slots are large


def entry(slot: int, mark: int = 0, format: TokenFormat = FORMAT) -> Entry:
    """A frame whose content tells its slot and mark, never all zero."""
    rng = np.random.default_rng((slot, mark))
    tokens = rng.integers(1, 1000, format.token_shape).astype(format.numpy_dtype)
    vector = rng.standard_normal(format.vector_width).astype(np.float32)
    return Entry(slot, slot * 1000 + mark, tokens, vector / np.linalg.norm(vector))


def stacked(entries: list[Entry]) -> NDArray[np.generic]:
    return np.stack([one.tokens for one in entries])


@pytest.fixture
def timeline(redis: StoreRedis) -> Timeline:
    return Timeline(redis, FORMAT, SEGMENTS)


@pytest.fixture
async def epoch(redis: StoreRedis) -> int:
    """The epoch of a lease on str_a."""
    taken = await Leases(redis).acquire("str_a", "writer", 60)
    assert taken is not None
    return taken


async def test_what_was_appended_is_read_back_bit_for_bit(timeline, epoch):
    entries = [entry(NOON + offset) for offset in range(0, 500, 3)]
    await timeline.append("str_a", epoch, entries)
    slots = await timeline.slots("str_a", NOON, NOON + 500)
    assert slots.tolist() == [one.slot for one in entries]
    tokens = await timeline.read("str_a", slots)
    assert tokens.dtype == np.float16
    np.testing.assert_array_equal(tokens, stacked(entries))
    np.testing.assert_array_equal(await timeline.times("str_a", slots), [one.time_ms for one in entries])
    vectors = await timeline.vectors("str_a", slots)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, np.stack([one.vector for one in entries]), atol=1e-3)


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("bfloat16", "uint16"), ("float32", "float32")])
async def test_every_model_dtype_keeps_its_bits(redis, epoch, dtype, numpy_dtype):
    format = FORMAT.model_copy(update={"dtype": dtype})
    timeline = Timeline(redis, format, SEGMENTS)
    await timeline.append("str_a", epoch, [entry(7, format=format)])
    tokens = await timeline.read("str_a", np.array([7]))
    assert tokens.dtype == np.dtype(numpy_dtype)
    np.testing.assert_array_equal(tokens[0], entry(7, format=format).tokens)


async def test_a_model_without_search_vectors_keeps_tokens_alone(redis, epoch):
    format = FORMAT.model_copy(update={"vector_width": 0})
    timeline = Timeline(redis, format, SEGMENTS)
    await timeline.append("str_a", epoch, [entry(7, format=format)])
    assert (await timeline.read("str_a", np.array([7]))).shape == (1, 2, 8)
    assert (await timeline.vectors("str_a", np.array([7]))).shape == (1, 0)
    assert (await timeline.erase("str_a", 7, 8)).total == 1


async def test_slots_are_returned_in_the_order_asked_and_as_often(timeline, epoch):
    entries = {slot: entry(slot) for slot in range(100, 200)}
    await timeline.append("str_a", epoch, list(entries.values()))
    asked = [150, 101, 150, 199, 100]
    np.testing.assert_array_equal(
        await timeline.read("str_a", np.array(asked)), stacked([entries[slot] for slot in asked])
    )


async def test_reading_nothing_returns_an_array_of_no_frames(timeline):
    assert (await timeline.read("str_a", np.empty(0, np.int64))).shape == (0, 2, 8)
    assert (await timeline.vectors("str_a", np.empty(0, np.int64))).shape == (0, 4)


async def test_many_hours_are_read_in_one_call(timeline, epoch):
    entries = [entry(slot) for slot in range(NOON, NOON + 3000)]
    await timeline.append("str_a", epoch, entries)
    np.testing.assert_array_equal(await timeline.read("str_a", np.arange(NOON, NOON + 3000)), stacked(entries))
    strided = np.arange(NOON, NOON + 3000, 25)
    np.testing.assert_array_equal(await timeline.read("str_a", strided), stacked(entries[::25]))


async def test_presence_tells_gaps(timeline, epoch):
    await timeline.append("str_a", epoch, [entry(10), entry(12)])
    assert (await timeline.present("str_a", 9, 14)).tolist() == [False, True, False, True, False]
    assert (await timeline.present("str_a", 14, 9)).tolist() == []
    assert (await timeline.slots("str_a", 0, 10**12)).tolist() == [10, 12]


async def test_an_absent_frame_is_named(timeline, epoch):
    await timeline.append("str_a", epoch, [entry(10), entry(12)])
    with pytest.raises(FrameNotKept, match="slot 11 of str_a") as caught:
        await timeline.read("str_a", np.array([10, 11, 12]))
    assert (caught.value.source_id, caught.value.slot) == ("str_a", 11)
    for unknown in (np.array([999_999]), np.array([-5])):
        with pytest.raises(FrameNotKept):
            await timeline.times("str_a", unknown)
    with pytest.raises(FrameNotKept):
        await timeline.vectors("str_unknown", np.array([10]))


async def test_a_frame_that_is_sent_again_is_kept_once(timeline, epoch):
    await timeline.append("str_a", epoch, [entry(10, mark=1)])
    await timeline.append("str_a", epoch, [entry(10, mark=2)])
    assert await timeline.count("str_a") == 1
    np.testing.assert_array_equal((await timeline.read("str_a", np.array([10])))[0], entry(10, mark=2).tokens)


async def test_extent_is_the_first_and_last_present_slot(timeline, epoch):
    assert await timeline.extent("str_a") is None
    await timeline.append("str_a", epoch, [entry(slot) for slot in (NOON + 500, NOON + 3, NOON + 77)])
    assert await timeline.extent("str_a") == (NOON + 3, NOON + 500)
    await timeline.erase("str_a", NOON, NOON + 4)
    assert await timeline.extent("str_a") == (NOON + 77, NOON + 500)
    await timeline.erase("str_a")
    assert await timeline.extent("str_a") is None


async def test_a_stale_epoch_writes_nothing(timeline, redis, epoch):
    await Leases(redis).revoke("str_a")
    with pytest.raises(StaleEpoch, match="str_a"):
        await timeline.append("str_a", epoch, [entry(10)])
    with pytest.raises(StaleEpoch):
        await timeline.append("str_never_leased", 1, [entry(10)])
    assert await timeline.extent("str_a") is None
    assert await timeline.count("str_a") == 0


async def test_an_expired_lease_that_nobody_took_still_writes(timeline, redis):
    leases = Leases(redis)
    epoch = await leases.acquire("str_b", "writer", 0.001)
    while await leases.owner("str_b") is not None:  # noqa: ASYNC110 - the server's clock sends no event
        await asyncio.sleep(0.001)
    await timeline.append("str_b", epoch, [entry(10)])
    assert await timeline.count("str_b") == 1


async def test_one_stale_source_does_not_stop_the_others(timeline, redis, epoch):
    other = await Leases(redis).acquire("str_b", "writer", 60)
    stale = await timeline.append_many(
        {("str_a", epoch - 1): [entry(1)], ("str_b", other): [entry(2), entry(3)], ("str_c", 5): []}
    )
    assert stale == {"str_a"}
    assert (await timeline.slots("str_b", 0, 10)).tolist() == [2, 3]
    assert await timeline.append_many({}) == frozenset()


async def test_of_two_owners_only_the_newer_one_writes(timeline, redis_url, redis, epoch):
    """Two writers race; the moment the lease changes hands, everything of the old one is refused."""
    leases = Leases(redis)

    async def write(epoch: int, mark: int) -> int:
        async with connect(redis_url) as own:
            for count in range(200):
                try:
                    await Timeline(own, FORMAT, SEGMENTS).append("str_a", epoch, [entry(count, mark)])
                except StaleEpoch:
                    return count
        return 200

    async def take_over() -> int:
        await leases.revoke("str_a")
        newer = await leases.acquire("str_a", "second", 60)
        assert newer is not None
        assert newer > epoch
        return await write(newer, 2)

    written = await asyncio.gather(write(epoch, 1), take_over())
    assert written[1] == 200
    np.testing.assert_array_equal(
        await timeline.read("str_a", np.arange(200)), stacked([entry(slot, 2) for slot in range(200)])
    )


@pytest.mark.parametrize(
    "bad",
    [
        Entry(-1, 0, entry(0).tokens, entry(0).vector),
        Entry(1, 0, entry(0).tokens[:1], entry(0).vector),
        Entry(1, 0, entry(0).tokens.astype(np.float32), entry(0).vector),
        Entry(1, 0, entry(0).tokens, entry(0).vector[:2]),
    ],
)
async def test_an_entry_of_another_format_is_refused(timeline, epoch, bad):
    with pytest.raises(ValueError, match=r"format wants|count from 0"):
        await timeline.append("str_a", epoch, [entry(5), bad])
    assert await timeline.count("str_a") == 0


async def test_models_never_mix_but_are_erased_together(timeline, redis, epoch):
    other = Timeline(redis, FORMAT.model_copy(update={"fingerprint": "f" * 16, "width": 5}), SEGMENTS)
    await timeline.append("str_a", epoch, [entry(1), entry(2)])
    await other.append("str_a", epoch, [entry(2, format=other.format), entry(3, format=other.format)])
    assert (await timeline.slots("str_a", 0, 9)).tolist() == [1, 2]
    assert (await other.slots("str_a", 0, 9)).tolist() == [2, 3]
    memory = Memory(redis, SEGMENTS, Keyframes(redis, "memory://keyframes"))
    assert (await memory.erase("str_a", 2, 3)).frames.total == 2
    assert (await memory.erase("str_a")).frames.total == 2
    assert not await has_tokens(redis, "str_a")


async def test_erased_tokens_leave_no_byte_behind(timeline, redis, epoch):
    await timeline.append("str_a", epoch, [entry(slot) for slot in range(180)])
    assert (await timeline.erase("str_a", 30, 130)).total == 100
    kept = await timeline.slots("str_a", 0, 180)
    assert kept.tolist() == [*range(30), *range(130, 180)]
    np.testing.assert_array_equal(await timeline.read("str_a", kept), stacked([entry(slot) for slot in kept]))
    for slot in range(30, 130):
        block, index = divmod(slot, 60)
        for part, size in (("t", FORMAT.token_bytes), ("m", 8), ("v", FORMAT.vector_bytes)):
            key = f"tl:{{str_a}}:{FORMAT.fingerprint}:{part}:{block}"
            assert not any(await redis.getrange(key, index * size, (index + 1) * size - 1))
    assert await redis.exists(f"tl:{{str_a}}:{FORMAT.fingerprint}:t:1") == 0
    assert (await timeline.erase("str_a")).total == 80
    assert [key for key in await redis.keys("tl:*")] == []


async def test_erasing_what_is_not_there_erases_nothing(timeline, epoch):
    assert (await timeline.erase("str_unknown")).total == 0
    await timeline.append("str_a", epoch, [entry(10)])
    assert (await timeline.erase("str_a", 11, 500)).total == 0
    assert (await timeline.erase("str_a", 12, 5)).total == 0
    assert await timeline.count("str_a") == 1


async def test_a_block_takes_its_size_and_not_more(timeline, redis, epoch):
    """Pre-sized strings: 1.0 times the payload, where growing ones take up to 2.5 times."""
    await timeline.append("str_a", epoch, [entry(0)])
    assert await redis.strlen(f"tl:{{str_a}}:{FORMAT.fingerprint}:t:0") == 60 * FORMAT.token_bytes


SLOTS = st.integers(0, 200)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(SLOTS, min_size=1, max_size=20), st.integers(0, 9)),
        st.tuples(st.just("erase"), st.none() | SLOTS, st.none() | SLOTS),
        st.tuples(st.just("read"), st.lists(SLOTS, max_size=20), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, base=st.sampled_from([0, 59, NOON]))
def test_the_timeline_equals_a_dictionary(redis_url, steps, base):
    async def check() -> None:
        async with connect(redis_url) as redis:
            await redis.flushdb()
            timeline = Timeline(redis, FORMAT, SEGMENTS)
            epoch = await Leases(redis).acquire("str_a", "writer", 60)
            model: dict[int, Entry] = {}
            for kind, first, second in steps:
                if kind == "append":
                    entries = [entry(base + slot, second) for slot in first]
                    await timeline.append("str_a", epoch, entries)
                    model |= {one.slot: one for one in entries}
                elif kind == "erase":
                    start, end = (None if side is None else base + side for side in (first, second))
                    doomed = {
                        slot for slot in model if (start is None or slot >= start) and (end is None or slot < end)
                    }
                    assert (await timeline.erase("str_a", start, end)).total == len(doomed)
                    model = {slot: one for slot, one in model.items() if slot not in doomed}
                else:
                    asked = np.array([base + slot for slot in first], np.int64)
                    if set(asked.tolist()) <= set(model):
                        wanted = [model[slot].tokens for slot in asked]
                        np.testing.assert_array_equal(
                            await timeline.read("str_a", asked),
                            np.stack(wanted) if wanted else np.empty((0, 2, 8)),
                        )
                    else:
                        with pytest.raises(FrameNotKept):
                            await timeline.read("str_a", asked)
            kept = sorted(model)
            assert (await timeline.slots("str_a", 0, 10**12)).tolist() == kept
            assert await timeline.count("str_a") == len(kept)
            assert await timeline.extent("str_a") == ((kept[0], kept[-1]) if kept else None)
            times = await timeline.times("str_a", np.array(kept, np.int64))
            assert times.tolist() == [model[slot].time_ms for slot in kept]

    asyncio.run(check())


def test_errors_cross_process_borders_whole():
    for error in (FrameNotKept("str_a", 7), StreamExists("str_a", "url"), StreamNotFound("str_a"), BadCursor("x")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (type(error), str(error))
        assert vars(copy) == vars(error)
