"""Which hours are sealed: their manifests in Redis, which change only if the hour has not changed meanwhile."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from store.connection import StoreUnavailable
from store.format import BLOCKS_PER_HOUR, TokenFormat
from store.hour_files import HourFileDamaged, HourFileGone, HourFiles, HourManifest
from store.keys import (
    EVEN_WHEN_FULL,
    LOST_SOURCES,
    NEW_MARK,
    SEALED_MARK,
    KeyframeKeys,
    TimelineKeys,
    erased_key,
    formats_key,
)
from store.packs import LABEL, Pack
from store.segments import Manifest
from store.slots import without

_HOURS_PER_COMMAND = 1000
_TRIES = 100  # of looks between which something is erased each time
_ANY_MARK = "*"
_CHANGES_KEPT_S = 24 * 3600  # longer than anybody packs an hour
_DISOWNED_S = 7 * 24 * 3600  # who disowns a file removes it at once; if it dies, who recovers does

# KEYS: changes, sealed hours, manifests, totals, disowned files, mark of the last erasure.
# ARGV: hour, changes it had, manifest it had and gets, mark of erasure or _ANY_MARK, '1' if the new one is all of it.
# Nothing happens, and 0 is returned, if the hour has changed since the caller read it, if anything of the source was
# erased since the mark, or if the file is disowned.
_REPLACE = f"""{EVEN_WHEN_FULL}
local hour = ARGV[1]
if ARGV[5] ~= '{_ANY_MARK}' and (redis.call('GET', KEYS[6]) or '') ~= ARGV[5] then return 0 end
if ARGV[4] ~= '' and redis.call('SISMEMBER', KEYS[5], cjson.decode(ARGV[4]).file) == 1 then return 0 end
if (redis.call('HGET', KEYS[1], hour) or '') ~= ARGV[2] then return 0 end
if (redis.call('HGET', KEYS[3], hour) or '') ~= ARGV[3] then return 0 end
if ARGV[6] == '1' then
  redis.call('HDEL', KEYS[1], hour)
  if ARGV[3] ~= '' then
    redis.call('SADD', KEYS[5], cjson.decode(ARGV[3]).file)
    redis.call('EXPIRE', KEYS[5], {_DISOWNED_S})
  end
end
for at, sign in pairs({{[3] = -1, [4] = 1}}) do
  if ARGV[at] ~= '' then
    local manifest = cjson.decode(ARGV[at])
    for _, field in ipairs({{'frames', 'size'}}) do
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

# More KEYS: blocks, frame counter, formats, then t, p, m, v of every block of the hour.
# More ARGV: fingerprint, format as JSON, frames that are gone, then the blocks' numbers.
_REPLACE_BLOCKS = f"""{_REPLACE}{NEW_MARK}
redis.call('HSET', KEYS[1], '{SEALED_MARK}', mark)
for i = 10, #ARGV do
  local at = 10 + 4 * (i - 10)
  redis.call('UNLINK', KEYS[at], KEYS[at + 1], KEYS[at + 2], KEYS[at + 3])
  redis.call('ZREM', KEYS[7], ARGV[i])
  redis.call('HDEL', KEYS[1], 'b' .. ARGV[i])
end
if ARGV[4] ~= '' then redis.call('HSETNX', KEYS[9], ARGV[7], ARGV[8]) end
if tonumber(ARGV[9]) ~= 0 then redis.call('DECRBY', KEYS[8], ARGV[9]) end
if redis.call('ZCARD', KEYS[7]) == 0 and redis.call('ZCARD', KEYS[2]) == 0 then
  redis.call('DEL', KEYS[1], KEYS[8])
  redis.call('HDEL', KEYS[9], ARGV[7])
end
return 1
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

# KEYS: sources to be looked at. ARGV: one more. The first write is one that Redis allows when it has no memory left.
_NOTE_LOST = """
redis.call('SREM', KEYS[1], ARGV[1])
redis.call('SADD', KEYS[1], ARGV[1])
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


@dataclass(frozen=True, slots=True)
class Before(Generic[M]):
    """An hour before something takes its place: its manifest, and the marks of what is not sealed and of erasures."""

    hour: int
    manifest: M | None
    changes: str
    as_of: str

    @property
    def next_generation(self) -> int:
        return 1 if self.manifest is None else self.manifest.generation + 1


class _Hours(ABC, Generic[M, K]):
    """The manifests of all sources' sealed hours. Raises StoreUnavailable."""

    def __init__(self, redis: Redis, manifest: type[M], label: str) -> None:
        self._redis = redis
        self._manifest = manifest
        self._label = label  # of the files
        self._note_lost = redis.register_script(_NOTE_LOST)
        self._touch = redis.register_script(_TOUCH)
        self._disown = redis.register_script(_DISOWN)
        self._recount = redis.register_script(_RECOUNT)

    @abstractmethod
    def keys(self, source_id: str) -> K:
        """Return the names of a source's keys."""

    async def at(self, source_id: str, hour: int) -> M | None:
        """Return the manifest of an hour, None if it is not sealed."""
        return self._read(await self._redis.hget(self.keys(source_id).sealed, str(hour)))

    async def between(self, source_id: str, start: int | None = None, end: int | None = None) -> list[M]:
        """Return the manifests of the sealed hours start to end, both included, in order; None leaves a side open."""
        keys = self.keys(source_id)
        low, high = ("-inf" if start is None else start), ("+inf" if end is None else end)
        hours: list[Any] = await self._redis.zrangebyscore(keys.hours, low, high)
        return await self._manifests(keys, [int(hour) for hour in hours])

    async def ends(self, source_id: str) -> tuple[M, M] | None:
        """Return the manifests of the first and the last sealed hour, None if there is none."""
        keys = self.keys(source_id)
        for _ in range(_TRIES):
            async with self._redis.pipeline() as pipe:
                pipe.zrange(keys.hours, 0, 0)
                pipe.zrange(keys.hours, -1, -1)
                first, last = await pipe.execute()
            if not first:
                return None
            found = await self._manifests(keys, [int(hour) for hour in (*first, *last)])
            if len(found) == 2:  # else one of the hours was erased between the two trips
                return found[0], found[1]
        raise StoreUnavailable(
            f"the sealed hours of {source_id} have lost manifests that their index names; "
            "check that Redis runs with maxmemory-policy noeviction"
        )

    async def marks(self, source_ids: Sequence[str]) -> list[dict[str, str]]:
        """Return for each source the marks of what is not sealed, and that of all that is."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for source_id in source_ids:
                pipe.hgetall(self.keys(source_id).changes)
            found: list[Any] = await pipe.execute()
        return [{field.decode(): mark.decode() for field, mark in marks.items()} for marks in found]

    async def recount(self, source_id: str) -> None:
        """Count anew what the hours of a source add up to."""
        keys = self.keys(source_id)
        await self._recount([keys.sealed, keys.totals])

    # Another file for an hour

    async def as_of(self, source_id: str) -> str:
        """Return a mark that differs after every erasure from the source's memory."""
        mark: Any = await self._redis.get(erased_key(source_id))
        return "" if mark is None else mark.decode()

    async def before(self, source_id: str, hour: int) -> Before[M]:
        """Return how an hour is now."""
        keys = self.keys(source_id)
        async with self._redis.pipeline() as pipe:
            pipe.hget(keys.sealed, str(hour))
            pipe.hget(keys.changes, str(hour))
            pipe.get(erased_key(source_id))
            manifest, changes, as_of = await pipe.execute()
        return Before(hour, self._read(manifest), (changes or b"").decode(), (as_of or b"").decode())

    async def touch(self, source_id: str, hour: int) -> None:
        """Let every `put` fail whose `before` was read before now."""
        await self._touch([self.keys(source_id).changes], [hour])

    async def put(
        self,
        files: HourFiles,
        source_id: str,
        before: Before[M],
        writing: Awaitable[M] | None,
        replace: Callable[[M | None], Awaitable[bool]],
    ) -> bool:
        """Write a file, or none, let it take an hour's place, and remove the one that does not count then.

        False, and nothing is changed, if `replace` finds that the hour is not any more as it was before.
        """
        try:
            new = None if writing is None else await writing
        except HourFileGone:  # an erasure took it for what a crash has left, and so the hour has changed
            return False
        done = await replace(new)
        if done:  # with which the other one is disowned: it is removed as a leftover if this process ends here
            superseded = [] if before.manifest is None else [before.manifest.file]
        else:  # it may count though it was not let in: somebody found it, and adopted it
            superseded = [] if new is None else await self._disowned(source_id, before.hour, new.file)
        if superseded:
            await files.remove(source_id, before.hour, *superseded)
        return done or (new is not None and not superseded)

    async def require_known(self, files: HourFiles, source_id: str, hour: int, slots: NDArray[np.int64]) -> None:
        """Raise StoreUnavailable if no manifest of an hour is known, but files that hold more of it than these slots.

        Redis has lost sight of them then, and whoever recovers what is lost looks at the source next. Else they are
        what a crash has left, or being written just now.
        """
        if await self.at(source_id, hour) is not None:
            return
        names = await files.files(source_id, hour, self._label)
        disowned = await self._redis.smismember(self.keys(source_id).disowned, names) if names else []
        for name, is_disowned in zip(names, disowned, strict=True):
            with suppress(HourFileGone, HourFileDamaged):
                if not is_disowned and len(without((await files.manifest(source_id, hour, name)).slots, slots)):
                    await self._note_lost([LOST_SOURCES], [source_id])
                    raise StoreUnavailable(
                        f"hour {hour} of {source_id} has files that Redis has lost sight of; the janitor looks for "
                        "them: try again in a minute"
                    )

    async def remove_leftovers(self, files: HourFiles, source_id: str, first: int | None, last: int | None) -> None:
        """Remove files that no manifest names, of the hours first to last: a crash has cut short what wrote them."""
        for hour in await files.hours(source_id):
            if (first is not None and hour < first) or (last is not None and hour > last):
                continue
            found = await files.files(source_id, hour, self._label)
            await files.remove(source_id, hour, *await self._disowned(source_id, hour, *found))

    async def _disowned(self, source_id: str, hour: int, *files: str) -> list[str]:
        """Return those of the files that no manifest names, and see to it that none ever does.

        Only these may be removed: somebody may have found a file and let it count, though who wrote it could not.
        """
        keys = self.keys(source_id)
        found: list[Any] = await self._disown([keys.sealed, keys.disowned], [hour, _DISOWNED_S, *files])
        return [file.decode() for file in found]

    async def _manifests(self, keys: K, hours: Sequence[int]) -> list[M]:
        found = []
        for start in range(0, len(hours), _HOURS_PER_COMMAND):
            some = hours[start : start + _HOURS_PER_COMMAND]
            texts = await self._redis.hmget(keys.sealed, [str(hour) for hour in some])
            found += [manifest for text in texts if (manifest := self._read(text)) is not None]
        return found

    def _read(self, text: Any) -> M | None:
        return None if text is None else self._manifest.model_validate_json(text)


class SealedHours(_Hours[Manifest, TimelineKeys]):
    """The segments that stand for hours, for tokens of one format."""

    def __init__(self, redis: Redis, format: TokenFormat) -> None:
        super().__init__(redis, Manifest, format.fingerprint)
        self._format = format
        self._replace = redis.register_script(_REPLACE_BLOCKS)

    def keys(self, source_id: str) -> TimelineKeys:
        return TimelineKeys(source_id, self._format.fingerprint)

    async def replace(
        self, source_id: str, before: Before[Manifest], new: Manifest | None, *, as_of: str | None = None, gone: int = 0
    ) -> bool:
        """Let `new` stand for an hour instead of its manifest and all of its hot blocks; it has `gone` frames less.

        False, and nothing is changed, if the hour is not any more as it was before, or if anything of the source was
        erased since `as_of`.
        """
        blocks = range(before.hour * BLOCKS_PER_HOUR, (before.hour + 1) * BLOCKS_PER_HOUR)
        return await self._swap(source_id, before, new, blocks, as_of=as_of, gone=gone)

    async def adopt(self, source_id: str, found: Manifest, lost: Manifest | None) -> bool:
        """Let `found` stand for its hour instead of `lost`; hot blocks stay. False if the hour changed meanwhile."""
        before = replace(await self.before(source_id, found.hour), manifest=lost)
        gone = (0 if lost is None else lost.frames) - found.frames
        return await self._swap(source_id, before, found, (), as_of=None, gone=gone)

    async def _swap(
        self,
        source_id: str,
        before: Before[Manifest],
        new: Manifest | None,
        blocks: Sequence[int],
        *,
        as_of: str | None,
        gone: int,
    ) -> bool:
        keys, format = self.keys(source_id), self._format
        named = _named(keys, source_id)
        named += [keys.blocks, keys.frames, formats_key(source_id), *keys.of_blocks(blocks)]
        about = _about(before, new, as_of, is_all=bool(blocks))
        about += [format.fingerprint, format.model_dump_json(), gone, *blocks]
        return bool(await self._replace(named, about))


class PackedHours(_Hours[Pack, KeyframeKeys]):
    """The packs that stand for the keyframes of hours."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, Pack, LABEL)
        self._replace = redis.register_script(f"{_REPLACE}\nreturn 1")

    def keys(self, source_id: str) -> KeyframeKeys:
        return KeyframeKeys(source_id)

    async def replace(
        self, source_id: str, before: Before[Pack], new: Pack | None, *, as_of: str | None = None
    ) -> bool:
        """Let `new` stand for an hour instead of its pack.

        False, and nothing is changed, if the hour is not any more as it was before, or if anything of the source was
        erased since `as_of`.
        """
        about = _about(before, new, as_of, is_all=True)
        return bool(await self._replace(_named(self.keys(source_id), source_id), about))

    async def adopt(self, source_id: str, found: Pack, lost: Pack | None) -> bool:
        """Let `found` stand for its hour instead of `lost`. False if the hour changed meanwhile."""
        before = replace(await self.before(source_id, found.hour), manifest=lost)
        about = _about(before, found, None, is_all=False)
        return bool(await self._replace(_named(self.keys(source_id), source_id), about))

    async def drop(self, source_id: str) -> None:
        """Forget all hours of a source."""
        keys = self.keys(source_id)
        await self._redis.delete(keys.hours, keys.sealed, keys.totals)
        await self._redis.expire(keys.changes, _CHANGES_KEPT_S)  # without its marks nothing would have changed


def _named(keys: _Keys, source_id: str) -> list[str]:
    return [keys.changes, keys.hours, keys.sealed, keys.totals, keys.disowned, erased_key(source_id)]


def _about(before: Before[M], new: M | None, as_of: str | None, *, is_all: bool) -> list[str | int]:
    was, becomes = ("" if one is None else one.model_dump_json() for one in (before.manifest, new))
    return [before.hour, before.changes, was, becomes, _ANY_MARK if as_of is None else as_of, "1" if is_all else ""]
