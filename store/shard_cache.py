"""The shards that one process holds, each as its hour stood at some time.

An hour stands unchanged as long as its segment and the mark of its hot frames are the same. One look at the marks of a
source tells that for all of its hours, whether they are a few or a thousand: nothing has to be compared frame by frame.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from store.connection import StoreUnavailable
from store.format import BLOCK_SLOTS, BLOCKS_PER_HOUR, span_of
from store.hot import FrameNotKept
from store.hour_files import HourFileDamaged
from store.hour_states import HourState, Sealed, SourceHours
from store.shards import Shard
from store.timeline import TRIES, Timeline

READS_AT_ONCE = 4  # of whole hours; each needs some 50 MB for a moment
SOURCES_AT_ONCE = 100  # whose hours are looked at before the event loop has its turn: a few ms
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Marks:
    """What tells of an hour whether a frame of it may have changed: its segment, and the marks of its hot blocks."""

    file: str
    hot: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class _Content:
    """What an hour consists of: slots (n,), their marks, and whether it is to be held as exact."""

    slots: NDArray[np.int64]
    marks: _Marks
    is_exact: bool


@dataclass(frozen=True, slots=True)
class _Held:
    """A shard, how its hour stood before the shard was made, and what its marks were then."""

    shard: Shard
    state: HourState
    marks: _Marks

    def is_good(self, state: HourState) -> bool:
        """Return whether the shard shows the hour as it stood at `state`, or later."""
        known = self.state
        return known.look >= state.look or (known.file == state.file and known.mark == state.mark)

    def is_known(self, content: _Content) -> NDArray[np.bool_]:
        """Return which slots (n,) of a content of the hour are here as they are now.

        Those of a block whose mark differs or is gone may not be, nor may any if the segment is another one: a seal
        takes the marks away, and with them what they would tell of the last writes.
        """
        slots = content.slots
        if self.marks.file != content.marks.file:
            return np.zeros(len(slots), np.bool_)
        changed = [block for block, _ in self.marks.hot.items() ^ content.marks.hot.items()]
        return np.isin(slots, self.shard.slots) & ~np.isin(slots // BLOCK_SLOTS, changed)

    def is_still(self, content: _Content) -> bool:
        """Return whether a shard of that content of the hour would be the same."""
        same_kind = self.shard.is_exact == content.is_exact
        same_slots = np.array_equal(self.shard.slots, content.slots)
        return same_kind and same_slots and bool(self.is_known(content).all())


class ShardCache:
    """At most so many bytes of shards; those whose last use is longest ago go first. Raises StoreUnavailable."""

    def __init__(self, timeline: Timeline, max_bytes: int) -> None:
        self._timeline = timeline
        self._max_bytes = max_bytes
        self._shards: OrderedDict[tuple[str, int], _Held] = OrderedDict()  # the longest unused first
        self._sealed: dict[str, Sealed] = {}
        self._making: dict[tuple[str, int], asyncio.Task[_Held]] = {}
        self._reading = asyncio.Semaphore(READS_AT_ONCE)
        self._erased: dict[str, int] = {}  # by source: looks before this one saw what is erased now
        self._looks = 0
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return self._bytes

    @property
    def sources(self) -> frozenset[str]:
        """The sources of which anything is known here."""
        return frozenset(self._sealed) | {source_id for source_id, _ in self._shards}

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Source and hour of each shard, the longest unused first."""
        return list(self._shards)

    async def hours(self, source_ids: Sequence[str]) -> dict[str, SourceHours]:
        """Return by source how its hours that may have frames stand now."""
        self._looks += 1
        look = self._looks  # counted before the look: what is made later shows at least what this look saw
        states: dict[str, SourceHours] = {}
        for first in range(0, len(source_ids), SOURCES_AT_ONCE):
            some = source_ids[first : first + SOURCES_AT_ONCE]
            for source_id, (hot, mark) in zip(some, await self._timeline.hour_marks(some), strict=True):
                states[source_id] = SourceHours.of(source_id, look, await self._sealed_hours(source_id, mark), hot)
        for source_id, hour in self.keys:
            if source_id in states and not states[source_id].has(hour):
                self._forget((source_id, hour))
        return states

    def get(self, state: HourState) -> Shard | None:
        """Return the shard of an hour if it is held as it stands."""
        held = self._shards.get(state.key)
        if held is None or not held.is_good(state):
            return None
        self._shards.move_to_end(state.key)
        return held.shard

    async def make(self, state: HourState) -> Shard:
        """Return the shard of an hour as it stood, or later; empty if nothing is kept. What is cancelled goes on."""
        while (shard := self.get(state)) is None:
            task = self._making.get(state.key)
            if task is None or task.done():  # one that is done would be waited for without a turn for what removes it
                task = asyncio.create_task(self._make(state))
                self._making[state.key] = task
                task.add_done_callback(lambda done: self._made(state, done))
            held = await asyncio.shield(task)
            if held.is_good(state):  # though it may be forgotten already
                return held.shard
        return shard

    async def forget_erased(self, source_id: str) -> None:
        """Let go of each hour of a source that is not any more as it was; whoever reads one just now keeps nothing."""
        known = (await self.hours([source_id]))[source_id]
        self._erased[source_id] = self._looks
        for key, held in list(self._shards.items()):
            if key[0] == source_id and not held.is_good(known.state(key[1])):
                self._forget(key)

    def drop(self, source_id: str) -> None:
        """Free all that is held of a source."""
        for key in [key for key in self._shards if key[0] == source_id]:
            self._forget(key)
        self._sealed.pop(source_id, None)
        self._erased.pop(source_id, None)

    async def _sealed_hours(self, source_id: str, mark: str) -> Sealed:
        """Return the sealed hours of a source, read anew if they are not those of the mark."""
        sealed = self._sealed.get(source_id)
        if sealed is None or sealed.mark != mark or not mark:  # without a mark nothing tells of a change
            sealed = Sealed.of(mark, await self._timeline.sealed(source_id))
            self._sealed[source_id] = sealed
        return sealed

    async def _make(self, state: HourState) -> _Held:
        async with self._reading:
            held = self._shards.get(state.key)
            for _ in range(TRIES):
                content = await self._content(state)
                if held is not None and held.is_still(content):
                    return self._remember(_Held(held.shard, state, content.marks))
                try:
                    vectors = await self._vectors(state.source_id, held, content)
                except FrameNotKept:  # sealed anew or erased in between
                    continue
                except HourFileDamaged as error:
                    raise StoreUnavailable(f"{error}: restore it or erase the hour") from None
                make = Shard.exact if content.is_exact or not len(content.slots) else Shard.in_bytes
                shard = await asyncio.to_thread(make, content.slots, vectors)
                return self._remember(_Held(shard, state, content.marks))
        raise StoreUnavailable(f"the memory of {state.source_id} changes all the time; search it again")

    async def _content(self, state: HourState) -> _Content:
        """Return what an hour consists of now."""
        source_id, hour = state.source_id, state.hour
        sealed = [] if state.file is None else await self._timeline.sealed(source_id, hour, hour)
        if sealed and not state.mark:
            return _Content(sealed[0].slots, _Marks(sealed[0].file, {}), is_exact=False)
        blocks = range(hour * BLOCKS_PER_HOUR, (hour + 1) * BLOCKS_PER_HOUR)
        marks = await self._timeline.marks(source_id, blocks)  # before what they stand for
        slots = await self._timeline.slots(source_id, *span_of(hour))
        is_exact = not sealed or not np.isin(slots, sealed[0].slots).all()
        hot = {block: mark for block, (mark, _) in zip(blocks, marks, strict=True) if mark}
        _, file = marks[0]  # as that of each: it is one hour
        return _Content(slots, _Marks(file, hot), is_exact)

    async def _vectors(self, source_id: str, held: _Held | None, content: _Content) -> NDArray[np.float32]:
        """Return the vectors (n, P) of an hour, reading only those that an exact shard does not hold."""
        slots = content.slots
        if held is None or not held.shard.is_exact:
            return await self._timeline.vectors(source_id, slots)
        is_known = held.is_known(content)
        vectors = np.empty((len(slots), self._timeline.format.vector_width), np.float32)
        vectors[~is_known] = await self._timeline.vectors(source_id, slots[~is_known])
        known = await asyncio.to_thread(held.shard.vectors)
        vectors[is_known] = known[np.searchsorted(held.shard.slots, slots[is_known])]
        return vectors

    def _made(self, state: HourState, task: "asyncio.Task[_Held]") -> None:
        if self._making.get(state.key) is task:
            del self._making[state.key]
        if not task.cancelled():
            task.exception()  # whoever waits for it has it; if nobody does any more, nobody is to be told

    def _remember(self, held: _Held) -> _Held:
        state = held.state
        self._forget(state.key)
        if state.look < self._erased.get(state.source_id, 0):
            return held
        self._shards[state.key] = held
        self._bytes += held.shard.nbytes
        while self._bytes > self._max_bytes and len(self._shards) > 1:
            self._forget(next(iter(self._shards)))
        return held

    def _forget(self, key: tuple[str, int]) -> None:
        held = self._shards.pop(key, None)
        if held is not None:
            self._bytes -= held.shard.nbytes


async def each(items: Iterable[T], act: Callable[[T], Awaitable[object]], patience_s: float | None = None) -> None:
    """Act on items in their order, READS_AT_ONCE at a time, and begin none any more when the patience ends."""
    left = iter(items)

    async def work() -> None:
        for item in left:
            await act(item)

    workers = [asyncio.create_task(work()) for _ in range(READS_AT_ONCE)]
    try:
        done, _ = await asyncio.wait(workers, timeout=patience_s, return_when=asyncio.FIRST_EXCEPTION)
        for worker in done:
            worker.result()
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
