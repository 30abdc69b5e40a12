"""Loads the newest hours of all sources before anybody searches them, and keeps up with what becomes of them."""

import asyncio
import logging

import numpy as np
from numpy.typing import NDArray

from store.connection import StoreUnavailable
from store.format import HOUR_SLOTS
from store.hour_states import HourState, SourceHours
from store.shard_cache import ShardCache, each
from store.source import Source, Video
from store.sources import Sources

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
        found = await self._cache.hours([source.id for source in sources])
        return await asyncio.to_thread(self._fitting, sources, [found[source.id] for source in sources])

    def _fitting(self, sources: list[Source], known: list[SourceHours]) -> list[HourState]:
        if not sources:
            return []
        pairs = list(zip(sources, known, strict=True))
        ends_s = np.concatenate([_ends_s(source, mine.hours) for source, mine in pairs])
        nbytes = np.concatenate([mine.bytes_of_shards(self._width) for mine in known])
        hours = np.concatenate([mine.hours for mine in known])
        places = np.repeat(np.arange(len(known)), [len(mine.hours) for mine in known])
        newest = np.argsort(-ends_s, kind="stable")
        fitting = newest[np.cumsum(nbytes[newest]) <= self._max_bytes]
        return [known[place].state(int(hour)) for place, hour in zip(places[fitting], hours[fitting], strict=True)]

    async def _make(self, state: HourState) -> None:
        try:
            await self._cache.make(state)
        except StoreUnavailable as error:  # the others may be there all the same
            logger.warning("hour %d of %s cannot be searched: %s", state.hour, state.source_id, error)


def _ends_s(source: Source, hours: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the ends (n,) of hours in Unix seconds; those of a video count from its registration on."""
    ends_s = (hours + 1) * HOUR_SLOTS / source.fps
    return source.created_at + ends_s if isinstance(source, Video) else ends_s
