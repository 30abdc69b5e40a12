"""A replica keeps what it has read: the same bytes as the timeline's, and only what is new is fetched."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from store.connection import StoreRedis
from store.format import BLOCK_SLOTS, HOUR_SLOTS
from store.hot import FrameNotKept
from store.leases import Leases
from store.segments import Segments
from store.timeline import Timeline
from store.token_cache import TokenCache
from tests.test_store_timeline import FORMAT, entry

PLENTY = 1 << 30
WIDE = FORMAT.model_copy(update={"width": 4096})
START = 500_000 * HOUR_SLOTS


@pytest.fixture
def timeline(redis: StoreRedis, tmp_path: Path) -> Timeline:
    return Timeline(redis, WIDE, Segments(str(tmp_path)))


@pytest.fixture
async def epoch(redis: StoreRedis) -> int:
    taken = await Leases(redis).acquire("str_a", "writer", 600)
    assert taken is not None
    return taken


async def remember(timeline: Timeline, epoch: int, slots: Sequence[int], mark: int = 0) -> None:
    await timeline.append("str_a", epoch, [entry(slot, mark, format=WIDE) for slot in slots])


async def sent_bytes(redis: StoreRedis) -> int:
    return int((await redis.info("stats"))["total_net_output_bytes"])


def slots_of(blocks: int) -> np.ndarray:
    return START + np.arange(blocks * BLOCK_SLOTS)


async def test_what_was_read_is_not_fetched_again(timeline, epoch, redis):
    slots = slots_of(10)
    await remember(timeline, epoch, slots.tolist())
    cache = TokenCache(timeline, PLENTY)
    first = await cache.read("str_a", slots)
    before = await sent_bytes(redis)
    again = await cache.read("str_a", slots)
    some = await cache.read("str_a", slots[7:300:3][::-1])
    assert await sent_bytes(redis) - before < 2 * WIDE.token_bytes
    assert first.tobytes() == again.tobytes() == (await timeline.read("str_a", slots)).tobytes()
    assert some.tobytes() == first[7:300:3][::-1].tobytes()


async def test_of_a_stream_that_goes_on_only_the_last_minute_is_fetched(timeline, epoch, redis):
    slots = slots_of(10)
    await remember(timeline, epoch, slots[:-5].tolist())
    cache = TokenCache(timeline, PLENTY)
    await cache.read("str_a", slots[:-5])
    await remember(timeline, epoch, slots[-5:].tolist())
    before = await sent_bytes(redis)
    read = await cache.read("str_a", slots)
    assert await sent_bytes(redis) - before < 1.1 * BLOCK_SLOTS * WIDE.token_bytes
    assert read.tobytes() == (await timeline.read("str_a", slots)).tobytes()


async def test_a_stride_and_then_the_rest_fetch_each_frame_once(timeline, epoch, redis):
    slots = slots_of(10)
    await remember(timeline, epoch, slots.tolist())
    cache = TokenCache(timeline, PLENTY)
    await cache.read("str_a", slots[::10])
    before = await sent_bytes(redis)
    read = await cache.read("str_a", slots)
    assert read.tobytes() == (await timeline.read("str_a", slots)).tobytes()
    once = await sent_bytes(redis)
    assert (await cache.read("str_a", slots)).tobytes() == read.tobytes()
    assert await sent_bytes(redis) - once < 2 * WIDE.token_bytes
    assert once - before < 2.2 * slots.size * WIDE.token_bytes  # the cache and the timeline, once each


async def test_sealed_frames_are_read_from_their_segment_once(timeline, epoch, tmp_path):
    slots = slots_of(10)
    await remember(timeline, epoch, slots.tolist())
    cache = TokenCache(timeline, PLENTY)
    hot = await cache.read("str_a", slots)
    assert await timeline.seal("str_a", START // HOUR_SLOTS)
    assert (await cache.read("str_a", slots)).tobytes() == hot.tobytes()
    [segment] = tmp_path.rglob("*.safetensors")
    segment.write_bytes(b"")
    assert (await cache.read("str_a", slots)).tobytes() == hot.tobytes()


@pytest.mark.parametrize("sealed", [False, True])
async def test_what_changed_or_is_gone_is_never_taken_from_the_cache(timeline, epoch, sealed):
    slots = slots_of(2)
    await remember(timeline, epoch, slots.tolist())
    if sealed:
        await timeline.seal("str_a", START // HOUR_SLOTS)
    cache = TokenCache(timeline, PLENTY)
    old = await cache.read("str_a", slots)
    await remember(timeline, epoch, [START + 7], mark=9)
    read = await cache.read("str_a", slots)
    assert read[7].tobytes() == entry(START + 7, 9, format=WIDE).tokens.tobytes() != old[7].tobytes()
    assert read[8:].tobytes() == old[8:].tobytes()
    await timeline.erase("str_a", START + 9, START + 10)
    with pytest.raises(FrameNotKept, match=str(START + 9)):
        await cache.read("str_a", slots)
    await timeline.erase("str_a")
    with pytest.raises(FrameNotKept, match=str(START)):
        await cache.read("str_a", slots)


async def test_more_than_it_may_hold_is_read_rightly_and_not_held(timeline, epoch, redis):
    slots = slots_of(10)
    await remember(timeline, epoch, slots.tolist())
    expected = (await timeline.read("str_a", slots)).tobytes()
    for max_bytes in (0, WIDE.token_bytes, 3 * BLOCK_SLOTS * (WIDE.token_bytes + 8)):
        cache = TokenCache(timeline, max_bytes)
        for _ in range(2):
            assert (await cache.read("str_a", slots)).tobytes() == expected
            assert cache.nbytes <= max_bytes
    last = slots[-3 * BLOCK_SLOTS :]
    await cache.read("str_a", last)
    before = await sent_bytes(redis)
    await cache.read("str_a", last)
    assert await sent_bytes(redis) - before < 2 * WIDE.token_bytes


async def test_what_is_forgotten_is_let_go_even_if_it_is_being_read(timeline, epoch):
    slots = slots_of(10)
    await remember(timeline, epoch, slots.tolist())
    cache = TokenCache(timeline, PLENTY)
    await cache.read("str_a", slots)
    assert cache.nbytes > slots.size * WIDE.token_bytes
    cache.forget("str_b")
    assert cache.nbytes > 0
    reading = asyncio.create_task(cache.read("str_a", slots))
    await asyncio.sleep(0)
    cache.forget("str_a")
    await reading
    assert cache.nbytes == 0


async def test_whatever_happens_the_cache_reads_what_the_timeline_reads(redis, epoch, tmp_path):
    timeline = Timeline(redis, FORMAT, Segments(str(tmp_path)))
    cache = TokenCache(timeline, 400 * FORMAT.token_bytes)
    chance = np.random.default_rng(3)
    hour = START // HOUR_SLOTS
    for round in range(120):
        at = START + int(chance.integers(0, 1200))
        match chance.integers(0, 6):
            case 0:
                await timeline.seal("str_a", hour)
            case 1:
                await timeline.erase("str_a", at, at + int(chance.integers(1, 90)))
            case _:
                fresh = np.unique(chance.integers(at, at + 100, 30)).tolist()
                await timeline.append("str_a", epoch, [entry(slot, round) for slot in fresh])
        kept = await timeline.slots("str_a", START, START + HOUR_SLOTS)
        if len(kept):
            wanted = chance.choice(kept, int(chance.integers(1, len(kept) + 1)))
            assert (await cache.read("str_a", wanted)).tobytes() == (await timeline.read("str_a", wanted)).tobytes()
