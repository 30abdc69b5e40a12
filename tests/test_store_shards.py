"""Shards are loaded before anybody searches, follow what becomes of hours, and searches tell what they left out."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from store.cipher import Cipher
from store.connection import StoreUnavailable
from store.format import BLOCK_SLOTS, HOUR_SLOTS
from store.hour_states import UNKNOWN, Sealed, SourceHours
from store.leases import Leases
from store.moments import HOURS_PER_READ, Found, Moments, Span
from store.segments import Manifest, Segments
from store.settings import StoreSettings
from store.shard_cache import READS_AT_ONCE
from store.shards import Shard, shard_bytes
from store.source import NewStream, NewVideo
from store.sources import Sources
from store.timeline import Timeline
from tests.ingest_parts import until
from tests.test_store_moments import ALWAYS, FORMAT, NOON, WIDTH, direction, entry, unit

FIRST = NOON // HOUR_SLOTS
PAST = 300_000  # an hour of the year 2004
STEP = 9  # slots between frames, so that an hour is 400 frames and all of them stay apart
FRAMES = HOUR_SLOTS // STEP


class GatedFileSystem(MemoryFileSystem):
    """An object store that answers no read while its gate is closed."""

    protocol = "gated"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    gate = threading.Event()
    reads = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("gated:/"))

    def cat_file(self, *args: Any, **options: Any) -> bytes:
        type(self).reads += 1
        self.gate.wait(60)
        return super().cat_file(*args, **options)


fsspec.register_implementation("gated", GatedFileSystem)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """The gate of an empty `gated://`, open at first and at last."""
    GatedFileSystem.store.clear()
    GatedFileSystem.gate.set()
    yield GatedFileSystem.gate
    GatedFileSystem.gate.set()


class Site:
    """Streams with hours of frames, and what searches them."""

    def __init__(self, redis, root: str, folder: Path) -> None:
        self.sources = Sources(redis, Cipher.open(None, folder))
        self.timeline = Timeline(redis, FORMAT, Segments(root))
        self._leases = Leases(redis)
        self.epochs: dict[str, int] = {}

    async def stream(self, name: str) -> str:
        return await self._owned((await self.sources.create_stream(NewStream(name=name, url=f"rtsp://h/{name}"))).id)

    async def video(self) -> str:
        return await self._owned((await self.sources.create_video(NewVideo(name="a.mp4", file="a"))).id)

    async def _owned(self, source_id: str) -> str:
        epoch = await self._leases.acquire(source_id, "writer", 600)
        assert epoch is not None
        self.epochs[source_id] = epoch
        return source_id

    async def keep(self, source_id: str, slots: Sequence[int]) -> None:
        await self.timeline.append(source_id, self.epochs[source_id], [entry(slot, vector(slot)) for slot in slots])

    async def hours(self, source_id: str, *hours: int, sealed: bool = True) -> None:
        """Keep frames of whole hours, and seal them."""
        for hour in hours:
            await self.keep(source_id, range(hour * HOUR_SLOTS, (hour + 1) * HOUR_SLOTS, STEP))
            assert not sealed or await self.timeline.seal(source_id, hour)

    def moments(self, **options: Any) -> Moments:
        return Moments(self.timeline, StoreSettings(**{"moments_patience_s": 30, **options}))


def vector(slot: int) -> np.ndarray:
    return unit(np.random.default_rng(slot).standard_normal(WIDTH).astype(np.float32))


def kept(slot: int) -> np.ndarray:
    """The vector of a slot as the store keeps it."""
    return vector(slot).astype(np.float16).astype(np.float32)


def manifest(hour: int, frames: int) -> Manifest:
    file = f"{FORMAT.fingerprint}-00000001-{hour:032x}.safetensors"
    return Manifest(hour=hour, generation=1, file=file, frames=frames, size=1, checksum="", offsets={}, bits="")


def hour_of(source_id: str, hour: int) -> list[Span]:
    return [Span(source_id, hour * HOUR_SLOTS, (hour + 1) * HOUR_SLOTS)]


async def becomes(moments: Moments, nbytes: int) -> None:
    while moments.nbytes != nbytes:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)


def told(found: Found) -> tuple[int, int, bool]:
    return found.frames_searched, found.frames_kept, found.partial


@pytest.fixture
def site(redis, segments_root, tmp_path) -> Site:
    return Site(redis, segments_root, tmp_path)


@pytest.fixture
def gated(redis, gate, tmp_path) -> Site:
    return Site(redis, "gated://site", tmp_path)


async def test_what_is_loaded_at_the_start_is_searched_without_reading_a_file(site):
    stream, video = await site.stream("dock"), await site.video()
    await site.hours(stream, FIRST, FIRST + 1)
    await site.hours(video, 0)
    await site.hours(stream, FIRST + 2, sealed=False)
    moments = site.moments()
    await moments.loader(site.sources).load()
    for source_id, hours in ((stream, (FIRST, FIRST + 1)), (video, (0,))):
        for hour in hours:
            [manifest] = [one for one in await site.timeline.sealed(source_id) if one.hour == hour]
            await Segments.remove(site.timeline._segments, source_id, hour, manifest.file)
    wanted = FIRST * HOUR_SLOTS + 100 * STEP
    found = await moments.search(vector(wanted), [Span(stream, *ALWAYS), Span(video, *ALWAYS)], top_k=3)
    assert told(found) == (4 * FRAMES, 4 * FRAMES, False)
    assert (found.moments[0].source_id, found.moments[0].slot) == (stream, wanted)


async def test_a_search_tells_what_it_could_not_read_in_time_and_the_next_one_has_it(gated, gate):
    stream = await gated.stream("dock")
    await gated.hours(stream, FIRST, FIRST + 1)
    await gated.hours(stream, FIRST + 2, sealed=False)
    moments = gated.moments(moments_patience_s=0.2)
    async with asyncio.timeout(30):  # the first ones may run out of patience
        while (await moments.search(direction(1), hour_of(stream, FIRST + 2), top_k=3)).partial:
            pass
    gate.clear()
    async with asyncio.timeout(30):
        found = await moments.search(direction(1), [Span(stream, *ALWAYS)], top_k=3)
        assert told(found) == (FRAMES, 3 * FRAMES, True)
        assert {moment.slot // HOUR_SLOTS for moment in found.moments} == {FIRST + 2}
        half = [Span(stream, FIRST * HOUR_SLOTS + 9, FIRST * HOUR_SLOTS + 1800), *hour_of(stream, FIRST + 2)]
        assert told(await moments.search(direction(1), half, top_k=3)) == (FRAMES, FRAMES + 199, True)
        some = {stream: np.arange(FIRST * HOUR_SLOTS, (FIRST + 3) * HOUR_SLOTS, 10 * STEP)}
        found = await moments.search(direction(1), [Span(stream, *ALWAYS)], top_k=3, slots=some)
        assert told(found) == (FRAMES // 10, 3 * FRAMES // 10, True)
    gate.set()
    await moments.loader(gated.sources).load()
    found = await moments.search(direction(1), [Span(stream, *ALWAYS)], top_k=3)
    assert told(found) == (3 * FRAMES, 3 * FRAMES, False)


async def test_searches_that_wait_for_the_same_hours_read_them_once_and_few_at_a_time(gated, gate):
    stream = await gated.stream("dock")
    await gated.hours(stream, *range(FIRST, FIRST + 3 * READS_AT_ONCE))
    moments = gated.moments()
    gate.clear()
    GatedFileSystem.reads = 0
    loading = asyncio.create_task(moments.loader(gated.sources).load())
    searching = [asyncio.create_task(moments.search(direction(1), [Span(stream, *ALWAYS)], top_k=1)) for _ in range(5)]
    await until(lambda: GatedFileSystem.reads >= READS_AT_ONCE)
    await asyncio.sleep(0.2)  # for one more, if there were any
    assert GatedFileSystem.reads == READS_AT_ONCE
    gate.set()
    await loading
    assert not any(found.partial for found in await asyncio.gather(*searching))
    assert GatedFileSystem.reads == 3 * READS_AT_ONCE


async def test_the_newest_hours_of_all_sources_are_loaded_as_far_as_they_fit(gated, gate):
    dock, yard, video = await gated.stream("dock"), await gated.stream("yard"), await gated.video()
    await gated.hours(dock, PAST, PAST + 2, PAST + 4)
    await gated.hours(yard, PAST + 1, PAST + 3)
    await gated.hours(video, 0)  # of a moment ago: newer than the hours of the streams
    room = 3 * shard_bytes(FRAMES, WIDTH, is_exact=False)
    moments = gated.moments(moments_max_bytes=room, moments_patience_s=0.1)
    loader = moments.loader(gated.sources)
    await moments.search(direction(1), hour_of(dock, PAST), top_k=1)
    await loader.load()
    assert moments.nbytes <= room
    gate.clear()
    for source_id, hour in ((dock, PAST + 4), (yard, PAST + 3), (video, 0)):
        assert not (await moments.search(direction(1), hour_of(source_id, hour), top_k=1)).partial
    for source_id, hour in ((dock, PAST), (dock, PAST + 2), (yard, PAST + 1)):
        assert (await moments.search(direction(1), hour_of(source_id, hour), top_k=1)).partial


async def test_an_hour_that_is_sealed_is_read_once_more_and_rounded(gated, gate):
    stream = await gated.stream("dock")
    await gated.hours(stream, FIRST, sealed=False)
    moments = gated.moments()
    loader = moments.loader(gated.sources)
    await loader.load()
    assert moments.nbytes == shard_bytes(FRAMES, WIDTH, is_exact=True)
    assert await gated.timeline.seal(stream, FIRST)
    GatedFileSystem.reads = 0
    await loader.load()
    assert GatedFileSystem.reads == 1
    assert moments.nbytes == shard_bytes(FRAMES, WIDTH, is_exact=False)
    gate.clear()
    await loader.load()
    assert not (await moments.search(direction(1), hour_of(stream, FIRST), top_k=1)).partial


async def test_the_open_hour_is_exact_and_a_sealed_one_within_the_steps_of_its_grid(site):
    stream = await site.stream("dock")
    await site.hours(stream, FIRST, sealed=False)
    query = vector(7)
    slots = range(FIRST * HOUR_SLOTS, (FIRST + 1) * HOUR_SLOTS, STEP)
    vectors = np.stack([kept(slot) for slot in slots])
    cosines = dict(zip(slots, vectors @ query, strict=True))
    moments = site.moments()
    found = await moments.search(query, hour_of(stream, FIRST), top_k=FRAMES)
    assert {moment.slot: moment.score for moment in found.moments} == pytest.approx(cosines, abs=1e-6)
    assert await site.timeline.seal(stream, FIRST)
    found = await moments.search(query, hour_of(stream, FIRST), top_k=FRAMES)
    most = float(np.abs(query) @ (np.ptp(vectors, axis=0) / 255)) / 2
    assert {moment.slot: moment.score for moment in found.moments} == pytest.approx(cosines, abs=most + 1e-6)
    await site.keep(stream, [FIRST * HOUR_SLOTS + 1])  # late, so the hour grows once more
    found = await moments.search(query, hour_of(stream, FIRST), top_k=FRAMES)
    assert told(found) == (FRAMES + 1, FRAMES + 1, False)
    assert found.moments[0].score == pytest.approx(max(cosines.values()), abs=1e-6)


async def test_what_is_erased_or_expired_is_never_found_again_and_leaves_the_memory(site):
    stream = await site.stream("dock")
    await site.hours(stream, FIRST, FIRST + 1, FIRST + 2)
    moments = site.moments()
    loader = moments.loader(site.sources)
    await loader.load()
    erased = (FIRST + 1) * HOUR_SLOTS + 10 * STEP
    await site.timeline.erase(stream, erased, erased + 5 * STEP)
    found = await moments.search(vector(erased), [Span(stream, *ALWAYS)], top_k=FRAMES)
    assert told(found) == (3 * FRAMES - 5, 3 * FRAMES - 5, False)
    assert not {moment.slot for moment in found.moments} & set(range(erased, erased + 5 * STEP))
    await site.timeline.expire(stream, (FIRST + 1) * HOUR_SLOTS)
    await loader.load()
    assert moments.nbytes == sum(shard_bytes(count, WIDTH, is_exact=False) for count in (FRAMES - 5, FRAMES))
    assert (await moments.search(direction(1), hour_of(stream, FIRST), top_k=1)) == Found((), 0, 0)
    await site.timeline.erase(stream)
    await loader.load()
    assert moments.nbytes == 0


async def test_a_late_frame_is_found_in_an_hour_that_was_adopted_from_its_file(site):
    stream = await site.stream("dock")
    await site.hours(stream, FIRST)
    await site.keep(stream, [FIRST * HOUR_SLOTS + 1])
    [manifest] = await site.timeline.sealed(stream)
    assert await site.timeline.adopt(stream, manifest, manifest)
    found = await site.moments().search(vector(FIRST * HOUR_SLOTS + 1), hour_of(stream, FIRST), top_k=1)
    assert told(found) == (FRAMES + 1, FRAMES + 1, False)
    assert found.moments[0].score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("sealed", [False, True])
async def test_a_frame_that_is_overwritten_is_found_by_its_new_vector_only(site, sealed):
    stream = await site.stream("dock")
    await site.hours(stream, FIRST, sealed=sealed)
    moments = site.moments()
    await moments.loader(site.sources).load()
    slot, other = FIRST * HOUR_SLOTS + 100 * STEP, vector(1)
    await site.timeline.append(stream, site.epochs[stream], [entry(slot, other)])
    for _ in range(2):
        found = await moments.search(other, hour_of(stream, FIRST), top_k=1)
        assert told(found) == (FRAMES, FRAMES, False)
        assert (found.moments[0].slot, found.moments[0].score) == (slot, pytest.approx(1, abs=0.02))
        old = await moments.search(vector(slot), hour_of(stream, FIRST), top_k=1)
        assert old.moments[0].score < 0.98
        if not sealed:
            assert await site.timeline.seal(stream, FIRST)


@pytest.mark.parametrize("sealed", [False, True])
async def test_a_frame_that_is_overwritten_and_sealed_between_two_searches_is_found_by_its_new_vector_only(
    site, sealed
):
    stream = await site.stream("dock")
    await site.hours(stream, FIRST, sealed=sealed)
    await site.keep(stream, [FIRST * HOUR_SLOTS + 1])  # so that a sealed hour is held as exact, too
    moments = site.moments()
    await moments.loader(site.sources).load()
    slot, other = FIRST * HOUR_SLOTS + 100 * STEP, vector(1)
    await site.timeline.append(stream, site.epochs[stream], [entry(slot, other)])
    assert await site.timeline.seal(stream, FIRST)
    found = await moments.search(other, hour_of(stream, FIRST), top_k=1)
    assert told(found) == (FRAMES + 1, FRAMES + 1, False)
    assert (found.moments[0].slot, found.moments[0].score) == (slot, pytest.approx(1, abs=0.02))
    assert (await moments.search(vector(slot), hour_of(stream, FIRST), top_k=1)).moments[0].score < 0.98


async def test_a_late_frame_that_expired_leaves_the_sealed_one_that_it_was_kept_before(site):
    stream = await site.stream("dock")
    await site.hours(stream, FIRST)
    slot, other = FIRST * HOUR_SLOTS + 10 * STEP, vector(1)
    await site.timeline.append(stream, site.epochs[stream], [entry(slot, other)])
    await site.keep(stream, [(FIRST + 1) * HOUR_SLOTS - 1])
    moments = site.moments()
    assert (await moments.search(other, hour_of(stream, FIRST), top_k=1)).moments[0].score > 0.99
    await site.timeline.expire(stream, FIRST * HOUR_SLOTS + HOUR_SLOTS // 2)
    assert (await moments.search(other, hour_of(stream, FIRST), top_k=1)).moments[0].score < 0.98
    found = await moments.search(vector(slot), hour_of(stream, FIRST), top_k=1)
    assert (found.moments[0].slot, found.moments[0].score) == (slot, pytest.approx(1, abs=1e-3))


@pytest.mark.parametrize("sealed", [False, True])
async def test_only_what_was_written_since_is_read_again_of_an_hour_of_which_something_is_not_sealed(
    site, monkeypatch, sealed
):
    stream = await site.stream("dock")
    await site.hours(stream, FIRST, sealed=sealed)
    await site.keep(stream, [(FIRST + 1) * HOUR_SLOTS - 1])
    moments = site.moments()
    await moments.search(direction(1), hour_of(stream, FIRST), top_k=1)
    read: list[int] = []
    vectors = site.timeline.vectors

    async def watched(source_id: str, slots: np.ndarray) -> np.ndarray:
        read.extend(slots.tolist())
        return await vectors(source_id, slots)

    monkeypatch.setattr(site.timeline, "vectors", watched)
    await site.keep(stream, [FIRST * HOUR_SLOTS + 1])
    found = await moments.search(vector(FIRST * HOUR_SLOTS + 1), hour_of(stream, FIRST), top_k=1)
    assert told(found) == (FRAMES + 2, FRAMES + 2, False)
    assert found.moments[0].slot == FIRST * HOUR_SLOTS + 1
    assert read == [FIRST * HOUR_SLOTS + offset for offset in (0, 1, *range(STEP, BLOCK_SLOTS, STEP))]


async def test_what_is_left_out_is_counted_to_the_frame_whatever_is_asked_of_it(gated, gate):
    dock, yard = await gated.stream("dock"), await gated.stream("yard")
    hours = range(FIRST, FIRST + HOURS_PER_READ + READS_AT_ONCE + 3)
    newest = hours[-READS_AT_ONCE:]  # at these the search waits, and gets no further
    await gated.hours(dock, *hours)
    await gated.hours(yard, *hours[:3], sealed=False)
    await gated.keep(dock, [FIRST * HOUR_SLOTS + 1])
    present = {
        dock: np.sort(np.array([FIRST * HOUR_SLOTS + 1, *range(hours[0] * HOUR_SLOTS, hours.stop * HOUR_SLOTS, STEP)])),
        yard: np.arange(hours[0] * HOUR_SLOTS, hours[3] * HOUR_SLOTS, STEP),
    }
    moments = gated.moments(moments_patience_s=0.2)
    gate.clear()

    async def expect(spans: list[Span], slots: dict[str, np.ndarray] | None = None) -> None:
        asked = {span.source_id: np.zeros(len(present[span.source_id]), np.bool_) for span in spans}
        for span in spans:
            here = present[span.source_id]
            asked[span.source_id] |= (here >= span.start) & (here < span.end)
        for source_id, some in (slots or {}).items():
            asked[source_id] &= np.isin(present[source_id], some)
        kept = sum(int(mine.sum()) for mine in asked.values())
        async with asyncio.timeout(30):
            assert told(await moments.search(direction(1), spans, top_k=3, slots=slots)) == (0, kept, kept > 0)

    stuck = Span(dock, newest[0] * HOUR_SLOTS, hours.stop * HOUR_SLOTS)
    cut = Span(dock, hours[0] * HOUR_SLOTS + 100, hours[-READS_AT_ONCE - 1] * HOUR_SLOTS + 5)
    pieces = [Span(dock, hours[1] * HOUR_SLOTS + at, hours[1] * HOUR_SLOTS + at + 50) for at in range(0, 900, 300)]
    await expect([Span(dock, *ALWAYS), Span(yard, *ALWAYS)])
    await expect([stuck, cut, Span(yard, hours[1] * HOUR_SLOTS - 10, hours[1] * HOUR_SLOTS + 10)])
    await expect([stuck, *pieces, Span(yard, *ALWAYS)])
    await expect([Span(dock, *ALWAYS), Span(yard, *ALWAYS)], {dock: present[dock][::7], yard: np.empty(0, np.int64)})
    await expect([stuck, *pieces], {dock: np.flip(present[dock][:2000:3])})


@settings(max_examples=100, deadline=None)
@given(
    sealed=st.sets(st.integers(0, 30)),
    hot=st.sets(st.integers(0, 30)),
    runs=st.lists(st.tuples(st.integers(0, 31 * HOUR_SLOTS), st.integers(1, 5 * HOUR_SLOTS)), max_size=4),
)
def test_hours_are_known_by_what_is_sealed_and_what_is_hot(sealed, hot, runs):
    manifests = [manifest(hour, frames=10 + hour) for hour in sorted(sealed)]
    known = SourceHours.of("str_a", 1, Sealed.of("m", manifests), {hour: f"h{hour}" for hour in hot})
    assert known.hours.tolist() == sorted(sealed | hot)
    assert known.frames.tolist() == [UNKNOWN if hour in hot else 10 + hour for hour in sorted(sealed | hot)]
    assert known.bytes_of_shards(WIDTH).tolist() == [
        shard_bytes(HOUR_SLOTS if hour in hot else 10 + hour, WIDTH, is_exact=hour in hot)
        for hour in sorted(sealed | hot)
    ]
    for hour in range(31):
        state = known.state(hour)
        assert state.file == (manifest(hour, frames=1).file if hour in sealed else None)
        assert state.mark == (f"h{hour}" if hour in hot else "")
        assert known.has(hour) == (hour in sealed | hot)
    spans = [(start, start + length) for start, length in runs]
    for hour, touched, covered in zip(known.hours, known.touched(spans), known.covered(spans), strict=True):
        first, last = hour * HOUR_SLOTS, (hour + 1) * HOUR_SLOTS
        assert touched == any(start < last and end > first for start, end in spans)
        assert covered == any(start <= first and last <= end for start, end in spans)


def test_of_a_sealed_hour_less_than_a_hundred_bytes_stay_in_memory():
    sealed = Sealed.of("m", [manifest(hour, frames=3600) for hour in range(168)])
    assert sealed.hours.nbytes + sealed.frames.nbytes + sealed.files.nbytes < 168 * 100


async def test_what_was_being_read_while_it_was_erased_is_not_kept(gated, gate):
    stream = await gated.stream("dock")
    await gated.hours(stream, FIRST)
    moments = gated.moments()
    gate.clear()
    searching = asyncio.create_task(moments.search(direction(1), hour_of(stream, FIRST), top_k=1))
    await asyncio.sleep(0.2)
    await gated.keep(stream, [FIRST * HOUR_SLOTS + 1])
    await gated.timeline.erase(stream, FIRST * HOUR_SLOTS + 1, FIRST * HOUR_SLOTS + 2)
    await moments.forget(stream)
    gate.set()
    assert (await searching).frames_searched == FRAMES
    assert moments.nbytes == 0


async def test_the_shards_of_sources_that_are_no_more_are_freed_and_new_sources_are_taken_up(site):
    stream = await site.stream("dock")
    await site.hours(stream, FIRST)
    moments = site.moments()
    following = asyncio.create_task(moments.loader(site.sources).run(every_s=0.01))
    try:
        async with asyncio.timeout(20):
            one = shard_bytes(FRAMES, WIDTH, is_exact=False)
            await becomes(moments, one)
            later = await site.stream("yard")
            await site.hours(later, FIRST + 5)
            await becomes(moments, 2 * one)
            await site.sources.delete_stream(stream, purge=True)
            await becomes(moments, one)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_an_hour_whose_segment_is_lost_is_left_out_and_told(site):
    stream = await site.stream("dock")
    await site.hours(stream, FIRST, FIRST + 1)
    [lost, _] = await site.timeline.sealed(stream)
    await site.timeline._segments.remove(stream, FIRST, lost.file)
    moments = site.moments()
    await moments.loader(site.sources).load()
    found = await moments.search(direction(1), [Span(stream, *ALWAYS)], top_k=3)
    assert told(found) == (FRAMES, 2 * FRAMES, True)
    with pytest.raises(StoreUnavailable, match="restore it or erase the hour"):
        await moments.search(direction(1), hour_of(stream, FIRST), top_k=3)


async def test_searches_while_hours_are_sealed_and_erased_find_only_what_was_not_erased_before(redis, tmp_path):
    site = Site(redis, str(tmp_path / "segments"), tmp_path)
    stream = await site.stream("dock")
    hours = range(FIRST, FIRST + 4)
    await site.hours(stream, *hours, sealed=False)
    moments = site.moments()
    erased: set[int] = set()
    working = asyncio.Event()

    async def change() -> None:
        for turn in range(12):
            hour = hours[turn % len(hours)]
            await site.timeline.seal(stream, hour)
            first = hour * HOUR_SLOTS + turn * 20 * STEP
            await site.timeline.erase(stream, first, first + 20 * STEP)
            erased.update(range(first, first + 20 * STEP))
        working.set()

    async def load() -> None:
        while not working.is_set():
            await moments.loader(site.sources).load()

    async def look(seed: int) -> None:
        while not working.is_set():
            before = set(erased)
            found = await moments.search(vector(seed), [Span(stream, *ALWAYS)], top_k=2000)
            assert not found.partial
            assert found.moments
            assert not before & {moment.slot for moment in found.moments}

    await asyncio.gather(change(), load(), *(look(seed) for seed in range(3)))
    found = await moments.search(vector(1), [Span(stream, *ALWAYS)], top_k=2000)
    assert told(found) == (4 * FRAMES - 12 * 20, 4 * FRAMES - 12 * 20, False)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 300),
    wanted=st.integers(1, 400),
    width=st.sampled_from([WIDTH, 33, 768]),  # FAISS has ways of its own for some widths
    is_exact=st.booleans(),
    spread=st.sampled_from([0.0, 1e-3, 1.0]),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_a_shard_returns_the_best_of_the_rows_that_count(count, wanted, width, is_exact, spread, seed, data):
    chance = np.random.default_rng(seed)
    vectors = chance.standard_normal(width) + spread * chance.standard_normal((count, width))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    slots = np.cumsum(chance.integers(1, 5, count))
    query = unit(chance.standard_normal(width).astype(np.float32))
    kinds = st.sampled_from(["all", "range", "mask"])
    rows: Any = None
    match data.draw(kinds):
        case "range":
            rows = tuple(sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count)))))
        case "mask":
            rows = chance.random(count) < 0.5
    asked = np.ones(count, np.bool_) if rows is None else rows
    if isinstance(rows, tuple):
        asked = (np.arange(count) >= rows[0]) & (np.arange(count) < rows[1])
    shard = (Shard.exact if is_exact else Shard.in_bytes)(slots, vectors)
    found, scores = shard.best(query, wanted, rows)
    cosines = dict(zip(slots[asked].tolist(), (vectors[asked] @ query).tolist(), strict=True))
    error = 1e-6 + (0 if is_exact else float(np.abs(query) @ np.ptp(vectors, axis=0)) / 255 / 2)
    assert len(found) == len(set(found.tolist())) == min(wanted, len(cosines))
    assert scores.tolist() == pytest.approx([cosines[slot] for slot in found.tolist()], abs=error)
    assert (np.diff(scores) <= 0).all()
    left_out = [score for slot, score in cosines.items() if slot not in set(found.tolist())]
    assert not left_out or max(left_out) <= scores[-1] + 2 * error
