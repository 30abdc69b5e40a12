"""What is kept of a source whatever model saw it: timelines of every format, and keyframes."""

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from store.format import TokenFormat
from store.keyframes import Keyframes
from store.keys import formats_key
from store.segments import Segments
from store.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Erased:
    """How many frame tokens, of all models together, and how many keyframes are gone."""

    frames: int
    keyframes: int


class Memory:
    """The memory of all sources. Raises StoreUnavailable."""

    def __init__(self, redis: Redis, segments: Segments, keyframes: Keyframes) -> None:
        self.keyframes = keyframes
        self._redis = redis
        self._segments = segments

    async def timelines(self, source_id: str) -> Sequence[Timeline]:
        """Return the timelines of a source, one for each model that saw it."""
        formats = await self._redis.hgetall(formats_key(source_id))
        return [Timeline(self._redis, TokenFormat.model_validate_json(raw), self._segments) for raw in formats.values()]

    async def erase(self, source_id: str, start: int | None = None, end: int | None = None) -> Erased:
        """Erase the slots [start, end) for good; None leaves a side unbounded."""
        frames = sum([await timeline.erase(source_id, start, end) for timeline in await self.timelines(source_id)])
        if start is None and end is None:
            await self._segments.remove_source(source_id)  # with what models left of whom nothing else is known
        return Erased(frames, await self.keyframes.erase(source_id, start, end))


async def has_tokens(redis: Redis, source_id: str) -> bool:
    """Return whether any model's tokens of the source were ever kept and not wholly erased."""
    return bool(await redis.exists(formats_key(source_id)))
