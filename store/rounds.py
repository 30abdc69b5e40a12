"""Work for one thing after the other, of which a bad one does not stop the rest."""

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from redis.asyncio import Redis

from store.connection import StoreFull, StoreUnavailable
from store.hour_files import HourFileDamaged

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
T = TypeVar("T")


class Rounds:
    """Acts on one thing after the other; `left_out` counts those whose files could not be read or written then."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.left_out = 0

    async def for_each(
        self, items: Iterable[Item], act: Callable[[Item], Awaitable[T]], name: Callable[[Item], str]
    ) -> list[T]:
        """Act on every item and return what came of those that were not left out.

        Raises StoreUnavailable without Redis, and StoreFull: the next one would fare no better.
        """
        done = []
        for item in items:
            try:
                done.append(await act(item))
            except StoreFull:
                raise
            except (StoreUnavailable, HourFileDamaged) as error:
                await self._redis.ping()
                logger.error("%s is left for later: %s", name(item), error)
                self.left_out += 1
        return done
