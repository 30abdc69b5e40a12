"""The REST surface over real parts in this process: a real Redis, the small untrained model, real keyframes."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from compressor_service.encoder import Encoder
from compressor_service.facts import BadPicture
from compressor_service.llava_mini import LlavaMini
from compressor_service.llava_mini.checkpoint import Dtype
from compressor_service.llava_mini.prompt import Prompt
from compressor_service.settings import CompressorSettings
from compressor_service.writer import FrameWriter
from deploy.app import Addresses, FirstLook
from deploy.remote import camera_errors, stream_probe
from ingest.address import AddressPolicy
from ingest.assignment import Camera
from ingest.frame import Frame
from ingest.sandbox import Sandbox
from qa_service.answerer import Answerer
from qa_service.api import Services, build_api
from qa_service.clock import write_stream_time
from qa_service.control import SourceControl
from qa_service.coverage import RangeReader
from qa_service.erasure import Erasure
from qa_service.errors import UnsupportedMedia
from qa_service.exports import Exports
from qa_service.feed import Feed
from qa_service.finder import Finder
from qa_service.health import Readiness
from qa_service.imports import Importer
from qa_service.keys import RateLimit
from qa_service.metrics import Metrics
from qa_service.once import Once
from qa_service.recomputing import Recomputing
from qa_service.schemas import ModelBody, StreamProbe, StreamProbeRequest
from qa_service.settings import ApiSettings, QASettings
from qa_service.viewer import Viewer
from store.cipher import Cipher
from store.connection import StoreRedis
from store.counters import Counters
from store.events import Events
from store.gaps import Gaps
from store.idempotency import Idempotency
from store.imports import Imports
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.moments import Moments
from store.recomputations import Recomputations
from store.room import Room
from store.segments import Segments
from store.settings import StoreSettings
from store.sizes import KeyframeHours, TokenHours
from store.source import NewStream, NewVideo, Stream, StreamStatus, Video, VideoStatus
from store.sources import Sources
from store.timeline import Timeline
from tests.ingest_parts import settings as ingest_settings

QUESTION = "what is there in the picture?"
LATER_S = 1000  # the clock of the parts stands so long after a stream was registered


class Compressor:
    """The compressor without Ray, its errors put as the REST surface knows them."""

    def __init__(self, writer: FrameWriter) -> None:
        self._writer = writer
        self.fused: list[Sequence[tuple[str, Sequence[int]]]] = []
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()  # a test may close it to hold fusion up
        self.gate.set()

    async def fuse_text(
        self, input_ids: Sequence[int], frames: Sequence[tuple[str, Sequence[int]]]
    ) -> NDArray[np.float32]:
        self.fused.append(frames)
        self.entered.set()
        await self.gate.wait()
        return await self._writer.fuse_text(input_ids, frames)

    async def embed_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return await self._writer.embed_text(texts)

    async def embed_image(self, pictures: Sequence[bytes]) -> NDArray[np.float32]:
        try:
            return await self._writer.embed_image(pictures)
        except BadPicture as error:
            raise UnsupportedMedia("The image cannot be decoded.", param="image") from error


@dataclass
class Parts:
    """Everything that a test speaks to, by name."""

    redis: StoreRedis
    sources: Sources
    timeline: Timeline
    segments: Segments
    keyframes: Keyframes
    encoder: Encoder
    writer: FrameWriter
    compressor: Compressor
    moments: Moments
    uploads: Path
    checkpoint: Path
    now: float
    api: FastAPI
    answerer: Answerer

    def client(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.api), base_url="http://test", **options)

    async def stream(self, slots: Sequence[int] = (), *, name: str = "dock") -> tuple[Stream, int]:
        """Register a stream, keep frames of slots that count from its registration, and return it with slot 0."""
        stream = await self.sources.create_stream(NewStream(name=name, url=f"rtsp://203.0.113.7/{name}"))
        base = int(stream.created_at) + 1
        await self.keep(stream.id, [base + slot for slot in slots])
        return stream, base

    async def video(self, slots: Sequence[int], *, duration_s: float, status: str = "ready") -> Video:
        video = await self.sources.create_video(NewVideo(name="yard.mp4", file="yard.upload"))
        told = VideoStatus.model_validate({"status": status, "progress": 0.5, "duration_s": duration_s})
        await self.keep(video.id, slots, video_status=told)
        return await self.sources.get_video(video.id)

    async def keep(
        self,
        source_id: str,
        slots: Sequence[int],
        *,
        video_status: VideoStatus | None = None,
        stream_status: StreamStatus | None = None,
    ) -> None:
        """Remember frames as ingest and the compressor do: under a lease, keyframes and tokens."""
        leases = Leases(self.redis)
        epoch = await leases.acquire(source_id, "test", 60)
        assert epoch is not None
        side = self.encoder.input_size_px
        frames = [Frame(source_id, slot, slot * 1000 + 250, keyframe(slot, side), epoch) for slot in slots]
        if frames:
            assert not (await self.writer.put([frames]))[0].lost
        if video_status is not None:
            assert await self.sources.set_video_status(source_id, epoch, video_status)
        if stream_status is not None:
            assert await self.sources.set_status(source_id, epoch, stream_status)
            return
        await leases.release("test", {source_id: epoch})

    def offline(self, question: str, pictures: Sequence[bytes], max_new_tokens: int) -> list[int]:
        """Return the ids that the whole model answers with, from the pictures alone."""
        model, prompt = whole_model(self.checkpoint, self.encoder.format.dtype)
        ids = torch.tensor([prompt.build(question)])
        pixels = torch.stack([self.encoder.decode(picture) for picture in pictures])[None]
        [made] = model.generate(model.inputs_embeds(ids, pixels), max_new_tokens, stop_ids=prompt.stop_ids).tolist()
        return [one for one in made if one not in prompt.stop_ids]


@asynccontextmanager
async def open_parts(
    redis: StoreRedis,
    checkpoint: Path,
    folder: Path,
    qa: QASettings | None = None,
    api: ApiSettings | None = None,
    dtype: Dtype = "float32",
    allowed_networks: tuple[str, ...] = (),
    spare_bytes: int = 0,
) -> AsyncIterator[Parts]:
    qa, api = qa or QASettings(), api or ApiSettings()
    encoder = load_encoder(checkpoint, dtype)
    segments = Segments(str(folder / "segments"))
    timeline = Timeline(redis, encoder.format, segments)
    keyframes = Keyframes(redis, str(folder / "segments"))
    sources = Sources(redis, Cipher.open(None, folder))
    room = Room((folder,), spare_bytes)
    writer = FrameWriter(
        encoder, timeline, keyframes, Leases(redis), Gaps(redis), Counters(redis), room=room, frames_per_pass=8
    )
    compressor = Compressor(writer)
    moments = Moments(timeline, StoreSettings(data_dir=folder))
    model, prompt = whole_model(checkpoint, dtype)
    now = int(time.time()) + float(LATER_S)
    answerer = Answerer(
        model,
        prompt,
        timeline,
        keyframes,
        sources,
        compressor,
        compressor,
        moments,
        qa,
        counters=Counters(redis),
        model_name="small",
        now=lambda: now,
    )
    reader = RangeReader(timeline, keyframes, sources, live_lag_s=qa.live_lag_s, now=lambda: now)
    settings = ingest_settings(allowed_networks=("203.0.113.0/24", *allowed_networks))
    addresses, sandbox = Addresses(AddressPolicy(settings.allowed_networks)), Sandbox(settings)

    async def probe_camera(wanted: StreamProbeRequest) -> StreamProbe:
        password = None if wanted.password is None else wanted.password.get_secret_value()
        camera = Camera(wanted.url, wanted.username, password, wanted.transport)
        with camera_errors():
            return stream_probe(await asyncio.to_thread(sandbox.camera, camera))

    async def describe() -> ModelBody:
        return ModelBody(
            id="small",
            created=0,
            owned_by="tokenline",
            tokens_per_frame=1,
            max_frames=answerer.max_frames(64, 256),
            fingerprint=encoder.format.fingerprint,
            untrained=True,
            note="The weights are untrained: answers carry no meaning.",
        )

    async def ping() -> None:
        await redis.ping()

    memory = Memory(redis, segments, keyframes)
    control = SourceControl(
        sources,
        memory,
        Idempotency(redis),
        uploads=folder / "uploads",
        room=room,
        max_upload_bytes=api.max_upload_bytes,
        check_camera_url=addresses.camera,
        check_download_url=addresses.download,
        probe=FirstLook(sandbox),
        probe_camera=probe_camera,
    )
    services = Services(
        control=control,
        viewer=Viewer(reader, timeline, keyframes),
        erasure=Erasure(reader, sources, Leases(redis), memory),
        exports=Exports(reader, timeline, keyframes),
        importer=Importer(
            Imports(redis, sources),
            Once(Idempotency(redis)),
            timeline,
            keyframes,
            side_px=encoder.input_size_px,
            folder=folder,
            room=room,
            max_bytes=api.max_import_bytes,
            max_hour_bytes=api.max_hour_bytes,
        ),
        recomputing=Recomputing(
            reader,
            sources,
            Recomputations(redis),
            Once(Idempotency(redis)),
            model="small",
            fingerprint=encoder.format.fingerprint,
        ),
        finder=Finder(reader, compressor, moments),
        questions=answerer,
        describe=describe,
        feed=Feed(Events(redis), ping_s=api.sse_ping_s),
        readiness=Readiness({"redis": ping}, api.probe_timeout_s),
        metrics=Metrics(sources, Counters(redis), TokenHours(redis), KeyframeHours(redis)),
        counters=Counters(redis),
        rate=RateLimit(redis, api.requests_per_minute) if api.requests_per_minute else None,
    )
    yield Parts(
        redis,
        sources,
        timeline,
        segments,
        keyframes,
        encoder,
        writer,
        compressor,
        moments,
        folder / "uploads",
        checkpoint,
        now,
        build_api(services, api),
        answerer,
    )
    answerer.close()


@cache
def load_encoder(checkpoint: Path, dtype: Dtype) -> Encoder:
    return Encoder.load(checkpoint, dtype, CompressorSettings(device="cpu"))


@cache
def whole_model(checkpoint: Path, dtype: Dtype = "float32") -> tuple[LlavaMini, Prompt]:
    return LlavaMini.from_pretrained(checkpoint, dtype, "cpu"), Prompt.from_pretrained(checkpoint)


@cache
def keyframe(number: int, side: int) -> bytes:
    """Draw a picture of its own for every number, as JPEG."""
    random = np.random.default_rng(number)
    small = random.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def stream_range(stream: Stream, start: int, end: int) -> dict[str, Any]:
    return {"stream_id": stream.id, "start": write_stream_time(start), "end": write_stream_time(end)}


def asked(*sources: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"question": QUESTION, "sources": list(sources), "max_output_tokens": 12, **fields}
