"""What is kept of a source whatever model saw it: timelines of every format, and keyframes."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from store.connection import StoreUnavailable
from store.erasures import Erasures
from store.format import span_of
from store.hot import formats_of
from store.keyframes import Keyframes
from store.keys import EVEN_WHEN_FULL, erased_key, formats_key
from store.segments import Segments
from store.timeline import NOTHING_ERASED, ErasedFrames, Timeline

logger = logging.getLogger(__name__)

MARK_KEPT_S = 24 * 3600  # longer than any restore takes
SCRUB_TRIES = 40
SCRUB_RETRY_S = 0.25


# KEYS: formats, mark of the last erasure. ARGV: new mark, seconds.
_MARK = f"""{EVEN_WHEN_FULL}
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
"""


@dataclass(frozen=True, slots=True)
class Erased:
    """How many frame tokens, of all models together, and how many keyframes are gone."""

    frames: ErasedFrames = NOTHING_ERASED
    keyframes: int = 0

    def __add__(self, other: "Erased") -> "Erased":
        return Erased(self.frames + other.frames, self.keyframes + other.keyframes)


class Memory:
    """The memory of all sources. Raises StoreUnavailable."""

    def __init__(self, redis: Redis, segments: Segments, keyframes: Keyframes) -> None:
        self.keyframes = keyframes
        self._redis = redis
        self._erasures = Erasures(redis)
        self._segments = segments
        self._set_mark = redis.register_script(_MARK)

    async def timelines(self, source_id: str) -> Sequence[Timeline]:
        """Return the timelines of a source, one for each model that saw it."""
        formats = await formats_of(self._redis, source_id)
        return [Timeline(self._redis, format, self._segments) for format in formats]

    async def erase(self, source_id: str, start: int | None = None, end: int | None = None) -> Erased:
        """Erase the slots [start, end) for good; None leaves a side unbounded.

        StoreUnavailable, and it is to be erased again, as long as an hour of which a part stays has files that Redis
        has lost sight of.
        """
        await self._mark(source_id)  # what was read before it is not packed any more
        try:
            frames = await self._erase_tokens(source_id, start, end)
            keyframes = await self.keyframes.erase(source_id, start, end)
            # Who makes tokens of kept pictures must not bring back what is erased: one that began before the mark is
            # refused from now on, one that begins after it finds no pictures any more.
            await self._mark(source_id)
            frames += await self._erase_tokens(source_id, start, end)
            if start is None and end is None:
                await self._segments.remove_source(source_id)
        finally:
            await self._erasures.note(source_id)  # of an erasure that fails, too, there are copies that must go
        return Erased(frames, keyframes)

    async def extent(self, source_id: str) -> tuple[int, int] | None:
        """Return the first and the last slot of which a frame may be kept, whatever model saw it; None if none is.

        Of hours whose files Redis has lost sight of, that is all of the hour.
        """
        lost = {hour for hours in (await self._segments.formats(source_id)).values() for hour in hours}
        ends = []
        for timeline in await self.timelines(source_id):
            lost -= {manifest.hour for manifest in await timeline.sealed(source_id)}
            if (extent := await timeline.extent(source_id)) is not None:
                ends.append(extent)
        ends += [(first, behind - 1) for first, behind in map(span_of, lost)]
        return (min(first for first, _ in ends), max(last for _, last in ends)) if ends else None

    async def _mark(self, source_id: str) -> None:
        await self._set_mark([formats_key(source_id), erased_key(source_id)], [uuid4().hex, MARK_KEPT_S])

    async def _erase_tokens(self, source_id: str, start: int | None, end: int | None) -> ErasedFrames:
        frames = NOTHING_ERASED
        for timeline in await self._every_timeline(source_id):
            frames += await timeline.erase(source_id, start, end)
        return frames

    async def _every_timeline(self, source_id: str) -> Sequence[Timeline]:
        """Return the timelines of a source, those of models of which only files are left included."""
        formats = {format.fingerprint: format for format in await formats_of(self._redis, source_id)}
        formats |= {format.fingerprint: format for format in await self._segments.formats(source_id)}
        return [Timeline(self._redis, format, self._segments) for format in formats.values()]

    async def scrub(self) -> bool:
        """Let Redis begin to write its log anew, without what was erased; False if it does not, or keeps no log."""
        try:
            for _ in range(SCRUB_TRIES):
                persistence: Any = await self._redis.info("persistence")
                if not persistence.get("aof_enabled"):
                    return False
                if not persistence.get("aof_rewrite_in_progress"):  # one that has begun holds what was erased
                    await self._redis.bgrewriteaof()
                    return True
                await asyncio.sleep(SCRUB_RETRY_S)
        except (ResponseError, StoreUnavailable) as error:
            logger.warning("Redis does not write its log anew (%s): erased bytes stay in it until it does", error)
        return False
