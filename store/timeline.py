"""The timeline of a source as readers see it: the hot hours in Redis and the sealed ones in segments, as one.

T frames of a read, C2 tokens a frame, D model width, P width of the search vector.

An hour is sealed in one step: its manifest appears and its hot blocks vanish. A reader that was between the two looks
again. A frame that comes for a sealed hour is hot until the hour is sealed anew, and counts before the sealed one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from store.connection import StoreUnavailable
from store.format import (
    BLOCKS_PER_HOUR,
    HOUR_SLOTS,
    TIME_DTYPE,
    VECTOR_DTYPE,
    TokenFormat,
    hours_cut,
    hours_of,
    span_of,
)
from store.hot import Entry, FrameNotKept, HotTimeline, formats_of
from store.hour_files import HourFileDamaged, HourFileGone
from store.keys import BLOCK_MARK, SEALED_MARK
from store.sealed import Before, SealedHours
from store.segments import Hour, Manifest, Part, Segments
from store.slots import NO_SLOTS, union, without

TRIES = 20  # of a read that meets seals and erasures again and again
_HOT_PARTS: Mapping[Part, str] = {"tokens": "t", "vectors": "v", "times": "m"}


class StaleEpoch(RuntimeError):
    """The writer no longer owns the source: another owner took over, or the lease was revoked."""


@dataclass(frozen=True, slots=True)
class ErasedFrames:
    """How many frames are gone from Redis (`hot`) and from segments (`sealed`)."""

    hot: int
    sealed: int

    def __add__(self, other: "ErasedFrames") -> "ErasedFrames":
        return ErasedFrames(self.hot + other.hot, self.sealed + other.sealed)

    @property
    def total(self) -> int:
        return self.hot + self.sealed


NOTHING_ERASED = ErasedFrames(0, 0)
BlockMark = tuple[str, str]  # of what is hot of a block, and the segment of its hour


class Timeline:
    """The timelines of all sources for tokens of one format. Raises StoreUnavailable."""

    def __init__(self, redis: Redis, format: TokenFormat, segments: Segments) -> None:
        self.format = format
        self._redis = redis
        self._hot = HotTimeline(redis, format)
        self._sealed = SealedHours(redis, format)
        self._segments = segments

    async def append(self, source_id: str, epoch: int, entries: Sequence[Entry]) -> None:
        """Keep the frames, all or none; a slot that is kept already is overwritten. StaleEpoch if not the owner's."""
        if await self.append_many({(source_id, epoch): entries}):
            raise StaleEpoch(f"{source_id} has another owner: epoch {epoch} is not its newest lease")

    async def append_many(self, batches: Mapping[tuple[str, int], Sequence[Entry]]) -> frozenset[str]:
        """Keep the frames of each (source id, epoch); return the sources whose epoch was stale: they kept nothing.

        The frames of one source are kept all or none. ValueError for an entry that does not fit the format.
        """
        return await self._hot.append_many(batches)

    async def slots(self, source_id: str, start: int, end: int) -> NDArray[np.int64]:
        """Return the present slots of [start, end), ascending. The range may be as wide as one likes."""
        if end <= start:
            return np.empty(0, np.int64)
        # The hot ones first: an hour that is sealed between the two looks is then found twice, and not never.
        hot = await self._hot.slots(source_id, start, end)
        sealed = await self._sealed.between(source_id, start // HOUR_SLOTS, (end - 1) // HOUR_SLOTS)
        if not sealed:
            return hot
        slots = union(*(manifest.slots for manifest in sealed), hot)
        return slots[slice(*np.searchsorted(slots, [start, end]))]

    async def seen_by_others(self, source_id: str, start: int, end: int) -> NDArray[np.int64]:
        """Return the slots of [start, end) of which tokens of other models are kept, ascending."""
        others = [one for one in await formats_of(self._redis, source_id) if one.fingerprint != self.format.fingerprint]
        return union(*[await Timeline(self._redis, one, self._segments).slots(source_id, start, end) for one in others])

    async def present(self, source_id: str, start: int, end: int) -> NDArray[np.bool_]:
        """Return for each slot of [start, end) whether its frame is kept, (end - start,)."""
        present = np.zeros(max(end - start, 0), np.bool_)
        present[await self.slots(source_id, start, end) - start] = True
        return present

    async def read(self, source_id: str, slots: NDArray[np.int64]) -> NDArray[np.generic]:
        """Return the tokens (T, C2, D) of the slots, in the order asked; FrameNotKept names the first absent one."""
        flat = await self._rows(source_id, slots, "tokens", self.format.token_bytes)
        return flat.view(self.format.numpy_dtype).reshape(len(flat), *self.format.token_shape)

    async def times(self, source_id: str, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the capture times (T,) in milliseconds of the slots; FrameNotKept."""
        flat = await self._rows(source_id, slots, "times", TIME_DTYPE.itemsize)
        return flat.view(TIME_DTYPE).reshape(len(flat))

    async def vectors(self, source_id: str, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the search vectors (T, P) of the slots, rounded to half precision; FrameNotKept."""
        if self.format.vector_width == 0:
            return np.empty((len(slots), 0), np.float32)
        flat = await self._rows(source_id, slots, "vectors", self.format.vector_bytes)
        return flat.view(VECTOR_DTYPE).reshape(len(flat), self.format.vector_width).astype(np.float32)

    async def marks(self, source_id: str, blocks: Sequence[int]) -> list[BlockMark]:
        """Return for each of ascending blocks a mark that differs whenever a frame of it may have changed."""
        hot = await self._hot.marks(source_id, blocks)
        sealed = await self._sealed.between(source_id, blocks[0] // BLOCKS_PER_HOUR, blocks[-1] // BLOCKS_PER_HOUR)
        files = {manifest.hour: manifest.file for manifest in sealed}
        return [(mark, files.get(block // BLOCKS_PER_HOUR, "")) for mark, block in zip(hot, blocks, strict=True)]

    async def extent(self, source_id: str) -> tuple[int, int] | None:
        """Return the first and the last present slot, None if nothing is kept."""
        hot, sealed = await self._hot.extent(source_id), await self._sealed.ends(source_id)
        ends = [] if hot is None else [hot]
        if sealed is not None:
            ends.append((int(sealed[0].slots[0]), int(sealed[1].slots[-1])))
        return (min(first for first, _ in ends), max(last for _, last in ends)) if ends else None

    async def count(self, source_id: str) -> int:
        """Return how many frames of the source are kept."""
        return await self._hot.count(source_id)

    async def sealed(self, source_id: str, first: int | None = None, last: int | None = None) -> list[Manifest]:
        """Return the manifests of the sealed hours first to last, both included, in order; None leaves a side open."""
        return await self._sealed.between(source_id, first, last)

    async def hot_hours(self, source_id: str) -> list[int]:
        """Return the hours that have frames which are not sealed, in order."""
        return await self._hot.hours(source_id)

    async def hour_marks(self, source_ids: Sequence[str]) -> list[tuple[dict[int, str], str]]:
        """Return for each source a mark of every hour of which something is not sealed, and one for all that is sealed.

        A mark differs after every change of what it stands for. This costs next to nothing, however long the timelines.
        """
        found = []
        for marks in await self._sealed.marks(source_ids):
            sealed = marks.pop(SEALED_MARK, "")
            hours = {int(field): mark for field, mark in marks.items() if field[0] != BLOCK_MARK}
            found.append((hours, sealed))
        return found

    async def seal(self, source_id: str, hour: int) -> bool:
        """Move an hour from Redis into a segment; False if it changed meanwhile: it stays as it is, to be tried again.

        Raises HourFileDamaged if the segment does not read back as it was written; then nothing is moved.
        """
        before = await self._sealed.before(source_id, hour)
        try:
            rows = await self._hour(source_id, hour)
        except FrameNotKept:  # erased between two reads
            return False
        return len(rows.slots) > 0 and await self._replace(source_id, before, rows)

    async def as_of(self, source_id: str) -> str:
        """Return a mark of the present for `restore`: to be taken before what shall be restored is read."""
        return await self._sealed.as_of(source_id)

    async def restore(self, source_id: str, rows: Hour, as_of: str) -> bool:
        """Add frames of an hour that is over straight to its segment; slots that are kept stay as they are.

        False, and nothing is added, if the hour changed meanwhile, or if anything of the source was erased since
        `as_of`: what was erased does not come back. ValueError for rows that are no hour of this format.
        StoreUnavailable as long as Redis has lost sight of what is kept of the hour.
        Raises HourFileDamaged if the segment does not read back as it was written.
        """
        hour = self._checked(rows)
        before = await self._sealed.before(source_id, hour)
        try:
            kept = await self._hour(source_id, hour)
        except FrameNotKept:
            return False
        is_new = ~np.isin(rows.slots, kept.slots)
        if not is_new.any():
            return True
        return await self._replace(source_id, before, _merged(kept, rows, is_new), as_of)

    async def adopt(self, source_id: str, found: Manifest, lost: Manifest | None) -> bool:
        """Let a segment count of whose hour none is known, or one (`lost`) that is not there any more.

        What is hot of the hour counts before it. False, and nothing is changed, if the hour changed meanwhile.
        """
        return await self._sealed.adopt(source_id, found, lost)

    async def erase(self, source_id: str, start: int | None = None, end: int | None = None) -> ErasedFrames:
        """Erase the slots [start, end) for good; None leaves a side unbounded.

        StoreUnavailable, and nothing is erased, as long as an hour of which a part stays has files that Redis lost.
        """
        erased = NOTHING_ERASED
        if start is not None and end is not None and end <= start:
            return erased
        for hour in hours_cut(start, end):
            hot_slots = await self._hot.slots(source_id, *span_of(hour))
            await self._sealed.require_known(self._segments, source_id, hour, hot_slots)
        first, last = hours_of(start, end)
        for _ in range(TRIES):
            # Hot frames first, each time: a seal in between may have brought some of them into a segment.
            hot = await self._hot.erase(source_id, start, end)
            done = [
                await self._erase_sealed(source_id, manifest, start, end)
                for manifest in await self._sealed.between(source_id, first, last)
            ]
            erased += ErasedFrames(hot, sum(frames for frames in done if frames is not None))
            if None not in done:
                break
        else:
            raise StoreUnavailable(f"the memory of {source_id} changes all the time; erase it again")
        await self._sealed.remove_leftovers(self._segments, source_id, first, last)
        return erased

    async def expire(self, source_id: str, before: int) -> ErasedFrames:
        """Erase what is older than a slot; a sealed hour goes as one, when all of it is older."""
        erased = ErasedFrames(await self._hot.erase(source_id, None, before), 0)
        if await self._sealed.between(source_id, None, before // HOUR_SLOTS - 1):
            erased += await self.erase(source_id, None, before // HOUR_SLOTS * HOUR_SLOTS)
        return erased

    async def _erase_sealed(self, source_id: str, old: Manifest, start: int | None, end: int | None) -> int | None:
        """Erase sealed slots [start, end) of an hour and return their number; None if the hour changed meanwhile."""
        first, behind = span_of(old.hour)
        low, high = np.searchsorted(old.slots, [first if start is None else start, behind if end is None else end])
        doomed = old.slots[low:high]
        if not len(doomed):
            return 0
        before = replace(await self._sealed.before(source_id, old.hour), manifest=old)
        try:
            rows = await self._hour(source_id, old.hour, doomed)
        except FrameNotKept:
            return None
        return len(doomed) if await self._replace(source_id, before, rows) else None

    def _checked(self, rows: Hour) -> int:
        """Return the hour of rows. ValueError if they are not rows of one hour in this format."""
        count, format = len(rows.slots), self.format
        if not count or rows.slots[0] < 0 or (np.diff(rows.slots) <= 0).any():
            raise ValueError("the slots of an hour ascend from 0, and there is at least one")
        first, last = hours_of(int(rows.slots[0]), int(rows.slots[-1]) + 1)
        if first is None or first != last:
            raise ValueError(f"slots {rows.slots[0]} to {rows.slots[-1]} are not of one hour")
        if rows.tokens.shape != (count, *format.token_shape) or rows.tokens.dtype != format.numpy_dtype:
            raise ValueError(f"tokens are {rows.tokens.shape} {rows.tokens.dtype}, not {count} of the format")
        if rows.vectors.shape != (count, format.vector_width) or rows.times.shape != (count,):
            raise ValueError(f"vectors {rows.vectors.shape} and times {rows.times.shape} do not fit {count} slots")
        return first

    async def _replace(self, source_id: str, before: Before[Manifest], rows: Hour, as_of: str | None = None) -> bool:
        """Let a segment of these rows, or nothing if they are none, stand for an hour."""
        hour, old = before.hour, before.manifest
        await self._sealed.require_known(self._segments, source_id, hour, rows.slots)
        kept = len(await self._hot.slots(source_id, *span_of(hour))) + (0 if old is None else old.frames)
        swap = partial(self._sealed.replace, source_id, before, as_of=as_of, gone=kept - len(rows.slots))
        writing = None
        if len(rows.slots):
            writing = self._segments.write(source_id, self.format, hour, before.next_generation, rows)
        return await self._sealed.put(self._segments, source_id, before, writing, swap)

    async def _hour(self, source_id: str, hour: int, doomed: NDArray[np.int64] = NO_SLOTS) -> Hour:
        """Read what is kept of an hour, but for doomed slots. FrameNotKept if it changes meanwhile."""
        slots = without(await self.slots(source_id, *span_of(hour)), doomed)
        return Hour(
            slots=slots,
            tokens=await self.read(source_id, slots),
            vectors=await self.vectors(source_id, slots),
            times=await self.times(source_id, slots),
        )

    async def _rows(self, source_id: str, slots: NDArray[np.int64], part: Part, row_bytes: int) -> NDArray[np.uint8]:
        """Return one part of the slots as bytes (T, row_bytes)."""
        slots = np.asarray(slots, np.int64)
        if len(slots) == 0:
            return np.empty((0, row_bytes), np.uint8)
        first, last = int(slots.min()) // HOUR_SLOTS, int(slots.max()) // HOUR_SLOTS
        before: list[Manifest] | None = None
        for _ in range(TRIES):
            sealed = await self._sealed.between(source_id, first, last)
            try:
                if not sealed:
                    return await self._hot.rows(source_id, slots, _HOT_PARTS[part], row_bytes)
                return await self._mixed_rows(source_id, slots, sealed, part, row_bytes)
            except HourFileDamaged as error:
                raise StoreUnavailable(f"{error}: restore the file, or erase the hour") from None
            except (FrameNotKept, HourFileGone) as error:
                # Sealed or erased between the looks? Only what is absent twice in the same state is not kept.
                if sealed == before:
                    if isinstance(error, FrameNotKept):
                        raise
                    raise StoreUnavailable(
                        f"the segment {error} of {source_id} is lost: restore it or erase the hour"
                    ) from None
                before = sealed
        raise StoreUnavailable(f"the memory of {source_id} changes all the time; read it again")

    async def _mixed_rows(
        self, source_id: str, slots: NDArray[np.int64], sealed: Sequence[Manifest], part: Part, row_bytes: int
    ) -> NDArray[np.uint8]:
        wanted, places = np.unique(slots, return_inverse=True)
        rows = np.empty((len(wanted), row_bytes), np.uint8)
        left = np.ones(len(wanted), np.bool_)
        hot = await self._hot.slots(source_id, span_of(sealed[0].hour)[0], span_of(sealed[-1].hour)[1])
        for manifest in sealed:
            low, high = np.searchsorted(wanted, span_of(manifest.hour))
            here = wanted[low:high]
            is_sealed = np.isin(here, manifest.slots) & ~np.isin(here, hot)
            if is_sealed.all() and len(here):
                await self._segments.read(source_id, manifest, part, here, rows[low:high])
            elif is_sealed.any():
                found = np.empty((int(is_sealed.sum()), row_bytes), np.uint8)
                await self._segments.read(source_id, manifest, part, here[is_sealed], found)
                rows[low:high][is_sealed] = found
            left[low:high] = ~is_sealed
        if left.any():
            rows[left] = await self._hot.rows(source_id, wanted[left], _HOT_PARTS[part], row_bytes)
        return rows if np.array_equal(wanted, slots) else rows[places]


def _merged(kept: Hour, rows: Hour, is_new: NDArray[np.bool_]) -> Hour:
    """Return kept frames and those rows (n,) that are new, in order."""
    order = np.argsort(np.concatenate([kept.slots, rows.slots[is_new]]))

    def both(old: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([old, new[is_new]])[order]

    return Hour(
        slots=both(kept.slots, rows.slots),
        tokens=both(kept.tokens, rows.tokens),
        vectors=both(kept.vectors, rows.vectors),
        times=both(kept.times, rows.times),
    )
