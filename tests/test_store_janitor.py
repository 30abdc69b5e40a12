"""Retention, purge and uploads on a real server and a real folder."""

import asyncio
import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from store import files
from store.cipher import Cipher
from store.connection import EmbeddedRedis, StoreFull, StoreRedis, StoreUnavailable, connect
from store.events import BEFORE_ALL, Events
from store.format import HOUR_SLOTS, TokenFormat
from store.gaps import Gap
from store.hot import Entry, FrameNotKept
from store.janitor import Janitor, SweepReport
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.segments import Segments
from store.settings import StoreSettings
from store.source import NewStream, NewVideo, VideoStatus
from store.sources import Sources
from store.timeline import Timeline
from tests.ingest_parts import until

SEGMENTS = Segments("memory://segments")  # where nothing is sealed

FORMAT = TokenFormat(fingerprint="0123456789abcdef", dtype="float16", tokens_per_frame=1, width=2, vector_width=2)


@dataclass
class Store:
    """All that a janitor looks after."""

    sources: Sources
    timeline: Timeline
    keyframes: Keyframes
    leases: Leases
    settings: StoreSettings
    janitor: Janitor

    async def remember(self, source_id: str, slots: list[int]) -> None:
        """Append frames as the owner, and give the source back."""
        epoch = await self.leases.acquire(source_id, "writer", 60)
        assert epoch is not None
        await self.keyframes.put_many({(source_id, slot): b"jpeg" for slot in slots})
        entries = [Entry(slot, slot * 1000, np.ones((1, 2), np.float16), np.ones(2, np.float32)) for slot in slots]
        await self.timeline.append(source_id, epoch, entries)
        await self.leases.release("writer", {source_id: epoch})


def opened(redis: StoreRedis, folder: Path, *, every_s: float = 0.01) -> Store:
    settings = StoreSettings(data_dir=folder, janitor_interval_s=every_s, upload_grace_s=100, seal_settle_s=900)
    sources = Sources(redis, Cipher(SecretStr(Fernet.generate_key().decode())))
    keyframes = Keyframes(redis, settings.segments_root)
    segments = Segments(settings.segments_root)
    janitor = Janitor(redis, sources, Memory(redis, segments, keyframes), settings)
    return Store(sources, Timeline(redis, FORMAT, segments), keyframes, Leases(redis), settings, janitor)


@pytest.fixture
def store(redis: StoreRedis, tmp_path: Path) -> Store:
    return opened(redis, tmp_path)


async def test_retention_erases_what_is_older_and_keeps_the_rest(store):
    stream = await store.sources.create_stream(NewStream(name="door", url="rtsp://cam/door", retention_hours=2))
    now = int(time.time())
    old, young = [now - 3 * 3600, now - 2 * 3600 - 60], [now - 2 * 3600 + 60, now]
    await store.remember(stream.id, old + young)
    await store.sources.add_gaps(stream.id, None, [Gap(start_slot=old[0], end_slot=old[0] + 5, reason="shed")])
    assert await store.janitor.sweep() == SweepReport(sealed=1, frames=2, keyframes=2)
    assert (await store.timeline.slots(stream.id, 0, 10**12)).tolist() == young
    assert await store.keyframes.get_many(stream.id, young) == [b"jpeg"] * 2
    with pytest.raises(FrameNotKept):
        await store.keyframes.get(stream.id, old[1])
    gaps = await store.sources.gaps(stream.id, old[0] - 5, old[0] + 5)
    assert [(gap.start_slot - old[0], gap.reason) for gap in gaps] == [(-5, "not_registered"), (0, "expired")]
    assert await store.janitor.sweep() == SweepReport()


async def test_retention_counts_slots_by_the_streams_own_rate(store):
    stream = await store.sources.create_stream(NewStream(name="fast", url="rtsp://cam/fast", fps=5, retention_hours=1))
    now = time.time()
    old, young = int((now - 3700) * 5), int((now - 3500) * 5)
    await store.remember(stream.id, [old, young])
    assert (await store.janitor.sweep()).frames == 1
    assert (await store.timeline.slots(stream.id, 0, 10**12)).tolist() == [young]


async def test_full_hours_are_sealed_once_nothing_more_is_expected_of_them(store):
    stream = await store.sources.create_stream(NewStream(name="door", url="rtsp://cam/door", retention_hours=9))
    now = int(time.time())
    settled = (now - 900) // HOUR_SLOTS
    full, open_hours = [(settled - 2) * HOUR_SLOTS, settled * HOUR_SLOTS - 1], [settled * HOUR_SLOTS, now]
    await store.remember(stream.id, full + open_hours)
    assert (await store.janitor.sweep()).sealed == 2
    assert (await store.janitor.sweep()).sealed == 0
    assert sealed_hours(store, stream.id) == {settled - 2, settled - 1}
    assert (await store.timeline.slots(stream.id, 0, 10**12)).tolist() == full + open_hours


async def test_retention_takes_a_sealed_hour_when_all_of_it_is_over(store):
    stream = await store.sources.create_stream(NewStream(name="door", url="rtsp://cam/door", retention_hours=9))
    hour = int(time.time()) // HOUR_SLOTS - 4
    slots = [hour * HOUR_SLOTS, (hour + 1) * HOUR_SLOTS - 1, (hour + 1) * HOUR_SLOTS]
    await store.remember(stream.id, slots)
    assert (await store.janitor.sweep()).sealed == 2
    await store.sources.update_stream(stream.id, retention_hours=3)
    assert (await store.janitor.sweep()).frames == 2
    assert sealed_hours(store, stream.id) == {hour + 1}
    assert (await store.timeline.slots(stream.id, 0, 10**12)).tolist() == slots[2:]


async def test_a_disk_that_is_full_keeps_no_retention_from_making_room(store, monkeypatch):
    streams = [
        await store.sources.create_stream(NewStream(name=name, url=f"rtsp://cam/{name}", retention_hours=2))
        for name in ("one", "two")
    ]
    now = int(time.time())
    for stream in streams:
        await store.remember(stream.id, [now - 3 * 3600, now - 5000])

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("store.files._write_whole", full)
        with pytest.raises(StoreUnavailable, match="disk of the store is full"):
            await store.janitor.sweep()
    for stream in streams:
        assert (await store.timeline.slots(stream.id, 0, 10**12)).tolist() == [now - 5000]
    assert (await store.janitor.sweep()).sealed == 2


async def test_a_video_is_sealed_to_its_end_once_it_is_read(store):
    video = await store.sources.create_video(NewVideo(name="clip", file="clip.mp4"))
    slots = [0, 5, HOUR_SLOTS + 3, HOUR_SLOTS + 2000]
    await store.remember(video.id, slots)
    assert (await store.janitor.sweep()).sealed == 1  # it goes on in the second hour
    epoch = await store.leases.acquire(video.id, "ingest", 60)
    assert epoch is not None
    await store.sources.set_video_status(video.id, epoch, VideoStatus(status="ready", progress=1.0))
    assert (await store.janitor.sweep()).sealed == 1
    assert sealed_hours(store, video.id) == {0, 1}
    assert (await store.timeline.slots(video.id, 0, 10**6)).tolist() == slots


def sealed_hours(store: Store, source_id: str) -> set[int]:
    folder = Path(store.settings.segments_root) / source_id / "hours"
    return {int(path.parent.name) for path in folder.rglob("*.safetensors")}


async def test_videos_have_no_retention(store):
    video = await store.sources.create_video(NewVideo(name="clip", file="clip.mp4"))
    await store.remember(video.id, [0, 1, 2])
    assert await store.janitor.sweep() == SweepReport()
    assert await store.timeline.count(video.id) == 3


async def test_a_purge_is_finished_whoever_began_it(store, redis):
    stream = await store.sources.create_stream(NewStream(name="door", url="rtsp://cam/door"))
    video = await store.sources.create_video(NewVideo(name="clip", file="clip.mp4"))
    for source in (stream, video):
        await store.remember(source.id, [1, 2, 3])
        await store.sources.add_gaps(source.id, None, [Gap(start_slot=5, end_slot=9, reason="shed")])
    await store.sources.delete_stream(stream.id, purge=True)
    await store.sources.delete_video(video.id)
    assert await store.janitor.sweep() == SweepReport(frames=6, keyframes=6)
    await store.keyframes.put(stream.id, 4, b"a frame that was on its way")
    assert (await store.janitor.sweep()).keyframes == 1
    while await store.sources.everything():
        await store.janitor.sweep()
    left = {key for key in await redis.keys("*") if b"{sources}" not in key}
    marks = {key for key in left if key.endswith((b":erased", b":disowned", b":changes"))}  # of erasures, which fade
    assert all([await redis.ttl(key) > 0 for key in marks])
    assert left - marks == {b"events", b"erasures"}
    assert await Events(redis).after(BEFORE_ALL) == []
    assert os.listdir(store.settings.segments_root) == []  # noqa: PTH208 - one call, not worth a thread


async def test_a_deleted_stream_answers_until_retention_and_is_then_forgotten(store):
    stream = await store.sources.create_stream(NewStream(name="door", url="rtsp://cam/door", retention_hours=1))
    now = int(time.time())
    await store.remember(stream.id, [now - 3500])
    await store.sources.delete_stream(stream.id)
    for _ in range(3):
        assert await store.janitor.sweep() in (SweepReport(), SweepReport(sealed=1))
    assert await store.timeline.count(stream.id) == 1
    await store.timeline.erase(stream.id)
    reports = [await store.janitor.sweep() for _ in range(3)]
    assert reports == [SweepReport(keyframes=1), SweepReport(), SweepReport(sources=1)]
    assert await store.sources.everything() == []


async def test_uploads_without_a_video_go_after_their_grace(store):
    uploads = store.settings.uploads_dir
    uploads.mkdir(parents=True)
    for name in ("kept.mp4", "orphan.mp4", "deleted.mp4", "young.mp4"):
        (uploads / name).write_bytes(b"x")
        if name != "young.mp4":
            os.utime(uploads / name, (1, 1))
    (uploads / "folder").mkdir()
    await store.sources.create_video(NewVideo(name="kept", file="kept.mp4"))
    deleted = await store.sources.create_video(NewVideo(name="deleted", file="deleted.mp4"))
    await store.sources.delete_video(deleted.id)
    assert (await store.janitor.sweep()).uploads == 2
    assert {path.name for path in uploads.iterdir()} == {"kept.mp4", "young.mp4", "folder"}


async def test_a_download_lives_as_long_as_its_video_is_read(store):
    video = await store.sources.create_video(NewVideo(name="far", url="https://host/far.mp4"))
    folder = store.settings.uploads_dir
    folder.mkdir()
    names = {f"{video.id}.download", f"{video.id}.download.0123.part", "vid_000000000000.download"}
    for name in names:
        (folder / name).write_bytes(b"video")
        os.utime(folder / name, (time.time() - 9999,) * 2)
    assert (await store.janitor.sweep()).uploads == 1
    assert {path.name for path in folder.iterdir()} == names - {"vid_000000000000.download"}
    await store.sources.delete_video(video.id)
    assert (await store.janitor.sweep()).uploads == 2
    assert list(folder.iterdir()) == []


async def test_of_two_janitors_one_works_and_the_other_takes_over(store, redis):
    second = Janitor(redis, store.sources, Memory(redis, SEGMENTS, store.keyframes), store.settings)
    tasks = [asyncio.create_task(janitor.run()) for janitor in (store.janitor, second)]
    try:
        stream = await store.sources.create_stream(NewStream(name="door", url="rtsp://cam/door", retention_hours=1))
        for task in (tasks[0], tasks[1]):
            await store.remember(stream.id, [1, 2, 3])
            await gone(store, stream.id)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await store.leases.revoke(stream.id)
        assert await store.leases.owner("janitor") is None
    finally:
        for task in tasks:
            task.cancel()


async def gone(store: Store, source_id: str) -> None:
    async with asyncio.timeout(10):
        while await store.timeline.count(source_id):  # noqa: ASYNC110 - another task's work, seen through Redis
            await asyncio.sleep(0.01)


async def test_a_source_that_cannot_be_read_does_not_hold_up_the_others(redis, tmp_path):
    store = opened(redis, tmp_path, every_s=60)
    now = int(time.time())
    streams = []
    for name in ("bad", "good"):
        stream = await store.sources.create_stream(NewStream(name=name, url=f"rtsp://cam/{name}", retention_hours=9))
        await store.remember(stream.id, [now - 2 * HOUR_SLOTS])
        streams.append(stream.id)
    bad, good = streams
    (Path(store.settings.segments_root) / bad / "hours").write_text("a file where a folder was")
    report = await store.janitor.sweep()
    # Nothing of it could be looked for, and neither its frames nor its pictures could be moved.
    assert (report.sealed, report.left_out) == (1, 3)
    assert sealed_hours(store, good)
    assert len(await store.timeline.slots(bad, 0, 10**12)) == 1
    (Path(store.settings.segments_root) / bad / "hours").unlink()
    assert (await store.janitor.sweep()).sealed == 1


async def test_a_store_that_fails_is_reported_by_a_sweep(store):
    """Keyframes that cannot be erased are not forgotten."""
    stream = await store.sources.create_stream(NewStream(name="door", url="rtsp://cam/door"))
    await store.remember(stream.id, [1])
    await store.sources.delete_stream(stream.id, purge=True)
    folder = Path(store.settings.segments_root) / stream.id
    moved = folder.rename(folder.with_name("elsewhere"))
    folder.write_text("a file where a folder was")
    for _ in range(3):
        assert await store.janitor.sweep() == SweepReport(left_out=2)  # neither recovered nor purged
    folder.unlink()
    moved.rename(folder)
    while await store.sources.everything():
        await store.janitor.sweep()
    assert not folder.exists()


async def test_what_makes_room_goes_on_in_a_redis_without_memory(tmp_path):
    with EmbeddedRedis.start(tmp_path) as server:
        async with connect(server.url) as redis:
            store = opened(redis, tmp_path)
            first = (int(time.time()) // HOUR_SLOTS - 4) * HOUR_SLOTS
            new = NewStream(name="door", url="rtsp://cam/door", retention_hours=9, keyframe_hours=1)
            stream = await store.sources.create_stream(new)
            purged = await store.sources.create_stream(NewStream(name="gate", url="rtsp://cam/gate"))
            full, doomed = range(first, first + 600), range(first + HOUR_SLOTS, first + HOUR_SLOTS + 600)
            await store.remember(stream.id, [*full, *doomed])
            await store.remember(purged.id, [*full])
            await store.sources.delete_stream(purged.id, purge=True)
            await fill_memory(redis)
            with pytest.raises(StoreFull):
                await store.remember(stream.id, [int(time.time())])
            memory = Memory(redis, Segments(store.settings.segments_root), store.keyframes)
            erased = await memory.erase(stream.id, doomed[0] + 1, doomed[-1] + 1)
            assert (erased.frames.hot, erased.keyframes) == (len(doomed) - 1, len(doomed) - 1)
            await fill_memory(redis)
            sweeping = asyncio.create_task(store.janitor.run())
            await until(lambda: sealed_hours(store, stream.id) == {first // HOUR_SLOTS, first // HOUR_SLOTS + 1})
            await until(lambda: not (Path(store.settings.segments_root) / purged.id).exists())
            sweeping.cancel()
            assert (await store.timeline.slots(stream.id, 0, 10**12)).tolist() == [*full, doomed[0]]
            assert await store.keyframes.hours(stream.id) == []


async def fill_memory(redis: StoreRedis) -> None:
    used = (await redis.info("memory"))["used_memory"]
    await redis.config_set("maxmemory", used - 100_000)


async def test_what_cannot_be_removed_or_is_not_foreseen_of_one_source_ends_no_sweep(
    redis, tmp_path, caplog, monkeypatch
):
    store = opened(redis, tmp_path, every_s=60)
    streams = [await store.sources.create_stream(NewStream(name=f"{n}", url=f"rtsp://cam/{n}")) for n in range(3)]
    first = (int(time.time()) // HOUR_SLOTS - 4) * HOUR_SLOTS
    for stream in streams:
        await store.remember(stream.id, [first, first + 1])
    strange = streams[1].id
    monkeypatch.setattr(Keyframes, "pack", strange_for(strange, Keyframes.pack))
    with kept_by_force(store.settings.uploads_dir / "old.mp4"):
        report = await store.janitor.sweep()
    assert (report.sealed, report.uploads, report.left_out) == (3, 0, 1)
    assert "old.mp4" in caplog.text
    assert strange in caplog.text
    assert str(tmp_path) not in caplog.records[0].getMessage()
    packed = [stream.id for stream in streams if await store.keyframes.packed(stream.id)]
    assert packed == [stream.id for stream in streams if stream.id != strange]


def strange_for(source_id: str, act: Any) -> Any:
    async def acting(self: object, subject: str, *rest: object) -> object:
        if subject == source_id:
            raise ZeroDivisionError
        return await act(self, subject, *rest)

    return acting


@contextlib.contextmanager
def kept_by_force(path: Path) -> Iterator[None]:
    """Let there be an old file that cannot be removed, or skip the test."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"a film")
    os.utime(path, (1, 1))
    locked = subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode == 0
    if not locked:
        path.parent.chmod(0o500)
    try:
        if not locked and os.access(path.parent, os.W_OK):
            pytest.skip("nothing is out of reach for root on this file system")
        yield
    finally:
        subprocess.run(["chattr", "-i", path], capture_output=True, check=False)
        path.parent.chmod(0o700)


async def test_sealing_has_its_turn_before_all_pictures_are_packed(redis, tmp_path):
    store = opened(redis, tmp_path, every_s=1e-6)
    stream = await store.sources.create_stream(NewStream(name="door", url="rtsp://cam/door"))
    first = int(time.time()) // HOUR_SLOTS - 6
    await store.remember(stream.id, [(first + hour) * HOUR_SLOTS for hour in range(3)])
    assert (await store.janitor.sweep()).sealed == 3
    assert [pack.hour for pack in await store.keyframes.packed(stream.id)] == [first]  # the oldest
    await store.remember(stream.id, [(first + 3) * HOUR_SLOTS])
    assert (await store.janitor.sweep()).sealed == 1
    assert len(await store.keyframes.packed(stream.id)) == 2
    slow = asyncio.create_task(opened(redis, tmp_path, every_s=0.5).janitor.run())
    async with asyncio.timeout(20):
        while len(await store.keyframes.packed(stream.id)) < 4:  # noqa: ASYNC110 - another janitor's work
            await asyncio.sleep(0.02)
    slow.cancel()


async def test_pictures_that_come_behind_their_pack_are_packed_too(store):
    stream = await store.sources.create_stream(NewStream(name="door", url="rtsp://cam/door"))
    first = (int(time.time()) // HOUR_SLOTS - 4) * HOUR_SLOTS
    for late in range(3):
        await store.remember(stream.id, [first + late])
        await store.janitor.sweep()
        assert await store.keyframes.noted_hours([stream.id]) == {stream.id: []}
    [pack] = await store.keyframes.packed(stream.id)
    assert pack.slots.tolist() == [first, first + 1, first + 2]


async def test_a_source_of_which_nothing_can_be_told_holds_up_no_packing(redis, tmp_path):
    store = opened(redis, tmp_path, every_s=60)
    first = (int(time.time()) // HOUR_SLOTS - 4) * HOUR_SLOTS
    stream = await store.sources.create_stream(NewStream(name="door", url="rtsp://cam/door"))
    video = await store.sources.create_video(NewVideo(name="film", url="http://host/film.mp4"))
    await store.remember(stream.id, [first, first + 1])
    await store.remember(video.id, [0, 1])
    await redis.delete(*await redis.keys(f"tl:{{{video.id}}}*:p:*"))  # as a Redis that evicts would
    report = await store.janitor.sweep()
    assert (report.sealed, report.left_out) == (1, 2)
    assert len(await store.keyframes.packed(stream.id)) == 1


async def test_a_disk_that_fills_up_under_one_seal_lets_the_others_end(redis, tmp_path, monkeypatch):
    store = opened(redis, tmp_path, every_s=60)
    first = (int(time.time()) // HOUR_SLOTS - 4) * HOUR_SLOTS
    streams = [(await store.sources.create_stream(NewStream(name=f"{n}", url=f"rtsp://cam/{n}"))).id for n in range(3)]
    for stream in streams:
        await store.remember(stream, [first, first + 1])
    write = files._write_whole

    def slow_or_full(path: Path, content: bytes, *, synced: bool) -> None:
        if "hours" in path.parts:
            if streams[-1] in path.parts:
                raise OSError(errno.ENOSPC, "No space left on device")
            time.sleep(0.2)
        write(path, content, synced=synced)

    monkeypatch.setattr(files, "_write_whole", slow_or_full)
    with pytest.raises(StoreFull):
        await store.janitor.sweep()
    await asyncio.sleep(0.5)
    for stream in streams[:-1]:
        [counts] = await store.timeline.sealed(stream)
        assert await store.timeline._segments.listing(stream) == {counts.hour: [counts.file]}
