"""Who may write for a source: leases with an epoch that fences replaced owners off."""

from collections.abc import Iterable, Mapping

from redis.asyncio import Redis

from store.keys import EVEN_WHEN_FULL

# Epochs follow the server's clock instead of counting from 1: a server that lost its last second, or all its data,
# still never gives out an epoch twice.
_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function exact(number) return string.format('%.0f', number) end
"""

_ACQUIRE = f"""{EVEN_WHEN_FULL}{_NOW}
local lease = redis.call('HMGET', KEYS[1], 'until', 'epoch')
if lease[1] and tonumber(lease[1]) > now then return false end
local epoch = math.max((tonumber(lease[2] or '0') or 0) + 1, now)
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'until', exact(now + ARGV[2]), 'epoch', exact(epoch))
return epoch
"""

# A lease that ran out unnoticed may be renewed as long as nobody else took it: its epoch is still the newest.
_RENEW = f"""{EVEN_WHEN_FULL}{_NOW}
local lease = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'until', exact(now + ARGV[3]))
return 1
"""

_RELEASE = f"""{EVEN_WHEN_FULL}
local lease = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'owner', '', 'until', '0')
return 1
"""

_REVOKE = f"""{EVEN_WHEN_FULL}{_NOW}
local epoch = math.max((tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0) + 1, now)
redis.call('HSET', KEYS[1], 'owner', '', 'until', '0', 'epoch', exact(epoch))
return epoch
"""

_OWNER = f"""{_NOW}
local lease = redis.call('HMGET', KEYS[1], 'owner', 'until')
if lease[2] and tonumber(lease[2]) > now then return lease[1] end
return false
"""


def lease_key(source_id: str) -> str:
    """The hash that holds a source's owner, `until` (ms, server time) and epoch."""
    return f"own:{{{source_id}}}"


class Leases:
    """Leases of sources by the server's clock. Raises StoreUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._acquire = redis.register_script(_ACQUIRE)
        self._renew = redis.register_script(_RENEW)
        self._release = redis.register_script(_RELEASE)
        self._revoke = redis.register_script(_REVOKE)
        self._owner = redis.register_script(_OWNER)

    async def acquire(self, source_id: str, owner: str, ttl_s: float) -> int | None:
        """Take a source that nobody holds and return the epoch of this ownership; None if it is held, be it by us."""
        return (await self.acquire_many([source_id], owner, ttl_s)).get(source_id)

    async def acquire_many(
        self, source_ids: Iterable[str], owner: str, ttl_s: float, *, limit: int | None = None
    ) -> dict[str, int]:
        """Take at most `limit` of the sources, first come first, and return their epochs: two trips for any number."""
        wanted = (await self.unowned(source_ids))[:limit]
        async with self._redis.pipeline(transaction=False) as pipe:
            for source_id in wanted:
                await self._acquire([lease_key(source_id)], [owner, round(ttl_s * 1000)], client=pipe)
            epochs = await pipe.execute()
        return {source_id: int(epoch) for source_id, epoch in zip(wanted, epochs, strict=True) if epoch is not None}

    async def unowned(self, source_ids: Iterable[str]) -> list[str]:
        """Return those of the sources that nobody holds now, in the given order."""
        asked = list(source_ids)
        async with self._redis.pipeline(transaction=False) as pipe:
            for source_id in asked:
                await self._owner([lease_key(source_id)], client=pipe)
            owners = await pipe.execute()
        return [source_id for source_id, owner in zip(asked, owners, strict=True) if owner is None]

    async def renew(self, owner: str, held: Mapping[str, int], ttl_s: float) -> frozenset[str]:
        """Prolong the leases of `held` (source id to epoch) and return the sources that are no longer ours."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for source_id, epoch in held.items():
                await self._renew([lease_key(source_id)], [owner, epoch, round(ttl_s * 1000)], client=pipe)
            renewed = await pipe.execute()
        return frozenset(source_id for source_id, ours in zip(held, renewed, strict=True) if not ours)

    async def release(self, owner: str, held: Mapping[str, int]) -> None:
        """Give the leases of `held` back; those that are no longer ours stay as they are."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for source_id, epoch in held.items():
                await self._release([lease_key(source_id)], [owner, epoch], client=pipe)
            await pipe.execute()

    async def revoke(self, source_id: str) -> None:
        """Take a source from whoever holds it: its writes are refused from now on, and anyone may acquire it."""
        await self._revoke([lease_key(source_id)])

    async def stale(self, epochs: Mapping[str, int]) -> frozenset[str]:
        """Return those of the sources of which an epoch is given that is not, or no longer, their newest."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for source_id in epochs:
                pipe.hget(lease_key(source_id), "epoch")
            newest = await pipe.execute()
        return frozenset(
            source_id
            for (source_id, epoch), known in zip(epochs.items(), newest, strict=True)
            if known is None or int(known) != epoch
        )

    async def owner(self, source_id: str) -> str | None:
        """Return who holds the source now."""
        owner = await self._owner([lease_key(source_id)])
        return None if owner is None else owner.decode()
