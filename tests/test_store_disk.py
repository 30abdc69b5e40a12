"""A disk that is full, for real: writes are refused by name, reads go on, nothing half is left, and room mends it."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from store.cipher import Cipher
from store.connection import EmbeddedRedis, StoreFull, StoreRedis, StoreUnavailable, connect
from store.format import HOUR_SLOTS, TokenFormat
from store.gaps import Gap, Gaps
from store.hot import Entry
from store.janitor import Janitor
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.room import Room
from store.segments import Segments
from store.settings import StoreSettings
from store.source import NewStream
from store.sources import Sources
from store.timeline import Timeline
from tests.small_disk import FILLER, fill, make_room, small_disk
from tests.test_store_connection import server_pid, wait_for_end

T = TypeVar("T")
FORMAT = TokenFormat(fingerprint="0123456789abcdef", dtype="float16", tokens_per_frame=1, width=64, vector_width=8)
SOURCE = "str_a"
MIB = 2**20
COME_BACK_S = 10.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 24 * MIB) as disk:
        yield disk


def entries(slots: Sequence[int]) -> list[Entry]:
    chance = np.random.default_rng(1)
    rows = chance.standard_normal((len(slots), 1, 64)).astype(np.float16)
    return [Entry(slot, slot * 1000, row, np.full(8, 0.5, np.float32)) for slot, row in zip(slots, rows, strict=True)]


def jpegs(slots: Sequence[int], size: int = 500) -> dict[tuple[str, int], bytes]:
    return {(SOURCE, slot): b"%d" % slot * size for slot in slots}


def files_of(disk: Path) -> set[str]:
    return {str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file() and path.name != FILLER}


async def owner(redis: StoreRedis) -> int:
    epoch = await Leases(redis).acquire(SOURCE, "test", 600)
    assert epoch is not None
    return epoch


async def rewritten(redis: StoreRedis) -> None:
    """Return once the append-only file was to be rewritten and could not be."""
    about = await redis.info("persistence")
    if about["aof_rewrite_in_progress"] or about["aof_last_bgrewrite_status"] == "ok":
        raise StoreUnavailable("not yet")


async def in_the_end(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until the store is there again."""
    async with asyncio.timeout(COME_BACK_S):
        while True:
            try:
                return await call()
            except StoreUnavailable:
                await asyncio.sleep(0.1)


async def test_keyframes_are_refused_by_name_read_on_and_taken_again(redis, disk):
    keyframes = Keyframes(redis, str(disk / "segments"))
    await keyframes.put_many(jpegs(range(5)))
    before = files_of(disk)
    fill(disk)
    for writing in (keyframes.put_many(jpegs(range(5, 9), size=50_000)), keyframes.check_writable()):
        with pytest.raises(StoreFull, match="make room") as caught:
            await writing
        assert str(disk) not in str(caught.value)
    assert files_of(disk) == before
    assert await keyframes.get_many(SOURCE, range(5)) == list(jpegs(range(5)).values())
    make_room(disk)
    await keyframes.check_writable()
    await keyframes.put_many(jpegs(range(5, 9)))
    assert len(await keyframes.get_many(SOURCE, range(9))) == 9


async def test_an_hour_that_finds_no_room_stays_in_redis_and_is_sealed_later(redis, disk):
    timeline, keyframes = Timeline(redis, FORMAT, Segments(str(disk))), Keyframes(redis, str(disk))
    slots = np.arange(0, HOUR_SLOTS, 4)
    await keyframes.put_many(jpegs(slots.tolist()))
    await timeline.append(SOURCE, await owner(redis), entries(slots.tolist()))
    before, tokens = files_of(disk), await timeline.read(SOURCE, slots)
    fill(disk, leave_bytes=64 * 1024)  # the file begins to be written, and does not end
    with pytest.raises(StoreFull):
        await timeline.seal(SOURCE, 0)
    with pytest.raises(StoreFull):
        await keyframes.pack(SOURCE, 0)
    assert files_of(disk) == before
    assert await timeline.sealed(SOURCE) == []
    assert (await timeline.read(SOURCE, slots)).tobytes() == tokens.tobytes()
    make_room(disk)
    assert await timeline.seal(SOURCE, 0)
    assert await keyframes.pack(SOURCE, 0)
    assert (await timeline.read(SOURCE, slots)).tobytes() == tokens.tobytes()
    assert len(await keyframes.get_many(SOURCE, slots.tolist())) == len(slots)
    assert not any(name.endswith(".tmp") for name in files_of(disk))


async def test_redis_on_a_full_disk_reads_on_refuses_writes_by_name_and_comes_back_by_itself(disk):
    with EmbeddedRedis.start(disk) as server:
        async with connect(server.url) as redis:
            timeline, epoch, pid = Timeline(redis, FORMAT, Segments(str(disk))), await owner(redis), server_pid(disk)
            kept = list(range(1000))
            await timeline.append(SOURCE, epoch, entries(kept))
            await Gaps(redis).add(SOURCE, epoch, [Gap(start_slot=2000, end_slot=2001, reason="shed")])
            fill(disk)
            slot = 2000
            with suppress(StoreFull):  # the write that finds no room is the one before that which is refused
                for slot in range(2000, 4000):
                    await timeline.append(SOURCE, epoch, entries([slot]))
            with pytest.raises(StoreFull, match="the disk of Redis is full"):
                await timeline.append(SOURCE, epoch, entries([slot]))
            with pytest.raises(StoreFull):
                await Leases(redis).renew("test", {SOURCE: epoch}, 600)
            assert all(not one.health_check_interval for one in redis.connection_pool._available_connections)
            assert len(await timeline.read(SOURCE, np.array(kept))) == len(kept)
            assert len(await Gaps(redis).read(SOURCE, 0, 3000)) == 1
            assert await Leases(redis).unowned([SOURCE]) == []
            make_room(disk)
            await in_the_end(lambda: timeline.append(SOURCE, epoch, entries([slot])))
            present = (await timeline.slots(SOURCE, 0, 4000)).tolist()
            assert present == [*kept, *range(2000, slot + 1)]
            assert server_pid(disk) == pid
            os.kill(pid, signal.SIGKILL)  # what was refused once and is there now lies on the disk as well
            wait_for_end(pid)
            assert (await in_the_end(lambda: timeline.slots(SOURCE, 0, 4000))).tolist() == present


async def test_redis_killed_on_a_full_disk_starts_with_what_was_written_and_goes_on_when_there_is_room(disk):
    with EmbeddedRedis.start(disk) as server:
        async with connect(server.url) as redis:
            timeline, epoch, pid = Timeline(redis, FORMAT, Segments(str(disk))), await owner(redis), server_pid(disk)
            kept = list(range(1000))
            await timeline.append(SOURCE, epoch, entries(kept))
            fill(disk)
            os.kill(pid, signal.SIGKILL)
            wait_for_end(pid)
            assert (await in_the_end(lambda: timeline.slots(SOURCE, 0, 4000))).tolist() == kept
            make_room(disk)
            await in_the_end(lambda: timeline.append(SOURCE, epoch, entries([1000])))
    with EmbeddedRedis.start(disk) as server:
        async with connect(server.url) as redis:
            assert await Timeline(redis, FORMAT, Segments(str(disk))).count(SOURCE) == 1001


async def test_a_rewriting_of_the_append_only_file_that_finds_no_room_leaves_nothing_and_costs_nothing(disk):
    with EmbeddedRedis.start(disk) as server:
        async with connect(server.url) as redis:
            timeline, epoch = Timeline(redis, FORMAT, Segments(str(disk))), await owner(redis)
            await timeline.append(SOURCE, epoch, entries(range(3000)))
            fill(disk, leave_bytes=256 * 1024)
            await redis.bgrewriteaof()
            await in_the_end(lambda: rewritten(redis))
            await timeline.append(SOURCE, epoch, entries([3000]))
            assert not [name for name in files_of(disk) if "temp" in name]
            assert await timeline.count(SOURCE) == 3001


def test_a_server_that_has_no_room_to_begin_says_so(disk):
    fill(disk)
    with pytest.raises(RuntimeError, match="the disk of the data folder is full"):
        EmbeddedRedis.start(disk)
    make_room(disk)
    with EmbeddedRedis.start(disk) as server:
        assert server.running


async def test_what_is_kept_can_be_erased_and_told_out_of_what_is_spared(disk):
    room = Room((disk, disk / "is not there"), 4 * MIB)
    with EmbeddedRedis.start(disk) as server:
        async with connect(server.url) as redis:
            timeline, epoch = Timeline(redis, FORMAT, Segments(str(disk))), await owner(redis)
            await timeline.append(SOURCE, epoch, entries(range(1200)))
            assert await timeline.seal(SOURCE, 0)
            room.check()
            fill(disk, leave_bytes=3 * MIB)
            with pytest.raises(StoreFull, match="3 MiB are free, and the last 4 MiB") as caught:
                room.check()
            assert str(disk) not in str(caught.value)
            assert (await timeline.erase(SOURCE, 100, 200)).sealed == 100
            assert await Gaps(redis).add(SOURCE, epoch, [Gap(start_slot=100, end_slot=200, reason="erased")])
            assert await timeline.count(SOURCE) == 1100
            make_room(disk)
            room.check()


async def test_a_janitor_without_room_erases_what_is_due_and_seals_when_there_is_some(redis, disk):
    settings = StoreSettings(data_dir=disk, spare_bytes=8 * MIB)
    timeline, keyframes = Timeline(redis, FORMAT, Segments(settings.segments_root)), Keyframes(redis, str(disk))
    sources = Sources(redis, Cipher.open(None, disk))
    janitor = Janitor(redis, sources, Memory(redis, Segments(settings.segments_root), keyframes), settings)
    for name in ("stays", "goes"):
        stream = await sources.create_stream(NewStream(name=name, url=f"rtsp://{name}", retention_hours=10**6))
        epoch = await Leases(redis).acquire(stream.id, "test", 600)
        assert epoch is not None
        await timeline.append(stream.id, epoch, entries(range(1_000_000, 1_000_100)))
        if name == "goes":
            await sources.delete_stream(stream.id, purge=True)
    fill(disk, leave_bytes=6 * MIB)
    with pytest.raises(StoreFull):
        await janitor.sweep()
    assert await timeline.count(stream.id) == 0
    make_room(disk)
    assert (await janitor.sweep()).sealed > 0


def test_the_room_of_a_store_is_that_of_its_own_disks(tmp_path):
    here = StoreSettings(data_dir=tmp_path, spare_bytes=1)
    assert here.room == Room((tmp_path, tmp_path / "segments"), 1)
    assert here.model_copy(update={"segments_url": "s3://bucket/site"}).room.folders == (tmp_path,)
    assert here.model_copy(update={"segments_url": "file:///srv/site"}).room.folders == (tmp_path, Path("/srv/site"))
    Room((tmp_path,), 0).check()
