"""A second look at kept pictures: which of an hour lack tokens of the running model, and what it makes of them.

n frames, C2 tokens a frame, D model width, P width of the search vector.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from compressor_service.facts import Encoded
from ingest.frame import SinkUnavailable
from store.format import span_of
from store.hot import FrameNotKept
from store.memory import Memory
from store.recomputations import Recomputation
from store.segments import Hour
from store.slots import without
from store.source import Source, Stream
from store.timeline import Timeline

logger = logging.getLogger(__name__)

PASS_FRAMES = 8  # a live frame waits for one pass at most, so it is a short one
READ_FRAMES = 64  # keyframes that are read at once
GO_ON_EVERY_S = 5.0  # while live frames have the device


class Eyes(Protocol):
    """Something that looks at keyframes with the running model, whenever nothing else is to be looked at."""

    async def encode(self, keyframes: Sequence[bytes]) -> Encoded:
        """Look at keyframes and keep nothing. Raises SinkUnavailable."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was made of a part of an hour, and the slots (u,) of it whose keyframes cannot be decoded."""

    rows: Hour
    unreadable: NDArray[np.int64]
    frames_per_s: float


class SecondLook:
    """Looks at the keyframes of hours with the model of one timeline."""

    def __init__(self, memory: Memory, timeline: Timeline, eyes: Eyes, now: Callable[[], float]) -> None:
        self._memory = memory
        self._timeline = timeline
        self._eyes = eyes
        self._now = now

    async def hours(self, job: Recomputation, source: Source) -> list[int]:
        """Return the hours of a source in which there may be something to do."""
        hours = set(await self._memory.keyframes.hours(source.id))
        if job.drop_old:
            for old in await self._old(source.id):
                hours |= {*await old.hot_hours(source.id), *(one.hour for one in await old.sealed(source.id))}
        return [hour for hour in hours if self._spans(job, source, hour)]

    async def missing(self, job: Recomputation, source: Source, hour: int) -> NDArray[np.int64]:
        """Return the slots of an hour that are wanted, have a keyframe and no token, ascending."""
        kept = await self._memory.keyframes.slots(source.id, hour)
        wanted = np.zeros(len(kept), np.bool_)
        for start, end in self._spans(job, source, hour):
            wanted |= (kept >= start) & (kept < end)
        return without(kept[wanted], await self._timeline.slots(source.id, *span_of(hour)))

    async def look(
        self, source: Source, slots: NDArray[np.int64], patience_s: float, go_on: Callable[[], Awaitable[None]]
    ) -> Seen | None:
        """Look at the first of ascending slots of an hour for as long as there is patience; None if a keyframe is gone.

        `go_on` is called before every pass and while the device is waited for, and may raise. Raises SinkUnavailable.
        """
        begun = time.monotonic()
        parts: list[Encoded] = []
        jpegs: list[bytes] = []
        done = 0
        while done < len(slots) and (not parts or time.monotonic() - begun < patience_s):
            await go_on()
            if not jpegs:
                some = slots[done : done + READ_FRAMES].tolist()
                try:
                    jpegs = await self._memory.keyframes.get_many(source.id, some)
                except FrameNotKept:
                    return None
            made = await self._encode(jpegs[:PASS_FRAMES], go_on)
            if made.fingerprint != self._timeline.format.fingerprint:  # in the middle of an upgrade
                raise SinkUnavailable("the compressor runs another model now; this service is about to be replaced")
            parts.append(made)
            done, jpegs = done + len(made.readable), jpegs[PASS_FRAMES:]
        whole, looked = Encoded.join(parts), slots[:done]
        kept = looked[whole.readable]
        rows = Hour(slots=kept, tokens=whole.tokens, vectors=whole.vectors, times=await self._times(source, kept))
        return Seen(rows, looked[~whole.readable], done / (time.monotonic() - begun))

    async def _encode(self, keyframes: Sequence[bytes], go_on: Callable[[], Awaitable[None]]) -> Encoded:
        looking = asyncio.create_task(self._eyes.encode(keyframes))
        try:
            while not (await asyncio.wait([looking], timeout=GO_ON_EVERY_S))[0]:
                await go_on()  # whoever is silent for longer than a lease is taken for gone
            return await looking
        finally:
            looking.cancel()

    async def drop_old(self, job: Recomputation, source: Source, hour: int) -> int:
        """Erase what other models made of an hour, unless something is lost by it; return the number of frames."""
        dropped = 0
        for old in await self._old(source.id):
            for start, end in self._spans(job, source, hour):
                doomed = await old.slots(source.id, start, end)
                lacking = without(doomed, await self._timeline.slots(source.id, start, end))
                if len(lacking):
                    stays = "hour %d of %s stays for model %s: %d of its frames have no keyframe that can be decoded"
                    logger.info(stays, hour, source.id, old.format.fingerprint, len(lacking))
                elif len(doomed):
                    dropped += (await old.erase(source.id, start, end)).total
        return dropped

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

    async def _old(self, source_id: str) -> list[Timeline]:
        """Return the timelines that other models made."""
        fingerprint = self._timeline.format.fingerprint
        return [one for one in await self._memory.timelines(source_id) if one.format.fingerprint != fingerprint]

    def _spans(self, job: Recomputation, source: Source, hour: int) -> list[tuple[int, int]]:
        """Return what is wanted of an hour, as runs of slots [start, end) that are not empty.

        What a stream's retention takes is not wanted: a picture may be kept for longer than what was made of it.
        """
        first, behind = span_of(hour)
        if isinstance(source, Stream):
            first = max(first, math.ceil((self._now() - source.retention_hours * 3600) * source.fps))
        spans = [
            (max(one.start, first), behind if one.end is None else min(one.end, behind))
            for one in job.wanted
            if one.source_id == source.id
        ]
        return [(start, end) for start, end in spans if start < end]
