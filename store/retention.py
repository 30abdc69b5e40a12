"""Retention: what is too old or too much goes, the oldest first, and its time is a gap with the reason `expired`.

A limit by age or by size comes down to the same: a slot of a source before which nothing stays. Sizes are kept by whole
hours, and an hour that may still get frames is never taken for them.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import TypeVar

from redis.asyncio import Redis

from store.format import HOUR_SLOTS
from store.memory import Erased, Memory
from store.rounds import Rounds
from store.settings import StoreSettings
from store.sizes import Hours, KeyframeHours, TokenHours
from store.source import Source, Stream
from store.sources import Sources
from store.timeline import NOTHING_ERASED

logger = logging.getLogger(__name__)

KEYFRAME_STEP_SLOTS = 600  # listing an object store costs money: retention of keyframes moves in steps of ten minutes
_NEVER = 1 << 62
T = TypeVar("T")


class Retention:
    """Ends the memory of sources where limits are passed. Raises StoreUnavailable."""

    def __init__(self, redis: Redis, sources: Sources, memory: Memory, settings: StoreSettings, rounds: Rounds) -> None:
        self._rounds = rounds
        self._sources = sources
        self._memory = memory
        self._settings = settings
        self._tokens = TokenHours(redis)
        self._keyframes = KeyframeHours(redis)
        self._counted: set[str] = set()  # sources whose files were added up since this process cares for them
        self._noted: dict[str, int] = {}  # the hour before which the time of a stream is noted as expired
        self._steps: dict[str, int] = {}  # how far keyframes of a stream are erased, in steps
        self._over: set[str] = set()  # limits that could not be kept at the last sweep

    async def sweep(self, sources: Sequence[Source]) -> Erased:
        """End what is over. Stopped at any point, the next sweep goes on from there."""
        now = time.time()

        async def end_old(source: Source) -> Erased:
            if source.id not in self._counted:
                await self._tokens.recount(source.id)
                await self._memory.keyframes.recount(source.id)
                self._counted.add(source.id)
            return await self._end_old(source, now) if isinstance(source, Stream) else Erased()

        erased = sum(await self._for_each(sources, end_old), Erased())
        # A picture is nothing without its frame: tokens first, so that keyframes are counted without theirs.
        erased += await self._make_room_for_tokens(sources, now)
        return erased + await self._make_room_for_keyframes(sources, now)

    def forget(self, source_id: str) -> None:
        """Let go of what is known of a source: it is gone."""
        self._counted.discard(source_id)
        self._noted.pop(source_id, None)
        self._steps.pop(source_id, None)

    def forget_all(self) -> None:
        """Let go of what is known of all sources: others may have changed it."""
        self._counted.clear()
        self._noted.clear()
        self._steps.clear()

    async def _for_each(self, sources: Iterable[Source], act: Callable[[Source], Awaitable[T]]) -> list[T]:
        return await self._rounds.for_each(sources, act, lambda source: source.id)

    # By age

    async def _end_old(self, stream: Stream, now: float) -> Erased:
        limits = self._settings
        hours = _least(stream.retention_hours, limits.retention_max_hours)
        keyframe_hours = _least(hours, stream.keyframe_hours, limits.retention_max_keyframe_hours)
        before = int((now - hours * 3600) * stream.fps)
        erased = await self._end_frames(stream, before) if before > 0 else Erased()
        before = int((now - keyframe_hours * 3600) * stream.fps)
        if before > 0 and self._steps.get(stream.id) != (step := before // KEYFRAME_STEP_SLOTS):
            erased += Erased(keyframes=await self._memory.keyframes.expire(stream.id, before))
            self._steps[stream.id] = step
        return erased

    async def _end_frames(self, source: Source, before: int) -> Erased:
        """End the frames before a slot; a sealed hour goes as one, when all of it is before."""
        hour = before // HOUR_SLOTS
        end = hour * HOUR_SLOTS
        first = await self._tokens.next(source.id, 0)
        timelines = await self._memory.timelines(source.id) if first is not None and first <= hour else ()
        if any([hour in await timeline.hot_hours(source.id) for timeline in timelines]):
            end = before
        if first is None or first * HOUR_SLOTS >= end:
            if self._noted.get(source.id) != hour:
                await self._note(source, _first_slot(source), end)
            return Erased()
        starts = [_first_slot(source)]
        if first < starts[0] // HOUR_SLOTS:  # frames that were brought from elsewhere
            extents = [await timeline.extent(source.id) for timeline in timelines]
            starts += [extent[0] for extent in extents if extent is not None]
        await self._note(source, min(starts), end)  # before it is so: who erases may die in between
        frames = NOTHING_ERASED
        for timeline in timelines:
            frames += await timeline.expire(source.id, end)
        return Erased(frames)

    async def _note(self, source: Source, start: int, before: int) -> None:
        await self._sources.note_expired(source.id, start, before)
        self._noted[source.id] = before // HOUR_SLOTS

    # By size

    async def _make_room_for_tokens(self, sources: Sequence[Source], now: float) -> Erased:
        own = {one.id: one.retention_bytes for one in sources if isinstance(one, Stream) and one.retention_bytes}
        limit = self._settings.retention_max_bytes
        counted = [one.id for one in sources if limit is not None or one.id in own]
        kept = {source_id: one.total for source_id, one in (await self._tokens.totals(counted)).items()}
        ends = await self._ends(self._tokens, "tokens", sources, kept, own, limit, now)

        async def end(source: Source) -> Erased:
            erased = await self._end_frames(source, ends[source.id])
            return erased + Erased(keyframes=await self._memory.keyframes.expire(source.id, ends[source.id]))

        return sum(await self._for_each([one for one in sources if one.id in ends], end), Erased())

    async def _make_room_for_keyframes(self, sources: Sequence[Source], now: float) -> Erased:
        own = {one.id: one.keyframe_bytes for one in sources if isinstance(one, Stream) and one.keyframe_bytes}
        limit = self._settings.retention_max_keyframe_bytes
        kept = await self._keyframes.totals([one.id for one in sources if limit is not None or one.id in own])
        ends = await self._ends(self._keyframes, "keyframes", sources, kept, own, limit, now)

        async def end(source: Source) -> int:
            return await self._memory.keyframes.expire(source.id, ends[source.id])

        return Erased(keyframes=sum(await self._for_each([one for one in sources if one.id in ends], end)))

    async def _ends(
        self,
        hours: Hours,
        kind: str,
        sources: Sequence[Source],
        kept: Mapping[str, int],
        own: Mapping[str, int],
        limit: int | None,
        now: float,
    ) -> dict[str, int]:
        """Return the slots before which sources have to end so that `kept` bytes fit the `own` limits and `limit`."""
        gone: dict[str, int] = {}
        left = sum(kept.values())

        def full_before(source: Source) -> int:
            return self._full_before(source, now)

        for source in sources:
            if source.id in own:
                excess = kept[source.id] - own[source.id]
                freed = await take_oldest(hours, [source], excess, gone, full_before)
                left -= freed
                self._tell(f"the {kind} of {source.id}", is_over=freed < excess, limit=own[source.id])
        if limit is not None:
            freed = await take_oldest(hours, sources, left - limit, gone, full_before)
            self._tell(f"the {kind} of all sources", is_over=freed < left - limit, limit=limit)
        return {source_id: hour * HOUR_SLOTS for source_id, hour in gone.items()}

    def _full_before(self, source: Source, now: float) -> int:
        """Return the hour before which a source's hours get no more frames."""
        if isinstance(source, Stream):
            return int((now - self._settings.seal_settle_s) * source.fps) // HOUR_SLOTS
        return 0 if source.is_being_read else _NEVER

    def _tell(self, what: str, *, is_over: bool, limit: int) -> None:
        if is_over and what not in self._over:
            logger.warning("%s have more than %d bytes in hours that may still get frames, which stay", what, limit)
        (self._over.add if is_over else self._over.discard)(what)


async def take_oldest(
    hours: Hours, sources: Iterable[Source], excess: int, gone: dict[str, int], full_before: Callable[[Source], int]
) -> int:
    """Take the oldest full hours of all sources until `excess` bytes are taken, and return how many were.

    `gone` holds the hour of a source before which all is taken, and is moved on.
    """
    if excess <= 0:
        return 0
    by_id = {source.id: source for source in sources}

    async def oldest(source: Source) -> list[tuple[float, str, int]]:
        hour = await hours.next(source.id, gone.get(source.id, 0))
        return [] if hour is None or hour >= full_before(source) else [(_begun_at(source, hour), source.id, hour)]

    heap = [one for source in by_id.values() for one in await oldest(source)]
    heapify(heap)
    taken = 0
    while heap and taken < excess:
        _, source_id, hour = heappop(heap)
        taken += await hours.nbytes(source_id, hour)
        gone[source_id] = hour + 1
        for one in await oldest(by_id[source_id]):
            heappush(heap, one)
    return taken


def _first_slot(source: Source) -> int:
    """Return the slot in which a source was registered; that of a video is its first one."""
    return int(source.created_at * source.fps) if isinstance(source, Stream) else 0


def _begun_at(source: Source, hour: int) -> float:
    """Return when an hour began, in Unix seconds; all of a video is as old as its registration."""
    return hour * HOUR_SLOTS / source.fps if isinstance(source, Stream) else source.created_at


def _least(hours: float, *limits: float | None) -> float:
    return min([hours, *(one for one in limits if one is not None)])
