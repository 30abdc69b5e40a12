"""Which hours of a timeline are sealed: their manifests in Redis, changed only together with the hot blocks."""

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from store.format import BLOCKS_PER_HOUR, TokenFormat
from store.keys import NEW_MARK, TimelineKeys, formats_key
from store.segments import Manifest

_HOURS_PER_COMMAND = 1000

# KEYS: blocks, changes, sealed hours, manifests, frame counter, formats, then t, p, m, v of every block of the hour.
# ARGV: hour, changes it had, manifest it had, manifest it gets, fingerprint, format as JSON, frames that are gone,
#       then the numbers of the blocks.
# Nothing happens, and 0 is returned, if the hour has changed since the caller read it.
_REPLACE = """
local hour = ARGV[1]
if (redis.call('HGET', KEYS[2], hour) or '') ~= ARGV[2] then return 0 end
if (redis.call('HGET', KEYS[4], hour) or '') ~= ARGV[3] then return 0 end
for i = 8, #ARGV do
  local at = 7 + 4 * (i - 8)
  redis.call('UNLINK', KEYS[at], KEYS[at + 1], KEYS[at + 2], KEYS[at + 3])
  redis.call('ZREM', KEYS[1], ARGV[i])
end
redis.call('HDEL', KEYS[2], hour)
if ARGV[4] == '' then
  redis.call('HDEL', KEYS[4], hour)
  redis.call('ZREM', KEYS[3], hour)
else
  redis.call('HSET', KEYS[4], hour, ARGV[4])
  redis.call('ZADD', KEYS[3], hour, hour)
  redis.call('HSETNX', KEYS[6], ARGV[5], ARGV[6])
end
if tonumber(ARGV[7]) > 0 then redis.call('DECRBY', KEYS[5], ARGV[7]) end
if redis.call('ZCARD', KEYS[1]) == 0 and redis.call('ZCARD', KEYS[3]) == 0 then
  redis.call('DEL', KEYS[2], KEYS[5])
  redis.call('HDEL', KEYS[6], ARGV[5])
end
return 1
"""


_TOUCH = f"""{NEW_MARK}
redis.call('HSET', KEYS[1], ARGV[1], mark)
"""


class SealedHours:
    """The manifests of all sources' sealed hours for tokens of one format. Raises StoreUnavailable."""

    def __init__(self, redis: Redis, format: TokenFormat) -> None:
        self._redis = redis
        self._format = format
        self._replace = redis.register_script(_REPLACE)
        self._touch = redis.register_script(_TOUCH)

    async def between(self, source_id: str, start: int | None = None, end: int | None = None) -> list[Manifest]:
        """Return the manifests of the sealed hours start to end, both included, in order; None leaves a side open."""
        keys = self._keys(source_id)
        low, high = ("-inf" if start is None else start), ("+inf" if end is None else end)
        hours: list[Any] = await self._redis.zrangebyscore(keys.hours, low, high)
        return await self._manifests(keys, [int(hour) for hour in hours])

    async def ends(self, source_id: str) -> tuple[Manifest, Manifest] | None:
        """Return the manifests of the first and the last sealed hour, None if there is none."""
        keys = self._keys(source_id)
        while True:
            async with self._redis.pipeline() as pipe:
                pipe.zrange(keys.hours, 0, 0)
                pipe.zrange(keys.hours, -1, -1)
                first, last = await pipe.execute()
            if not first:
                return None
            found = await self._manifests(keys, [int(hour) for hour in (*first, *last)])
            if len(found) == 2:  # else one of the hours was erased between the two trips
                return found[0], found[1]

    async def changes(self, source_id: str, hour: int) -> str:
        """Return a mark that differs after every change of the hour's hot blocks."""
        mark: Any = await self._redis.hget(self._keys(source_id).changes, str(hour))
        return "" if mark is None else mark.decode()

    async def touch(self, source_id: str, hour: int) -> None:
        """Let every `replace` fail that has begun before now."""
        await self._touch([self._keys(source_id).changes], [hour])

    async def replace(
        self, source_id: str, hour: int, old: Manifest | None, new: Manifest | None, *, changes: str, gone: int = 0
    ) -> bool:
        """Let `new` stand for the hour instead of `old` and all of its hot blocks, of which `gone` frames were erased.

        False, and nothing is changed, if the hour is not any more as it was when `old` and `changes` were read.
        """
        keys = self._keys(source_id)
        blocks = list(range(hour * BLOCKS_PER_HOUR, (hour + 1) * BLOCKS_PER_HOUR))
        named = [keys.blocks, keys.changes, keys.hours, keys.sealed, keys.frames, formats_key(source_id)]
        texts = ["" if manifest is None else manifest.model_dump_json() for manifest in (old, new)]
        about: list[str | int] = [hour, changes, *texts, self._format.fingerprint, self._format.model_dump_json(), gone]
        return bool(await self._replace([*named, *keys.of_blocks(blocks)], [*about, *blocks]))

    async def _manifests(self, keys: TimelineKeys, hours: Sequence[int]) -> list[Manifest]:
        found = []
        for start in range(0, len(hours), _HOURS_PER_COMMAND):
            some = hours[start : start + _HOURS_PER_COMMAND]
            texts = await self._redis.hmget(keys.sealed, [str(hour) for hour in some])
            found += [Manifest.model_validate_json(text) for text in texts if text is not None]
        return found

    def _keys(self, source_id: str) -> TimelineKeys:
        return TimelineKeys(source_id, self._format.fingerprint)
