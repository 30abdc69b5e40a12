"""Totals that outlive processes: frames kept, frames dropped, reconnects, questions."""

from contextlib import suppress
from typing import Any

from redis.asyncio import Redis

from store.connection import StoreFull

_KEY = "counters"


class Counters:
    """Named totals of the whole installation. Raises StoreUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def bump(self, name: str, amount: int = 1) -> None:
        """Add to a total, which begins at 0. Nothing is counted while the store is full: what is counted goes on."""
        with suppress(StoreFull):
            await self._redis.hincrby(_KEY, name, amount)

    async def counters(self) -> dict[str, int]:
        """Return all totals, by name."""
        totals: dict[Any, Any] = await self._redis.hgetall(_KEY)
        return {name.decode(): int(total) for name, total in sorted(totals.items())}
