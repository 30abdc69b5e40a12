"""Export: what is remembered of a source, hour by hour, to be kept in a file or taken to another service."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Sequence
from threading import BoundedSemaphore

import numpy as np
from numpy.typing import NDArray

from qa_service import clock
from qa_service.coverage import RangeReader, Reading, asked_range
from qa_service.errors import EmptyRange, QueueFull, RangeTooLong, StateConflict
from qa_service.keys import Caller
from qa_service.memory_schemas import MAX_LISTED, TimelineExport
from store.connection import StoreUnavailable
from store.finish import finish
from store.format import HOUR_SLOTS
from store.gaps import Gap, GapReason
from store.hot import FrameNotKept
from store.keyframes import Keyframes
from store.portable import write_frames, write_keyframes
from store.segments import Hour
from store.source import Source, Stream, Video
from store.timeline import Timeline

TRIES = 20  # of an hour from which something is erased again and again while it is read
PIECE_BYTES = 1 << 20
HOURS_OUT = 4  # that are put together, wait for that, or are sent
HOURS_AT_ONCE = 1  # that are put together: an hour of keyframes has some 150 MB
# Reasons that are heeded even where there is a frame: what was erased is not imported, and for a picture that cannot be
# decoded no other model is looked for.
_EXACT: frozenset[GapReason] = frozenset({"erased", "decode_error"})


class OutgoingHour:
    """The bytes of an hour, in pieces: some proxies hand on whole messages alone.

    It takes one of a few places in memory until nobody holds it any more, however its sending ends. Raises QueueFull.
    Behind Ray sending ends early: Ray takes all of the bytes at once, and they lie with it until its proxy has them.
    """

    def __init__(self, places: BoundedSemaphore) -> None:
        if not places.acquire(blocking=False):
            raise QueueFull("Other hours are being exported; ask again in a moment.", retry_after_s=5)
        weakref.finalize(self, places.release)
        self.content = b""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        # In a thread a plain iterator would be held, once it is read, until garbage is collected.
        for at in range(0, len(self.content), PIECE_BYTES):
            yield self.content[at : at + PIECE_BYTES]


class Exports:
    """Gives out timelines. Raises StreamNotFound, VideoNotFound, SourceForbidden and StoreUnavailable.

    Hours go out one by one: behind Ray's proxy a response lies in memory until its reader has all of it. Beyond
    HOURS_OUT that are put together or sent QueueFull is raised; those that lie with Ray do not count.
    """

    def __init__(self, reader: RangeReader, timeline: Timeline, keyframes: Keyframes) -> None:
        self._reader = reader
        self._timeline = timeline
        self._keyframes = keyframes
        self._room = asyncio.Semaphore(HOURS_AT_ONCE)
        self._places = BoundedSemaphore(HOURS_OUT)

    async def describe(self, caller: Caller, source_id: str, start: str | None, end: str | None) -> TimelineExport:
        """Tell what [start, end) of a source holds; times left out: from the first frame, to the last.

        Raises BadTimeRange, EmptyRange, RangeTooLong, and StateConflict for a video that is still read.
        """
        caller.require_source(source_id)
        source = await self._reader.source(source_id)
        if isinstance(source, Video) and source.is_being_read:
            raise StateConflict(f"{source_id} is still read: export it when it is ready")
        start_s, end_s = asked_range(source, start, end)
        extent = await self._reader.extent(source)
        if extent is None:
            raise _empty(source_id)
        first, behind = _whole(source, extent)
        low = first if start_s is None else clock.first_slot(start_s, source.fps)
        high = behind if end_s is None else clock.first_slot(end_s, source.fps)
        reading = await self._reader.read(source, low, high)
        if not len(reading.present):
            raise _empty(source_id)
        return _described(reading, self._timeline)

    async def frames(self, caller: Caller, source_id: str, hour: int, start_slot: int, end_slot: int) -> "OutgoingHour":
        """Return the frames of an hour that lie in [start_slot, end_slot), of one moment. Raises EmptyRange."""
        start, end = await self._bounds(caller, source_id, hour, start_slot, end_slot)
        outgoing = OutgoingHour(self._places)
        async with self._room:
            outgoing.content = await finish(self._frames(source_id, hour, start, end))
        return outgoing

    async def keyframes(
        self, caller: Caller, source_id: str, hour: int, start_slot: int, end_slot: int
    ) -> "OutgoingHour":
        """Return the keyframes of those frames; EmptyRange if none of them is kept."""
        start, end = await self._bounds(caller, source_id, hour, start_slot, end_slot)
        outgoing = OutgoingHour(self._places)
        async with self._room:
            outgoing.content = await finish(self._pictures(source_id, hour, start, end))
        return outgoing

    async def _bounds(
        self, caller: Caller, source_id: str, hour: int, start_slot: int, end_slot: int
    ) -> tuple[int, int]:
        caller.require_source(source_id)
        await self._reader.source(source_id)
        return max(start_slot, hour * HOUR_SLOTS), min(end_slot, (hour + 1) * HOUR_SLOTS)

    async def _frames(self, source_id: str, hour: int, start: int, end: int) -> bytes:
        rows = await self._rows(source_id, start, end)
        return await asyncio.to_thread(write_frames, self._timeline.format, hour, rows)

    async def _pictures(self, source_id: str, hour: int, start: int, end: int) -> bytes:
        slots = (await self._timeline.slots(source_id, start, end)).tolist()
        jpegs = await self._keyframes.find(source_id, slots)
        if not jpegs:
            raise _empty(source_id)
        return await asyncio.to_thread(write_keyframes, hour, jpegs)

    async def _rows(self, source_id: str, start: int, end: int) -> Hour:
        for _ in range(TRIES):
            slots = await self._timeline.slots(source_id, start, end)
            if not len(slots):
                raise _empty(source_id)
            try:
                return Hour(
                    slots=slots,
                    tokens=await self._timeline.read(source_id, slots),
                    vectors=await self._timeline.vectors(source_id, slots),
                    times=await self._timeline.times(source_id, slots),
                )
            except FrameNotKept:  # erased between two reads
                continue
        raise StoreUnavailable(f"the memory of {source_id} changes all the time; export it again")


def _empty(source_id: str) -> EmptyRange:
    return EmptyRange(f"Nothing of this time of {source_id} is remembered by the model that runs here.")


def _whole(source: Source, extent: tuple[int, int]) -> tuple[int, int]:
    """Return the slots [start, end) of all that there is."""
    first, last = extent
    if isinstance(source, Stream):
        return first, last + 1
    return 0, max(last + 1, int((source.duration_s or 0) * source.fps))


def _described(reading: Reading, timeline: Timeline) -> TimelineExport:
    source = reading.source
    stream, video = (source, None) if isinstance(source, Stream) else (None, source)
    hours = np.unique(reading.present // HOUR_SLOTS).tolist()
    gaps = _joined([_as_elsewhere(gap) for gap in reading.gaps], reading.present)
    if max(len(hours), len(gaps)) > MAX_LISTED:
        raise RangeTooLong(
            f"{source.id} has {len(hours)} hours with frames and {len(gaps)} gaps in this time, and an export tells at "
            f"most {MAX_LISTED} of each: export a shorter time, and the rest of it as another file.",
            details={"hours": len(hours), "gaps": len(gaps), "max": MAX_LISTED},
        )
    return TimelineExport(
        kind="video" if stream is None else "stream",
        name=source.name,
        fps=source.fps,
        labels={} if stream is None else stream.labels,
        recorded_at=None if video is None or video.recorded_at is None else clock.write_stream_time(video.recorded_at),
        duration_s=None if video is None else _duration(video, reading.end),
        start_slot=reading.start,
        end_slot=reading.end,
        format=timeline.format,
        hours=hours,
        gaps=gaps,
    )


def _joined(gaps: Sequence[Gap], present: NDArray[np.int64]) -> list[Gap]:
    """Join gaps of one reason that only slots which are present (T,) lie between.

    A camera that is slower than its grid has a gap behind each of its frames, millions in a month.
    """
    if not gaps:
        return []
    starts = np.array([gap.start_slot for gap in gaps[1:]], np.int64)
    ends = np.array([gap.end_slot for gap in gaps[:-1]], np.int64)
    frames = np.searchsorted(present, starts) - np.searchsorted(present, ends)
    joins = [False, *(frames == starts - ends).tolist()]
    runs: list[tuple[int, int, GapReason]] = []
    for gap, is_next in zip(gaps, joins, strict=True):
        start = gap.start_slot
        if is_next and gap.reason == runs[-1][2] and gap.reason not in _EXACT:
            start, _, _ = runs.pop()
        runs.append((start, gap.end_slot, gap.reason))
    return [Gap(start_slot=start, end_slot=end, reason=reason) for start, end, reason in runs]


def _as_elsewhere(gap: Gap) -> Gap:
    """What only another model saw here was never seen where an export goes."""
    return gap.model_copy(update={"reason": "not_registered"}) if gap.reason == "other_model" else gap


def _duration(video: Video, end_slot: int) -> float:
    """Return the length of a video of which all is exported, else where the exported part ends."""
    duration_s = video.duration_s or 0.0
    return duration_s if 0 < duration_s * video.fps < end_slot + 1 else end_slot / video.fps
