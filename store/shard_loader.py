"""Loads the newest hours of all sources before anybody searches them, and keeps up with what becomes of them."""

import asyncio
import logging

from store.connection import StoreUnavailable
from store.format import HOUR_SLOTS
from store.shard_cache import HourState, ShardCache, each
from store.sources import Source, Sources, Video

logger = logging.getLogger(__name__)

FOLLOW_EVERY_S = 10.0  # an hour that grows meanwhile is brought up to date by whoever searches it


class ShardLoader:
    """Fills a cache of shards with the newest hours, as many as it may hold."""

    def __init__(self, cache: ShardCache, sources: Sources, *, width: int, max_bytes: int) -> None:
        self._cache = cache
        self._sources = sources
        self._width = width
        self._max_bytes = max_bytes

    async def run(self, every_s: float = FOLLOW_EVERY_S) -> None:
        """Load, and follow what is kept, until cancelled."""
        while True:
            try:
                await self.load()
            except StoreUnavailable as error:
                logger.warning("search shards cannot be loaded now: %s", error)
            except Exception:  # for as long as the process lives: searches do without, but slowly
                logger.exception("search shards were not loaded; it is tried again")
            await asyncio.sleep(every_s)

    async def load(self) -> None:
        """Make the shards of the newest hours that are missing or out of date, and let go of those of lost sources."""
        if not self._width:
            return  # the model makes no search vectors
        sources = [kept.source for kept in await self._sources.everything() if not kept.purge]
        for gone in self._cache.sources - {source.id for source in sources}:
            self._cache.drop(gone)
        newest = await self._newest(sources)
        # Used from the oldest to the newest, so that making one of them never costs another: all of them have room.
        missing = [state for state in reversed(newest) if self._cache.get(state) is None]
        await each(reversed(missing), self._make)

    async def _newest(self, sources: list[Source]) -> list[HourState]:
        """Return the newest hours of all sources that fit into the cache together, the newest first."""
        states = await self._cache.hours([source.id for source in sources])
        aged = [(_end_s(source, state.hour), state) for source in sources for state in states[source.id].values()]
        aged.sort(key=lambda one: one[0], reverse=True)
        fitting, room = [], self._max_bytes
        for _, state in aged:
            room -= state.bytes_of_shard(self._width)
            if room < 0:
                break
            fitting.append(state)
        return fitting

    async def _make(self, state: HourState) -> None:
        try:
            await self._cache.make(state)
        except StoreUnavailable as error:  # the others may be there all the same
            logger.warning("hour %d of %s cannot be searched: %s", state.hour, state.source_id, error)


def _end_s(source: Source, hour: int) -> float:
    """Return the end of an hour in Unix seconds; that of a video counts from its registration on."""
    end_s = (hour + 1) * HOUR_SLOTS / source.fps
    return source.created_at + end_s if isinstance(source, Video) else end_s
