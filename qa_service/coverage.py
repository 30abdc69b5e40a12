"""What is remembered of a time range, and why the rest is missing: the truth under every answer."""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qa_service import clock
from qa_service.errors import BadTimeRange, inverted
from qa_service.schemas import GapBody, StreamRange, Time, VideoRange
from store.gaps import Gap, GapReason
from store.keyframes import Keyframes
from store.slots import union, without
from store.source import Source, SourceNotFound, Stream, StreamNotFound, Video, VideoNotFound
from store.sources import Sources
from store.timeline import Timeline

_EVER = 1 << 62


def write_time(source: Source, seconds: float) -> Time:
    """Write a time on the clock of `source`: RFC 3339 for a stream, seconds for a video."""
    return clock.write_stream_time(seconds) if isinstance(source, Stream) else round(seconds, 6)


def asked_seconds(source: Source, text: str, param: str) -> float:
    """Read a time of an address on the clock of `source`. Raises BadTimeRange."""
    try:
        return clock.parse_query_time(text, live=isinstance(source, Stream))
    except ValueError as error:
        raise BadTimeRange(str(error), param=param) from None


def asked_range(source: Source, start: str | None, end: str | None) -> tuple[float | None, float | None]:
    """Read the times [start, end) of an address, each of which may be left out. Raises BadTimeRange."""
    start_s = None if start is None else asked_seconds(source, start, "start")
    end_s = None if end is None else asked_seconds(source, end, "end")
    if start_s is not None and end_s is not None and end_s <= start_s:
        raise inverted("end")
    return start_s, end_s


def write_slot(source: Source, slot: int) -> Time:
    """Write the time at which a slot begins."""
    return write_time(source, slot / source.fps)


def frame_url(source: Source, slot: int) -> str:
    """Return where the keyframe of a slot is served."""
    return f"/v1/sources/{source.id}/frames/{write_slot(source, slot)}"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one range of one source holds.

    [start, end) are the slots that a source without gaps would hold by now; `present` (T,) are those that are kept,
    `gaps` those that are missing. A slot that is neither is one in which a video file has no picture of its own.
    `note` says, for people, why the range that was asked for is not expected whole.
    """

    source: Source
    start: int
    end: int
    present: NDArray[np.int64]
    gaps: tuple[Gap, ...]
    note: str | None = None


class RangeReader:
    """Reads presence and gaps of ranges. Raises StoreUnavailable, StreamNotFound and VideoNotFound."""

    def __init__(
        self,
        timeline: Timeline,
        keyframes: Keyframes,
        sources: Sources,
        *,
        live_lag_s: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._timeline = timeline
        self._keyframes = keyframes
        self._sources = sources
        self._live_lag_s = live_lag_s
        self._now = now

    def now(self) -> float:
        """The present, in Unix seconds."""
        return self._now()

    async def source(self, source_id: str) -> Source:
        """Return a stream, deleted ones with memory included, or a video, by its id."""
        source = await self._found(source_id)
        if source is None:
            raise (VideoNotFound if source_id.startswith("vid_") else StreamNotFound)(source_id)
        return source

    async def _found(self, source_id: str) -> Source | None:
        try:
            return await self._sources.source(source_id)
        except SourceNotFound:
            return None

    async def stream(self, stream_id: str) -> Stream:
        """Return a stream by its id."""
        source = await self._found(stream_id)
        if not isinstance(source, Stream):
            raise StreamNotFound(stream_id)
        return source

    async def video(self, video_id: str) -> Video:
        """Return a video by its id."""
        source = await self._found(video_id)
        if not isinstance(source, Video):
            raise VideoNotFound(video_id)
        return source

    async def resolve(self, wanted: StreamRange | VideoRange) -> tuple[Source, float, float]:
        """Return the source of a range and its seconds [start, end), with what was left out filled in."""
        source: Source
        if isinstance(wanted, StreamRange):
            source = await self.stream(wanted.stream_id)
        else:
            source = await self.video(wanted.video_id)
        if wanted.start is not None and wanted.end is not None:
            return source, wanted.start, wanted.end
        first, last = await self._timeline.extent(source.id) or (0, 0)
        start_s = first / source.fps if wanted.start is None else wanted.start
        if wanted.end is not None:
            return source, start_s, wanted.end
        newest_s = (last + 1) / source.fps
        if isinstance(source, Stream):
            end_s = self._now() - self._live_lag_s
        else:
            end_s = int((source.duration_s or 0) * source.fps) / source.fps
        # Beyond the last frame an open end must not turn the range around: it is empty, and said to be.
        return source, start_s, max(end_s, newest_s, start_s + 1 / source.fps)

    async def extent(self, source: Source) -> tuple[int, int] | None:
        """Return the first and the last slot that is kept."""
        return await self._timeline.extent(source.id)

    async def read(self, source: Source, start: int, end: int) -> Reading:
        """Read the slots [start, end)."""
        present = await self._timeline.slots(source.id, start, end)
        expected_end, note = await self._expected_end(source, start, end, present)
        recorded = await self._sources.gaps(source.id, start, expected_end)
        elsewhere = without(await self._timeline.seen_by_others(source.id, start, expected_end), present)
        for gap in recorded:
            if gap.reason == "decode_error":  # its picture was looked at again, in vain
                elsewhere = elsewhere[(elsewhere < gap.start_slot) | (elsewhere >= gap.end_slot)]
        runs = _absent_runs(union(present, elsewhere), start, expected_end)
        gaps = _with_reasons(runs, recorded, await self._usual_reasons(source))
        gaps += [Gap(start_slot=low, end_slot=high, reason="other_model") for low, high in _runs_of(elsewhere)]
        gaps.sort(key=lambda gap: gap.start_slot)
        return Reading(source, start, expected_end, present, tuple(gaps), note)

    async def pictured(self, source: Source, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the slots (T,) whose keyframes are kept, as far as this is known without looking at files."""
        return slots[await self._keyframes.kept(source.id, slots)]

    async def nearest(self, source: Source, start: int, end: int) -> tuple[int | None, int | None]:
        """Return the last kept slot before [start, end) and the first one behind it."""
        extent = await self._timeline.extent(source.id)
        if extent is None:
            return None, None
        before = await self._timeline.slots(source.id, extent[0], min(start, extent[1] + 1))
        after = await self._timeline.slots(source.id, max(end, extent[0]), extent[1] + 1)
        return (int(before[-1]) if len(before) else None), (int(after[0]) if len(after) else None)

    async def _expected_end(
        self, source: Source, start: int, end: int, present: NDArray[np.int64]
    ) -> tuple[int, str | None]:
        """Return where the expected part of [start, end) ends, and a note if that is early."""
        note: str | None
        if isinstance(source, Stream):
            limit = clock.slot_at(self._now() - self._live_lag_s, source.fps)
            note = f"The range of {source.id} reaches beyond now; it was read up to {write_slot(source, limit)}."
        else:
            extent = await self._timeline.extent(source.id)
            limit = 0 if extent is None else extent[1] + 1
            if source.status == "ready":
                # A last slot that the file fills only in part need not hold a picture.
                limit = max(limit, int((source.duration_s or 0) * source.fps))
                note = f"The range of {source.id} reaches beyond the video's end at {write_slot(source, limit)} s."
                if end <= math.ceil((source.duration_s or 0) * source.fps):
                    note = None
            else:
                note = f"{source.id} is {source.status}: it is remembered up to {write_slot(source, limit)} s so far."
        # A frame that came early counts; a range beyond the limit is empty, not negative.
        limit = max(limit, int(present[-1]) + 1 if len(present) else start)
        return (end, None) if end <= limit else (limit, note)

    async def _usual_reasons(self, source: Source) -> list[Gap]:
        """Return why slots are absent where nothing was recorded, as gaps that lie behind one another.

        None for a video: what could not be decoded is recorded, and where a file shows no new picture none is missing.
        """
        if isinstance(source, Video):
            return []
        created = clock.slot_at(source.created_at, source.fps)
        kept_from = max(created, clock.slot_at(self._now() - source.retention_hours * 3600, source.fps))
        status = await self._sources.status(source.id)
        stopped = max(kept_from, clock.slot_at(status.since, source.fps)) if status.state == "disabled" else _EVER
        bounds: list[tuple[int, int, GapReason]] = [
            (0, created, "not_registered"),
            (created, kept_from, "expired"),
            (kept_from, stopped, "stream_down"),
            (stopped, _EVER, "not_registered"),
        ]
        return [Gap(start_slot=low, end_slot=high, reason=reason) for low, high, reason in bounds if low < high]


def _absent_runs(present: NDArray[np.int64], start: int, end: int) -> list[tuple[int, int]]:
    """Return the runs [first, behind) of [start, end) without a present slot."""
    edges = np.concatenate(([start - 1], present, [end]))
    holes = np.flatnonzero(np.diff(edges) > 1)
    return [(int(edges[hole]) + 1, int(edges[hole + 1])) for hole in holes]


def _runs_of(slots: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return ascending slots as runs [first, behind)."""
    parts = np.split(slots, np.flatnonzero(np.diff(slots) > 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]


def _with_reasons(runs: Sequence[tuple[int, int]], recorded: Sequence[Gap], usual: Sequence[Gap]) -> list[Gap]:
    """Cut absent runs where the reason changes: recorded reasons first, usual ones where nothing was recorded.

    What has neither is no gap.
    """
    found: list[Gap] = []
    ends = [gap.end_slot for gap in recorded]
    for start, end in runs:
        at = start
        while at < end:
            index = bisect_right(ends, at)
            if index < len(recorded) and recorded[index].start_slot <= at:
                here, behind = recorded[index].reason, ends[index]
            else:
                default = next((gap for gap in usual if gap.start_slot <= at < gap.end_slot), None)
                known = recorded[index].start_slot if index < len(recorded) else end
                if default is None:
                    at = known
                    continue
                here, behind = default.reason, min(default.end_slot, known)
            behind = min(behind, end)
            if found and found[-1].end_slot == at and found[-1].reason == here:
                found[-1] = found[-1].model_copy(update={"end_slot": behind})
            else:
                found.append(Gap(start_slot=at, end_slot=behind, reason=here))
            at = behind
    return found


def written_gaps(gaps: Iterable[Gap], source: Source) -> list[GapBody]:
    """Write gaps on the source's clock."""
    return [
        GapBody(start=write_slot(source, gap.start_slot), end=write_slot(source, gap.end_slot), reason=gap.reason)
        for gap in gaps
    ]
