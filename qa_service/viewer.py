"""What is kept of a source, for people to look at: frames over time, and the pictures themselves."""

import math
from dataclasses import dataclass

import numpy as np

from qa_service import clock
from qa_service.coverage import RangeReader, asked_seconds, write_slot, write_time, written_gaps
from qa_service.errors import FrameMissing, ValidationFailed, inverted
from qa_service.memory_schemas import TimelineBody, TimelineBucket
from qa_service.schemas import Time
from store.hot import FrameNotKept
from store.keyframes import Keyframes
from store.timeline import Timeline

MAX_BUCKETS = 10_000


@dataclass(frozen=True, slots=True)
class Picture:
    """A keyframe as JPEG, and when it was captured."""

    jpeg: bytes
    time: Time


class Viewer:
    """Shows timelines and keyframes. Raises StreamNotFound, VideoNotFound and StoreUnavailable."""

    def __init__(self, reader: RangeReader, timeline: Timeline, keyframes: Keyframes) -> None:
        self._reader = reader
        self._timeline = timeline
        self._keyframes = keyframes

    async def timeline(self, source_id: str, start: str | None, end: str | None, resolution_s: float) -> TimelineBody:
        """Count the kept frames of [start, end) in buckets. Times left out: from the first kept frame to the last.

        Raises BadTimeRange, and ValidationFailed for more buckets than a response holds.
        """
        source = await self._reader.source(source_id)
        first, last = await self._reader.extent(source) or (0, -1)
        start_s = first / source.fps if start is None else asked_seconds(source, start, "start")
        end_s = max(start_s, (last + 1) / source.fps) if end is None else asked_seconds(source, end, "end")
        if end is not None and end_s <= start_s:
            raise inverted("end")
        count = math.ceil((end_s - start_s) / resolution_s)
        if count > MAX_BUCKETS:
            raise ValidationFailed(
                f"The range has {count} buckets, a response at most {MAX_BUCKETS}: raise resolution_s.",
                param="resolution_s",
            )
        reading = await self._reader.read(source, *clock.slots_between(start_s, end_s, source.fps))
        edges = [clock.slots_between(start_s, start_s + one * resolution_s, source.fps)[1] for one in range(count + 1)]
        places = np.searchsorted(reading.present, edges)
        return TimelineBody(
            source_id=source.id,
            start=write_time(source, start_s),
            end=write_time(source, end_s),
            fps=source.fps,
            resolution_s=resolution_s,
            buckets=[
                TimelineBucket(
                    start=write_time(source, start_s + one * resolution_s),
                    frames=int(places[one + 1] - places[one]),
                    slots=max(0, min(edges[one + 1], reading.end) - min(edges[one], reading.end)),
                )
                for one in range(count)
            ],
            gaps=written_gaps(reading.gaps, source),
        )

    async def picture(self, source_id: str, time: str) -> Picture:
        """Return the keyframe of the slot that covers a time. Raises BadTimeRange and FrameMissing."""
        source = await self._reader.source(source_id)
        slot = clock.slot_at(asked_seconds(source, time, "time"), source.fps)
        try:
            [captured_ms] = await self._timeline.times(source.id, np.array([slot], np.int64))
        except FrameNotKept:
            before, behind = await self._reader.nearest(source, slot, slot + 1)
            raise FrameMissing(
                "The frame of this time is not kept; `details` tells the nearest ones.",
                param="time",
                details={
                    "nearest_before": None if before is None else write_slot(source, before),
                    "nearest_after": None if behind is None else write_slot(source, behind),
                },
            ) from None
        try:
            jpeg = await self._keyframes.get(source.id, slot)
        except FrameNotKept:
            raise FrameMissing(
                "The picture of this time is not kept any more, only its frame token: questions about it are answered, "
                "but it cannot be shown.",
                param="time",
            ) from None
        return Picture(jpeg, write_time(source, int(captured_ms) / 1000))
