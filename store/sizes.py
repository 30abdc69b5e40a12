"""How many bytes are kept of sources, in all and hour by hour, as Redis knows it: no file is looked at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from redis.asyncio import Redis

from store.format import BLOCKS_PER_HOUR, span_of
from store.hot import HotTimeline, formats_of, read_formats
from store.keys import KeyframeKeys, TimelineKeys, formats_key
from store.loose import LooseHours, parse_loose
from store.sealed import PackedHours, SealedHours

_SOURCES_PER_TRIP = 250


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The bytes of a source's frame tokens, search vectors and times, of all models: in Redis and in segments."""

    hot: int
    sealed: int

    @property
    def total(self) -> int:
        return self.hot + self.sealed


class Hours(Protocol):
    """What is kept of one kind, hour by hour."""

    async def next(self, source_id: str, hour: int) -> int | None:
        """Return the first hour from `hour` on of which something is kept."""

    async def nbytes(self, source_id: str, hour: int) -> int:
        """Return the bytes that are kept of an hour."""


class TokenHours:
    """The frame tokens of sources, of all models. Raises StoreUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def next(self, source_id: str, hour: int) -> int | None:
        found: list[int] = []
        for format in await formats_of(self._redis, source_id):
            keys = TimelineKeys(source_id, format.fingerprint)
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.zrangebyscore(keys.blocks, hour * BLOCKS_PER_HOUR, "+inf", start=0, num=1)
                pipe.zrangebyscore(keys.hours, hour, "+inf", start=0, num=1)
                blocks, hours = await pipe.execute()
            found += [*(int(block) // BLOCKS_PER_HOUR for block in blocks), *map(int, hours)]
        return min(found, default=None)

    async def nbytes(self, source_id: str, hour: int) -> int:
        total = 0
        for format in await formats_of(self._redis, source_id):
            hot = await HotTimeline(self._redis, format).slots(source_id, *span_of(hour))
            sealed = await SealedHours(self._redis, format).between(source_id, hour, hour)
            total += len(hot) * format.frame_bytes + sum(manifest.size for manifest in sealed)
        return total

    async def totals(self, source_ids: Sequence[str]) -> dict[str, TokenBytes]:
        """Return what is kept of sources: few commands a source, few trips for all."""
        totals: dict[str, TokenBytes] = {}
        for some in _parts(source_ids):
            async with self._redis.pipeline(transaction=False) as pipe:
                for source_id in some:
                    pipe.hgetall(formats_key(source_id))
                formats = [read_formats(raw) for raw in await pipe.execute()]
            async with self._redis.pipeline(transaction=False) as pipe:
                for source_id, its_formats in zip(some, formats, strict=True):
                    for format in its_formats:
                        keys = TimelineKeys(source_id, format.fingerprint)
                        pipe.get(keys.frames)
                        pipe.hmget(keys.totals, ["frames", "size"])
                replies = iter(await pipe.execute())
            for source_id, its_formats in zip(some, formats, strict=True):
                hot = sealed = 0
                for format in its_formats:
                    frames, (sealed_frames, size) = int(next(replies) or 0), next(replies)
                    hot += max(frames - int(sealed_frames or 0), 0) * format.frame_bytes
                    sealed += int(size or 0)
                totals[source_id] = TokenBytes(hot, sealed)
        return totals

    async def recount(self, source_id: str) -> None:
        """Count anew what the segments of a source add up to."""
        for format in await formats_of(self._redis, source_id):
            await SealedHours(self._redis, format).recount(source_id)


class KeyframeHours:
    """The keyframes of sources, packed or loose. Raises StoreUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._packed = PackedHours(redis)
        self._loose = LooseHours(redis)

    async def next(self, source_id: str, hour: int) -> int | None:
        packed: list[Any] = await self._redis.zrangebyscore(KeyframeKeys(source_id).hours, hour, "+inf", start=0, num=1)
        loose = [one for one in await self._loose.read(source_id) if one >= hour]
        return min([*map(int, packed), *loose], default=None)

    async def nbytes(self, source_id: str, hour: int) -> int:
        packed = await self._packed.between(source_id, hour, hour)
        loose = (await self._loose.read(source_id)).get(hour)
        return sum(pack.size for pack in packed) + (0 if loose is None else loose.nbytes)

    async def totals(self, source_ids: Sequence[str]) -> dict[str, int]:
        """Return the bytes that are kept of sources: two commands a source, few trips for all."""
        totals: dict[str, int] = {}
        for some in _parts(source_ids):
            async with self._redis.pipeline(transaction=False) as pipe:
                for source_id in some:
                    keys = KeyframeKeys(source_id)
                    pipe.hget(keys.totals, "size")
                    pipe.hgetall(keys.loose)
                replies = await pipe.execute()
            for source_id, packed, loose in zip(some, replies[::2], replies[1::2], strict=True):
                totals[source_id] = int(packed or 0) + sum(one.nbytes for one in parse_loose(loose).values())
        return totals


def _parts(source_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(source_ids), _SOURCES_PER_TRIP):
        yield source_ids[start : start + _SOURCES_PER_TRIP]
