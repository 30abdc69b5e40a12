"""Limits by age and by size, on a real server, a real folder and object stores: what goes, what stays, what is told."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from store.cipher import Cipher
from store.connection import StoreRedis, StoreUnavailable
from store.files import Files
from store.format import HOUR_SLOTS, TokenFormat
from store.gaps import Gap
from store.hot import Entry
from store.janitor import Janitor, SweepReport
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.segments import Segments
from store.settings import StoreSettings
from store.sizes import KeyframeHours, TokenHours
from store.source import KeyframesOutlive, NewStream, NewVideo, Source, Stream, VideoStatus
from store.sources import Sources
from store.timeline import Timeline

FORMAT = TokenFormat(fingerprint="0123456789abcdef", dtype="float16", tokens_per_frame=1, width=64, vector_width=16)
OTHER = FORMAT.model_copy(update={"fingerprint": "fedcba9876543210", "width": 32})
FRAMES = 12  # of an hour in these tests
JPEG = bytes(1000)


@dataclass
class Place:
    """A store, and what looks after it."""

    redis: StoreRedis
    root: str
    folder: Path
    sources: Sources
    timeline: Timeline
    keyframes: Keyframes
    tokens: TokenHours
    pictures: KeyframeHours

    def janitor(self, **limits: object) -> Janitor:
        settings = StoreSettings.model_validate({"data_dir": self.folder, "segments_url": self.root, **limits})
        memory = Memory(self.redis, Segments(self.root), Keyframes(self.redis, self.root))
        return Janitor(self.redis, self.sources, memory, settings)

    async def stream(self, name: str = "door", **fields: object) -> Stream:
        """Register a stream, as of a day ago."""
        new = NewStream.model_validate({"name": name, "url": f"rtsp://cam/{name}", **fields})
        a_day_ago = time.time() - 24 * 3600
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("store.sources.time.time", lambda: a_day_ago)
            return await self.sources.create_stream(new)

    async def video(self, name: str, hours: int, status: str = "ready") -> Source:
        video = await self.sources.create_video(NewVideo(name=name, file=f"{name}.mp4"))
        await self.fill(video.id, range(hours))
        epoch = await Leases(self.redis).acquire(video.id, "ingest", 60)
        assert epoch is not None
        told = VideoStatus.model_validate({"status": status, "duration_s": hours * 3600})
        assert await self.sources.set_video_status(video.id, epoch, told)
        await Leases(self.redis).release("ingest", {video.id: epoch})
        return await self.sources.source(video.id)

    async def fill(self, source_id: str, hours: Sequence[int], frames: int = FRAMES) -> None:
        await self.remember(source_id, [hour * HOUR_SLOTS + slot for hour in hours for slot in range(frames)])

    async def remember(
        self, source_id: str, slots: Sequence[int], *, pictures: bool = True, format: TokenFormat = FORMAT
    ) -> None:
        leases = Leases(self.redis)
        epoch = await leases.acquire(source_id, "writer", 60)
        assert epoch is not None
        if pictures:
            await self.keyframes.put_many({(source_id, slot): JPEG for slot in slots})
        tokens, vector = np.ones(format.token_shape, np.float16), np.ones(format.vector_width, np.float32)
        entries = [Entry(slot, slot * 1000, tokens, vector) for slot in slots]
        await Timeline(self.redis, format, Segments(self.root)).append(source_id, epoch, entries)
        await leases.release("writer", {source_id: epoch})

    async def hours(self, source_id: str) -> list[int]:
        slots = await self.timeline.slots(source_id, 0, 10**12)
        return sorted({int(slot) // HOUR_SLOTS for slot in slots})

    async def pictured_hours(self, source_id: str) -> list[int]:
        """The hours whose pictures can be read, of those that have frames; and that this is what is known of them."""
        slots = await self.timeline.slots(source_id, 0, 10**12)
        known = slots[await self.keyframes.kept(source_id, slots)].tolist()
        readable = sorted(await self.keyframes._read(source_id, await self.keyframes._packed.between(source_id), slots))
        assert known == readable
        return sorted({slot // HOUR_SLOTS for slot in readable})

    async def files(self, source_id: str, part: str) -> int:
        """Bytes of the files of a source, whose path has a part in it."""
        files = Files(self.root)._fs
        found = await asyncio.to_thread(files.find, f"{Files(self.root)._root}/{source_id}", detail=True)
        return sum(about["size"] for path, about in found.items() if part in path)

    async def check_counts(self, *source_ids: str) -> None:
        """What is counted of sources is what is there."""
        tokens = await self.tokens.totals(source_ids)
        pictures = await self.pictures.totals(source_ids)
        for source_id in source_ids:
            hot = sum([len(await self._hot(source_id, format)) * format.frame_bytes for format in (FORMAT, OTHER)])
            files = [await self.files(source_id, f"/{format.fingerprint}-") for format in (FORMAT, OTHER)]
            assert (tokens[source_id].hot, tokens[source_id].sealed) == (hot, sum(files))
            loose, packed = await self.files(source_id, ".jpg"), await self.files(source_id, "/keyframes-")
            assert pictures[source_id] == loose + packed
            assert sum([await self.tokens.nbytes(source_id, hour) for hour in await self.hours(source_id)]) == (
                tokens[source_id].total
            )

    async def _hot(self, source_id: str, format: TokenFormat) -> list[int]:
        timeline = Timeline(self.redis, format, Segments(self.root))
        return (await timeline._hot.slots(source_id, 0, 10**12)).tolist()


@pytest.fixture
def place(redis: StoreRedis, segments_root: str, tmp_path: Path) -> Place:
    return open_place(redis, segments_root, tmp_path)


@pytest.fixture
def local(redis: StoreRedis, tmp_path: Path) -> Place:
    return open_place(redis, str(tmp_path / "segments"), tmp_path)


def open_place(redis: StoreRedis, root: str, folder: Path) -> Place:
    sources = Sources(redis, Cipher(SecretStr(Fernet.generate_key().decode())))
    timeline = Timeline(redis, FORMAT, Segments(root))
    return Place(
        redis, root, folder, sources, timeline, Keyframes(redis, root), TokenHours(redis), KeyframeHours(redis)
    )


def this_hour() -> int:
    """The hour of a stream that may still get frames, by the settings of these tests."""
    return int(time.time() - 600) // HOUR_SLOTS


async def reasons(place: Place, source_id: str, hour: int) -> set[str]:
    gaps = await place.sources.gaps(source_id, hour * HOUR_SLOTS, (hour + 1) * HOUR_SLOTS)
    return {gap.reason for gap in gaps}


# What is counted


async def test_what_is_counted_is_what_is_there_whatever_happens_to_an_hour(place):
    stream, now = await place.stream(), this_hour()
    janitor = place.janitor()
    await place.fill(stream.id, [now - 3, now - 2, now])
    await place.remember(stream.id, [(now - 2) * HOUR_SLOTS + slot for slot in range(7)], format=OTHER, pictures=False)
    await place.check_counts(stream.id)
    assert (await janitor.sweep()).sealed == 3
    await place.check_counts(stream.id)
    await place.remember(stream.id, [(now - 2) * HOUR_SLOTS + slot for slot in (3, 500)])  # one of them is sent again
    assert (await place.tokens.totals([stream.id]))[stream.id].hot == (FRAMES + 2) * FORMAT.frame_bytes
    assert (await janitor.sweep()).sealed == 1
    await place.check_counts(stream.id)
    memory = Memory(place.redis, Segments(place.root), place.keyframes)
    await memory.erase(stream.id, (now - 2) * HOUR_SLOTS + 5, now * HOUR_SLOTS + 5)
    await place.check_counts(stream.id)
    await memory.erase(stream.id)
    assert (await place.tokens.totals([stream.id]))[stream.id].total == 0
    assert await place.pictures.totals([stream.id]) == {stream.id: 0}
    assert [key for key in await place.redis.keys("*") if b"totals" in key or b"loose" in key] == []


async def test_a_keyframe_that_is_sent_again_counts_twice_only_until_it_is_packed(place):
    stream, hour = await place.stream(), this_hour() - 2
    for _ in range(2):
        await place.fill(stream.id, [hour])
    assert await place.pictures.totals([stream.id]) == {stream.id: 2 * FRAMES * len(JPEG)}
    await place.janitor().sweep()
    await place.check_counts(stream.id)


async def test_counts_that_were_lost_are_made_again_by_the_next_janitor(place):
    stream, now = await place.stream(), this_hour()
    await place.fill(stream.id, [now - 3, now - 2, now])
    await place.janitor().sweep()
    lost = [key for key in await place.redis.keys("*") if key.endswith((b":totals", b":loose"))]
    assert len(lost) == 3
    await place.redis.delete(*lost)
    await place.janitor().sweep()
    await place.check_counts(stream.id)
    assert await place.pictured_hours(stream.id) == [now - 3, now - 2, now]


# By age


async def test_pictures_may_go_before_their_frames(place):
    stream, now = await place.stream(retention_hours=48, keyframe_hours=5), this_hour()
    await place.fill(stream.id, [now - 9, now - 8, now - 2, now])
    janitor = place.janitor()
    report = await janitor.sweep()
    assert (report.frames, report.keyframes, report.sealed) == (0, 2 * FRAMES, 3)
    assert await place.hours(stream.id) == [now - 9, now - 8, now - 2, now]
    assert await place.pictured_hours(stream.id) == [now - 2, now]
    assert await reasons(place, stream.id, now - 9) == set()  # no gap: the frames are there
    await place.check_counts(stream.id)
    over_hours = (time.time() - (now - 1) * HOUR_SLOTS) / 3600
    await place.sources.update_stream(stream.id, keyframe_hours=over_hours + 0.1)
    await janitor.sweep()
    assert await place.pictured_hours(stream.id) == [now - 2, now]  # it is packed: a pack goes as one
    await place.sources.update_stream(stream.id, keyframe_hours=over_hours - 0.2)
    await janitor.sweep()
    assert await place.pictured_hours(stream.id) == [now]
    assert await place.hours(stream.id) == [now - 9, now - 8, now - 2, now]


async def test_pictures_of_an_hour_that_is_not_over_go_as_they_grow_old(place):
    stream = await place.stream(keyframe_hours=0.25)
    now = int(time.time())
    slots = [now - 2400, now - 1300, now - 300, now]
    await place.remember(stream.id, slots)
    assert (await place.janitor().sweep()).keyframes == 2
    found = slots[2:]
    assert await place.keyframes.get_many(stream.id, found) == [JPEG] * 2
    kept = await place.keyframes.kept(stream.id, np.array(slots))
    assert kept.tolist() == [False, False, True, True]
    await place.check_counts(stream.id)


async def test_no_retention_of_a_stream_goes_beyond_that_of_the_settings(place):
    stream, now = await place.stream(retention_hours=48, keyframe_hours=24), this_hour()
    await place.fill(stream.id, [now - 9, now - 5, now - 1])
    await place.janitor(retention_max_hours=7, retention_max_keyframe_hours=3.5).sweep()
    assert await place.hours(stream.id) == [now - 5, now - 1]
    assert await place.pictured_hours(stream.id) == [now - 1]
    assert await reasons(place, stream.id, now - 9) == {"expired"}


async def test_what_expired_stays_so_when_the_retention_is_prolonged(local):
    stream, now = await local.stream(retention_hours=5), this_hour()
    await local.fill(stream.id, [now - 9, now - 8, now])
    down = Gap(start_slot=(now - 9) * HOUR_SLOTS + 50, end_slot=(now - 9) * HOUR_SLOTS + 60, reason="stream_down")
    erased = Gap(start_slot=(now - 8) * HOUR_SLOTS + 50, end_slot=(now - 8) * HOUR_SLOTS + 60, reason="erased")
    await local.sources.add_gaps(stream.id, None, [down, erased])
    await local.janitor().sweep()
    await local.sources.update_stream(stream.id, retention_hours=500)
    await local.janitor().sweep()
    assert await reasons(local, stream.id, now - 9) == {"expired"}
    assert await reasons(local, stream.id, now - 8) == {"expired", "erased"}


async def test_gaps_of_an_hour_that_is_kept_keep_their_reasons(local):
    """A sealed hour goes as one: until then nothing of it has expired, old as its first minutes may be."""
    stream, now = await local.stream(), this_hour()
    hour = now - 5
    await local.fill(stream.id, [hour])
    await local.janitor().sweep()
    down = Gap(start_slot=hour * HOUR_SLOTS + 50, end_slot=hour * HOUR_SLOTS + 60, reason="stream_down")
    await local.sources.add_gaps(stream.id, None, [down])
    age_hours = (time.time() - hour * HOUR_SLOTS) / 3600
    await local.sources.update_stream(stream.id, retention_hours=age_hours - 0.5)
    assert (await local.janitor().sweep()).frames == 0
    assert await reasons(local, stream.id, hour) == {"stream_down"}


# By size


async def test_beyond_its_size_a_stream_loses_its_oldest_hours_with_their_pictures(place):
    stream, now = await place.stream(), this_hour()
    await place.fill(stream.id, [now - 6, now - 5, now - 3, now - 2, now])
    janitor = place.janitor()
    assert (await janitor.sweep()).sealed == 4
    total = (await place.tokens.totals([stream.id]))[stream.id].total
    one = await place.tokens.nbytes(stream.id, now - 6)
    for limit, frames in ((total, 0), (total - 1, FRAMES), (total - one - 1, FRAMES), (total - 2 * one, 0)):
        await place.sources.update_stream(stream.id, retention_bytes=limit)
        report = await janitor.sweep()
        assert (report.frames, report.keyframes) == (frames, frames)
    assert await place.hours(stream.id) == await place.pictured_hours(stream.id) == [now - 3, now - 2, now]
    assert (await place.tokens.totals([stream.id]))[stream.id].total <= total - 2 * one
    assert await reasons(place, stream.id, now - 6) == await reasons(place, stream.id, now - 5) == {"expired"}
    assert await reasons(place, stream.id, now - 4) == set()
    await place.check_counts(stream.id)


async def test_beyond_their_size_pictures_go_and_frames_stay(place):
    stream, now = await place.stream(), this_hour()
    await place.fill(stream.id, [now - 4, now - 3, now - 2, now])
    janitor = place.janitor()
    await janitor.sweep()
    packed = await place.pictures.nbytes(stream.id, now - 4)
    open_bytes = FRAMES * len(JPEG)
    await place.sources.update_stream(stream.id, keyframe_bytes=open_bytes + packed + 5)
    assert (await janitor.sweep()).keyframes == 2 * FRAMES
    assert await place.pictured_hours(stream.id) == [now - 2, now]
    assert await place.hours(stream.id) == [now - 4, now - 3, now - 2, now]
    await place.check_counts(stream.id)


async def test_an_hour_that_may_still_get_frames_stays_and_it_is_told(place, caplog):
    stream, now = await place.stream(retention_bytes=1, keyframe_bytes=1), this_hour()
    await place.fill(stream.id, [now - 2, now])
    janitor = place.janitor()
    for _ in range(3):
        await janitor.sweep()
    assert await place.hours(stream.id) == await place.pictured_hours(stream.id) == [now]
    told = [record.getMessage() for record in caplog.records if "may still get frames" in record.getMessage()]
    assert [text.partition(" have")[0] for text in told] == [
        f"the tokens of {stream.id}",
        f"the keyframes of {stream.id}",
    ]


async def test_full_hours_that_are_not_sealed_yet_can_go_too(place):
    stream, now = await place.stream(retention_bytes=FRAMES * FORMAT.frame_bytes), this_hour()
    await place.fill(stream.id, [now - 2, now - 1])
    report = await place.janitor().sweep()
    assert (report.frames, report.keyframes) == (FRAMES, FRAMES)
    assert await place.hours(stream.id) == [now - 1]


async def test_the_limit_of_all_takes_the_oldest_hours_whosever_they_are(place):
    now = this_hour()
    slow, fast = await place.stream("slow"), await place.stream("fast", fps=2)
    await place.fill(slow.id, [now - 5, now - 3, now])
    # At 2 fps an hour of slots is half an hour: [now - 4:30], [now - 4:00], [now - 2:30].
    await place.fill(fast.id, [2 * now - 9, 2 * now - 8, 2 * now - 5])
    janitor = place.janitor()
    await janitor.sweep()
    kept = sum(one.total for one in (await place.tokens.totals([slow.id, fast.id])).values())
    one = await place.tokens.nbytes(slow.id, now - 5)
    await place.janitor(retention_max_bytes=kept - 2 * one + 10).sweep()
    assert (await place.hours(slow.id), await place.hours(fast.id)) == ([now - 3, now], [2 * now - 8, 2 * now - 5])
    await place.janitor(retention_max_bytes=kept - 4 * one + 10).sweep()
    assert (await place.hours(slow.id), await place.hours(fast.id)) == ([now], [2 * now - 5])
    await place.check_counts(slow.id, fast.id)


async def test_the_limit_of_all_for_pictures_leaves_their_frames(place):
    now = this_hour()
    one, other = await place.stream("one"), await place.stream("other")
    await place.fill(one.id, [now - 6, now - 4, now - 2])
    await place.fill(other.id, [now - 5, now - 3])
    await place.janitor().sweep()
    kept = sum((await place.pictures.totals([one.id, other.id])).values())
    packed = await place.pictures.nbytes(one.id, now - 6)
    await place.janitor(retention_max_keyframe_bytes=kept - 3 * packed + 10).sweep()
    assert await place.pictured_hours(one.id) == [now - 2]
    assert await place.pictured_hours(other.id) == [now - 3]
    assert await place.hours(one.id) == [now - 6, now - 4, now - 2]
    await place.check_counts(one.id, other.id)


async def test_what_a_streams_own_limit_frees_counts_for_the_limit_of_all(local):
    now = this_hour()
    small, other = await local.stream("small"), await local.stream("other")
    await local.fill(small.id, [now - 3, now - 2, now - 1])
    await local.fill(other.id, [now - 9])
    await local.janitor().sweep()
    one = await local.tokens.nbytes(other.id, now - 9)
    await local.sources.update_stream(small.id, retention_bytes=one + 10)
    await local.janitor(retention_max_bytes=2 * one + 10).sweep()
    assert (await local.hours(small.id), await local.hours(other.id)) == ([now - 1], [now - 9])


async def test_a_video_is_as_old_as_its_registration_and_untouched_while_it_is_read(place):
    now = this_hour()
    stream = await place.stream()
    await place.fill(stream.id, [now - 3, now - 2])
    ready, reading = await place.video("ready", 3), await place.video("reading", 2, status="processing")
    await place.janitor().sweep()
    one = await place.tokens.nbytes(ready.id, 0)
    everything = [stream.id, ready.id, reading.id]
    kept = sum(one.total for one in (await place.tokens.totals(everything)).values())
    await place.janitor(retention_max_bytes=kept - 3 * one + 99).sweep()
    assert await place.hours(stream.id) == []  # older than any video
    assert await place.hours(ready.id) == [1, 2]
    assert await reasons(place, ready.id, 0) == {"expired"}
    assert await reasons(place, ready.id, 1) == set()
    await place.janitor(retention_max_bytes=1).sweep()
    assert await place.hours(ready.id) == []
    assert await place.hours(reading.id) == [0, 1]
    await place.check_counts(*everything)


async def test_the_disk_has_more_room_afterwards(local):
    stream, now = await local.stream(retention_hours=9999), this_hour()
    hours = range(now - 12, now)
    await local.fill(stream.id, hours, frames=300)
    await local.janitor().sweep()

    def on_disk() -> int:
        files = [path for path in Path(local.root).rglob("*") if path.is_file() and "note" not in path.parts]
        return sum(path.stat().st_size for path in files)

    before = on_disk()
    await local.janitor(retention_max_bytes=200_000, retention_max_keyframe_bytes=1_000_000).sweep()
    tokens = (await local.tokens.totals([stream.id]))[stream.id]
    pictures = (await local.pictures.totals([stream.id]))[stream.id]
    assert tokens.sealed + pictures == on_disk() <= 1_200_000 < before / 3
    assert tokens.total <= 200_000
    assert pictures <= 1_000_000
    kept = await local.hours(stream.id)
    assert kept == list(hours)[-len(kept) :] != []
    assert len(list((Path(local.root) / stream.id).rglob("hours/*"))) == len(kept)  # no empty folder stays


# Whatever happens


async def test_a_sweep_that_is_cut_short_is_finished_by_the_next_one(local, monkeypatch):
    now, remove = this_hour(), Files.remove
    for fails_after in range(9):
        stream = await local.stream(str(fails_after), retention_hours=9999)
        await local.fill(stream.id, range(now - 4, now))
        await local.janitor().sweep()
        one = await local.tokens.nbytes(stream.id, now - 4)
        await local.sources.update_stream(stream.id, retention_bytes=2 * one + 10)
        calls = iter(range(10**6))

        def fail(self: Files, *about: object, calls=calls, fails_after=fails_after, **options: object) -> None:
            if next(calls) >= fails_after:
                raise StoreUnavailable("the process ends here")
            remove(self, *about, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Files, "remove", fail)
            try:
                await local.janitor().sweep()
            except StoreUnavailable:
                gone = set(range(now - 4, now)) - set(await local.hours(stream.id))
                for hour in gone:
                    assert await reasons(local, stream.id, hour) == {"expired"}
        await local.janitor().sweep()
        assert await local.hours(stream.id) == await local.pictured_hours(stream.id) == [now - 2, now - 1]
        await local.check_counts(stream.id)
        await local.sources.delete_stream(stream.id, purge=True)


async def test_janitors_that_work_at_once_take_no_more_than_one_does(place):
    now = this_hour()
    streams = [await place.stream(str(number), retention_hours=9999) for number in range(3)]
    for stream in streams:
        await place.fill(stream.id, range(now - 5, now))
    await place.janitor().sweep()
    ids = [stream.id for stream in streams]
    kept = sum(one.total for one in (await place.tokens.totals(ids)).values())
    one = await place.tokens.nbytes(ids[0], now - 5)
    limits = {"retention_max_bytes": kept - 6 * one + 50}
    working = [asyncio.create_task(place.janitor(janitor_interval_s=0.05, **limits).run()) for _ in range(4)]
    wanted, deadline = [list(range(now - 3, now))] * 3, time.monotonic() + 30
    while [await place.hours(source_id) for source_id in ids] != wanted:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)  # for one that would take more
    for one_of_four in working:
        one_of_four.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    assert [await place.hours(source_id) for source_id in ids] == wanted
    await place.check_counts(*ids)


async def test_frames_that_come_while_hours_go_are_kept_and_counted(local):
    stream, now = await local.stream(retention_hours=9999), this_hour()
    await local.fill(stream.id, range(now - 8, now))
    janitor = local.janitor()
    await janitor.sweep()
    await local.sources.update_stream(stream.id, retention_bytes=30_000)
    rng = random.Random(1)
    late = [(now - 1) * HOUR_SLOTS + 100 + slot for slot in range(60)]
    fresh = [int(time.time()) - slot for slot in range(60)]

    async def write() -> None:
        for slots in zip(late, fresh, strict=True):
            await local.remember(stream.id, slots)
            await asyncio.sleep(rng.random() / 500)

    async def sweep() -> None:
        for _ in range(15):
            await janitor.sweep()

    await asyncio.gather(write(), sweep())
    await janitor.sweep()
    slots = (await local.timeline.slots(stream.id, 0, 10**12)).tolist()
    assert set(fresh) <= set(slots)
    assert set(late) <= set(slots) or not set(late) & set(slots)  # an hour goes whole
    assert (await local.tokens.totals([stream.id]))[stream.id].total <= 30_000 + FORMAT.frame_bytes * 60
    await local.check_counts(stream.id)


async def test_a_sweep_of_many_sources_asks_little_of_redis(local):
    """Commands a source, not time: with limits that nobody passes, and with one that takes an hour of one of them."""
    now, count = this_hour(), 200
    ids = [(await local.stream(str(number), keyframe_hours=5)).id for number in range(count)]
    for some in range(0, count, 100):
        writes = (local.remember(one, [now * HOUR_SLOTS], pictures=False) for one in ids[some : some + 100])
        await asyncio.gather(*writes)
    for source_id in ids[:3]:
        await local.remember(source_id, [(now - 3) * HOUR_SLOTS])
    generous = local.janitor(retention_max_bytes=2**40, retention_max_keyframe_bytes=2**40)
    assert (await generous.sweep()).sealed == 3
    assert await commands(local, generous, SweepReport()) < 13 * count
    kept = sum(one.total for one in (await local.tokens.totals(ids)).values())
    frames = 1 + await local.tokens.nbytes(ids[0], now - 3) // FORMAT.frame_bytes  # more than its hour's
    tight = local.janitor(retention_max_bytes=kept - 1, retention_max_keyframe_bytes=2**40)
    first = await commands(local, tight, SweepReport(frames=1, keyframes=1))  # looks at everything once
    await local.remember(ids[-1], [now * HOUR_SLOTS + slot for slot in range(1, 1 + frames)], pictures=False)
    assert await commands(local, tight, SweepReport(frames=1, keyframes=1)) < min(first, 19 * count)


async def commands(place: Place, janitor: Janitor, report: SweepReport) -> int:
    before = (await place.redis.info("stats"))["total_commands_processed"]
    assert await janitor.sweep() == report
    sent = int((await place.redis.info("stats"))["total_commands_processed"] - before)
    print("SENT", sent)
    return sent


@pytest.mark.parametrize(
    "bad",
    [
        {"retention_bytes": 0},
        {"retention_bytes": -1},
        {"keyframe_bytes": 0},
        {"keyframe_hours": 0},
        {"keyframe_hours": float("nan")},
        {"keyframe_hours": float("inf")},
        {"retention_hours": -1},
    ],
)
async def test_limits_that_are_none_are_refused(local, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        await local.stream(**bad)
    stream = await local.stream()
    with pytest.raises(ValueError, match=next(iter(bad))):
        await local.sources.update_stream(stream.id, **bad)


async def test_pictures_are_not_kept_longer_than_their_frames(local):
    with pytest.raises(KeyframesOutlive, match=r"24 hours.*12"):
        await local.stream(retention_hours=12, keyframe_hours=24)
    stream = await local.stream(retention_hours=12, keyframe_hours=12)
    with pytest.raises(KeyframesOutlive):
        await local.sources.update_stream(stream.id, retention_hours=11)
    assert (
        await local.sources.update_stream(stream.id, keyframe_hours=None, retention_hours=11)
    ).keyframe_hours is None
