"""The Serve application: every deployment, and what each is made of. The only module that knows all of them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from compressor_service.facts import ModelFacts
from compressor_service.recompute import Recomputer
from compressor_service.service import CompressorService
from deploy.desk import StoreDesk
from deploy.remote import (
    Handle,
    RemoteCameras,
    RemoteCompressor,
    RemoteMoments,
    RemoteQuestions,
    plain_errors,
    sentence,
)
from deploy.settings import IngestScaling, LoadScaling, Scaling, ServeSettings, Settings
from ingest.address import AddressPolicy, check_camera_url, check_download_url
from ingest.address import BadUrl as BadAddress
from ingest.archive import UnsupportedMedia as NoVideo
from ingest.assignment import Camera
from ingest.camera import CameraFacts
from ingest.sandbox import Sandbox
from qa_service.api import Services, build_api
from qa_service.control import SourceControl
from qa_service.coverage import RangeReader
from qa_service.erasure import Erasure
from qa_service.errors import BadUrl, UnsupportedMedia
from qa_service.exports import Exports
from qa_service.feed import Feed
from qa_service.finder import Finder
from qa_service.health import Readiness
from qa_service.imports import Importer
from qa_service.keys import RateLimit
from qa_service.metrics import Metrics
from qa_service.once import Once
from qa_service.recomputing import Recomputing
from qa_service.schemas import AnswerEvent, ModelBody, Question
from qa_service.viewer import Viewer
from store.cipher import Cipher
from store.connection import StoreRedis, StoreUnavailable, connect
from store.counters import Counters
from store.erasures import Erasures
from store.events import Events
from store.idempotency import Idempotency
from store.imports import Imports
from store.janitor import Janitor
from store.keyframes import Keyframes
from store.leases import Leases
from store.memory import Memory
from store.moments import Found, Moments, Span
from store.recomputations import Recomputations
from store.room import Room
from store.segments import Segments
from store.sizes import KeyframeHours, TokenHours
from store.sources import Sources
from store.timeline import Timeline

if TYPE_CHECKING:
    from compressor_service.llava_mini import LlavaMini
    from compressor_service.llava_mini.prompt import Prompt

APPLICATION = "tokenline"
DTYPE: Final = "bfloat16"  # of the published weights
PUBLISHED: Final = "ICTNLP/llava-mini-llama-3.1-8b"
HEALTH_PERIOD_S = 5
READY_KEY = "ready"
LOOKS_AT_ONCE = 4  # a process each, beside those of the cameras


def model_note(facts: ModelFacts) -> str | None:
    """Say what must be known before the model is believed; nothing for a model of the real world."""
    if facts.untrained:
        return "The weights are untrained: the answers of this model carry no meaning."
    if facts.world is not None:
        return (
            f"This small model knows only {facts.world}, a drawn world of streets and yards: what it says about real "
            f"pictures has no meaning. TOKENLINE_MODEL__CHECKPOINT={PUBLISHED} switches to the published model."
        )
    return None


class NotConfigured(ValueError):
    """A setting is missing that a cluster cannot do without."""


def _redis(settings: Settings) -> StoreRedis:
    if settings.store.redis_url is None:
        raise NotConfigured(
            "TOKENLINE_STORE__REDIS_URL is not set: the processes of a cluster need one Redis that all of them reach; "
            "`tokenline run` starts its own"
        )
    return connect(settings.store.redis_url)


def _sources(settings: Settings, redis: StoreRedis) -> Sources:
    return Sources(redis, Cipher.open(settings.store.secret_key, settings.store.data_dir))


def _segments(settings: Settings) -> Segments:
    return Segments(settings.store.segments_root)


def _keyframes(settings: Settings, redis: StoreRedis) -> Keyframes:
    return Keyframes(redis, settings.store.segments_root, settings.store.keyframes_root)


def _checkpoint(settings: Settings) -> str:
    if settings.model.checkpoint is None:
        raise NotConfigured("TOKENLINE_MODEL__CHECKPOINT is not set: name a model that every node reaches")
    return settings.model.checkpoint


def _load_language(settings: Settings) -> "tuple[LlavaMini, Prompt]":
    # Every replica imports this module, but only this one needs torch: 280 MB in each of the others.
    from compressor_service.llava_mini import LlavaMini
    from compressor_service.llava_mini.prompt import SYSTEM_TEXT, Prompt

    checkpoint, qa = _checkpoint(settings), settings.qa
    model = LlavaMini.from_pretrained(
        checkpoint, settings.model.dtype or DTYPE, qa.device, part="llm", load_in_8bit=qa.load_in_8bit
    )
    system = SYSTEM_TEXT if qa.system_text is None else qa.system_text
    return model, Prompt.from_pretrained(checkpoint, system=system, add_generation_prompt=qa.add_generation_prompt)


# Serve awaits the constructors below, which no type checker expects of `__init__`.


class Ingest:
    """Reads cameras and files for as long as the replica lives, and looks at cameras when asked."""

    async def __init__(self, settings: Settings, compressor: Handle) -> None:  # type: ignore[misc]
        from ingest.service import IngestService

        redis = _redis(settings)
        sink = RemoteCompressor(compressor)
        timeline = Timeline(redis, (await sink.facts()).format, _segments(settings))
        self._desk = StoreDesk(_sources(settings, redis), Leases(redis), timeline, settings.ingest.lease_s)
        uploads = settings.store.uploads_dir
        await asyncio.to_thread(uploads.mkdir, parents=True, exist_ok=True)
        self._service = IngestService(
            settings.ingest, self._desk, sink, uploads, spare_bytes=settings.store.spare_bytes
        )
        self._sandbox = Sandbox(settings.ingest)
        self._looking = asyncio.Semaphore(LOOKS_AT_ONCE)
        await self._service.start()

    async def ping(self) -> None:
        """Return if the replica does its work."""
        self.check_health()

    def check_health(self) -> None:
        self._service.check_health()

    async def look(self, camera: Camera) -> CameraFacts:
        """Look at what a camera sends. Raises CameraFault and BadUrl."""
        async with self._looking:
            return await asyncio.to_thread(self._sandbox.camera, camera)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        try:
            unowned = await self._desk.unowned()
        except StoreUnavailable:
            unowned = 0  # scaling waits for the store like everything else
        return {"owned": float(self._service.stats()["owned"]), "unowned": float(unowned)}

    async def __del__(self) -> None:
        if hasattr(self, "_service"):
            await self._service.stop()


class Search:
    """Holds the FAISS shards."""

    async def __init__(self, settings: Settings, compressor: Handle) -> None:  # type: ignore[misc]
        redis = _redis(settings)
        timeline = Timeline(redis, (await RemoteCompressor(compressor).facts()).format, _segments(settings))
        self._moments = Moments(timeline, settings.store)
        self._tasks = [
            asyncio.create_task(Erasures(redis).follow(self._moments.forget)),
            asyncio.create_task(self._moments.loader(_sources(settings, redis)).run()),
        ]

    async def search(
        self,
        vector: NDArray[np.float32],
        spans: Sequence[Span],
        *,
        top_k: int,
        min_score: float | None,
        slots: Mapping[str, NDArray[np.int64]] | None,
    ) -> Found:
        return await self._moments.search(vector, spans, top_k=top_k, min_score=min_score, slots=slots)


class QA:
    """Holds the language model and answers."""

    async def __init__(self, settings: Settings, compressor: Handle, search: Handle) -> None:  # type: ignore[misc]
        redis, remote = _redis(settings), RemoteCompressor(compressor)
        model, prompt = await asyncio.to_thread(_load_language, settings)
        from qa_service.answerer import Answerer

        facts = await remote.facts()
        self._answerer = Answerer(
            model,
            prompt,
            Timeline(redis, facts.format, _segments(settings)),
            _keyframes(settings, redis),
            _sources(settings, redis),
            remote,
            remote,
            RemoteMoments(search),
            settings.qa,
            counters=Counters(redis),
            model_name=facts.name,
        )
        self._erasures = asyncio.create_task(Erasures(redis).follow(self._answerer.forget))
        self._described = ModelBody(
            id=facts.name,
            created=int(time.time()),
            owned_by="tokenline",
            tokens_per_frame=facts.format.tokens_per_frame,
            max_frames=self._answerer.max_frames(text_tokens=0, output_tokens=0),
            fingerprint=facts.format.fingerprint,
            untrained=facts.untrained,
            note=model_note(facts),
        )

    async def describe(self) -> ModelBody:
        return self._described

    async def ask(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        async with aclosing(self._answerer.ask(question)) as events:  # a caller who leaves ends the work at once
            async for event in events:
                yield event

    def __del__(self) -> None:
        if hasattr(self, "_answerer"):
            self._answerer.close()


class Gateway:
    """The REST surface."""

    async def __init__(  # type: ignore[misc]
        self, settings: Settings, compressor: Handle, search: Handle, qa: Handle, ingest: Handle, janitor: Handle
    ) -> None:
        redis, remote, questions = _redis(settings), RemoteCompressor(compressor), RemoteQuestions(qa)
        sources, keyframes = _sources(settings, redis), _keyframes(settings, redis)
        facts = await remote.facts()
        timeline = Timeline(redis, facts.format, _segments(settings))
        reader = RangeReader(timeline, keyframes, sources, live_lag_s=settings.qa.live_lag_s)
        counters = Counters(redis)
        uploads = settings.store.uploads_dir
        await asyncio.to_thread(uploads.mkdir, parents=True, exist_ok=True)
        addresses = Addresses(AddressPolicy(settings.ingest.allowed_networks))
        memory = Memory(redis, _segments(settings), keyframes)
        self._settings = settings.api
        self._services = Services(
            control=SourceControl(
                sources,
                memory,
                Idempotency(redis),
                uploads=uploads,
                room=settings.store.room,
                max_upload_bytes=settings.api.max_upload_bytes,
                check_camera_url=addresses.camera,
                check_download_url=addresses.download,
                probe=FirstLook(Sandbox(settings.ingest)),
                probe_camera=RemoteCameras(ingest),
            ),
            viewer=Viewer(reader, timeline, keyframes),
            erasure=Erasure(reader, sources, Leases(redis), memory),
            exports=Exports(reader, timeline, keyframes),
            importer=Importer(
                Imports(redis, sources),
                Once(Idempotency(redis)),
                timeline,
                keyframes,
                side_px=facts.input_size_px,
                folder=uploads,
                room=settings.store.room,
                max_bytes=settings.api.max_import_bytes,
                max_hour_bytes=settings.api.max_hour_bytes,
            ),
            recomputing=Recomputing(
                reader,
                sources,
                Recomputations(redis),
                Once(Idempotency(redis)),
                model=facts.name,
                fingerprint=facts.format.fingerprint,
            ),
            finder=Finder(reader, remote, RemoteMoments(search)),
            questions=questions,
            describe=questions.describe,
            feed=Feed(Events(redis), ping_s=settings.api.sse_ping_s),
            readiness=Readiness(
                _probes(redis, keyframes, settings.store.room, compressor, questions, ingest),
                settings.api.probe_timeout_s,
            ),
            metrics=Metrics(sources, counters, TokenHours(redis), KeyframeHours(redis)),
            counters=counters,
            rate=None
            if settings.api.requests_per_minute is None
            else RateLimit(redis, settings.api.requests_per_minute),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._services, self._settings, behind_ray=True)


class Caretaker:
    """Runs the janitor and the recomputer."""

    def __init__(self, settings: Settings, compressor: Handle) -> None:
        redis = _redis(settings)
        sources = _sources(settings, redis)
        memory = Memory(redis, _segments(settings), _keyframes(settings, redis))
        janitor = Janitor(redis, sources, memory, settings.store)

        async def recompute() -> None:
            eyes = RemoteCompressor(compressor)
            timeline = Timeline(redis, (await eyes.facts_when_loaded()).format, _segments(settings))
            store = settings.store
            recomputer = Recomputer(
                redis, sources, memory, timeline, eyes, room=store.room, settle_s=store.seal_settle_s
            )
            await recomputer.run()

        self._tasks = {
            "janitor": asyncio.create_task(janitor.run()),
            "recomputer": asyncio.create_task(recompute()),
        }

    def check_health(self) -> None:
        for name, task in self._tasks.items():
            if task.done():
                raise RuntimeError(f"the {name} has ended")

    async def __del__(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


class Addresses:
    """The address check of ingest, in the errors of the REST surface."""

    def __init__(self, policy: AddressPolicy) -> None:
        self._policy = policy

    async def camera(self, url: str) -> None:
        try:
            await check_camera_url(url, self._policy)
        except BadAddress as error:
            raise BadUrl(str(error), param="url") from None

    async def download(self, url: str) -> None:
        try:
            await check_download_url(url, self._policy)
        except BadAddress as error:
            raise BadUrl(str(error), param="url") from None


class FirstLook:
    """The first look at an uploaded file, in the errors of the REST surface."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def __call__(self, path: Path) -> float | None:
        try:
            return self._sandbox.archive(path).duration_s
        except NoVideo as error:
            hint = "Send one video file, such as MP4, MKV or WebM, that plays to its end elsewhere."
            raise UnsupportedMedia(f"{sentence(error)}. {hint}", param="file") from None


def _probes(
    redis: StoreRedis, keyframes: Keyframes, room: Room, compressor: Handle, questions: RemoteQuestions, ingest: Handle
) -> dict[str, Any]:
    async def store_takes() -> None:  # written, for a Redis that is full still reads
        await redis.set(READY_KEY, 1, px=1000)

    async def segments_take() -> None:
        await asyncio.to_thread(room.check)
        await keyframes.check_writable()

    async def compressor_looks() -> None:
        with plain_errors("compressor"):
            await compressor.describe.remote()

    async def model_answers() -> None:
        await questions.describe()

    async def ingest_reads() -> None:
        with plain_errors("ingest"):
            await ingest.ping.remote()

    return {
        "redis": store_takes,
        "segments": segments_take,
        "compressor": compressor_looks,
        "qa": model_answers,
        "ingest": ingest_reads,
    }


def _options(name: str, scaling: Scaling, serving: ServeSettings) -> dict[str, Any]:
    """Return the options of one deployment: its share of a node, its replicas and how patient its callers are."""
    options: dict[str, Any] = {
        "name": name,
        "ray_actor_options": {
            "num_cpus": scaling.cpus,
            "num_gpus": scaling.gpus,
            "resources": dict(scaling.resources),
        },
        "max_ongoing_requests": scaling.max_ongoing_requests,
        "max_queued_requests": serving.max_queued_requests,
        "graceful_shutdown_timeout_s": serving.graceful_shutdown_s,
        "health_check_period_s": HEALTH_PERIOD_S,
    }
    if scaling.min_replicas == scaling.max_replicas:
        return options | {"num_replicas": scaling.min_replicas}
    bounds: dict[str, Any] = {"min_replicas": scaling.min_replicas, "max_replicas": scaling.max_replicas}
    if isinstance(scaling, LoadScaling):
        bounds |= {"target_ongoing_requests": scaling.target_ongoing_requests}
    if isinstance(scaling, IngestScaling):
        kwargs = {"target_sources": scaling.target_sources}
        bounds |= {"policy": {"policy_function": "deploy.autoscaling:SourcesPolicy", "policy_kwargs": kwargs}}
        # Load may be a burst, cameras are there to stay: until a replica has room for one, nobody records it.
        bounds |= {"upscale_delay_s": 5.0, "metrics_interval_s": 5.0, "look_back_period_s": 10.0}
    return options | {"autoscaling_config": AutoscalingConfig.model_validate(bounds)}


def build(settings: Settings) -> Application:
    """Put the application together. Ray holds no state of it: all that must survive is in the store."""
    serving = settings.serve
    redis_url = settings.store.redis_url
    if redis_url is None:
        _redis(settings)

    def deploy(kind: type, name: str, scaling: Scaling) -> Any:
        return serve.deployment(kind, **_options(name, scaling, serving))

    compressor = deploy(CompressorService, "compressor", serving.compressor).bind(
        _checkpoint(settings),
        settings.model.dtype or DTYPE,
        settings.compressor,
        redis_url,
        settings.store.segments_root,
        settings.store.keyframes_root,
        settings.store.room,
    )
    search = deploy(Search, "search", serving.search).bind(settings, compressor)
    qa = deploy(QA, "qa", serving.qa).bind(settings, compressor, search)
    ingest = deploy(Ingest, "ingest", serving.ingest).bind(settings, compressor)
    janitor = deploy(Caretaker, "janitor", serving.janitor).bind(settings, compressor)
    gateway = deploy(serve.ingress()(Gateway), "api", serving.api)
    return gateway.bind(settings, compressor, search, qa, ingest, janitor)
