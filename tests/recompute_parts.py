"""A place whose frames one small model saw and another looks at again, and a process of its own that does so.

python -m tests.recompute_parts URL FOLDER CHECKPOINT
"""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compressor_service.encoder import Encoder
from compressor_service.recompute import Recomputer
from compressor_service.settings import CompressorSettings
from compressor_service.writer import FrameWriter
from ingest.frame import Frame
from store.cipher import Cipher
from store.connection import StoreRedis, connect
from store.counters import Counters
from store.gaps import Gaps
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.recomputations import Recomputation, Recomputations, Wanted
from store.room import Room
from store.segments import Segments
from store.source import NewStream, NewVideo, Stream, Video, VideoStatus
from store.sources import Sources
from store.timeline import Timeline
from tests.qa_parts import keyframe

LATE_MS = 250  # of every frame after the begin of its slot
PASS = 8
EVER = 1 << 40


@dataclass
class Place:
    """What an installation keeps in a Redis and a folder."""

    redis: StoreRedis
    folder: Path

    def __post_init__(self) -> None:
        self.root = str(self.folder / "segments")
        self.sources = Sources(self.redis, Cipher.open(None, self.folder))
        self.keyframes = Keyframes(self.redis, self.root)
        self.memory = Memory(self.redis, Segments(self.root), self.keyframes)
        self.jobs = Recomputations(self.redis)

    def timeline(self, encoder: Encoder) -> Timeline:
        return Timeline(self.redis, encoder.format, Segments(self.root))

    def writer(self, encoder: Encoder) -> FrameWriter:
        counters, gaps, leases = Counters(self.redis), Gaps(self.redis), Leases(self.redis)
        timeline = self.timeline(encoder)
        return FrameWriter(
            encoder, timeline, self.keyframes, leases, gaps, counters, room=self.room(), frames_per_pass=PASS
        )

    def room(self, spare_bytes: int = 0) -> Room:
        return Room((self.folder,), spare_bytes)

    def recomputer(
        self, encoder: Encoder, *, keep_every_s: float = 60.0, now: Callable[[], float] = time.time
    ) -> Recomputer:
        return Recomputer(
            self.redis,
            self.sources,
            self.memory,
            self.timeline(encoder),
            self.writer(encoder),
            room=self.room(),
            settle_s=600,
            keep_every_s=keep_every_s,
            now=now,
        )

    async def video(self, encoder: Encoder, slots: Sequence[int], name: str = "yard.mp4") -> Video:
        """Register a video whose frames a model has seen."""
        video = await self.sources.create_video(NewVideo(name=name, file=name))
        await self.see(encoder, video.id, slots, VideoStatus(status="ready", progress=1.0, duration_s=max(slots) + 1))
        return await self.sources.get_video(video.id)

    async def stream(self, **fields: object) -> Stream:
        return await self.sources.create_stream(NewStream(**({"name": "dock", "url": "rtsp://203.0.113.7/a"} | fields)))

    async def see(
        self, encoder: Encoder, source_id: str, slots: Sequence[int], status: VideoStatus | None = None
    ) -> None:
        """Remember frames as ingest and the compressor do, eight at a time."""
        leases, writer = Leases(self.redis), self.writer(encoder)
        epoch = await leases.acquire(source_id, "ingest", 60)
        assert epoch is not None
        for start in range(0, len(slots), PASS):
            frames = [
                Frame(source_id, slot, slot * 1000 + LATE_MS, keyframe(slot % 100, encoder.input_size_px), epoch)
                for slot in slots[start : start + PASS]
            ]
            [receipt] = await writer.put([frames])
            assert not receipt.lost
        if status is not None:
            assert await self.sources.set_video_status(source_id, epoch, status)
        await leases.release("ingest", {source_id: epoch})

    async def ask(self, encoder: Encoder, *source_ids: str, drop_old: bool = False) -> Recomputation:
        wanted = [Wanted(source_id=source_id) for source_id in source_ids]
        return await self.jobs.create("new", encoder.format.fingerprint, wanted, drop_old=drop_old)

    async def slots(self, encoder: Encoder, source_id: str) -> list[int]:
        slots: list[int] = (await self.timeline(encoder).slots(source_id, 0, EVER)).tolist()
        return slots

    async def kept(self, encoder: Encoder, source_id: str, slots: Sequence[int]) -> tuple[bytes, bytes]:
        """Return the bytes of the tokens and of the search vectors of slots."""
        timeline, wanted = self.timeline(encoder), np.array(slots)
        return (await timeline.read(source_id, wanted)).tobytes(), (await timeline.vectors(source_id, wanted)).tobytes()


async def work(recomputer: Recomputer) -> None:
    """Do all that has its turn."""
    while await recomputer.step():
        pass


def load(checkpoint: Path) -> Encoder:
    return Encoder.load(str(checkpoint), "float32", CompressorSettings(device="cpu", threads=1))


async def main(url: str, folder: str, checkpoint: str) -> None:
    async with connect(url) as redis:
        await Place(redis, Path(folder)).recomputer(load(Path(checkpoint)), keep_every_s=0.0).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
