"""What Redis forgot is known again from the files beside it."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from store.cipher import Cipher
from store.connection import EmbeddedRedis, StoreRedis, StoreUnavailable, connect
from store.files import Files
from store.format import HOUR_SLOTS
from store.gaps import Gap
from store.hot import FrameNotKept
from store.janitor import Janitor
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.recovery import Recovered, Recovery
from store.rounds import Rounds
from store.segments import Segments
from store.settings import StoreSettings
from store.source import NewStream, NewVideo, Stream, StreamNotFound, Video, VideoStatus
from store.sources import Sources
from store.timeline import Timeline
from tests.ingest_parts import until
from tests.test_store_connection import server_pid
from tests.test_store_sealing import hour_of
from tests.test_store_timeline import FORMAT, entry

FIRST = int(time.time()) // HOUR_SLOTS - 50  # an hour behind the registration of streams counts as not registered
CAMERA = NewStream(
    name="door", url="rtsp://cam/door", username="eve", password=SecretStr("s3cret"), labels={"site": "north"}
)


@dataclass
class Place:
    """A Redis, a root of files, and all that keeps memory in both."""

    redis: StoreRedis
    root: str
    sources: Sources
    timeline: Timeline
    memory: Memory

    def recovery(self) -> Recovery:
        return Recovery(self.redis, self.sources, self.memory, self.root, Rounds(self.redis))

    async def recover(self) -> Recovered:
        recovery = self.recovery()
        await recovery.begin()
        return await recovery.go_on()

    async def remember(self, source_id: str, slots: Sequence[int], mark: int = 0) -> None:
        epoch = await Leases(self.redis).acquire(source_id, "writer", 60)
        assert epoch is not None
        await self.memory.keyframes.put_many({(source_id, slot): f"{slot}".encode() for slot in slots})
        await self.timeline.append(source_id, epoch, [entry(slot, mark) for slot in slots])
        await Leases(self.redis).release("writer", {source_id: epoch})

    async def seal(self, source_id: str, *hours: int) -> None:
        for hour in hours:
            assert await self.timeline.seal(source_id, hour)
            assert await self.memory.keyframes.pack(source_id, hour)

    async def camera(self, new: NewStream = CAMERA) -> Stream:
        stream = await self.sources.create_stream(new)
        await self.recovery().note(stream)
        return stream

    def note(self, source_id: str) -> Path:
        return Path(self.root) / source_id / "note" / "source.json"

    async def content(self, source_id: str) -> tuple[list[int], bytes, bytes, bytes, list[bytes]]:
        slots = await self.timeline.slots(source_id, 0, 10**12)
        return (
            slots.tolist(),
            (await self.timeline.read(source_id, slots)).tobytes(),
            (await self.timeline.times(source_id, slots)).tobytes(),
            (await self.timeline.vectors(source_id, slots)).tobytes(),
            await self.memory.keyframes.get_many(source_id, slots.tolist()),
        )


def at(hour: int, *seconds: int) -> list[int]:
    return [(FIRST + hour) * HOUR_SLOTS + second for second in seconds]


def placed(redis: StoreRedis, root: str) -> Place:
    sources = Sources(redis, Cipher(SecretStr(Fernet.generate_key().decode())))
    segments = Segments(root)
    memory = Memory(redis, segments, Keyframes(redis, root))
    return Place(redis, root, sources, Timeline(redis, FORMAT, segments), memory)


@pytest.fixture
def place(redis: StoreRedis, segments_root: str) -> Place:
    return placed(redis, segments_root)


@pytest.fixture
def on_disk(redis: StoreRedis, tmp_path: Path) -> Place:
    """A place whose files are on this disk, so that a test can damage them."""
    return placed(redis, str(tmp_path))


def files(place: Place, hour: int, label: str) -> list[Path]:
    return sorted(Path(place.root).glob(f"*/hours/{FIRST + hour}/{label}-*"))


async def test_a_redis_that_lost_everything_knows_cameras_and_sealed_hours_again(place):
    stream = await place.camera()
    await place.remember(stream.id, at(0, 1, 5, 3599) + at(1, 0) + at(2, 7))
    await place.seal(stream.id, FIRST, FIRST + 1, FIRST + 2)
    before = await place.content(stream.id)
    await place.redis.flushall()
    assert await place.recover() == Recovered(sources=1, hours=3, packs=3)
    assert await place.content(stream.id) == before
    assert await place.timeline.count(stream.id) == 5
    again = await place.sources.get_stream(stream.id)
    assert again == stream.model_copy(update={"enabled": False, "has_password": False})
    assert (await place.sources.status(stream.id)).state == "disabled"
    assert [one.id for one in (await place.sources.list_streams()).items] == [stream.id]
    assert await place.recover() == Recovered()
    enabled = await place.sources.update_stream(stream.id, enabled=True, password="s3cret")
    assert enabled.has_password


async def test_a_video_comes_back_as_it_was(place):
    video = await place.sources.create_video(NewVideo(name="film", url="http://host/film.mp4", recorded_at=5.0))
    await place.recovery().note(video)  # while it is still read nothing is noted: it would never be finished
    await place.remember(video.id, [1, 2, HOUR_SLOTS])
    epoch = await Leases(place.redis).acquire(video.id, "reader", 60)
    assert epoch is not None
    await place.sources.set_video_status(video.id, epoch, VideoStatus(status="ready", progress=1, duration_s=3602.5))
    await place.seal(video.id, 0, 1)
    await place.redis.delete("unrelated")
    await place.recovery().note(await place.sources.get_video(video.id))
    known, before = await place.sources.get_video(video.id), await place.content(video.id)
    await place.redis.flushall()
    assert await place.recover() == Recovered(sources=1, hours=2, packs=2)
    assert await place.sources.get_video(video.id) == known
    assert await place.content(video.id) == before
    assert isinstance(await place.sources.source(video.id), Video)
    assert await place.sources.claimable() == []


async def test_no_note_holds_a_password(place):
    stream = await place.camera()
    assert stream.has_password
    [note] = Files(place.root).read([f"{Files(place.root).folder(stream.id, 'note')}/source.json"])
    assert note is not None
    assert b"s3cret" not in note
    assert json.loads(note)["source"]["name"] == "door"


async def test_what_is_hot_stands_beside_what_is_found(place):
    stream = await place.camera()
    await place.remember(stream.id, at(0, 1, 5))
    await place.seal(stream.id, FIRST)
    await place.redis.flushall()
    await place.sources.restore(stream)
    await place.remember(stream.id, at(0, 5, 9), mark=3)  # the camera went on before anyone looked at the files
    assert await place.recover() == Recovered(hours=1, packs=1)
    slots, tokens, *_ = await place.content(stream.id)
    assert slots == at(0, 1, 5, 9)
    marks = zip(slots, (0, 3, 3), strict=True)
    assert tokens == b"".join(entry(slot, mark).tokens.tobytes() for slot, mark in marks)
    await place.seal(stream.id, FIRST)
    assert (await place.content(stream.id))[:2] == (slots, tokens)
    assert await place.timeline.count(stream.id) == 3


async def test_a_name_that_is_taken_again_leaves_the_old_memory_readable(place):
    stream = await place.camera()
    await place.remember(stream.id, at(0, 1))
    await place.seal(stream.id, FIRST)
    await place.redis.flushall()
    other = await place.sources.create_stream(CAMERA)
    assert (await place.recover()).sources == 1
    assert [one.id for one in (await place.sources.list_streams()).items] == [other.id]
    assert (await place.content(stream.id))[0] == at(0, 1)
    assert (await place.sources.source(stream.id)).name == "door"
    with pytest.raises(StreamNotFound):
        await place.sources.get_stream(stream.id)


async def test_a_purged_source_does_not_come_back(place):
    stream = await place.camera()
    await place.remember(stream.id, at(0, 1))
    await place.seal(stream.id, FIRST)
    await place.sources.delete_stream(stream.id, purge=True)
    await place.memory.erase(stream.id)
    await place.recovery().forget(stream.id)
    await place.sources.forget(stream.id)
    await place.remember(stream.id, at(0, 2))  # a straggler
    assert await place.recover() == Recovered()
    with pytest.raises(LookupError):
        await place.sources.source(stream.id)


@pytest.mark.parametrize("is_known", [True, False])
async def test_an_erasure_that_died_before_its_files_were_removed_is_finished(on_disk, is_known):
    stream = await on_disk.camera()
    await on_disk.remember(stream.id, at(0, 1, 2) + at(1, 1, 2))
    await on_disk.seal(stream.id, FIRST, FIRST + 1)
    doomed = [*files(on_disk, 0, ""), *files(on_disk, 0, "*")]
    kept = {path: path.read_bytes() for path in doomed}
    assert len(kept) == 2
    gap = Gap(start_slot=at(0, 0)[0], end_slot=at(1, 0)[0], reason="erased")
    await on_disk.sources.add_gaps(stream.id, None, [gap])
    await on_disk.memory.erase(stream.id, gap.start_slot, gap.end_slot)
    for path, content in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if not is_known:
        await on_disk.redis.delete(*await on_disk.redis.keys("*:disowned"))
    await on_disk.recover()
    assert (await on_disk.content(stream.id))[0] == at(1, 1, 2)
    with pytest.raises(FrameNotKept):
        await on_disk.memory.keyframes.get(stream.id, at(0, 1)[0])
    assert not any(path.exists() for path in kept)


async def test_files_that_were_superseded_are_removed(on_disk):
    stream = await on_disk.camera()
    await on_disk.remember(stream.id, at(0, 1))
    await on_disk.seal(stream.id, FIRST)
    old = {path: path.read_bytes() for path in files(on_disk, 0, "*")}
    await on_disk.remember(stream.id, at(0, 2))
    await on_disk.seal(stream.id, FIRST)
    for path, content in old.items():
        path.write_bytes(content)
    before = await on_disk.content(stream.id)
    assert await on_disk.recover() == Recovered()
    assert not any(path.exists() for path in old)
    assert await on_disk.content(stream.id) == before


async def test_a_redis_that_is_a_second_behind_finds_the_newer_file(on_disk):
    """Power was lost after an hour was sealed anew and its old file removed, and Redis had not synced that yet."""
    stream = await on_disk.camera()
    await on_disk.remember(stream.id, at(0, 1))
    await on_disk.seal(stream.id, FIRST)
    manifests = {key: await on_disk.redis.dump(key) for key in await on_disk.redis.keys("*") if b"seal" in key}
    manifests |= {key: await on_disk.redis.dump(key) for key in await on_disk.redis.keys("*:packs")}
    await on_disk.remember(stream.id, at(0, 2))
    await on_disk.seal(stream.id, FIRST)
    before = await on_disk.content(stream.id)
    for key, value in manifests.items():
        await on_disk.redis.restore(key, 0, value, replace=True)
    assert await on_disk.recover() == Recovered(hours=1, packs=1)
    assert await on_disk.content(stream.id) == before


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other"])
async def test_a_damaged_file_is_named_and_the_other_hours_come_back(on_disk, caplog, damage):
    stream = await on_disk.camera()
    await on_disk.remember(stream.id, at(0, 1) + at(1, 1))
    await on_disk.seal(stream.id, FIRST, FIRST + 1)
    [segment] = files(on_disk, 0, FORMAT.fingerprint)
    [other] = files(on_disk, 1, FORMAT.fingerprint)
    content = segment.read_bytes()
    segment.write_bytes(
        {"cut": content[:-1], "text": b"not a segment at all", "empty": b"", "other": other.read_bytes()}[damage]
    )
    await on_disk.redis.flushall()
    assert await on_disk.recover() == Recovered(sources=1, hours=1, packs=2, lost=1)
    assert segment.name in caplog.text
    assert (await on_disk.content(stream.id))[0] == at(1, 1)


@pytest.mark.parametrize("note", [b"", b"{}", b"\xff", b'{"version": 1, "source": {"id": "str_x"}}'])
async def test_a_note_that_says_nothing_brings_nothing_back(on_disk, note):
    stream = await on_disk.camera()
    path = on_disk.note(stream.id)
    path.write_bytes(note)
    await on_disk.redis.flushall()
    assert await on_disk.recover() == Recovered()
    with pytest.raises(LookupError):
        await on_disk.sources.source(stream.id)


async def test_a_note_of_another_source_is_refused(on_disk, caplog):
    stream = await on_disk.camera()
    path = on_disk.note(stream.id)
    moved = on_disk.note("str_other")
    moved.parent.mkdir(parents=True)
    path.rename(moved)
    await on_disk.redis.flushall()
    assert await on_disk.recover() == Recovered()
    assert "speaks of" in caplog.text


async def test_a_file_that_counts_is_not_removed_by_who_wrote_it_in_vain(on_disk, monkeypatch):
    """An import writes an hour, and before it can let it count a recovery has found the file."""
    stream = await on_disk.camera()
    rows = hour_of([entry(slot) for slot in at(0, 1, 2)])
    write = Segments.write

    async def found_at_once(self, *arguments):
        written = await write(self, *arguments)
        assert (await on_disk.recover()).hours == 1
        return written

    monkeypatch.setattr(Segments, "write", found_at_once)
    assert await on_disk.timeline.restore(stream.id, rows, await on_disk.timeline.as_of(stream.id))
    assert (await on_disk.timeline.read(stream.id, rows.slots)).tobytes() == rows.tokens.tobytes()
    assert await on_disk.timeline.count(stream.id) == 2


async def test_a_file_that_is_being_removed_is_not_found(on_disk, monkeypatch):
    stream = await on_disk.camera()
    as_of = await on_disk.timeline.as_of(stream.id)
    await on_disk.memory.erase(stream.id)
    remove, found = Segments.remove, []

    async def looked_for_first(self, source_id, hour, *names):
        monkeypatch.setattr(Segments, "remove", remove)
        found.append((await on_disk.recover()).hours)
        await remove(self, source_id, hour, *names)

    monkeypatch.setattr(Segments, "remove", looked_for_first)
    assert not await on_disk.timeline.restore(stream.id, hour_of([entry(slot) for slot in at(0, 1, 2)]), as_of)
    assert found == [0]
    assert await on_disk.timeline.extent(stream.id) is None
    assert files(on_disk, 0, "*") == []


async def test_nothing_is_lost_when_hours_are_sealed_and_erased_during_a_recovery(on_disk):
    stream = await on_disk.camera()
    for hour in range(6):
        await on_disk.remember(stream.id, at(hour, *range(0, 3600, 400)))
    done = False

    async def recover() -> None:
        while not done:
            await on_disk.recover()

    looking = [asyncio.create_task(recover()) for _ in range(3)]
    for hour in range(6):
        while not await on_disk.timeline.seal(stream.id, FIRST + hour):
            pass
        while not await on_disk.memory.keyframes.pack(stream.id, FIRST + hour):
            pass
        erased = at(hour, 400)[0]
        await on_disk.sources.add_gaps(stream.id, None, [Gap(start_slot=erased, end_slot=erased + 1, reason="erased")])
        await on_disk.memory.erase(stream.id, erased, erased + 1)
    done = True
    await asyncio.gather(*looking)
    expected = [slot for hour in range(6) for slot in at(hour, *range(0, 3600, 400)) if slot != at(hour, 400)[0]]
    slots, tokens, *_, pictures = await on_disk.content(stream.id)
    assert slots == expected
    assert tokens == b"".join(entry(slot).tokens.tobytes() for slot in expected)
    assert pictures == [f"{slot}".encode() for slot in expected]
    assert await on_disk.timeline.count(stream.id) == len(expected)
    assert np.array_equal(await on_disk.timeline.present(stream.id, *at(0, 400, 401)), [False])


async def test_a_part_of_an_hour_is_not_erased_before_the_rest_of_it_is_known_again(place):
    stream = await place.camera()
    await place.remember(stream.id, at(0, *range(0, 600, 10)) + at(1, 1))
    await place.seal(stream.id, FIRST, FIRST + 1)
    await place.redis.flushall()
    await place.sources.restore(stream)
    await place.remember(stream.id, at(40, 1))  # by which the model is known again
    start, end = at(0, 100, 200)
    for erasing in (place.memory.erase, place.memory.keyframes.erase):
        with pytest.raises(StoreUnavailable, match="try again"):
            await erasing(stream.id, start, end)
    assert await place.recover() == Recovered(hours=2, packs=2)
    erased = await place.memory.erase(stream.id, start, end)
    assert (erased.frames.sealed, erased.keyframes) == (10, 10)
    expected = at(0, *range(0, 100, 10), *range(200, 600, 10)) + at(1, 1) + at(40, 1)
    assert (await place.content(stream.id))[0] == expected


async def test_an_erasure_whose_files_stay_for_a_moment_is_finished_by_the_next_one(place, monkeypatch):
    """The range cuts an hour, but holds all of its frames: then nothing but the old file tells of them."""
    stream = await place.camera()
    await place.remember(stream.id, at(0, *range(1800, 1900)))
    await place.seal(stream.id, FIRST)
    remove = Segments.remove

    async def fails_once(self: Segments, *about: object) -> None:
        monkeypatch.undo()
        raise StoreUnavailable("the bucket is away")

    monkeypatch.setattr(Segments, "remove", fails_once)
    with pytest.raises(StoreUnavailable, match="away"):
        await place.memory.erase(stream.id, at(0, 1700)[0], at(1, 0)[0])
    assert Segments.remove is remove
    await place.memory.erase(stream.id, at(0, 1700)[0], at(1, 0)[0])
    assert (await place.content(stream.id))[0] == []
    assert Files(place.root).tree(f"{place.root}/{stream.id}/hours") == []
    await place.remember(stream.id, at(0, 10))
    await place.seal(stream.id, FIRST)  # a late frame: nothing stands in its way


async def test_what_anybody_meets_of_lost_files_is_looked_for_next(place):
    stream = await place.camera()
    before = await place.timeline.as_of(stream.id)
    rows = hour_of([entry(slot) for slot in at(0, *range(0, 50, 10))])
    await place.timeline._segments.write(stream.id, FORMAT, FIRST, 1, rows)  # and whoever wrote it is killed
    recovery = place.recovery()
    assert await recovery.go_on() == Recovered()
    fewer = hour_of([entry(slot) for slot in at(0, 0, 10, 60)])
    with pytest.raises(StoreUnavailable, match="the janitor looks for them"):
        await place.timeline.restore(stream.id, fewer, before)
    assert await recovery.go_on() == Recovered(hours=1)
    assert recovery.pending == set()
    assert await place.timeline.restore(stream.id, fewer, before)
    assert (await place.timeline.slots(stream.id, 0, 10**12)).tolist() == at(0, *range(0, 50, 10), 60)


async def test_a_file_that_nobody_can_read_stands_in_nobodys_way(on_disk):
    stream = await on_disk.camera()
    await on_disk.remember(stream.id, at(0, 1, 2))
    left = await on_disk.timeline._segments.write(stream.id, FORMAT, FIRST, 1, hour_of([entry(at(0, 3)[0])]))
    [path] = files(on_disk, 0, FORMAT.fingerprint)
    path.write_bytes(path.read_bytes().replace(b"float16", b"float61"))
    assert (await on_disk.recover()).lost == 1
    await on_disk.memory.erase(stream.id, at(0, 1)[0], at(0, 2)[0])
    await on_disk.seal(stream.id, FIRST)
    assert (await on_disk.timeline.slots(stream.id, 0, 10**12)).tolist() == at(0, 2)
    assert left.file not in {one.name for one in files(on_disk, 0, "*")}


async def test_nothing_takes_the_place_of_an_hour_that_redis_has_lost_sight_of(place):
    stream = await place.camera()
    await place.remember(stream.id, at(0, 1, 2, 3))
    await place.seal(stream.id, FIRST)
    before = await place.content(stream.id)
    await place.redis.flushall()
    await place.sources.restore(stream)
    rows, pictures = hour_of([entry(slot) for slot in at(0, 9)]), {at(0, 9)[0]: b"late"}
    with pytest.raises(StoreUnavailable, match="lost sight"):
        await place.timeline.restore(stream.id, rows, "")
    with pytest.raises(StoreUnavailable, match="lost sight"):
        await place.memory.keyframes.restore(stream.id, FIRST, pictures, "")
    await place.remember(stream.id, at(0, 2))
    with pytest.raises(StoreUnavailable, match="lost sight"):
        await place.timeline.seal(stream.id, FIRST)
    with pytest.raises(StoreUnavailable, match="lost sight"):
        await place.memory.keyframes.pack(stream.id, FIRST)
    assert await place.recover() == Recovered(hours=1, packs=1)
    assert await place.content(stream.id) == before
    await place.seal(stream.id, FIRST)
    assert await place.content(stream.id) == before


async def test_what_redis_lost_is_not_there_any_more_after_it_was_erased_whole(place):
    stream = await place.camera()
    await place.remember(stream.id, at(0, 1) + at(1, 1))
    await place.seal(stream.id, FIRST, FIRST + 1)
    assert await place.memory.extent(stream.id) == (at(0, 1)[0], at(1, 1)[0])
    await place.redis.flushall()
    await place.sources.restore(stream)
    await place.remember(stream.id, at(40, 1))
    assert await place.memory.extent(stream.id) == (at(0, 0)[0], at(40, 1)[0])  # of what is not known, all of its hour
    await place.memory.erase(stream.id, at(0, 0)[0], at(1, 0)[0])
    assert await place.recover() == Recovered(hours=1, packs=1)
    assert (await place.content(stream.id))[0] == at(1, 1) + at(40, 1)


@pytest.mark.parametrize("fault", ["cannot be read", "lies about itself", "is not foreseen"])
async def test_a_source_whose_files_cannot_be_looked_at_does_not_hold_up_the_others(
    on_disk, monkeypatch, caplog, fault
):
    streams = [(await on_disk.camera(NewStream(name=f"{n}", url=f"rtsp://cam/{n}"))).id for n in range(3)]
    for stream in streams:
        await on_disk.remember(stream, at(0, 1, 2))
        await on_disk.seal(stream, FIRST)
    bad, *good = sorted(streams)
    hours = Path(on_disk.root) / bad / "hours"
    away = [
        path.rename(path.with_name(f"{path.name}.away"))
        for path in hours.rglob("*")
        if fault == "cannot be read" and path.is_file()
    ]
    for path in away:
        path.with_suffix("").symlink_to(path.with_suffix(""))  # opening it fails, and says nothing of what it held
    if fault == "lies about itself":
        for path in hours.rglob("*.safetensors"):
            path.write_bytes(path.read_bytes().replace(b'"data_offsets":[0,', b'"data_offsets":[-9,'))
    elif fault == "is not foreseen":
        listing = Segments.listing

        async def strange(self: Segments, source_id: str) -> dict[int, list[str]]:
            if source_id == bad:
                raise ZeroDivisionError
            return await listing(self, source_id)

        monkeypatch.setattr(Segments, "listing", strange)
    await on_disk.redis.flushall()
    recovery = on_disk.recovery()
    await recovery.begin()
    await recovery.go_on()
    for stream in good:
        assert (await on_disk.content(stream))[0] == at(0, 1, 2)
    assert bad in caplog.text
    assert recovery.pending == ({bad} if fault != "lies about itself" else set())  # that file is named, and lost
    monkeypatch.undo()
    for path in away:
        path.with_suffix("").unlink()
        path.rename(path.with_suffix(""))
    if fault != "lies about itself":
        await recovery.go_on()
        assert (recovery.pending, (await on_disk.content(bad))[0]) == (set(), at(0, 1, 2))


async def test_each_sweep_looks_at_some_sources_and_seals_what_it_may(on_disk, tmp_path):
    streams = [(await on_disk.camera(NewStream(name=f"{n}", url=f"rtsp://cam/{n}"))).id for n in range(4)]
    for stream in streams:
        await on_disk.remember(stream, at(45, *range(1, 9)))
        await on_disk.seal(stream, FIRST + 45)
    await on_disk.redis.flushall()
    for stream in streams:
        assert await on_disk.recovery()._restore_source(stream)
        await on_disk.remember(stream, at(45, 10) + at(46, 1))  # one is late
    settings = StoreSettings(data_dir=tmp_path, segments_url=on_disk.root, janitor_interval_s=1e-6, spare_bytes=0)
    janitor = Janitor(on_disk.redis, on_disk.sources, on_disk.memory, settings)
    for looked_at in range(1, 5):
        assert (await janitor.sweep()).sealed == (5 if looked_at == 1 else 1)
        assert len(janitor._recovery.pending) == 4 - looked_at
    for stream in streams:
        assert (await on_disk.timeline.slots(stream, 0, 10**12)).tolist() == at(45, *range(1, 9), 10) + at(46, 1)
        assert await on_disk.timeline.hot_hours(stream) == []


async def test_an_erasure_holds_though_a_seal_of_a_rediscovered_hour_has_begun_before_it(on_disk, monkeypatch):
    stream = await on_disk.camera()
    await on_disk.remember(stream.id, at(0, 1, 2))
    await on_disk.seal(stream.id, FIRST)
    await on_disk.remember(stream.id, at(0, 10, 11))
    keys = on_disk.timeline._sealed.keys(stream.id)
    await on_disk.redis.delete(keys.hours, keys.sealed, keys.totals)
    assert (await on_disk.recover()).hours == 1
    write = Segments.write

    async def overtaken(self: Segments, *about: object) -> object:
        monkeypatch.undo()
        await on_disk.memory.erase(stream.id, at(0, 10)[0], at(0, 12)[0])
        return await write(self, *about)

    monkeypatch.setattr(Segments, "write", overtaken)
    assert not await on_disk.timeline.seal(stream.id, FIRST)
    assert (await on_disk.timeline.slots(stream.id, 0, 10**12)).tolist() == at(0, 1, 2)


async def test_of_files_of_one_generation_none_stays_beside_the_one_that_counts(on_disk):
    stream = await on_disk.camera()
    for number in range(6):  # names end at random: some of the others come before and some behind
        await on_disk.remember(stream.id, at(number, 1, 2))
        left = await on_disk.timeline._segments.write(
            stream.id, FORMAT, FIRST + number, 1, await on_disk.timeline._hour(stream.id, FIRST + number)
        )
        await on_disk.seal(stream.id, FIRST + number)
        assert left.file in {path.name for path in files(on_disk, number, FORMAT.fingerprint)}
    await on_disk.recover()
    for number in range(6):
        [counts] = await on_disk.timeline.sealed(stream.id, FIRST + number, FIRST + number)
        assert [path.name for path in files(on_disk, number, FORMAT.fingerprint)] == [counts.file]


async def test_a_janitor_looks_again_whenever_redis_has_been_started_anew(tmp_path):
    with EmbeddedRedis.start(tmp_path) as server:
        async with connect(server.url) as redis:
            place = placed(redis, str(tmp_path / "segments"))
            stream = await place.camera()
            await place.remember(stream.id, at(0, 1, 2))
            await place.seal(stream.id, FIRST)
            settings = StoreSettings(data_dir=tmp_path, janitor_interval_s=0.05, spare_bytes=0)
            janitor = Janitor(redis, place.sources, place.memory, settings)
            sweeping = asyncio.create_task(janitor.run())
            known: list[str | None] = [None]

            def has_looked() -> bool:
                return janitor._recovered not in known and not janitor._recovery.pending

            for _ in range(2):
                await until(has_looked)
                known.append(janitor._recovered)
                await redis.delete(*await redis.keys(f"*{stream.id}*"))
                assert await place.timeline.extent(stream.id) is None
                os.kill(server_pid(tmp_path), signal.SIGKILL)
                await until(has_looked)
            assert (await place.content(stream.id))[0] == at(0, 1, 2)
            sweeping.cancel()
            await asyncio.gather(sweeping, return_exceptions=True)
