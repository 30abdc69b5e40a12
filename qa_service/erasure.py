"""Erasure of memory, with a receipt."""

import logging
import time
from uuid import uuid4

from qa_service import clock
from qa_service.coverage import RangeReader, asked_range, write_time
from qa_service.errors import StateConflict
from qa_service.keys import Caller
from qa_service.memory_schemas import ErasedCounts, ErasureReceipt
from store.erasures import FOLLOW_EVERY_S
from store.finish import finish
from store.gaps import Gap
from store.leases import Leases
from store.memory import Memory
from store.source import Source, Stream, Video
from store.sources import Sources

logger = logging.getLogger(__name__)

IN_FLIGHT_S = 300.0  # frames of so long ago may still be on their way to the store


class Erasure:
    """Erases frames of sources. Raises StreamNotFound, VideoNotFound and StoreUnavailable."""

    def __init__(self, reader: RangeReader, sources: Sources, leases: Leases, memory: Memory) -> None:
        self._reader = reader
        self._sources = sources
        self._leases = leases
        self._memory = memory

    async def erase(self, caller: Caller, source_id: str, start: str | None, end: str | None) -> ErasureReceipt:
        """Erase the slots that begin in [start, end), wherever they are kept; the source itself stays.

        Raises SourceForbidden, BadTimeRange, and StateConflict for a video that is still read.
        """
        caller.require_source(source_id)
        source = await self._reader.source(source_id)
        start_s, end_s = asked_range(source, start, end)
        if isinstance(source, Video) and source.is_being_read:
            raise StateConflict(f"{source_id} is still read: wait until it is ready, or delete it")
        if isinstance(source, Stream) and (end_s is None or end_s > self._reader.now() - IN_FLIGHT_S):
            await self._leases.revoke(source_id)  # what is on its way is refused; ingest goes on with the next picture
        low = None if start_s is None else clock.first_slot(start_s, source.fps)
        high = None if end_s is None else clock.first_slot(end_s, source.fps)
        if isinstance(source, Stream) and source.enabled and high is None and low is not None:
            high = max(clock.first_slot(self._reader.now(), source.fps), low + 1)  # what comes from now on stays
        await self._note(source, low, high)
        return await finish(self._carry_out(source, start_s, end_s, low, high))  # whoever waits for the receipt

    async def _carry_out(
        self, source: Source, start_s: float | None, end_s: float | None, low: int | None, high: int | None
    ) -> ErasureReceipt:
        erased = await self._memory.erase(source.id, low, high)
        receipt = ErasureReceipt(
            id=f"era_{uuid4().hex[:12]}",
            source_id=source.id,
            start=None if start_s is None else write_time(source, start_s),
            end=None if end_s is None else write_time(source, end_s),
            erased=ErasedCounts(
                redis_frames=erased.frames.hot, sealed_frames=erased.frames.sealed, keyframes=erased.keyframes
            ),
            caches_within_s=2 * FOLLOW_EVERY_S,
            redis_log_rewritten=await self._memory.scrub(),
            completed_at=clock.write_stream_time(time.time()),
        )
        logger.info("erased %s", receipt.model_dump_json())
        return receipt

    async def _note(self, source: Source, low: int | None, high: int | None) -> None:
        """Record why the slots will be absent: first, for who erases may die before the end."""
        extent = await self._memory.extent(source.id)
        if extent is None:
            return
        first, behind = extent[0], extent[1] + 1
        if isinstance(source, Stream) and source.enabled:  # frames on their way are refused, and told by this
            behind = max(behind, clock.first_slot(self._reader.now(), source.fps))
        start = first if low is None else max(low, first)
        end = behind if high is None else min(high, behind)
        if start < end:
            await self._sources.add_gaps(source.id, None, [Gap(start_slot=start, end_slot=end, reason="erased")])
