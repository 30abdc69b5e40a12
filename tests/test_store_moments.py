"""The search over FAISS shards, from a timeline on a real server."""

import asyncio
from collections.abc import Sequence
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from store.connection import StoreRedis, connect
from store.format import TokenFormat
from store.hot import Entry
from store.leases import Leases
from store.moments import HITS_PER_MOMENT, Moment, Moments, Span
from store.segments import Segments
from store.settings import StoreSettings
from store.timeline import Timeline

WIDTH = 16
FORMAT = TokenFormat(fingerprint="0123456789abcdef", dtype="float16", tokens_per_frame=1, width=2, vector_width=WIDTH)
HOUR = 3600
NOON = 1_800_000_000 // HOUR * HOUR
ALWAYS = (0, 10**12)


def unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def direction(axis: int, noise: float = 0.0, seed: int = 0) -> NDArray[np.float32]:
    vector = np.zeros(WIDTH, np.float32)
    vector[axis] = 1
    return unit(vector + noise * np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32))


def entry(slot: int, vector: NDArray[np.float32]) -> Entry:
    return Entry(slot, slot * 1000, np.zeros((1, 2), np.float16), vector)


async def whole(moments: Moments, query: NDArray[np.float32], spans: Sequence[Span], **options) -> list[Moment]:
    """Search, and expect that nothing was left out."""
    found = await moments.search(query, spans, **options)
    assert not found.partial
    assert found.frames_searched == found.frames_kept
    return list(found.moments)


class Writer:
    """Appends vectors as the owner of every source."""

    def __init__(self, redis: StoreRedis) -> None:
        self.timeline = Timeline(redis, FORMAT, Segments(f"memory://{uuid4().hex}"))
        self._leases = Leases(redis)
        self._epochs: dict[str, int] = {}

    async def append(self, source_id: str, vectors: dict[int, NDArray[np.float32]]) -> None:
        if source_id not in self._epochs:
            self._epochs |= await self._leases.acquire_many([source_id], "writer", 60)
        await self.timeline.append(
            source_id, self._epochs[source_id], [entry(slot, vector) for slot, vector in vectors.items()]
        )


@pytest.fixture
def writer(redis: StoreRedis) -> Writer:
    return Writer(redis)


@pytest.fixture
def moments(writer: Writer) -> Moments:
    return Moments(writer.timeline, StoreSettings())


async def test_the_scene_that_matches_is_found_as_one_moment(writer, moments):
    background = {slot: direction(0, 0.05, slot) for slot in range(NOON, NOON + 600)}
    scene = {slot: direction(1, 0.05, slot) for slot in range(NOON + 300, NOON + 310)}
    scene[NOON + 304] = direction(1)
    await writer.append("str_a", background | scene)
    [moment] = await whole(moments, direction(1), [Span("str_a", *ALWAYS)], top_k=5, min_score=0.5)
    assert (moment.source_id, moment.start, moment.end, moment.slot) == ("str_a", NOON + 300, NOON + 310, NOON + 304)
    assert moment.score == pytest.approx(1.0, abs=1e-3)


async def test_the_time_filter_is_half_open_to_the_slot(writer, moments):
    await writer.append("str_a", {slot: direction(1) for slot in range(NOON, NOON + 20)})
    [moment] = await whole(moments, direction(1), [Span("str_a", NOON + 5, NOON + 9)], top_k=3)
    assert (moment.start, moment.end) == (NOON + 5, NOON + 9)
    assert await whole(moments, direction(1), [Span("str_a", NOON + 20, NOON + 90)], top_k=3) == []
    assert await whole(moments, direction(1), [Span("str_a", NOON + 9, NOON + 5)], top_k=3) == []
    assert await whole(moments, direction(1), [Span("str_a", 0, NOON)], top_k=3) == []


async def test_hits_far_apart_are_moments_of_their_own_best_first(writer, moments):
    await writer.append("str_a", {NOON: direction(1, 0.1, 1), NOON + 10: direction(1), NOON + 12: direction(1, 0.1, 2)})
    found = await whole(moments, direction(1), [Span("str_a", *ALWAYS)], top_k=5)
    assert [(moment.start, moment.end) for moment in found] == [(NOON + 10, NOON + 13), (NOON, NOON + 1)]
    assert found[0].slot == NOON + 10


async def test_several_sources_are_searched_together(writer, moments):
    await writer.append("str_a", {100: direction(1, 0.2, 1)})
    await writer.append("str_b", {100: direction(1)})
    await writer.append("str_c", {100: direction(1, 0.1, 3)})
    spans = [Span("str_a", *ALWAYS), Span("str_b", *ALWAYS), Span("str_unknown", *ALWAYS)]
    found = await whole(moments, direction(1), spans, top_k=9)
    assert [moment.source_id for moment in found] == ["str_b", "str_a"]


async def test_top_k_counts_moments_even_if_one_scene_fills_the_best_hits(writer, moments):
    scene = {slot: direction(1) for slot in range(NOON, NOON + 40 * HITS_PER_MOMENT)}
    other = {NOON + 2000: direction(1, 0.3, 5)}
    await writer.append("str_a", scene | other)
    found = await whole(moments, direction(1), [Span("str_a", *ALWAYS)], top_k=2)
    assert [moment.slot >= NOON + 2000 for moment in found] == [False, True]
    assert len(await whole(moments, direction(1), [Span("str_a", *ALWAYS)], top_k=1)) == 1
    assert await whole(moments, direction(1), [Span("str_a", *ALWAYS)], top_k=0) == []


async def test_only_the_slots_that_were_used_are_found(writer, moments):
    await writer.append("str_a", {slot: direction(1) for slot in range(NOON, NOON + 100)})
    used = np.arange(NOON, NOON + 100, 10)
    found = await whole(moments, direction(1), [Span("str_a", *ALWAYS)], top_k=50, slots={"str_a": used})
    assert sorted(moment.slot for moment in found) == used.tolist()
    assert all(moment.end == moment.start + 1 for moment in found)
    nothing = {"str_a": np.empty(0, np.int64)}
    assert await whole(moments, direction(1), [Span("str_a", *ALWAYS)], top_k=5, slots=nothing) == []


async def test_overlapping_spans_are_searched_once(writer, moments):
    await writer.append("str_a", {slot: direction(1) for slot in range(NOON, NOON + 10)})
    spans = [Span("str_a", NOON, NOON + 6), Span("str_a", NOON + 4, NOON + 10), Span("str_a", NOON, NOON + 2)]
    [moment] = await whole(moments, direction(1), spans, top_k=9)
    assert (moment.start, moment.end) == (NOON, NOON + 10)


async def test_what_is_appended_later_is_found_and_what_is_erased_is_not(writer, moments):
    everywhere = [Span("str_a", *ALWAYS)]
    await writer.append("str_a", {NOON + 50: direction(1)})
    assert len(await whole(moments, direction(1), everywhere, top_k=5, min_score=0.5)) == 1
    await writer.append("str_a", {NOON + 10: direction(1), NOON + 90: direction(2)})
    found = await whole(moments, direction(1), everywhere, top_k=5, min_score=0.5)
    assert {moment.slot for moment in found} == {NOON + 10, NOON + 50}
    await writer.timeline.erase("str_a", NOON, NOON + 60)
    assert await whole(moments, direction(1), everywhere, top_k=5, min_score=0.5) == []
    [left] = await whole(moments, direction(2), everywhere, top_k=5, min_score=0.5)
    assert left.slot == NOON + 90
    await writer.timeline.erase("str_a")
    assert await whole(moments, direction(2), everywhere, top_k=5) == []


async def test_sealed_hours_find_the_same_frames_in_half_of_the_memory(writer):
    vectors = {
        slot: unit(np.random.default_rng(slot).standard_normal(WIDTH).astype(np.float32))
        for slot in range(NOON, NOON + 2 * HOUR, 7)
    }
    await writer.append("str_a", vectors)
    query = vectors[NOON + 700]
    spans = [Span("str_a", *ALWAYS)]
    hot, sealed = (Moments(writer.timeline, StoreSettings()) for _ in range(2))
    exact = await whole(hot, query, spans, top_k=10)
    for hour in await writer.timeline.hot_hours("str_a"):
        assert await writer.timeline.seal("str_a", hour)
    rounded = await whole(sealed, query, spans, top_k=10)
    assert rounded[0].slot == exact[0].slot == NOON + 700
    assert len({moment.slot for moment in exact} & {moment.slot for moment in rounded}) >= 8
    assert rounded[0].score == pytest.approx(exact[0].score, abs=0.01)
    assert sealed.nbytes < 0.75 * hot.nbytes  # the slots weigh as much as such narrow vectors
    assert await whole(hot, query, spans, top_k=10) == rounded
    assert hot.nbytes == sealed.nbytes


async def test_shards_beyond_the_memory_limit_are_made_again_when_needed(writer):
    await writer.append(
        "str_a", {NOON + hour * HOUR + offset: direction(hour) for hour in range(5) for offset in range(50)}
    )
    tight = Moments(writer.timeline, StoreSettings(moments_max_bytes=1))
    for _ in range(2):
        for hour in range(5):
            best = (await whole(tight, direction(hour), [Span("str_a", *ALWAYS)], top_k=1))[0]
            assert best.slot // HOUR == NOON // HOUR + hour


async def test_only_hours_of_which_something_was_erased_are_forgotten(writer, moments):
    await writer.append("str_a", {NOON: direction(1), NOON + 1: direction(1), NOON + HOUR: direction(1)})
    assert await whole(moments, direction(1), [Span("str_a", *ALWAYS)], top_k=9)
    held = moments.nbytes
    await moments.forget("str_a")
    await moments.forget("str_unknown")
    assert moments.nbytes == held > 0
    await writer.timeline.erase("str_a", NOON, NOON + 1)
    await moments.forget("str_a")
    assert moments.nbytes == held // 3
    assert len(await whole(moments, direction(1), [Span("str_a", *ALWAYS)], top_k=9)) == 2


async def test_searches_while_frames_arrive_and_vanish_agree_with_some_state(writer, moments):
    """Searches run in threads while shards are replaced."""
    spans = [Span("str_a", *ALWAYS)]
    await writer.append("str_a", {slot: direction(0) for slot in range(NOON, NOON + 100)})

    async def change() -> None:
        for slot in range(NOON + 100, NOON + 160):
            await writer.append("str_a", {slot: direction(0)})
            await writer.timeline.erase("str_a", slot - 100, slot - 99)

    async def search() -> list[list[Moment]]:
        return [await whole(moments, direction(0), spans, top_k=1) for _ in range(20)]

    results = await asyncio.gather(change(), *(search() for _ in range(4)))
    for found in results[1:]:
        assert all(len(one) == 1 and one[0].score == pytest.approx(1, abs=1e-3) for one in found)


@pytest.mark.parametrize(
    "bad", [np.ones(WIDTH - 1), np.ones((1, WIDTH)), np.full(WIDTH, np.nan), np.full(WIDTH, np.inf), np.empty(0)]
)
async def test_a_vector_of_another_space_is_refused(moments, bad):
    with pytest.raises(ValueError, match=r"\(16,\)"):
        await whole(moments, bad, [Span("str_a", *ALWAYS)], top_k=1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slots=st.sets(st.integers(0, 4 * HOUR), min_size=1, max_size=40),
    spans=st.lists(st.tuples(st.integers(0, 4 * HOUR), st.integers(0, 2 * HOUR)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_exact_search_equals_a_matrix_product(redis_url, slots, spans, seed):
    async def check() -> None:
        async with connect(redis_url) as redis:
            await redis.flushdb()
            writer = Writer(redis)
            rng = np.random.default_rng(seed)
            vectors = {slot: unit(rng.standard_normal(WIDTH).astype(np.float32)) for slot in slots}
            await writer.append("str_a", vectors)
            query = unit(rng.standard_normal(WIDTH).astype(np.float32))
            moments = Moments(writer.timeline, StoreSettings())
            found = await whole(
                moments, query, [Span("str_a", start, start + length) for start, length in spans], top_k=1000
            )
            inside = {slot for slot in slots if any(start <= slot < start + length for start, length in spans)}
            covered = {slot for moment in found for slot in slots & set(range(moment.start, moment.end))}
            assert inside <= covered
            assert [moment.score for moment in found] == sorted((moment.score for moment in found), reverse=True)
            for moment in found:
                mine = {slot: float(vectors[slot] @ query) for slot in inside if moment.start <= slot < moment.end}
                assert moment.score == pytest.approx(max(mine.values()), abs=2e-3)
                assert {moment.start, moment.end - 1, moment.slot} <= inside

    asyncio.run(check())
