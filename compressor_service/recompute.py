"""Tokens of the running model for frames that another model saw: kept keyframes, looked at again in the background.

n frames, C2 tokens a frame, D model width, P width of the search vector.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from compressor_service.facts import Encoded
from ingest.frame import SinkUnavailable
from store.connection import StoreUnavailable
from store.format import HOUR_SLOTS
from store.gaps import Gap
from store.hot import FrameNotKept
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
from store.segments import Hour
from store.sources import Source, SourceNotFound, Sources, Stream
from store.timeline import Timeline

logger = logging.getLogger(__name__)

POLL_S = 2.0
LEASE_S = 30.0
PASS_FRAMES = 8  # a live frame waits for one pass at most, so it is a short one
READ_FRAMES = 64  # keyframes that are read at once
KEEP_EVERY_S = 60.0  # work that a kill may cost; each keeping writes the hour's segment anew
PUT_OFF_S = 60.0  # after what stood in the way of an hour
_UNEXPECTED = "an unexpected error, which the log of the service tells; what was made stays: ask again for the rest"
_TRIES = 20  # of an hour of which something is erased again and again


class Eyes(Protocol):
    """Something that looks at keyframes with the running model, whenever nothing else is to be looked at."""

    async def encode(self, keyframes: Sequence[bytes]) -> Encoded:
        """Look at keyframes and keep nothing. Raises SinkUnavailable."""


class _Stopped(Exception):
    """The recomputation was cancelled, or somebody else does the work now."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was made of a part of an hour, and the slots (u,) of it whose keyframes cannot be decoded."""

    rows: Hour
    unreadable: NDArray[np.int64]
    frames_per_s: float


class Recomputer:
    """Does what recomputations ask for, hour by hour, the newest first; of several recomputers of a model one works.

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
        settle_s: float,
        keep_every_s: float = KEEP_EVERY_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = Recomputations(redis)
        self._sources = sources
        self._memory = memory
        self._timeline = timeline
        self._eyes = eyes
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
            if hour := await self._jobs.due(job.id, self._now()):
                await self._do(job, hour)
                return True
            await self._rest(job)
            return False
        except (StoreUnavailable, _Stopped):
            raise
        except Exception:
            logger.exception("recomputation %s failed", job.id)
            await self._jobs.update(job.id, ended("failed", _UNEXPECTED))
            return True

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

    # What is to be done

    async def _plan(self, job: Recomputation) -> None:
        hours: dict[HourLeft, float] = {}
        for source_id in dict.fromkeys(one.source_id for one in job.wanted):
            try:
                source = await self._sources.source(source_id)
            except SourceNotFound:  # deleted since it was asked for
                continue
            every = set(await self._memory.keyframes.hours(source_id))
            if job.drop_old:
                every |= {hour for old in await self._old(source_id) for hour in await _hours(old, source_id)}
            for hour in every:
                if not self._spans(job, source, hour):
                    continue
                await self._go_on(job)
                try:
                    missing = len(await self._missing(job, source, hour))
                except HourFileDamaged:
                    missing = 1  # at least: what stands in the way is told when the hour has its turn
                if missing or job.drop_old:
                    hours[HourLeft(source_id, hour, missing)] = self._turn(source, hour)
        if await self._jobs.plan(job.id, hours):
            slots = sum(hour.slots for hour in hours)
            logger.info("recomputation %s begins: %d frames in %d hours", job.id, slots, len(hours))

    def _turn(self, source: Source, hour: int) -> float:
        """Return the time from which on an hour can be done; for a video that is still read, the time to look again."""
        if isinstance(source, Stream):
            return (hour + 1) * HOUR_SLOTS / source.fps + self._settle_s
        if source.status in ("queued", "processing"):
            return self._now() + PUT_OFF_S
        return source.created_at

    async def _missing(self, job: Recomputation, source: Source, hour: int) -> NDArray[np.int64]:
        """Return the slots of an hour that have a keyframe and no token, ascending."""
        kept = _within(await self._memory.keyframes.slots(source.id, hour), self._spans(job, source, hour))
        if not len(kept):
            return kept
        return np.setdiff1d(kept, await self._timeline.slots(source.id, int(kept[0]), int(kept[-1]) + 1))

    async def _old(self, source_id: str) -> list[Timeline]:
        """Return the timelines that other models made."""
        fingerprint = self._timeline.format.fingerprint
        return [one for one in await self._memory.timelines(source_id) if one.format.fingerprint != fingerprint]

    async def _rest(self, job: Recomputation) -> None:
        """End a recomputation of which nothing is left, or tell when it goes on."""
        at = await self._jobs.next_at(job.id)
        if at is not None:
            if at != job.resumes_at:
                await self._jobs.update(job.id, facts(resumes_at=at))
            return
        if await self._jobs.update(job.id, ended("done")):
            logger.info("recomputation %s is done: %s", job.id, job.total)

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
        except (StoreUnavailable, SinkUnavailable, HourFileDamaged) as error:
            logger.warning("recomputing hour %d of %s is put off: %s", left.hour, source.id, error)
            # Other hours first.
            at = self._now() + PUT_OFF_S
            await self._jobs.update(job.id, facts(reason=str(error)), hour=work.left, after=work.left, at=at)

    async def _hour(self, work: "_Work") -> None:
        """Make what an hour lacks, keep it now and then, and write down how far it is."""
        begun = time.monotonic()
        source, unreadable = work.source, np.empty(0, np.int64)
        patience_s, tries = self._keep_every_s, 0
        while True:
            # Before keyframes are looked for: what is erased from now on must not come back.
            as_of = await self._timeline.as_of(source.id)
            missing = np.setdiff1d(await self._missing(work.job, source, work.left.hour), unreadable)
            await self._note(work, len(missing) + len(unreadable))
            if not len(missing):
                break
            seen = await self._look(work, missing, patience_s)
            if seen is None or not await self._keep(source, seen.rows, as_of):
                # Something was erased or sealed meanwhile: who begins anew with less leaves less room for that.
                patience_s, tries = patience_s / 2, tries + 1
                if tries == _TRIES:
                    raise StoreUnavailable(f"the memory of {source.id} changes all the time")
                continue
            tries = 0
            unreadable = np.union1d(unreadable, seen.unreadable)
            speed = round(seen.frames_per_s, 2)
            await self._jobs.update(work.job.id, facts(frames_per_s=speed, resumes_at=None, reason=None))
        await self._end(work, unreadable.tolist())
        logger.info("recomputed hour %d of %s in %.1f s", work.left.hour, source.id, time.monotonic() - begun)

    async def _keep(self, source: Source, rows: Hour, as_of: str) -> bool:
        return len(rows.slots) == 0 or await self._timeline.restore(source.id, rows, as_of)

    async def _note(self, work: "_Work", slots: int) -> None:
        """Write down that only so many slots of an hour are left; _Stopped if it is not ours to do any more."""
        after = HourLeft(work.left.source_id, work.left.hour, min(slots, work.left.slots))

        def advanced(job: Recomputation) -> Recomputation:
            return job.advanced(work.left, after)

        if await self._jobs.update(work.job.id, advanced, hour=work.left, after=after) is None:
            raise _Stopped
        work.left = after

    async def _look(self, work: "_Work", slots: NDArray[np.int64], patience_s: float) -> _Seen | None:
        """Look at keyframes, those of the first slots, for as long as there is patience; None if one is gone."""
        begun = time.monotonic()
        parts: list[Encoded] = []
        jpegs: list[bytes] = []
        done = 0
        while done < len(slots) and (not parts or time.monotonic() - begun < patience_s):
            await self._go_on(work.job)
            if not jpegs:
                try:
                    jpegs = await self._memory.keyframes.get_many(
                        work.source.id, slots[done : done + READ_FRAMES].tolist()
                    )
                except FrameNotKept:
                    return None
            made = await self._eyes.encode(jpegs[:PASS_FRAMES])
            if made.fingerprint != self._timeline.format.fingerprint:  # in the middle of an upgrade
                raise SinkUnavailable("the compressor runs another model now; this service is about to be replaced")
            parts.append(made)
            done, jpegs = done + len(made.readable), jpegs[PASS_FRAMES:]
        made, looked = Encoded.join(parts), slots[:done]
        kept = looked[made.readable]
        rows = Hour(slots=kept, tokens=made.tokens, vectors=made.vectors, times=await self._times(work.source, kept))
        return _Seen(rows, looked[~made.readable], done / (time.monotonic() - begun))

    async def _times(self, source: Source, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the capture times (n,) in milliseconds as another model's timeline has them, else those of slots."""
        times = np.round(slots * (1000 / source.fps)).astype(np.int64)
        if not len(slots):
            return times
        for old in await self._old(source.id):
            known = np.isin(slots, await old.slots(source.id, int(slots[0]), int(slots[-1]) + 1))
            with contextlib.suppress(FrameNotKept):  # erased meanwhile
                times[known] = await old.times(source.id, slots[known])
        return times

    async def _end(self, work: "_Work", unreadable: Sequence[int]) -> None:
        """Write down that an hour is done, but for keyframes that cannot be decoded."""
        job, source, left = work.job, work.source, work.left
        for slot in unreadable:
            logger.warning("%s slot %d: keyframe left out: it cannot be decoded", source.id, slot)
        if gaps := [Gap(start_slot=slot, end_slot=slot + 1, reason="decode_error") for slot in unreadable]:
            await self._sources.add_gaps(source.id, None, gaps)
        dropped = await self._drop_old(job, source, left.hour) if job.drop_old else 0
        named = tuple(UnreadableKeyframe(source_id=source.id, slot=slot) for slot in unreadable)

        def done(job: Recomputation) -> Recomputation:
            job = job.advanced(left, None, unreadable=len(unreadable), dropped=dropped)
            return job.model_copy(update={"unreadable": (*job.unreadable, *named)[:NAMED_UNREADABLE]})

        await self._jobs.update(job.id, done, hour=left)

    async def _drop_old(self, job: Recomputation, source: Source, hour: int) -> int:
        """Erase what other models made of an hour, unless something is lost by it; return the number of frames."""
        dropped = 0
        for old in await self._old(source.id):
            for start, end in self._spans(job, source, hour):
                doomed = await old.slots(source.id, start, end)
                lacking = np.setdiff1d(doomed, await self._timeline.slots(source.id, start, end))
                if len(lacking):
                    stays = "hour %d of %s stays for model %s: %d of its frames have no keyframe that can be decoded"
                    logger.info(stays, hour, source.id, old.format.fingerprint, len(lacking))
                elif len(doomed):
                    dropped += (await old.erase(source.id, start, end)).total
        return dropped

    def _spans(self, job: Recomputation, source: Source, hour: int) -> list[tuple[int, int]]:
        """Return what is wanted of an hour, as runs of slots [start, end) that are not empty.

        What a stream's retention takes is not wanted: a picture may be kept for longer than what was made of it.
        """
        first, behind = hour * HOUR_SLOTS, (hour + 1) * HOUR_SLOTS
        if isinstance(source, Stream):
            first = max(first, math.ceil((self._now() - source.retention_hours * 3600) * source.fps))
        spans = [
            (max(one.start, first), behind if one.end is None else min(one.end, behind))
            for one in job.wanted
            if one.source_id == source.id
        ]
        return [(start, end) for start, end in spans if start < end]


@dataclass(slots=True)
class _Work:
    """An hour that is being done."""

    job: Recomputation
    source: Source
    left: HourLeft


def _within(slots: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    wanted = np.zeros(len(slots), np.bool_)
    for start, end in spans:
        wanted |= (slots >= start) & (slots < end)
    return slots[wanted]


async def _hours(timeline: Timeline, source_id: str) -> list[int]:
    sealed = await timeline.sealed(source_id)
    return [*await timeline.hot_hours(source_id), *(manifest.hour for manifest in sealed)]
