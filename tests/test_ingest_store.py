"""Ingest, compressor and store together, without Ray, while things break: what is kept and what is told."""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from compressor_service.encoder import Encoder
from compressor_service.settings import CompressorSettings
from compressor_service.writer import FrameWriter
from deploy.desk import StoreDesk
from ingest.frame import Frame, Receipt, SinkFull, SinkUnavailable
from ingest.service import IngestService
from store.cipher import Cipher
from store.connection import EmbeddedRedis, StoreFull, StoreRedis, connect
from store.counters import Counters
from store.gaps import Gaps
from store.janitor import Janitor
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.segments import Segments
from store.settings import StoreSettings
from store.source import NewStream, NewVideo
from store.sources import Sources
from store.timeline import Timeline
from tests.ingest_parts import encode, free_port, settings, simulated_camera, steady
from tests.test_store_connection import server_pid

pytestmark = pytest.mark.alone

SEGMENTS = Segments("memory://segments")  # where nothing is sealed

CIPHER = Cipher(SecretStr(Fernet.generate_key().decode()))
ALWAYS = (0, 1 << 40)


class WriterSink:
    """A FrameSink straight into the writer; remembers what was acknowledged."""

    def __init__(self, writer: FrameWriter, size_px: int) -> None:
        self._writer = writer
        self._size_px = size_px
        self.kept: dict[str, list[int]] = {}

    async def input_size_px(self) -> int:
        return self._size_px

    async def put(self, frames: Sequence[Frame]) -> Receipt:
        try:
            [receipt] = await self._writer.put([frames])
        except StoreFull as error:
            raise SinkFull(str(error)) from None
        except ConnectionError as error:
            raise SinkUnavailable(str(error)) from None
        for frame in frames:
            if frame.source_id not in receipt.lost:
                self.kept.setdefault(frame.source_id, []).append(frame.slot)
        return receipt


@dataclass
class Place:
    """All that one installation has, and the ingest services that run on it."""

    redis: StoreRedis
    encoder: Encoder
    folder: Path

    def __post_init__(self) -> None:
        self.store = StoreSettings(data_dir=self.folder, spare_bytes=0)
        self.sources = Sources(self.redis, CIPHER)
        self.timeline = Timeline(self.redis, self.encoder.format, SEGMENTS)
        self.keyframes = Keyframes(self.redis, self.store.segments_root)
        self.store.uploads_dir.mkdir(parents=True, exist_ok=True)

    @asynccontextmanager
    async def ingest(self, lease_s: float = 3.0, **changes: object) -> AsyncIterator[tuple[IngestService, WriterSink]]:
        counters, gaps, leases = Counters(self.redis), Gaps(self.redis), Leases(self.redis)
        writer = FrameWriter(
            self.encoder,
            self.timeline,
            self.keyframes,
            leases,
            gaps,
            counters,
            room=self.store.room,
            frames_per_pass=8,
        )
        sink = WriterSink(writer, self.encoder.input_size_px)
        desk = StoreDesk(self.sources, leases, self.timeline, lease_s)
        service = IngestService(settings(**changes), desk, sink, self.store.uploads_dir)
        await service.start()
        try:
            yield service, sink
        finally:
            await service.stop()

    async def slots(self, source_id: str) -> list[int]:
        slots: list[int] = (await self.timeline.slots(source_id, *ALWAYS)).tolist()
        return slots

    async def reasons(self, source_id: str) -> Mapping[int, str]:
        """Return the recorded reason of each slot that is absent between the first and the last that is kept."""
        slots = await self.slots(source_id)
        gaps = await self.sources.gaps(source_id, slots[0], slots[-1])
        recorded = {slot: gap.reason for gap in gaps for slot in range(gap.start_slot, gap.end_slot)}
        absent = sorted(set(range(slots[0], slots[-1])) - set(slots))
        return {slot: recorded.get(slot, "untold") for slot in absent}

    def pictures(self) -> list[Path]:
        return sorted((self.folder / "segments").rglob("*.jpg"))


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Encoder:
    return Encoder.load(str(checkpoint), "float32", CompressorSettings(device="cpu", threads=1))


@pytest.fixture
async def place(redis: StoreRedis, encoder: Encoder, tmp_path: Path) -> Place:
    return Place(redis, encoder, tmp_path)


async def eventually(condition: Callable[[], object], within_s: float = 30.0) -> None:
    """Wait for something to become true, however the store is."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
        except ConnectionError:
            pass
        assert time.monotonic() < deadline, "it did not come about in time"
        await asyncio.sleep(0.05)


def longer(slots: list[int], *, by: int) -> Callable[[], bool]:
    length = len(slots) + by
    return lambda: len(slots) >= length


def camera_of(url: str, **changes: object) -> NewStream:
    return NewStream(**({"name": "door", "url": url} | changes))


async def test_redis_dies_and_comes_back_while_a_camera_is_recorded(encoder, tmp_path):
    with simulated_camera("--gop", "5") as cam, EmbeddedRedis.start(tmp_path) as server:
        async with connect(server.url) as redis:
            place = Place(redis, encoder, tmp_path)
            stream = await place.sources.create_stream(camera_of(cam.url, fps=5))
            async with place.ingest() as (service, sink):
                kept = sink.kept.setdefault(stream.id, [])
                await eventually(lambda: len(kept) >= 5)
                for _ in range(2):
                    os.kill(server_pid(tmp_path), signal.SIGKILL)
                    await eventually(longer(kept, by=10))
                assert service.stats()["owned"] == 1
                status = await place.sources.status(stream.id)
                assert status.state in ("online", "degraded")
            slots = await place.slots(stream.id)
            assert set(kept) <= set(slots)
            assert "untold" not in (await place.reasons(stream.id)).values()


async def test_of_two_services_one_owns_a_camera_and_the_other_takes_over_within_the_lease(place):
    with simulated_camera("--gop", "5") as cam:
        stream = await place.sources.create_stream(camera_of(cam.url, fps=5))
        async with place.ingest() as (one, first):
            await eventually(longer(first.kept.setdefault(stream.id, []), by=3))
            [renewing] = [task for task in asyncio.all_tasks() if task.get_name() == "ingest-leases"]
            async with place.ingest() as (two, second):
                assert (one.stats()["owned"], two.stats()["owned"]) == (1, 0)
                renewing.cancel()  # the service goes on reading and sending, but renews no more
                await asyncio.wait([renewing])
                await eventually(longer(second.kept.setdefault(stream.id, []), by=5))
                await eventually(lambda: one.stats()["owned"] == 0)
            with pytest.raises(RuntimeError, match="ingest-leases"):
                one.check_health()
        sent = first.kept[stream.id] + second.kept[stream.id]
        assert len(sent) == len(set(sent))
        assert sorted(sent) == await place.slots(stream.id)
        assert set((await place.reasons(stream.id)).values()) <= {"stream_down"}


async def test_a_camera_gets_another_address_and_a_pause_while_it_is_recorded(place):
    with simulated_camera("--gop", "5", "--user", "u", "--password", "new") as cam:
        stream = await place.sources.create_stream(
            camera_of(f"rtsp://127.0.0.1:{free_port()}/cam", fps=5, username="u", password="old")
        )
        async with place.ingest() as (service, sink):

            async def state() -> str:
                return (await place.sources.status(stream.id)).state

            async def is_in(wanted: str) -> bool:
                return await state() == wanted

            await eventually(lambda: is_in("reconnecting"))
            await place.sources.update_stream(stream.id, url=cam.url)
            await eventually(lambda: is_in("auth_failed"))
            await place.sources.update_stream(stream.id, password="new")
            await eventually(lambda: is_in("online"))
            kept = sink.kept.setdefault(stream.id, [])
            await eventually(longer(kept, by=1))  # it is online as soon as a picture is read
            await place.sources.update_stream(stream.id, enabled=False)
            await eventually(lambda: service.stats()["owned"] == 0)
            assert await state() == "disabled"
            last = (await place.slots(stream.id))[-1]
            await eventually(lambda: time.time() * 5 > last + 5)
            await place.sources.update_stream(stream.id, enabled=True)
            await eventually(longer(kept, by=3))
        assert "not_registered" in set((await place.reasons(stream.id)).values()) <= {"not_registered", "stream_down"}


async def test_nothing_comes_back_to_life_after_a_purge(place, redis):
    with simulated_camera("--gop", "5") as cam:
        async with place.ingest(tick_s=0.01) as (service, sink):
            janitor = Janitor(redis, place.sources, Memory(redis, SEGMENTS, place.keyframes), place.store)
            for _ in range(3):
                stream = await place.sources.create_stream(camera_of(cam.url, fps=20))
                await eventually(longer(sink.kept.setdefault(stream.id, []), by=3))
                await place.sources.delete_stream(stream.id, purge=True)
                await Memory(redis, SEGMENTS, place.keyframes).erase(stream.id)
                await place.keyframes.erase(stream.id)
                await eventually(lambda: service.stats()["owned"] == 0)
            await janitor.sweep()
            assert (await janitor.sweep()).frames == 0
        assert place.pictures() == []
        assert [key for key in await redis.keys("tl:*") if not key.endswith((b":erased", b":disowned"))] == []


@pytest.mark.parametrize(("fps", "count"), [(2.0, 20), (0.5, 5), (0.2, 2)])
async def test_a_video_keeps_its_own_grid_and_all_of_its_slots(place, fps, count):
    encode(place.store.uploads_dir / "clip.mp4", steady(10))
    video = await place.sources.create_video(NewVideo(name="clip", file="clip.mp4", fps=fps))

    async def is_ready() -> bool:
        return (await place.sources.get_video(video.id)).status == "ready"

    async with place.ingest():
        await eventually(is_ready)
    assert await place.slots(video.id) == list(range(count))
    times = await place.timeline.times(video.id, np.arange(count))
    assert [int(time_ms * fps // 1000) for time_ms in times] == list(range(count))
    assert len(place.pictures()) == count


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
async def test_a_full_disk_holds_a_video_up_and_costs_it_nothing(place, caplog):
    segments = place.folder / "segments"
    segments.mkdir()
    mount = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(segments))
    if await mount.wait():
        pytest.skip("mounting is not allowed here")
    try:
        (segments / "ballast").write_bytes(bytes(60_000))
        encode(place.store.uploads_dir / "clip.mp4", steady(6))
        video = await place.sources.create_video(NewVideo(name="clip", file="clip.mp4"))

        async def status() -> str:
            return (await place.sources.get_video(video.id)).status

        async def is_ready() -> bool:
            return await status() == "ready"

        async with place.ingest() as (_, sink):
            await eventually(lambda: "the disk of the store is full" in caplog.text)
            assert (await status(), sink.kept) == ("processing", {})
            (segments / "ballast").unlink()
            await eventually(is_ready)
        assert await place.slots(video.id) == list(range(6))
    finally:
        await (await asyncio.create_subprocess_exec("umount", str(segments))).wait()


async def test_two_hundred_cameras_that_are_away_cost_little_and_are_told_once(place, caplog):
    caplog.set_level(logging.INFO)
    port = free_port()
    for number in range(200):
        await place.sources.create_stream(camera_of(f"rtsp://127.0.0.1:{port}/{number}", name=f"c{number}"))
    async with place.ingest(max_sources=200, backoff_min_s=0.5, backoff_max_s=30.0, report_s=2.0) as (service, _):
        await eventually(lambda: service.stats()["owned"] == 200)

        async def all_tried_twice() -> bool:
            page = await place.sources.list_streams(limit=200)
            statuses = await place.sources.statuses(page.items)
            return all(status.reconnects_1h >= 2 for status in statuses.values())

        await eventually(all_tried_twice)
        assert threading.active_count() < 200 + 50
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) <= 200
