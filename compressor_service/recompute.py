"""Tokens of the running model for frames that another model saw, made in the background, hour by hour."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

from redis.asyncio import Redis

from compressor_service.second_look import Eyes, SecondLook
from ingest.frame import SinkUnavailable
from store.connection import StoreFull, StoreUnavailable
from store.format import HOUR_SLOTS
from store.gaps import Gap
from store.hour_files import HourFileDamaged
from store.leases import Leases
from store.memory import Memory
from store.recomputations import (
    NAMED_UNREADABLE,
    HourLeft,
    Recomputation,
    Recomputations,
    UnreadableKeyframe,
    ended,
    facts,
    worker_lease,
)
from store.room import Room
from store.segments import Hour
from store.slots import NO_SLOTS, union, without
from store.source import Source, SourceNotFound, Stream
from store.sources import Sources
from store.timeline import Timeline

logger = logging.getLogger(__name__)

POLL_S = 2.0
LEASE_S = 30.0
KEEP_EVERY_S = 60.0  # work that a kill may cost; each keeping writes the hour's segment anew
PUT_OFF_S = 20.0  # after what stood in the way of an hour
_UNEXPECTED = "an unexpected error, which the log of the service tells; what was made stays: ask again for the rest"
_TRIES = 20  # of an hour of which something is erased again and again


class _Stopped(Exception):
    """Nothing is to be done now: the recomputation was cancelled, somebody else does the work, or nobody can."""


@dataclass(slots=True)
class _Work:
    """An hour that is being done."""

    job: Recomputation
    source: Source
    left: HourLeft


class Recomputer:
    """Does what recomputations ask for, the newest hours first; of several recomputers of a model one works.

    What is left to do stands in the store: whoever dies, the next one goes on.
    """

    def __init__(
        self,
        redis: Redis,
        sources: Sources,
        memory: Memory,
        timeline: Timeline,
        eyes: Eyes,
        *,
        room: Room,
        settle_s: float,
        keep_every_s: float = KEEP_EVERY_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = Recomputations(redis)
        self._sources = sources
        self._timeline = timeline
        self._second = SecondLook(memory, timeline, eyes, now)
        self._room = room
        self._settle_s = settle_s
        self._keep_every_s = keep_every_s
        self._now = now
        self._leases = Leases(redis)
        self._owner = f"recomputer-{uuid4().hex[:12]}"
        self._held: dict[str, int] = {}
        self._renewed = 0.0

    async def run(self) -> None:
        """Work until cancelled, and give the lease back then."""
        try:
            while True:
                worked = False
                try:
                    worked = await self.step()
                except StoreUnavailable as error:
                    logger.warning("recomputing put off: %s", error)
                except Exception:
                    logger.exception("recomputing failed; it is tried again")
                await asyncio.sleep(0 if worked else POLL_S)
        finally:
            with contextlib.suppress(StoreUnavailable):  # then the lease runs out by itself
                await self._leases.release(self._owner, self._held)

    async def step(self) -> bool:
        """Plan a recomputation or do an hour of one, if it is ours to do; False if nothing is to be done now."""
        jobs = await self._jobs.active(self._timeline.format.fingerprint)
        try:
            if jobs:
                await self._hold()
            for job in jobs:
                if await self._work(job):
                    return True
        except _Stopped:
            return False
        return False

    async def _work(self, job: Recomputation) -> bool:
        """Plan it or do an hour of it; False if nothing of it has its turn."""
        try:
            if job.status == "queued":
                await self._plan(job)
                return True
            if left := await self._jobs.due(job.id, self._now()):
                await self._do(job, left)
                return True
            await self._rest(job)
            return False
        except _Stopped:
            raise
        except (SinkUnavailable, StoreFull) as error:  # it would be so with every hour of every other one, too
            await self._tell(job, error)
            raise _Stopped from None
        except StoreUnavailable as error:
            await self._tell(job, error)
            return False
        except Exception:
            logger.exception("recomputation %s failed", job.id)
            await self._jobs.update(job.id, ended("failed", _UNEXPECTED))
            return True

    async def _tell(self, job: Recomputation, error: SinkUnavailable | StoreUnavailable) -> None:
        """Note what stands in the way of a recomputation."""
        if str(error) != job.reason:
            logger.warning("recomputation %s is put off: %s", job.id, error)
            await self._jobs.update(job.id, facts(reason=str(error)))

    async def _hold(self) -> None:
        """Take or keep the lease; _Stopped if somebody else has it."""
        now = time.monotonic()
        if self._held and now - self._renewed < LEASE_S / 3:
            return
        if not self._held or await self._leases.renew(self._owner, self._held, LEASE_S):
            lease_id = worker_lease(self._timeline.format.fingerprint)
            self._held = await self._leases.acquire_many([lease_id], self._owner, LEASE_S)
        if not self._held:
            raise _Stopped
        self._renewed = now

    async def _go_on(self, job: Recomputation) -> None:
        """Raise _Stopped if a recomputation is not to be worked at any more, or not by us."""
        await self._hold()
        if not await self._jobs.is_active(job):
            raise _Stopped

    async def _plan(self, job: Recomputation) -> None:
        hours: dict[HourLeft, float] = {}
        for source_id in dict.fromkeys(one.source_id for one in job.wanted):
            try:
                source = await self._sources.source(source_id)
            except SourceNotFound:  # deleted since it was asked for
                continue
            for hour in await self._second.hours(job, source):
                await self._go_on(job)
                missing = len(await self._second.missing(job, source, hour))
                if missing or job.drop_old:
                    hours[HourLeft(source_id, hour, missing)] = self._turn(source, hour)
        await self._go_on(job)
        if await self._jobs.plan(job.id, hours):
            slots = sum(hour.slots for hour in hours)
            logger.info("recomputation %s begins: %d frames in %d hours", job.id, slots, len(hours))

    def _turn(self, source: Source, hour: int) -> float:
        """Return the time from which on an hour can be done; for a video that is still read, the time to look again."""
        if isinstance(source, Stream):
            return (hour + 1) * HOUR_SLOTS / source.fps + self._settle_s
        if source.is_being_read:
            return self._now() + PUT_OFF_S
        return source.created_at

    async def _rest(self, job: Recomputation) -> None:
        """End a recomputation of which nothing is left, or tell when it goes on."""
        at = await self._jobs.next_at(job.id)
        if at is None:
            if done := await self._jobs.update(job.id, ended("done")):
                logger.info("recomputation %s is done: %s", job.id, done.total)
        elif at != job.resumes_at:
            await self._jobs.update(job.id, facts(resumes_at=at))

    # An hour

    async def _do(self, job: Recomputation, left: HourLeft) -> None:
        try:
            source = await self._sources.source(left.source_id)
        except SourceNotFound:  # deleted, and its keyframes with it
            await self._jobs.update(job.id, lambda job: job.advanced(left, None), hour=left)
            return
        if (turn := self._turn(source, left.hour)) > self._now():
            await self._jobs.update(job.id, facts(), hour=left, after=left, at=turn)
            return
        work = _Work(job, source, left)
        try:
            await self._hour(work)
        except StoreFull:
            raise
        except (StoreUnavailable, HourFileDamaged) as error:
            logger.warning("recomputing hour %d of %s is put off: %s", left.hour, source.id, error)
            # Other hours first.
            at = self._now() + PUT_OFF_S
            await self._jobs.update(job.id, facts(reason=str(error)), hour=work.left, after=work.left, at=at)

    async def _hour(self, work: _Work) -> None:
        """Make what an hour lacks, keep it now and then, and write down how far it is."""
        begun = time.monotonic()
        job, source, hour = work.job, work.source, work.left.hour
        unreadable = NO_SLOTS
        patience_s, tries = self._keep_every_s, 0
        while True:
            # Before keyframes are looked for: what is erased from now on must not come back.
            as_of = await self._timeline.as_of(source.id)
            missing = without(await self._second.missing(job, source, hour), unreadable)
            await self._note(work, len(missing) + len(unreadable))
            if not len(missing):
                break
            await asyncio.to_thread(self._room.check)
            seen = await self._second.look(source, missing, patience_s, lambda: self._go_on(job))
            if seen is None or not await self._keep(source, seen.rows, as_of):
                # Something was erased or sealed meanwhile: who begins anew with less leaves less room for that.
                patience_s, tries = patience_s / 2, tries + 1
                if tries == _TRIES:
                    raise StoreUnavailable(f"the memory of {source.id} changes all the time")
                continue
            tries = 0
            unreadable = union(unreadable, seen.unreadable)
            speed = round(seen.frames_per_s, 2)
            await self._jobs.update(job.id, facts(frames_per_s=speed, resumes_at=None, reason=None))
        await self._end(work, unreadable.tolist())
        logger.info("recomputed hour %d of %s in %.1f s", hour, source.id, time.monotonic() - begun)

    async def _keep(self, source: Source, rows: Hour, as_of: str) -> bool:
        return len(rows.slots) == 0 or await self._timeline.restore(source.id, rows, as_of)

    async def _note(self, work: _Work, slots: int) -> None:
        """Write down that only so many slots of an hour are left; _Stopped if it is not ours to do any more."""
        after = HourLeft(work.left.source_id, work.left.hour, min(slots, work.left.slots))

        def advanced(job: Recomputation) -> Recomputation:
            return job.advanced(work.left, after)

        if await self._jobs.update(work.job.id, advanced, hour=work.left, after=after) is None:
            raise _Stopped
        work.left = after

    async def _end(self, work: _Work, unreadable: list[int]) -> None:
        """Write down that an hour is done, but for keyframes that cannot be decoded."""
        job, source, left = work.job, work.source, work.left
        for slot in unreadable:
            logger.warning("%s slot %d: keyframe left out: it cannot be decoded", source.id, slot)
        if gaps := [Gap(start_slot=slot, end_slot=slot + 1, reason="decode_error") for slot in unreadable]:
            await self._sources.add_gaps(source.id, None, gaps)
        dropped = await self._second.drop_old(job, source, left.hour) if job.drop_old else 0
        named = tuple(UnreadableKeyframe(source_id=source.id, slot=slot) for slot in unreadable)

        def done(job: Recomputation) -> Recomputation:
            job = job.advanced(left, None, unreadable=len(unreadable), dropped=dropped)
            return job.model_copy(update={"unreadable": (*job.unreadable, *named)[:NAMED_UNREADABLE]})

        await self._jobs.update(job.id, done, hour=left)
