"""Deployments as their callers know them: the protocols of ingest and answering, behind Serve handles."""

import asyncio
import logging
from base64 import b64encode
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from compressor_service.facts import BadPicture, Encoded, ModelFacts
from compressor_service.facts import SearchUnavailable as NoTextHalf
from ingest.address import BadUrl as BadAddress
from ingest.assignment import Camera
from ingest.camera import CameraAuthFailed, CameraFacts, CameraFault, CameraTimeout
from ingest.frame import Frame, Receipt, SinkFull, SinkUnavailable
from qa_service.errors import (
    BadUrl,
    ModelLoading,
    QueueFull,
    RtspAuthFailed,
    RtspTimeout,
    RtspUnreachable,
    ScalingUp,
    SearchUnavailable,
    UnsupportedMedia,
)
from qa_service.schemas import AnswerEvent, ModelBody, Question, StreamProbe, StreamProbeRequest
from store.connection import StoreFull
from store.moments import Found, Span

logger = logging.getLogger(__name__)

Handle = DeploymentHandle[Any]
LOADING_PATIENCE_S = 5.0
_LOST = (
    RayActorError,
    NodeDiedError,
    WorkerCrashedError,
    OutOfMemoryError,
    ObjectLostError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)


@contextmanager
def plain_errors(part: str) -> Iterator[None]:
    """Raise what happened in a replica as it was raised there, and what happened to the replica by its name.

    Raises QueueFull, ScalingUp and whatever the called method raises.
    """
    try:
        yield
    except BackPressureError:
        raise QueueFull(
            f"More requests than the {part} can serve in time are waiting; ask again in a moment."
        ) from None
    except RayTaskError as error:  # before RayActorError: its text is the remote traceback, its cause the error itself
        raise error.cause from None
    except _LOST as error:
        logger.warning("%s: %s", part, type(error).__name__)
        raise ScalingUp(f"The {part} was lost and is being started again; ask again in a moment.") from None


class RemoteCompressor:
    """The compressor: a FrameSink for ingest, TextFusion and SearchSpace for answering, Eyes for recomputing."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._facts: ModelFacts | None = None

    async def facts(self) -> ModelFacts:
        """Return what the model is; waits until it is loaded."""
        if self._facts is None:
            with plain_errors("compressor"):
                self._facts = await self._handle.describe.remote()
        return self._facts

    async def facts_when_loaded(self) -> ModelFacts:
        """Return what the model is, however long it takes until a compressor tells."""
        while True:
            try:
                return await self.facts()
            except (QueueFull, ScalingUp, RayError) as error:
                logger.info("the compressor does not tell its model yet: %s", type(error).__name__)
                await asyncio.sleep(LOADING_PATIENCE_S)

    async def input_size_px(self) -> int:
        with _as_sink():
            return (await self.facts()).input_size_px

    async def put(self, frames: Sequence[Frame]) -> Receipt:
        with _as_sink(), plain_errors("compressor"):
            return await self._handle.put.remote(list(frames))

    async def encode(self, keyframes: Sequence[bytes]) -> Encoded:
        with _as_sink(), plain_errors("compressor"):
            return await self._handle.encode.remote(list(keyframes))

    async def fuse_text(
        self, input_ids: Sequence[int], frames: Sequence[tuple[str, Sequence[int]]]
    ) -> NDArray[np.float32]:
        return await self._retried("fuse_text", list(input_ids), list(frames))

    async def embed_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return await self._retried("embed_text", list(texts))

    async def embed_image(self, pictures: Sequence[bytes]) -> NDArray[np.float32]:
        return await self._retried("embed_image", list(pictures))

    async def _retried(self, method: str, *arguments: object) -> NDArray[np.float32]:
        """Call once more when the replica died: these calls change nothing."""
        try:
            return await self._called(method, *arguments)
        except ScalingUp:
            return await self._called(method, *arguments)

    async def _called(self, method: str, *arguments: object) -> NDArray[np.float32]:
        """Call an embedding or a fusion, and tell its errors in the words of the REST surface."""
        try:
            with plain_errors("compressor"):
                return await getattr(self._handle, method).remote(*arguments)
        except NoTextHalf as error:
            raise SearchUnavailable(str(error)) from None
        except BadPicture:
            raise UnsupportedMedia("The image cannot be decoded: send a whole JPEG or PNG.", param="image") from None


@contextmanager
def _as_sink() -> Iterator[None]:
    """Tell ingest of everything that may pass by itself in the one way it knows: it sends the frames again."""
    try:
        yield
    except StoreFull as error:
        raise SinkFull(str(error)) from None
    except (QueueFull, ScalingUp, ConnectionError) as error:
        raise SinkUnavailable(str(error)) from None
    except RayError as error:  # a node that died on the way, and whatever else Ray may suffer
        raise SinkUnavailable(f"the compressor could not be called: {type(error).__name__}") from None


class RemoteCameras:
    """Cameras, as the ingest deployment reaches them."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def __call__(self, wanted: StreamProbeRequest) -> StreamProbe:
        """Let ingest look at a camera. Raises BadUrl, RtspUnreachable, RtspAuthFailed and RtspTimeout."""
        password = None if wanted.password is None else wanted.password.get_secret_value()
        with camera_errors(), plain_errors("ingest"):
            return stream_probe(
                await self._handle.look.remote(Camera(wanted.url, wanted.username, password, wanted.transport))
            )


def stream_probe(facts: CameraFacts) -> StreamProbe:
    """Return what was seen of a camera as the REST surface tells it."""
    return StreamProbe(
        codec=facts.codec,
        width=facts.width,
        height=facts.height,
        fps=facts.fps,
        first_frame_ms=facts.first_frame_ms,
        snapshot=f"data:image/jpeg;base64,{b64encode(facts.snapshot).decode()}",
    )


@contextmanager
def camera_errors() -> Iterator[None]:
    """Tell what is wrong with a camera in the words of the REST surface."""
    try:
        yield
    except BadAddress as error:
        raise BadUrl(str(error), param="url") from None
    except CameraAuthFailed as error:
        raise RtspAuthFailed(f"{sentence(error)}; check them.", param="username") from None
    except CameraTimeout as error:
        raise RtspTimeout(f"{sentence(error)}; check that it is not overloaded.", param="url") from None
    except CameraFault as error:
        raise RtspUnreachable(f"{sentence(error)}.", param="url") from None


def sentence(error: Exception) -> str:
    """Return what an error says with a capital letter, as the REST surface speaks."""
    text = str(error)
    return text[:1].upper() + text[1:]


class RemoteMoments:
    """The search deployment."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def search(
        self,
        vector: NDArray[np.float32],
        spans: Sequence[Span],
        *,
        top_k: int,
        min_score: float | None = None,
        slots: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> Found:
        narrowed = None if slots is None else dict(slots)
        with plain_errors("search"):
            return await self._handle.search.remote(
                vector, list(spans), top_k=top_k, min_score=min_score, slots=narrowed
            )


class RemoteQuestions:
    """The answering deployment."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def describe(self) -> ModelBody:
        """Return the facts of the model that answers. Raises ModelLoading while no replica has it in memory."""
        with plain_errors("model"):
            try:
                async with asyncio.timeout(LOADING_PATIENCE_S):
                    return await self._handle.describe.remote()
            except TimeoutError:
                raise ModelLoading("The model is being loaded; ask again in a moment.", retry_after_s=5) from None

    async def ask(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        await self.describe()  # each time: Serve would let the question wait, without a word, for a replica to load
        with plain_errors("model"):
            events: Any = self._handle.options(stream=True).ask.remote(question)
            try:
                async for event in events:
                    yield event
            finally:
                events.cancel()
