"""Which hours are sealed: their manifests in Redis, which change only if the hour has not changed meanwhile."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from redis.asyncio import Redis

from store.format import BLOCKS_PER_HOUR, TokenFormat
from store.hour_files import HourFiles, HourManifest
from store.keys import EVEN_WHEN_FULL, NEW_MARK, SEALED_MARK, KeyframeKeys, TimelineKeys, erased_key, formats_key
from store.packs import Pack
from store.segments import Manifest

_HOURS_PER_COMMAND = 1000
_ANY_MARK = "*"
_CHANGES_KEPT_S = 24 * 3600  # longer than anybody packs an hour
_DISOWNED_S = 24 * 3600  # who disowns a file removes it at once

# KEYS: changes, sealed hours, manifests, totals, disowned files.
# ARGV: hour, changes it had, manifest it had, manifest it gets.
# Nothing happens, and 0 is returned, if the hour has changed since the caller read it, or if the file is disowned.
_REPLACE = """
local hour = ARGV[1]
if ARGV[4] ~= '' and redis.call('SISMEMBER', KEYS[5], cjson.decode(ARGV[4]).file) == 1 then return 0 end
if (redis.call('HGET', KEYS[1], hour) or '') ~= ARGV[2] then return 0 end
if (redis.call('HGET', KEYS[3], hour) or '') ~= ARGV[3] then return 0 end
redis.call('HDEL', KEYS[1], hour)
for at, sign in pairs({[3] = -1, [4] = 1}) do
  if ARGV[at] ~= '' then
    local manifest = cjson.decode(ARGV[at])
    for _, field in ipairs({'frames', 'size'}) do
      redis.call('HINCRBY', KEYS[4], field, string.format('%.0f', sign * manifest[field]))
    end
  end
end
if ARGV[4] == '' then
  redis.call('HDEL', KEYS[3], hour)
  redis.call('ZREM', KEYS[2], hour)
else
  redis.call('HSET', KEYS[3], hour, ARGV[4])
  redis.call('ZADD', KEYS[2], hour, hour)
end
if redis.call('ZCARD', KEYS[2]) == 0 then redis.call('DEL', KEYS[4]) end
"""

# What the manifests add up to, counted anew. KEYS: manifests, totals.
_RECOUNT = """
local totals = {frames = 0, size = 0}
for _, text in ipairs(redis.call('HVALS', KEYS[1])) do
  local manifest = cjson.decode(text)
  for field, sum in pairs(totals) do totals[field] = sum + manifest[field] end
end
redis.call('DEL', KEYS[2])
if totals.frames == 0 then return end
for field, sum in pairs(totals) do redis.call('HSET', KEYS[2], field, string.format('%.0f', sum)) end
"""

# More KEYS: mark of the last erasure, blocks, frame counter, formats, then t, p, m, v of every block of the hour.
# More ARGV: mark that it had or _ANY_MARK, fingerprint, format as JSON, frames that are gone, then the blocks' numbers.
_REPLACE_BLOCKS = f"""{NEW_MARK}
if ARGV[5] ~= '{_ANY_MARK}' and (redis.call('GET', KEYS[6]) or '') ~= ARGV[5] then return 0 end
{_REPLACE}
redis.call('HSET', KEYS[1], '{SEALED_MARK}', mark)
for i = 9, #ARGV do
  local at = 10 + 4 * (i - 9)
  redis.call('UNLINK', KEYS[at], KEYS[at + 1], KEYS[at + 2], KEYS[at + 3])
  redis.call('ZREM', KEYS[7], ARGV[i])
  redis.call('HDEL', KEYS[1], 'b' .. ARGV[i])
end
if ARGV[4] ~= '' then redis.call('HSETNX', KEYS[9], ARGV[6], ARGV[7]) end
if tonumber(ARGV[8]) ~= 0 then redis.call('DECRBY', KEYS[8], ARGV[8]) end
if redis.call('ZCARD', KEYS[7]) == 0 and redis.call('ZCARD', KEYS[2]) == 0 then
  redis.call('DEL', KEYS[1], KEYS[8])
  redis.call('HDEL', KEYS[9], ARGV[6])
end
return 1
"""

# KEYS: manifests, disowned files. ARGV: hour, seconds, then files of the hour. Returns those that do not count.
_DISOWN = f"""{EVEN_WHEN_FULL}
local text = redis.call('HGET', KEYS[1], ARGV[1])
local counts = text and cjson.decode(text).file
local disowned = {{}}
for i = 3, #ARGV do
  if ARGV[i] ~= counts then
    redis.call('SADD', KEYS[2], ARGV[i])
    table.insert(disowned, ARGV[i])
  end
end
redis.call('EXPIRE', KEYS[2], ARGV[2])
return disowned
"""

_TOUCH = f"""{EVEN_WHEN_FULL}{NEW_MARK}
redis.call('HSET', KEYS[1], ARGV[1], mark)
"""


class _Keys(Protocol):
    @property
    def changes(self) -> str: ...
    @property
    def hours(self) -> str: ...
    @property
    def sealed(self) -> str: ...
    @property
    def totals(self) -> str: ...
    @property
    def disowned(self) -> str: ...


M = TypeVar("M", bound=HourManifest)
K = TypeVar("K", bound=_Keys)


class _Hours(ABC, Generic[M, K]):
    """The manifests of all sources' sealed hours. Raises StoreUnavailable."""

    def __init__(self, redis: Redis, manifest: type[M]) -> None:
        self._redis = redis
        self._manifest = manifest
        self._touch = redis.register_script(_TOUCH)
        self._disown = redis.register_script(_DISOWN)
        self._recount = redis.register_script(_RECOUNT)

    @abstractmethod
    def keys(self, source_id: str) -> K:
        """Return the names of a source's keys."""

    async def between(self, source_id: str, start: int | None = None, end: int | None = None) -> list[M]:
        """Return the manifests of the sealed hours start to end, both included, in order; None leaves a side open."""
        keys = self.keys(source_id)
        low, high = ("-inf" if start is None else start), ("+inf" if end is None else end)
        hours: list[Any] = await self._redis.zrangebyscore(keys.hours, low, high)
        return await self._manifests(keys, [int(hour) for hour in hours])

    async def ends(self, source_id: str) -> tuple[M, M] | None:
        """Return the manifests of the first and the last sealed hour, None if there is none."""
        keys = self.keys(source_id)
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
        """Return a mark that differs after every change of what of the hour is not sealed yet."""
        mark: Any = await self._redis.hget(self.keys(source_id).changes, str(hour))
        return "" if mark is None else mark.decode()

    async def marks(self, source_ids: Sequence[str]) -> list[dict[str, str]]:
        """Return for each source the marks of what is not sealed, and that of all that is."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for source_id in source_ids:
                pipe.hgetall(self.keys(source_id).changes)
            found: list[Any] = await pipe.execute()
        return [{field.decode(): mark.decode() for field, mark in marks.items()} for marks in found]

    async def touch(self, source_id: str, hour: int) -> None:
        """Let every `replace` fail that has begun before now."""
        await self._touch([self.keys(source_id).changes], [hour])

    async def disown(self, source_id: str, hour: int, *files: str) -> list[str]:
        """Return those of the files that no manifest names, and see to it that none ever does.

        Only these may be removed: somebody may have found a file and let it count, though who wrote it could not.
        """
        keys = self.keys(source_id)
        found: list[Any] = await self._disown([keys.sealed, keys.disowned], [hour, _DISOWNED_S, *files])
        return [file.decode() for file in found]

    async def recount(self, source_id: str) -> None:
        """Count anew what the hours of a source add up to."""
        keys = self.keys(source_id)
        await self._recount([keys.sealed, keys.totals])

    async def settle(
        self, files: HourFiles, source_id: str, hour: int, old: M | None, new: M | None, *, done: bool
    ) -> bool:
        """Remove what a `replace` that was done or not has left over, and return whether `new` counts.

        It may count though the `replace` failed: somebody found its file, and adopted it.
        """
        superseded = old if done else new
        if superseded is None:
            return done
        unnamed = await self.disown(source_id, hour, superseded.file)
        await files.remove(source_id, hour, *unnamed)
        return done or not unnamed

    async def remove_leftovers(
        self, files: HourFiles, source_id: str, label: str, first: int | None, last: int | None
    ) -> None:
        """Remove files that no manifest names, of the hours first to last: a crash has cut short what wrote them."""
        for hour in await files.hours(source_id):
            if (first is not None and hour < first) or (last is not None and hour > last):
                continue
            found = await files.files(source_id, hour, label)
            await files.remove(source_id, hour, *await self.disown(source_id, hour, *found))

    async def _manifests(self, keys: K, hours: Sequence[int]) -> list[M]:
        found = []
        for start in range(0, len(hours), _HOURS_PER_COMMAND):
            some = hours[start : start + _HOURS_PER_COMMAND]
            texts = await self._redis.hmget(keys.sealed, [str(hour) for hour in some])
            found += [self._manifest.model_validate_json(text) for text in texts if text is not None]
        return found


class SealedHours(_Hours[Manifest, TimelineKeys]):
    """The segments that stand for hours, for tokens of one format."""

    def __init__(self, redis: Redis, format: TokenFormat) -> None:
        super().__init__(redis, Manifest)
        self._format = format
        self._replace = redis.register_script(_REPLACE_BLOCKS)

    def keys(self, source_id: str) -> TimelineKeys:
        return TimelineKeys(source_id, self._format.fingerprint)

    async def as_of(self, source_id: str) -> str:
        """Return a mark that differs after every erasure from the source's memory."""
        mark: Any = await self._redis.get(erased_key(source_id))
        return "" if mark is None else mark.decode()

    async def replace(
        self,
        source_id: str,
        hour: int,
        old: Manifest | None,
        new: Manifest | None,
        *,
        changes: str,
        as_of: str | None = None,
        gone: int = 0,
    ) -> bool:
        """Let `new` stand for the hour instead of `old` and all of its hot blocks; it has `gone` frames less.

        False, and nothing is changed, if the hour is not any more as it was when `old` and `changes` were read, or if
        anything of the source was erased since `as_of`.
        """
        blocks = list(range(hour * BLOCKS_PER_HOUR, (hour + 1) * BLOCKS_PER_HOUR))
        return await self._swap(source_id, hour, old, new, blocks, changes=changes, as_of=as_of, gone=gone)

    async def adopt(self, source_id: str, found: Manifest, lost: Manifest | None) -> bool:
        """Let `found` stand for its hour instead of `lost`; hot blocks stay. False if the hour changed meanwhile."""
        changes, gone = await self.changes(source_id, found.hour), (0 if lost is None else lost.frames) - found.frames
        return await self._swap(source_id, found.hour, lost, found, [], changes=changes, as_of=None, gone=gone)

    async def _swap(
        self,
        source_id: str,
        hour: int,
        old: Manifest | None,
        new: Manifest | None,
        blocks: Sequence[int],
        *,
        changes: str,
        as_of: str | None,
        gone: int,
    ) -> bool:
        keys, format = self.keys(source_id), self._format
        named = [keys.changes, keys.hours, keys.sealed, keys.totals, keys.disowned, erased_key(source_id)]
        named += [keys.blocks, keys.frames, formats_key(source_id), *keys.of_blocks(blocks)]
        about: list[str | int] = [hour, changes, _text(old), _text(new), _ANY_MARK if as_of is None else as_of]
        about += [format.fingerprint, format.model_dump_json(), gone, *blocks]
        return bool(await self._replace(named, about))


class PackedHours(_Hours[Pack, KeyframeKeys]):
    """The packs that stand for the keyframes of hours."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, Pack)
        self._replace = redis.register_script(f"{_REPLACE}\nreturn 1")

    def keys(self, source_id: str) -> KeyframeKeys:
        return KeyframeKeys(source_id)

    async def replace(self, source_id: str, hour: int, old: Pack | None, new: Pack | None, *, changes: str) -> bool:
        """Let `new` stand for the hour instead of `old`; False, and nothing is changed, if the hour has changed."""
        keys = self.keys(source_id)
        named = [keys.changes, keys.hours, keys.sealed, keys.totals, keys.disowned]
        return bool(await self._replace(named, [hour, changes, _text(old), _text(new)]))

    async def drop(self, source_id: str) -> None:
        """Forget all hours of a source; whoever packs one of them just now fails."""
        keys = self.keys(source_id)
        await self._redis.delete(keys.hours, keys.sealed, keys.totals)
        await self._redis.expire(keys.changes, _CHANGES_KEPT_S)  # without its marks nothing would have changed


def _text(manifest: HourManifest | None) -> str:
    return "" if manifest is None else manifest.model_dump_json()
