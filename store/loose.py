"""What is known of keyframes outside of packs without a listing: on an object store a listing costs money."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from store.keys import EVEN_WHEN_FULL, KeyframeKeys

_FROM = ":from"
_SOURCES_PER_TRIP = 250

# KEYS: loose hours. ARGV: hours and their bytes.
_NOTE = f"""{EVEN_WHEN_FULL}
for i = 1, #ARGV, 2 do redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) end
"""

# KEYS: loose hours. ARGV: hour, bytes that are not loose any more, and '' or the slot before which there are none.
_TAKE = f"""{EVEN_WHEN_FULL}
if redis.call('HINCRBY', KEYS[1], ARGV[1], -ARGV[2]) <= 0 then
  redis.call('HDEL', KEYS[1], ARGV[1], ARGV[1] .. '{_FROM}')
  return 0
end
if ARGV[3] ~= '' then redis.call('HSET', KEYS[1], ARGV[1] .. '{_FROM}', ARGV[3]) end
return 1
"""


@dataclass(frozen=True, slots=True)
class Loose:
    """The loose keyframes of an hour: their bytes, and the slot before which there are none.

    Bytes count before they are written, so a keyframe that is sent twice counts twice until its hour is packed.
    """

    nbytes: int
    start: int


class LooseHours:
    """The hours of all sources that have keyframes outside of packs. Raises StoreUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._note = redis.register_script(_NOTE)
        self._take = redis.register_script(_TAKE)

    async def add(self, sizes: Mapping[tuple[str, int], int]) -> None:
        """Note bytes that are about to be written, by source id and hour."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for (source_id, hour), nbytes in sizes.items():
                pipe.hincrby(KeyframeKeys(source_id).loose, str(hour), nbytes)
            await pipe.execute()

    async def note(self, sizes: Mapping[tuple[str, int], int]) -> None:
        """Note bytes that were written, by source id and hour, of hours of which nothing is noted.

        Who packed or erased while they were written has not seen them, but may have taken their bytes with the others.
        """
        of_sources: dict[str, list[int]] = {}
        for (source_id, hour), nbytes in sizes.items():
            of_sources.setdefault(source_id, []).extend((hour, nbytes))
        async with self._redis.pipeline(transaction=False) as pipe:
            for source_id, arguments in of_sources.items():
                await self._note([KeyframeKeys(source_id).loose], arguments, client=pipe)
            await pipe.execute()

    async def read(self, source_id: str) -> dict[int, Loose]:
        """Return the hours of a source."""
        return (await self.read_many([source_id]))[source_id]

    async def read_many(self, source_ids: Sequence[str]) -> dict[str, dict[int, Loose]]:
        """Return the hours of sources, in few trips."""
        found: dict[str, dict[int, Loose]] = {}
        for start in range(0, len(source_ids), _SOURCES_PER_TRIP):
            some = source_ids[start : start + _SOURCES_PER_TRIP]
            async with self._redis.pipeline(transaction=False) as pipe:
                for source_id in some:
                    pipe.hgetall(KeyframeKeys(source_id).loose)
                found |= zip(some, map(parse_loose, await pipe.execute()), strict=True)
        return found

    async def take(self, source_id: str, hour: int, nbytes: int, start: int | None = None) -> bool:
        """Note that so many bytes of an hour are packed or erased now, or were never written; True if more are noted.

        `start` is the slot before which there are none any more.
        """
        arguments = [hour, nbytes, "" if start is None else start]
        return bool(await self._take([KeyframeKeys(source_id).loose], arguments))

    async def drop(self, source_id: str) -> None:
        """Forget all hours of a source."""
        await self._redis.delete(KeyframeKeys(source_id).loose)


def parse_loose(fields: Mapping[Any, Any]) -> dict[int, Loose]:
    """Read the hash of a source."""
    values = {name.decode(): int(value) for name, value in fields.items()}
    return {
        int(name): Loose(max(value, 0), values.get(f"{name}{_FROM}", 0))
        for name, value in values.items()
        if not name.endswith(_FROM)
    }
