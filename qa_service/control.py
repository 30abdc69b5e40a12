"""Registering, changing and deleting streams and videos."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qa_service.clock import write_stream_time
from qa_service.errors import StreamTaken, ValidationFailed
from qa_service.keys import Caller
from qa_service.once import Once
from qa_service.schemas import (
    KeyframeRetention,
    Retention,
    StreamBody,
    StreamDeleted,
    StreamHealth,
    StreamList,
    StreamPatch,
    StreamProbe,
    StreamProbeRequest,
    StreamRequest,
    StreamState,
    VideoBody,
    VideoDamage,
    VideoDeleted,
    VideoFailure,
    VideoForm,
    VideoList,
    VideoRequest,
)
from qa_service.seams import AddressCheck, CameraProbe, MediaProbe
from qa_service.upload import Upload, receive_form
from qa_service.validation import refusal
from store.idempotency import Idempotency
from store.memory import Memory
from store.room import Room
from store.source import (
    Damage,
    KeyframesOutlive,
    NewStream,
    NewVideo,
    Stream,
    StreamChanges,
    StreamExists,
    StreamStatus,
    Video,
    VideoNotFound,
)
from store.sources import Sources

WAIT_STEP_S = 0.1
_REFUSED = frozenset({"auth_failed", "disabled"})


class SourceControl:
    """Streams and videos as the REST surface shows them. Raises StoreUnavailable everywhere.

    What is registered here is found, claimed and recorded by ingest on its own.
    """

    def __init__(
        self,
        sources: Sources,
        memory: Memory,
        idempotency: Idempotency,
        *,
        uploads: Path,
        room: Room,
        max_upload_bytes: int,
        check_camera_url: AddressCheck,
        check_download_url: AddressCheck,
        probe: MediaProbe,
        probe_camera: CameraProbe,
    ) -> None:
        self._sources = sources
        self._memory = memory
        self._once = Once(idempotency)
        self._uploads = uploads
        self._room = room
        self._max_upload_bytes = max_upload_bytes
        self._check_camera_url = check_camera_url
        self._check_download_url = check_download_url
        self._probe = probe
        self._probe_camera = probe_camera

    # Streams

    async def create_stream(
        self, caller: Caller, request: StreamRequest, *, wait_s: float = 0, key: str | None = None
    ) -> StreamBody:
        """Register a camera and return it, after at most `wait_s` seconds for its first frame or its failure.

        Raises BadUrl, StreamTaken, SourceForbidden, ValidationFailed for keyframes that would outlive their frames and,
        for a repeated `key` that does not fit, IdempotencyConflict.
        """
        caller.require_new_sources()

        async def create() -> StreamBody:
            await self._check_camera_url(request.url)
            fields = request.model_dump(exclude={"retention"})
            new = NewStream(**fields, **_retention_fields(request.retention))
            with _taken_as_seen_by(caller), _retention_that_can_be():
                stream = await self._sources.create_stream(new)
            return await self._stream_body(stream)

        # Without the password: what is kept of the request must not help to guess it.
        body = await self._once(
            caller, "streams", key, request.model_dump_json(exclude={"password"}), StreamBody, create
        )
        return await self._settled(body, wait_s) if wait_s else body

    async def probe_stream(self, caller: Caller, wanted: StreamProbeRequest) -> StreamProbe:
        """Look at a camera without registering it.

        Raises BadUrl, RtspUnreachable, RtspAuthFailed, RtspTimeout and SourceForbidden.
        """
        caller.require_new_sources()
        await self._check_camera_url(wanted.url)
        return await self._probe_camera(wanted)

    async def get_stream(self, caller: Caller, stream_id: str) -> StreamBody:
        """Return a stream. Raises StreamNotFound and SourceForbidden."""
        caller.require_source(stream_id)
        return await self._stream_body(await self._sources.get_stream(stream_id))

    async def list_streams(
        self, caller: Caller, *, state: StreamState | None, label: str | None, cursor: str | None, limit: int
    ) -> StreamList:
        """Return a page of the streams that the caller may see. Raises BadCursor."""
        page = await self._sources.list_streams(
            state=state, label=label, cursor=cursor, limit=limit, visible=caller.sources
        )
        statuses = await self._sources.statuses(page.items)
        data = [_stream_body(stream, statuses[stream.id]) for stream in page.items]
        return StreamList(data=data, has_more=page.next_cursor is not None, next_cursor=page.next_cursor)

    async def update_stream(self, caller: Caller, stream_id: str, patch: StreamPatch) -> StreamBody:
        """Change the fields that are given.

        Raises StreamNotFound, StreamTaken, StateConflict, BadUrl, and ValidationFailed for keyframes that would outlive
        their frames.
        """
        caller.require_source(stream_id)
        await self._sources.get_stream(stream_id)
        if "url" in patch.model_fields_set:
            await self._check_camera_url(patch.url)
        changes: Any = patch.model_dump(exclude_unset=True, exclude={"retention", "password"})
        if "retention" in patch.model_fields_set:
            changes |= _retention_fields(patch.retention, given_only=True)
        if "password" in patch.model_fields_set:
            changes["password"] = None if patch.password is None else patch.password.get_secret_value()
        typed: StreamChanges = changes
        with _taken_as_seen_by(caller), _retention_that_can_be():
            stream = await self._sources.update_stream(stream_id, **typed)
        return await self._stream_body(stream)

    async def delete_stream(self, caller: Caller, stream_id: str, *, purge: bool) -> StreamDeleted:
        """Unlist a stream; with `purge` its memory is erased at once. Raises StreamNotFound."""
        caller.require_source(stream_id)
        await self._sources.delete_stream(stream_id, purge=purge)
        return StreamDeleted(id=stream_id, purged_frames=await self._erase(stream_id) if purge else 0)

    async def stream_health(self, caller: Caller, stream_id: str) -> StreamHealth:
        """Return how a camera is doing. Raises StreamNotFound."""
        caller.require_source(stream_id)
        await self._sources.get_stream(stream_id)
        status = await self._sources.status(stream_id)
        return StreamHealth(
            state=status.state,
            reason=status.reason,
            since=write_stream_time(status.since),
            last_frame_at=_optional_time(status.last_frame_at),
            lag_s=status.lag_s,
            reconnects_1h=status.reconnects_1h,
            frames_1h=status.frames_1h,
            next_retry_at=_optional_time(status.next_retry_at),
            clock=status.clock,
        )

    # Videos

    async def add_video(self, caller: Caller, request: VideoRequest, *, key: str | None = None) -> VideoBody:
        """Register a video that ingest downloads. Raises BadUrl, SourceForbidden and IdempotencyConflict."""
        caller.require_new_sources()

        async def create() -> VideoBody:
            await self._check_download_url(request.url)
            return _video_body(await self._sources.create_video(NewVideo(**request.model_dump())))

        return await self._once(caller, "videos", key, request.model_dump_json(), VideoBody, create)

    async def upload_video(
        self, caller: Caller, content_type: str, chunks: AsyncIterator[bytes], *, key: str | None = None
    ) -> VideoBody:
        """Take a multipart upload to disk and register it.

        Raises FileTooLarge, UnsupportedMedia, InvalidJson, ValidationFailed, StorageFull, SourceForbidden and
        IdempotencyConflict; nothing stays on disk then.
        """
        caller.require_new_sources()
        await asyncio.to_thread(self._uploads.mkdir, parents=True, exist_ok=True)
        name = f"{uuid.uuid4().hex}.upload"
        target = self._uploads / name
        kept = False
        try:
            upload = await receive_form(content_type, chunks, target, self._max_upload_bytes, self._room)
            form = _video_form(upload.fields)

            async def create() -> VideoBody:
                nonlocal kept
                await asyncio.to_thread(self._probe, target)
                new = NewVideo(
                    name=form.name or upload.filename or "upload", file=name, recorded_at=form.recorded_at, fps=form.fps
                )
                video = await self._sources.create_video(new)
                kept = True
                return _video_body(video)

            return await self._once(caller, "videos", key, _described(upload, form), VideoBody, create)
        finally:
            if not kept:
                await asyncio.to_thread(target.unlink, missing_ok=True)

    async def get_video(self, caller: Caller, video_id: str) -> VideoBody:
        """Return a video. Raises VideoNotFound and SourceForbidden."""
        caller.require_source(video_id)
        return _video_body(await self._sources.get_video(video_id))

    async def list_videos(self, caller: Caller, *, cursor: str | None, limit: int) -> VideoList:
        """Return a page of the videos that the caller may see. Raises BadCursor."""
        page = await self._sources.list_videos(cursor=cursor, limit=limit, visible=caller.sources)
        data = [_video_body(video) for video in page.items]
        return VideoList(data=data, has_more=page.next_cursor is not None, next_cursor=page.next_cursor)

    async def delete_video(self, caller: Caller, video_id: str) -> VideoDeleted:
        """Delete a video, its file and its memory. Raises VideoNotFound."""
        caller.require_source(video_id)
        if not video_id.startswith("vid_"):
            raise VideoNotFound(video_id)
        video = await self._sources.get_video(video_id)
        await self._sources.delete_video(video_id)
        if video.file is not None:
            await asyncio.to_thread((self._uploads / video.file).unlink, missing_ok=True)
        return VideoDeleted(id=video_id, purged_frames=await self._erase(video_id))

    # Both

    async def _erase(self, source_id: str) -> int:
        """Erase what is kept of a source that is gone, and return its number of frames.

        The janitor does the same again for what a crash leaves here.
        """
        return (await self._memory.erase(source_id)).frames.total

    async def _settled(self, body: StreamBody, wait_s: float) -> StreamBody:
        """Return the stream once a frame is in memory, it was refused or stopped, at the latest after `wait_s`."""
        deadline = asyncio.get_running_loop().time() + wait_s
        while (
            body.last_frame_at is None and body.state not in _REFUSED and asyncio.get_running_loop().time() < deadline
        ):
            await asyncio.sleep(WAIT_STEP_S)
            body = await self._stream_body(await self._sources.get_stream(body.id))
        return body

    async def _stream_body(self, stream: Stream) -> StreamBody:
        return _stream_body(stream, await self._sources.status(stream.id))


@contextmanager
def _taken_as_seen_by(caller: Caller) -> Iterator[None]:
    """Tell which stream has the name or the address, but not to a caller who may not see that one."""
    try:
        yield
    except StreamExists as error:
        seen = caller.may_see(error.existing_id)
        raise StreamTaken(
            f"{error.existing_id if seen else 'Another stream'} has this {error.field}; change that one, or choose "
            f"another {error.field}.",
            param=error.field,
            details={"stream_id": error.existing_id} if seen else None,
        ) from None


@contextmanager
def _retention_that_can_be() -> Iterator[None]:
    try:
        yield
    except KeyframesOutlive as error:
        raise ValidationFailed(
            f"{str(error).capitalize()}.",
            param="retention.keyframes.hours",
            details={"hours": error.retention_hours, "keyframe_hours": error.keyframe_hours},
        ) from None


def _retention_fields(retention: Retention, *, given_only: bool = False) -> dict[str, Any]:
    """Return a retention as the registry names it."""
    named = {
        "retention_hours": (retention, "hours"),
        "retention_bytes": (retention, "max_bytes"),
        "keyframe_hours": (retention.keyframes, "hours"),
        "keyframe_bytes": (retention.keyframes, "max_bytes"),
    }
    return {
        name: getattr(body, field)
        for name, (body, field) in named.items()
        if not given_only or field in body.model_fields_set
    }


def _stream_body(stream: Stream, status: StreamStatus) -> StreamBody:
    return StreamBody(
        id=stream.id,
        name=stream.name,
        url=stream.url,
        username=stream.username,
        has_password=stream.has_password,
        transport=stream.transport,
        fps=stream.fps,
        labels=stream.labels,
        retention=Retention(
            hours=stream.retention_hours,
            max_bytes=stream.retention_bytes,
            keyframes=KeyframeRetention(hours=stream.keyframe_hours, max_bytes=stream.keyframe_bytes),
        ),
        enabled=stream.enabled,
        created_at=write_stream_time(stream.created_at),
        state=status.state,
        reason=status.reason,
        since=write_stream_time(status.since),
        last_frame_at=_optional_time(status.last_frame_at),
    )


def _video_body(video: Video) -> VideoBody:
    return VideoBody(
        id=video.id,
        name=video.name,
        url=video.url,
        recorded_at=_optional_time(video.recorded_at),
        fps=video.fps,
        created_at=write_stream_time(video.created_at),
        status=video.status,
        progress=video.progress,
        eta_s=video.eta_s,
        duration_s=video.duration_s,
        error=None if video.error is None else VideoFailure(message=video.error),
        damage=None if video.damage is None else _video_damage(video.damage, video.duration_s),
    )


def _video_damage(damage: Damage, duration_s: float | None) -> VideoDamage:
    parts = []
    if duration_s is not None and duration_s - damage.held_s > 0.1:
        parts.append(f"the file states {duration_s:.1f} s and holds {damage.held_s:.1f} s")
    if damage.lost_s:
        parts.append(f"{damage.lost_s:g} s have no picture")
    if damage.errors:
        parts.append(f"{damage.errors} errors were met while reading it")
    return VideoDamage(message="; ".join(parts), **damage.model_dump())


def _video_form(fields: Mapping[str, str]) -> VideoForm:
    try:
        return VideoForm.model_validate(fields)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False, include_context=False, include_input=False)) from None


def _described(upload: Upload, form: VideoForm) -> str:
    """Tell one upload from another."""
    return f"{upload.sha256} {upload.filename} {form.model_dump_json()}"


def _optional_time(seconds: float | None) -> str | None:
    return None if seconds is None else write_stream_time(seconds)
