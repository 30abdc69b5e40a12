"""The registry: streams and videos, their state and their gaps. The one truth about them for every process."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Unpack
from uuid import uuid4

from pydantic import BaseModel
from redis.asyncio import Redis

from store.cipher import Cipher
from store.events import Events
from store.gaps import Gap, Gaps
from store.hot import has_tokens
from store.leases import Leases, lease_key
from store.pages import Page, read_page
from store.source import (
    Frozen,
    KeyframesOutlive,
    NewStream,
    NewVideo,
    Source,
    SourceNotFound,
    StateConflict,
    Stream,
    StreamChanges,
    StreamExists,
    StreamNotFound,
    StreamState,
    StreamStatus,
    Video,
    VideoNotFound,
    VideoState,
    VideoStatus,
)


@dataclass(frozen=True, slots=True)
class Kept:
    """A source as its caretaker sees it: `purge` asks for all of it to be erased; `hidden` is not complete yet."""

    source: Source
    purge: bool
    hidden: bool = False


class _StreamRecord(Frozen):
    stream: Stream
    secret: str | None  # the encrypted password
    purge: bool = False
    hidden: bool = False

    @property
    def is_there(self) -> bool:
        """Whether it is a source to anyone but its caretaker."""
        return not (self.purge or self.hidden)


class _VideoRecord(Frozen):
    id: str
    new: NewVideo
    created_at: float
    purge: bool = False
    hidden: bool = False

    @property
    def is_there(self) -> bool:
        """Whether it is a source to anyone but its caretaker."""
        return not (self.purge or self.hidden)

    def video(self, status: VideoStatus) -> Video:
        return Video(id=self.id, created_at=self.created_at, **dict(self.new), **dict(status))


_Record = TypeVar("_Record", _StreamRecord, _VideoRecord)

# One hash tag for the registry, so that a record changes together with its indexes.
_STREAMS, _VIDEOS = "reg:{sources}:streams", "reg:{sources}:videos"
_NAMES, _URLS = "reg:{sources}:names", "reg:{sources}:urls"
_SEQUENCE = "reg:{sources}:sequence"
_UNFINISHED = "reg:{sources}:unfinished"  # videos that are still to be read

# Replaces a record if it is still the one that was read; an empty text stands for "none" on either side.
# KEYS: records, order, sequence, names, urls.
# ARGV: id, old record, new record, old name, new name, old url, new url.
_REPLACE = """
local id = ARGV[1]
if (redis.call('HGET', KEYS[1], id) or '') ~= ARGV[2] then return {'changed'} end
for at, field in ipairs({'name', 'url'}) do
  local index, new = KEYS[3 + at], ARGV[3 + 2 * at]
  local holder = new ~= '' and redis.call('HGET', index, new)
  if holder and holder ~= id then return {field, holder} end
end
for at = 1, 2 do
  local index, old, new = KEYS[3 + at], ARGV[2 + 2 * at], ARGV[3 + 2 * at]
  if old ~= '' then redis.call('HDEL', index, old) end
  if new ~= '' then redis.call('HSET', index, new, id) end
end
redis.call('HSET', KEYS[1], id, ARGV[3])
if ARGV[2] == '' then redis.call('ZADD', KEYS[2], redis.call('INCR', KEYS[3]), id) end
return {'done'}
"""

# Returns whether it was written, and the status before.
_SET_STATUS = """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return {0, ''} end
return {1, redis.call('GETSET', KEYS[2], ARGV[2]) or ''}
"""


class Sources:
    """Streams and videos in Redis. Raises StoreUnavailable."""

    def __init__(self, redis: Redis, cipher: Cipher) -> None:
        self._redis = redis
        self._cipher = cipher
        self._leases = Leases(redis)
        self._gaps = Gaps(redis)
        self._events = Events(redis)
        self._replace = redis.register_script(_REPLACE)
        self._set_status = redis.register_script(_SET_STATUS)

    # streams

    async def create_stream(self, new: NewStream) -> Stream:
        """Register a stream; StreamExists if one has its name or url, KeyframesOutlive."""
        _check_retention(new)
        stream = Stream(
            id=f"str_{uuid4().hex[:12]}",
            has_password=new.password is not None,
            created_at=time.time(),
            **new.model_dump(exclude={"password"}),
        )
        secret = None if new.password is None else self._cipher.encrypt(new.password.get_secret_value())
        await self._replace_stream(None, _StreamRecord(stream=stream, secret=secret))
        await self._tell_stream(stream.id, _waiting(stream, stream.created_at))
        return stream

    async def get_stream(self, stream_id: str) -> Stream:
        """Return a stream that is not deleted; StreamNotFound."""
        return (await self._stream_record(stream_id)).stream

    async def list_streams(
        self,
        *,
        state: StreamState | None = None,
        label: str | None = None,
        cursor: str | None = None,
        limit: int = 100,
        visible: frozenset[str] | None = None,
    ) -> Page[Stream]:
        """Return streams in order of creation: of a state, with a label (`key` or `key=value`), among the visible ones.

        BadCursor if the cursor is not one of ours.
        """

        async def choose(ids: Sequence[str]) -> list[Stream | None]:
            records = [_parse(_StreamRecord, raw) for raw in await self._raw(_STREAMS, ids)]
            chosen = [
                record.stream if record and record.is_there and _labelled(record.stream, label) else None
                for record in records
            ]
            if state is None:
                return chosen
            statuses = await self.statuses([stream for stream in chosen if stream])
            return [stream if stream and statuses[stream.id].state == state else None for stream in chosen]

        return await read_page(self._redis, f"{_STREAMS}:order", choose, cursor, limit, visible)

    async def update_stream(self, stream_id: str, **changes: Unpack[StreamChanges]) -> Stream:
        """Change a stream and return it; its owner loses it, so that it is claimed anew with the new settings.

        StreamNotFound; StreamExists if another one has the new name or url; StateConflict for another fps while frames
        are kept, since their slots were counted with the old one, and for one without a url that is to be recorded;
        KeyframesOutlive and other ValueErrors for values that cannot be.
        """
        while True:
            old = await self._stream_record(stream_id)
            record = self._changed(old, changes)
            if record.stream.fps != old.stream.fps:
                await self._leases.revoke(stream_id)  # so that no frame arrives after the check
                if await has_tokens(self._redis, stream_id):
                    raise StateConflict(
                        f"fps of {stream_id} is fixed while frames are kept: erase its memory first, "
                        "or register the camera again after deleting this stream"
                    )
            if await self._replace_stream(old, record):
                break
        if record.stream.fps != old.stream.fps:
            await self._gaps.drop(stream_id)  # counted on the old grid
        if _recording(record) != _recording(old):
            await self._leases.revoke(stream_id)
            if record.stream.enabled and not old.stream.enabled:
                await self._note_pause(old.stream)
            if record.stream.enabled or old.stream.enabled:  # a pause keeps its beginning
                await self._wait_anew(record.stream)
        return record.stream

    async def delete_stream(self, stream_id: str, *, purge: bool = False) -> None:
        """Stop and unlist a stream; its name and url are free again. StreamNotFound.

        Without `purge` its memory answers until retention takes it. With `purge` the source is gone at once and its
        memory is erased by the caller or, whatever becomes of the caller, by the janitor.
        """
        while True:
            old = await self._stream_record(stream_id)
            gone = old.model_copy(
                update={"stream": old.stream.model_copy(update={"deleted": True, "enabled": False}), "purge": purge}
            )
            gone = gone.model_copy(update={"secret": None})
            if await self._replace_stream(old, gone):
                break
        await self._redis.zrem(f"{_STREAMS}:order", stream_id)
        await self._leases.revoke(stream_id)
        if old.stream.enabled:
            await self._wait_anew(gone.stream)

    async def password(self, stream_id: str) -> str | None:
        """Return the camera's password for the one who connects to it; StreamNotFound, WrongKey."""
        secret = (await self._stream_record(stream_id)).secret
        return None if secret is None else self._cipher.decrypt(secret)

    async def status(self, stream_id: str) -> StreamStatus:
        """Return how a stream is doing; StreamNotFound. A deleted stream is `disabled`."""
        record = _parse(_StreamRecord, (await self._raw(_STREAMS, [stream_id]))[0])
        if record is None or not record.is_there:
            raise StreamNotFound(stream_id)
        return (await self.statuses([record.stream]))[stream_id]

    async def statuses(self, streams: Sequence[Stream]) -> dict[str, StreamStatus]:
        """Return how the streams are doing, by id, in one round trip.

        What the last owner reported counts only while the stream has an owner.
        """
        async with self._redis.pipeline(transaction=False) as pipe:
            for stream in streams:
                pipe.get(_status_key(stream.id))
            replies = await pipe.execute()
        unowned = frozenset(await self._leases.unowned([stream.id for stream in streams]))
        statuses = {}
        for stream, raw in zip(streams, replies, strict=True):
            status = _waiting(stream, stream.created_at) if raw is None else StreamStatus.model_validate_json(raw)
            if not stream.enabled:
                status = status.model_copy(update={"state": "disabled", "reason": None, "next_retry_at": None})
            elif stream.id in unowned and status.state not in ("connecting", "disabled"):
                reason = "no ingest worker has this stream now; the next free one takes it"
                status = status.model_copy(update={"state": "reconnecting", "reason": reason})
            statuses[stream.id] = status
        return statuses

    async def set_status(self, stream_id: str, epoch: int, status: StreamStatus) -> bool:
        """Note what the owner reports; False, and nothing noted, if the epoch is stale."""
        noted, before = await self._note(stream_id, epoch, status)
        if noted and (before is None or _state(status) != _state(StreamStatus.model_validate_json(before))):
            await self._tell_stream(stream_id, status)
        return noted

    # videos

    async def create_video(self, new: NewVideo) -> Video:
        """Register a video, status `queued`; ValueError unless it has exactly one of file and url."""
        if (new.file is None) == (new.url is None):
            raise ValueError("a video comes from an uploaded file or from a url: give exactly one")
        record = _VideoRecord(id=f"vid_{uuid4().hex[:12]}", new=new, created_at=time.time())
        await self._redis.sadd(_UNFINISHED, record.id)
        await self._replace_video(None, record)
        await self._tell_video(record.id, VideoStatus())
        return record.video(VideoStatus())

    async def get_video(self, video_id: str) -> Video:
        """Return a video; VideoNotFound."""
        return (await self._videos([video_id], missing=VideoNotFound))[0]

    async def list_videos(
        self,
        *,
        status: VideoState | None = None,
        cursor: str | None = None,
        limit: int = 100,
        visible: frozenset[str] | None = None,
    ) -> Page[Video]:
        """Return videos in order of creation, of a status, among the visible ones. BadCursor."""

        async def choose(ids: Sequence[str]) -> list[Video | None]:
            found = {video.id: video for video in await self._videos(ids)}
            videos = [found.get(video_id) for video_id in ids]
            return [video if video and status in (None, video.status) else None for video in videos]

        return await read_page(self._redis, f"{_VIDEOS}:order", choose, cursor, limit, visible)

    async def set_video_status(self, video_id: str, epoch: int, status: VideoStatus) -> bool:
        """Note what the owner reports; False, and nothing noted, if the epoch is stale."""
        noted, before = await self._note(video_id, epoch, status)
        if noted and status.status in ("ready", "failed"):
            await self._redis.srem(_UNFINISHED, video_id)
        if noted and (before is None or status.status != VideoStatus.model_validate_json(before).status):
            await self._tell_video(video_id, status)
        return noted

    async def delete_video(self, video_id: str) -> None:
        """Delete a video and ask for its memory to be erased; VideoNotFound."""
        while True:
            old = _parse(_VideoRecord, (await self._raw(_VIDEOS, [video_id]))[0])
            if old is None or not old.is_there:
                raise VideoNotFound(video_id)
            if await self._replace_video(old, old.model_copy(update={"purge": True})):
                break
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zrem(f"{_VIDEOS}:order", video_id)
            pipe.srem(_UNFINISHED, video_id)
            await pipe.execute()
        await self._leases.revoke(video_id)

    # both

    async def source(self, source_id: str) -> Source:
        """Return a stream, deleted or not, or a video; SourceNotFound."""
        if source_id.startswith("vid_"):
            return (await self._videos([source_id], missing=SourceNotFound))[0]
        record = _parse(_StreamRecord, (await self._raw(_STREAMS, [source_id]))[0])
        if record is None or not record.is_there:
            raise SourceNotFound(source_id)
        return record.stream

    async def claimable(self) -> list[Source]:
        """Return what wants an owner: enabled streams and unfinished videos, owned or not, in four round trips."""
        unfinished: Any = await self._redis.smembers(_UNFINISHED)
        videos = await self._videos(sorted(member.decode() for member in unfinished))
        streams = [kept.source for kept in await self._kept_streams() if not kept.purge]
        return [
            *(stream for stream in streams if isinstance(stream, Stream) and stream.enabled and not stream.deleted),
            *(video for video in videos if video.is_being_read),
        ]

    async def restore(self, source: Source) -> bool:
        """Register a source under its own id again; False if it is registered.

        A stream comes back disabled and without its password: nobody kept that. If another one has its name or address
        by now it comes back deleted: unlisted, its memory answers until retention takes it.
        """
        if isinstance(source, Video):
            new = NewVideo(**source.model_dump(include=set(NewVideo.model_fields)))
            record = _VideoRecord(id=source.id, new=new, created_at=source.created_at)
            status = VideoStatus(**source.model_dump(include=set(VideoStatus.model_fields)))
            if not await self._replace_video(None, record):
                return False
            await self._redis.set(_status_key(source.id), status.model_dump_json())
            return True
        stream = source.model_copy(update={"enabled": False, "has_password": False})
        try:
            done = await self._replace_stream(None, _StreamRecord(stream=stream, secret=None))
        except StreamExists:
            stream = stream.model_copy(update={"deleted": True})
            done = await self._replace_stream(None, _StreamRecord(stream=stream, secret=None))
        if stream.deleted:
            await self._redis.zrem(f"{_STREAMS}:order", stream.id)
        if done:
            await self._wait_anew(stream)
        return done

    async def everything(self) -> list[Kept]:
        """Return every source that anything may be kept of, deleted and purged ones included."""
        raw: dict[Any, Any] = await self._redis.hgetall(_VIDEOS)
        records = [_VideoRecord.model_validate_json(one) for one in raw.values()]
        statuses = await self._video_statuses([record.id for record in records])
        videos = [
            Kept(record.video(status), record.purge, record.hidden)
            for record, status in zip(records, statuses, strict=True)
        ]
        return [*await self._kept_streams(), *videos]

    async def forget(self, source_id: str) -> None:
        """Remove the last trace of a deleted source from the registry, once its memory is erased."""
        await self._gaps.drop(source_id)
        await self._events.drop(source_id)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.delete(_status_key(source_id))
            pipe.delete(lease_key(source_id))  # without a lease every epoch is stale
            pipe.hdel(_STREAMS, source_id)
            pipe.hdel(_VIDEOS, source_id)
            await pipe.execute()

    async def add_gaps(self, source_id: str, epoch: int | None, gaps: Iterable[Gap]) -> bool:
        """Record why slots are absent; False, and nothing recorded, if the epoch is stale. None: not as an owner."""
        return await self._gaps.add(source_id, epoch, gaps)

    async def gaps(self, source_id: str, start: int, end: int) -> list[Gap]:
        """Return the recorded gaps within slots [start, end): disjoint, sorted, cut to the range. SourceNotFound.

        What lies before a stream's registration is `not_registered`.
        """
        source = await self.source(source_id)
        registered = int(source.created_at * source.fps) if isinstance(source, Stream) else 0
        return await self._gaps.read(source_id, start, end, registered=registered)

    async def note_expired(self, source_id: str, start: int, before: int) -> None:
        """Record that what was kept of slots [start, before) is gone; other records of gaps before a slot go too."""
        await self._gaps.expire(source_id, start, before)

    # what is put together before anyone sees it

    async def add_hidden_stream(self, stream_id: str, new: NewStream, status: StreamStatus, begins_at: float) -> None:
        """Register a stream that nobody sees before `reveal`; StreamExists if another one has its name by now."""
        holder: Any = await self._redis.hget(_NAMES, new.name)
        if holder is not None:
            raise StreamExists(holder.decode(), "name")
        fields = new.model_dump(exclude={"password"})
        stream = Stream(id=stream_id, has_password=False, created_at=begins_at, **fields)
        await self._redis.set(_status_key(stream_id), status.model_dump_json())
        await self._replace_stream(None, _StreamRecord(stream=stream, secret=None, hidden=True))

    async def add_hidden_video(self, video_id: str, new: NewVideo, status: VideoStatus) -> None:
        """Register a video that nobody sees before `reveal`."""
        await self._redis.set(_status_key(video_id), status.model_dump_json())
        record = _VideoRecord(id=video_id, new=new, created_at=time.time(), hidden=True)
        await self._replace_video(None, record)

    async def reveal(self, source_id: str) -> Source:
        """Let everyone see a hidden source. SourceNotFound if it is not hidden (any more); StreamExists."""
        await self._end_hiding(source_id, purge=False)
        source = await self.source(source_id)
        if isinstance(source, Stream):
            await self._tell_stream(source_id, await self.status(source_id))
        else:
            [status] = await self._video_statuses([source_id])
            await self._tell_video(source_id, status)
        return source

    async def purge_hidden(self, source_id: str) -> None:
        """Ask for all of a hidden source to be erased. SourceNotFound if it is not hidden (any more)."""
        await self._end_hiding(source_id, purge=True)

    async def _end_hiding(self, source_id: str, *, purge: bool) -> None:
        done, ended = False, {"hidden": False, "purge": purge}
        if source_id.startswith("vid_"):
            video = _parse(_VideoRecord, (await self._raw(_VIDEOS, [source_id]))[0])
            if video is not None and video.hidden:
                done = await self._replace_video(video, video.model_copy(update=ended))
        else:
            stream = _parse(_StreamRecord, (await self._raw(_STREAMS, [source_id]))[0])
            if stream is not None and stream.hidden:
                shown = stream.stream.model_copy(update={"deleted": purge})
                done = await self._replace_stream(stream, stream.model_copy(update={**ended, "stream": shown}))
        if not done:
            raise SourceNotFound(source_id)
        if purge:
            await self._redis.zrem(f"{_VIDEOS}:order", source_id)
            await self._redis.zrem(f"{_STREAMS}:order", source_id)

    # how it is kept

    def _changed(self, old: _StreamRecord, changes: StreamChanges) -> _StreamRecord:
        known = old.stream
        fields: dict[str, Any] = {name: getattr(known, name) for name in NewStream.model_fields if name != "password"}
        fields.update(changes)
        if fields["enabled"] and fields["url"] is None:
            raise StateConflict(f"{known.id} has no camera to be read: give it a url")
        new = NewStream.model_validate(fields)
        _check_retention(new)
        secret = old.secret
        if "password" in changes:
            secret = None if new.password is None else self._cipher.encrypt(new.password.get_secret_value())
        stream = Stream(
            id=known.id,
            has_password=secret is not None,
            created_at=known.created_at,
            **new.model_dump(exclude={"password"}),
        )
        return _StreamRecord(stream=stream, secret=secret)

    async def _stream_record(self, stream_id: str) -> _StreamRecord:
        record = _parse(_StreamRecord, (await self._raw(_STREAMS, [stream_id]))[0])
        if record is None or record.stream.deleted or not record.is_there:
            raise StreamNotFound(stream_id)
        return record

    async def _replace_stream(self, old: _StreamRecord | None, new: _StreamRecord) -> bool:
        """Write the record with its indexes; False if it is no longer the old one. StreamExists."""
        indexes = [value for pair in zip(_indexed(old), _indexed(new), strict=True) for value in pair]
        outcome, *holder = await self._write(_STREAMS, new.stream.id, old, new, indexes)
        if outcome == b"name" or outcome == b"url":
            raise StreamExists(holder[0].decode(), "name" if outcome == b"name" else "url")
        return outcome == b"done"

    async def _replace_video(self, old: _VideoRecord | None, new: _VideoRecord) -> bool:
        return (await self._write(_VIDEOS, new.id, old, new, [""] * 4))[0] == b"done"

    async def _write(
        self, records: str, source_id: str, old: BaseModel | None, new: BaseModel, indexes: list[str]
    ) -> list[bytes]:
        before = "" if old is None else old.model_dump_json()
        keys = [records, f"{records}:order", _SEQUENCE, _NAMES, _URLS]
        return await self._replace(keys, [source_id, before, new.model_dump_json(), *indexes])

    async def _raw(self, records: str, ids: Sequence[str]) -> list[Any]:
        return await self._redis.hmget(records, list(ids)) if ids else []

    async def _kept_streams(self) -> list[Kept]:
        raw: dict[Any, Any] = await self._redis.hgetall(_STREAMS)
        records = [_StreamRecord.model_validate_json(one) for one in raw.values()]
        return [Kept(record.stream, record.purge, record.hidden) for record in records]

    async def _videos(self, ids: Sequence[str], missing: type[SourceNotFound] | None = None) -> list[Video]:
        """Return those of the videos that are not deleted; with `missing`, raise it for one that is."""
        records = [_parse(_VideoRecord, raw) for raw in await self._raw(_VIDEOS, ids)]
        for video_id, record in zip(ids, records, strict=True):
            if missing is not None and (record is None or not record.is_there):
                raise missing(video_id)
        found = [record for record in records if record is not None and record.is_there]
        statuses = await self._video_statuses([record.id for record in found])
        return [record.video(status) for record, status in zip(found, statuses, strict=True)]

    async def _video_statuses(self, ids: Sequence[str]) -> list[VideoStatus]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for video_id in ids:
                pipe.get(_status_key(video_id))
            replies = await pipe.execute()
        return [VideoStatus() if raw is None else VideoStatus.model_validate_json(raw) for raw in replies]

    async def _note_pause(self, stream: Stream) -> None:
        """Record the time in which a stream was disabled: nobody expected frames of it."""
        since = (await self.status(stream.id)).since
        start, end = math.floor(since * stream.fps), math.floor(time.time() * stream.fps)
        if start < end:
            gap = Gap(start_slot=start, end_slot=end, reason="not_registered")
            await self.add_gaps(stream.id, None, [gap])

    async def _wait_anew(self, stream: Stream) -> None:
        """Set the status that a stream has without an owner, from now on."""
        status = _waiting(stream, time.time())
        await self._redis.set(_status_key(stream.id), status.model_dump_json())
        await self._tell_stream(stream.id, status)

    async def _note(self, source_id: str, epoch: int, status: BaseModel) -> tuple[bool, bytes | None]:
        """Write a status unless the epoch is stale; return whether it was written, and the one before."""
        keys = [lease_key(source_id), _status_key(source_id)]
        written, before = await self._set_status(keys, [epoch, status.model_dump_json()])
        return bool(written), before or None

    async def _tell_stream(self, stream_id: str, status: StreamStatus) -> None:
        facts = status.model_dump(include={"state", "reason", "since"})
        await self._events.add("stream.state", stream_id, facts)

    async def _tell_video(self, video_id: str, status: VideoStatus) -> None:
        facts = status.model_dump(include={"status", "progress", "error"})
        await self._events.add("video.status", video_id, facts)


def _parse(kind: type[_Record], raw: bytes | None) -> _Record | None:
    return None if raw is None else kind.model_validate_json(raw)


def _status_key(source_id: str) -> str:
    return f"st:{{{source_id}}}"


def _indexed(record: _StreamRecord | None) -> list[str]:
    """The name and the url that no other stream may have; empty where it claims none."""
    if record is None or record.stream.deleted or record.hidden:
        return ["", ""]
    return [record.stream.name, record.stream.url or ""]


def _state(status: StreamStatus) -> tuple[str, str | None]:
    return status.state, status.reason


def _waiting(stream: Stream, since: float) -> StreamStatus:
    if not stream.enabled:
        return StreamStatus(state="disabled", since=since)
    return StreamStatus(state="connecting", since=since, reason="waiting for an ingest worker")


def _recording(record: _StreamRecord) -> tuple[object, ...]:
    """What its owner works with: when that changes, the owner has to begin anew."""
    stream = record.stream
    return stream.url, stream.username, record.secret, stream.transport, stream.fps, stream.enabled


def _check_retention(new: NewStream) -> None:
    if new.keyframe_hours is not None and new.keyframe_hours > new.retention_hours:
        raise KeyframesOutlive(new.keyframe_hours, new.retention_hours)


def _labelled(stream: Stream, label: str | None) -> bool:
    if label is None:
        return True
    key, given, value = label.partition("=")
    return key in stream.labels and (not given or stream.labels[key] == value)
