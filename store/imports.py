"""Imports: sources that come from elsewhere, hour by hour, and are seen by nobody until all of them is there."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis

from store.gaps import Gap, Gaps
from store.source import NewStream, NewVideo, Source, SourceNotFound, StreamStatus, VideoStatus
from store.sources import Sources

IDLE_S = 3600  # an import that goes on no more is given up after this time, and what came of it is erased
RETENTION_HOURS = 24.0 * 366 * 10  # of an imported stream: its memory is old when it comes
_GAPS_AT_ONCE = 1000

# Returns what is imported and its bytes by now. An import that has ended does not begin again.
# KEYS: import. ARGV: bytes that came, seconds.
_GO_ON = """
local new = redis.call('HGET', KEYS[1], 'new')
if not new then return false end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return {new, redis.call('HINCRBY', KEYS[1], 'bytes', ARGV[1])}
"""


class ImportNotFound(LookupError):
    """No such import, or it has ended."""

    def __str__(self) -> str:
        return f"there is no import {self.args[0]}, or it has ended"


class ImportedTooMuch(ValueError):
    """More bytes came than an import may have."""


class NewImport(BaseModel):
    """A source from elsewhere, of which the slots [start_slot, end_slot) come. A stream is never recorded by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["stream", "video"]
    name: str = Field(min_length=1, max_length=200)
    fps: float = Field(gt=0, le=30, allow_inf_nan=False)
    labels: dict[str, str] = Field(default_factory=dict)
    recorded_at: float | None = None
    duration_s: float | None = None
    start_slot: int = Field(ge=0)
    end_slot: int


class Imports:
    """The imports that are under way. Raises StoreUnavailable.

    Nobody has to end one: the janitor erases what came of an import that has stopped.
    """

    def __init__(self, redis: Redis, sources: Sources) -> None:
        self._redis = redis
        self._sources = sources
        self._gaps = Gaps(redis)
        self._go_on = redis.register_script(_GO_ON)

    async def begin(self, new: NewImport, gaps: Sequence[Gap]) -> str:
        """Begin an import and return the id of its source. StreamExists if a stream has its name."""
        source_id = f"{'str' if new.kind == 'stream' else 'vid'}_{uuid4().hex[:12]}"
        # First, or the janitor would find a hidden source that nobody works at.
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(_key(source_id), mapping={"new": new.model_dump_json(), "bytes": 0})
            pipe.expire(_key(source_id), IDLE_S)
            await pipe.execute()
        if new.kind == "stream":
            stream = NewStream(
                name=new.name,
                url=None,
                fps=new.fps,
                labels=new.labels,
                retention_hours=RETENTION_HOURS,
                enabled=False,
            )
            paused = StreamStatus(state="disabled", since=new.end_slot / new.fps)
            begins_at = new.start_slot / new.fps  # nobody here knows of a time before
            await self._sources.add_hidden_stream(source_id, stream, paused, begins_at)
        else:
            video = NewVideo(name=new.name, recorded_at=new.recorded_at, fps=new.fps)
            read = VideoStatus(status="ready", progress=1, duration_s=new.duration_s)
            await self._sources.add_hidden_video(source_id, video, read)
        for some in _parts([*_before(new), *gaps]):
            await self._sources.add_gaps(source_id, None, some)
        return source_id

    async def go_on(self, source_id: str, size_bytes: int = 0, max_bytes: int | None = None) -> NewImport:
        """Return what is imported, and note that it goes on with so many bytes. ImportNotFound; ImportedTooMuch."""
        found = await self._go_on([_key(source_id)], [size_bytes, IDLE_S])
        if found is None:
            raise ImportNotFound(source_id)
        known, total = found
        if max_bytes is not None and total > max_bytes:
            raise ImportedTooMuch(source_id)
        return NewImport.model_validate_json(known)

    async def erased(self, source_id: str, start: int, end: int) -> list[Gap]:
        """Return which of the slots [start, end) were erased where they come from, be it after they were read there."""
        return [gap for gap in await self._gaps.read(source_id, start, end) if gap.reason == "erased"]

    async def is_alive(self, source_id: str) -> bool:
        """Return whether somebody may still be working at an import."""
        return bool(await self._redis.exists(_key(source_id)))

    async def complete(self, source_id: str, frames: int) -> None:
        """Let everyone see the source of so many frames. ImportNotFound; StreamExists if its name was taken meanwhile.

        It is remembered for a while: who did not hear of it asks again.
        """
        await self._redis.set(_completed(source_id), frames, ex=IDLE_S)
        try:
            await self._sources.reveal(source_id)
        except SourceNotFound:
            raise ImportNotFound(source_id) from None
        await self._redis.delete(_key(source_id))

    async def completed(self, source_id: str) -> tuple[Source, int] | None:
        """Return the source of an import that was completed not long ago, and its frames."""
        frames: Any = await self._redis.get(_completed(source_id))
        if frames is None:
            return None
        try:
            return await self._sources.source(source_id), int(frames)
        except SourceNotFound:  # it is hidden still, or was deleted
            return None

    async def abandon(self, source_id: str) -> None:
        """Give an import up: the janitor erases what came of it. ImportNotFound."""
        try:
            await self._sources.purge_hidden(source_id)
        except SourceNotFound:
            raise ImportNotFound(source_id) from None
        await self._redis.delete(_key(source_id))


def _key(source_id: str) -> str:
    return f"import:{{{source_id}}}"


def _completed(source_id: str) -> str:
    return f"import:{{{source_id}}}:completed"


def _before(new: NewImport) -> list[Gap]:
    """What lies before the imported part of a video; a stream begins where its memory does."""
    if new.kind == "stream" or new.start_slot == 0:
        return []
    return [Gap(start_slot=0, end_slot=new.start_slot, reason="not_registered")]


def _parts(gaps: Sequence[Gap]) -> Iterable[Sequence[Gap]]:
    """Cut a list so that no other command of Redis waits long for one of its parts."""
    return (gaps[at : at + _GAPS_AT_ONCE] for at in range(0, len(gaps), _GAPS_AT_ONCE))
