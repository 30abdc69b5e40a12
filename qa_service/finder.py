"""Moments that look like a text or a picture."""

import numpy as np

from qa_service import clock
from qa_service.coverage import RangeReader, frame_url, write_slot
from qa_service.errors import inverted
from qa_service.schemas import MomentBody, MomentList, SearchCoverage, SearchRequest, StreamRange, VideoRange
from qa_service.seams import MomentSearch, SearchSpace
from store.moments import Span
from store.source import Source


class Finder:
    """Searches ranges of sources. Raises StreamNotFound, VideoNotFound and StoreUnavailable."""

    def __init__(self, reader: RangeReader, space: SearchSpace, moments: MomentSearch) -> None:
        self._reader = reader
        self._space = space
        self._moments = moments

    async def find(self, request: SearchRequest) -> MomentList:
        """Return the moments nearest to the request's text or picture.

        Raises BadTimeRange, SearchUnavailable, and UnsupportedMedia for a picture that cannot be decoded.
        """
        sources: dict[str, Source] = {}
        spans = []
        for place, wanted in enumerate(request.sources):
            source, start_s, end_s = await self._reader.resolve(_range(wanted))
            if end_s <= start_s:
                raise inverted(f"sources[{place}].end")
            sources[source.id] = source
            start, end = clock.slots_between(start_s, end_s, source.fps)
            if start < end:
                spans.append(Span(source.id, start, end))
        if request.image is not None:
            [vector] = await self._space.embed_image([request.image])
        else:
            assert request.query is not None
            [vector] = await self._space.embed_text([request.query])
        found = await self._moments.search(vector, spans, top_k=request.top_k, min_score=request.min_score)
        pictured = {
            source_id: await self._reader.pictured(
                source, np.array([one.slot for one in found.moments if one.source_id == source_id], np.int64)
            )
            for source_id, source in sources.items()
        }
        return MomentList(
            data=[
                MomentBody(
                    source_id=one.source_id,
                    start=write_slot(sources[one.source_id], one.start),
                    end=write_slot(sources[one.source_id], one.end),
                    time=write_slot(sources[one.source_id], one.slot),
                    score=round(one.score, 4),
                    frame_url=frame_url(sources[one.source_id], one.slot)
                    if one.slot in pictured[one.source_id]
                    else None,
                )
                for one in found.moments
            ],
            coverage=SearchCoverage(
                frames_kept=found.frames_kept, frames_searched=found.frames_searched, partial=found.partial
            ),
        )


def _range(wanted: StreamRange | VideoRange | str) -> StreamRange | VideoRange:
    """Take an id for the whole of its source."""
    if not isinstance(wanted, str):
        return wanted
    return VideoRange(video_id=wanted) if wanted.startswith("vid_") else StreamRange(stream_id=wanted)
