"""Recomputations as the REST surface shows them: what is asked for, how far it is."""

import logging

from qa_service import clock
from qa_service.coverage import RangeReader, write_slot
from qa_service.errors import inverted
from qa_service.keys import Caller
from qa_service.memory_schemas import (
    RecomputationBody,
    RecomputationList,
    RecomputationRequest,
    RecomputedSource,
    UnreadableFrame,
)
from qa_service.once import Once
from qa_service.schemas import StreamRange, VideoRange
from store.recomputations import Recomputation, Recomputations, Wanted
from store.source import Source, SourceNotFound, Stream
from store.sources import Sources

logger = logging.getLogger(__name__)

BEGINS_WITHIN_S = 15.0  # of a service that runs the model


class Recomputing:
    """Asks for tokens of the model that runs here. Raises StoreUnavailable everywhere."""

    def __init__(
        self,
        reader: RangeReader,
        sources: Sources,
        recomputations: Recomputations,
        once: Once,
        *,
        model: str,
        fingerprint: str,
    ) -> None:
        self._reader = reader
        self._sources = sources
        self._recomputations = recomputations
        self._once = once
        self._model = model
        self._fingerprint = fingerprint

    async def create(
        self, caller: Caller, request: RecomputationRequest, *, key: str | None = None
    ) -> RecomputationBody:
        """Ask for what the request names. Raises StreamNotFound, VideoNotFound, SourceForbidden and BadTimeRange."""

        async def create() -> RecomputationBody:
            if request.sources is None:
                kept = [one.source for one in await self._sources.everything() if not (one.purge or one.hidden)]
                wanted = [self._all(source) for source in kept if caller.may_see(source.id)]
            else:
                wanted = [
                    await self._wanted(caller, one, f"sources[{place}]") for place, one in enumerate(request.sources)
                ]
            job = await self._recomputations.create(self._model, self._fingerprint, wanted, drop_old=request.drop_old)
            logger.info("recomputation %s of %d sources is asked for by %s", job.id, len(job.progress), caller.name)
            return await self._body(job)

        return await self._once(
            caller,
            "recomputations",
            key,
            request.model_dump_json(),
            RecomputationBody,
            create,
        )

    async def get(self, caller: Caller, recomputation_id: str) -> RecomputationBody:
        """Return a recomputation. Raises RecomputationNotFound and SourceForbidden."""
        return await self._body(await self._seen(caller, recomputation_id))

    async def everything(self, caller: Caller) -> RecomputationList:
        """Return the recomputations of sources that the caller may see."""
        jobs = [job for job in await self._recomputations.everything() if _may_see(caller, job)]
        return RecomputationList(data=[await self._body(job) for job in jobs], has_more=False, next_cursor=None)

    async def cancel(self, caller: Caller, recomputation_id: str) -> RecomputationBody:
        """End a recomputation. Raises RecomputationNotFound, SourceForbidden and RecomputationEnded."""
        await self._seen(caller, recomputation_id)
        return await self._body(await self._recomputations.cancel(recomputation_id))

    async def _seen(self, caller: Caller, recomputation_id: str) -> Recomputation:
        job = await self._recomputations.get(recomputation_id)
        for one in job.wanted:
            caller.require_source(one.source_id)
        return job

    async def _wanted(self, caller: Caller, asked: StreamRange | VideoRange | str, param: str) -> Wanted:
        if isinstance(asked, str):
            caller.require_source(asked, param)
            return self._all(await self._reader.source(asked))
        source_id = asked.stream_id if isinstance(asked, StreamRange) else asked.video_id
        caller.require_source(source_id, param)
        source: Source
        if isinstance(asked, StreamRange):
            source = await self._reader.stream(source_id)
        else:
            source = await self._reader.video(source_id)
        if asked.start is not None and asked.end is not None and asked.end <= asked.start:
            raise inverted(f"{param}.end")
        whole = self._all(source)
        start = 0 if asked.start is None else clock.first_slot(asked.start, source.fps)
        if asked.end is None:
            return whole.model_copy(update={"start": start})
        end = clock.first_slot(asked.end, source.fps)
        return whole.model_copy(update={"start": start, "end": end if whole.end is None else min(end, whole.end)})

    def _all(self, source: Source) -> Wanted:
        """Return the whole of a source: of a stream that is what it has by now."""
        end = clock.slot_at(self._reader.now(), source.fps) + 1 if isinstance(source, Stream) else None
        return Wanted(source_id=source.id, end=end)

    async def _body(self, job: Recomputation) -> RecomputationBody:
        total, now = job.total, self._reader.now()
        settled = total.done + total.unreadable
        waits = job.resumes_at is not None and not job.ended
        return RecomputationBody(
            id=job.id,
            model=job.model,
            fingerprint=job.fingerprint,
            drop_old=job.drop_old,
            status=job.status,
            reason=job.reason or await self._why_not_begun(job),
            progress=1.0 if job.status == "done" else settled / total.slots if total.slots else 0.0,
            eta_s=_eta_s(job, now),
            frames=total.slots,
            done=total.done,
            unreadable=total.unreadable,
            dropped=total.dropped,
            waiting_until=clock.write_stream_time(job.resumes_at) if waits and job.resumes_at else None,
            created_at=clock.write_stream_time(job.created_at),
            ended_at=None if job.ended_at is None else clock.write_stream_time(job.ended_at),
            sources=[
                RecomputedSource(
                    source_id=source_id,
                    frames=one.slots,
                    done=one.done,
                    unreadable=one.unreadable,
                    dropped=one.dropped,
                )
                for source_id, one in job.progress.items()
            ],
            unreadable_frames=await self._unreadable(job),
        )

    async def _why_not_begun(self, job: Recomputation) -> str | None:
        if job.ended or self._reader.now() < job.created_at + BEGINS_WITHIN_S:
            return None
        if await self._recomputations.has_worker(job.fingerprint):
            return None
        return f"no service runs {job.model} with the fingerprint {job.fingerprint} now: start one, or cancel this"

    async def _unreadable(self, job: Recomputation) -> list[UnreadableFrame]:
        frames = []
        for one in job.unreadable:
            try:
                source = await self._sources.source(one.source_id)
            except SourceNotFound:  # deleted since
                continue
            frames.append(UnreadableFrame(source_id=source.id, time=write_slot(source, one.slot)))
        return frames


def _may_see(caller: Caller, job: Recomputation) -> bool:
    return all(caller.may_see(one.source_id) for one in job.wanted)


def _eta_s(job: Recomputation, now: float) -> float | None:
    if job.status != "running":
        return None
    if job.resumes_at is not None:
        return round(max(job.resumes_at - now, 0.0), 1)
    left = job.total.slots - job.total.done - job.total.unreadable
    return round(left / job.frames_per_s, 1) if job.frames_per_s else None
