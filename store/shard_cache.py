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
from store.format import HOUR_SLOTS
from store.hot import FrameNotKept
from store.hour_files import HourFileDamaged
from store.segments import Manifest
from store.shards import Shard, shard_bytes
from store.timeline import TRIES, Timeline

READS_AT_ONCE = 4  # of whole hours; each needs some 50 MB for a moment
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HourState:
    """How an hour of a source stood when somebody looked, at the `look`-th look: what is sealed of it, what is not."""

    source_id: str
    hour: int
    manifest: Manifest | None
    mark: str
    look: int

    @property
    def key(self) -> tuple[str, int]:
        return self.source_id, self.hour

    @property
    def file(self) -> str | None:
        return None if self.manifest is None else self.manifest.file

    @property
    def slots(self) -> NDArray[np.int64] | None:
        """The frames of an hour that is sealed and has not been touched since; None if one has to look."""
        return None if self.manifest is None or self.mark else self.manifest.slots

    def bytes_of_shard(self, width: int) -> int:
        """Return the bytes that a shard of vectors (P,) of this hour needs at most, or nearly so."""
        if self.manifest is None:
            return shard_bytes(HOUR_SLOTS, width, is_exact=True)
        return shard_bytes(self.manifest.frames, width, is_exact=False)


@dataclass(frozen=True, slots=True)
class _Held:
    """A shard, and how its hour stood before the shard was made."""

    shard: Shard
    state: HourState

    def is_good(self, state: HourState) -> bool:
        """Return whether the shard shows the hour as it stood at `state`, or later."""
        known = self.state
        return known.look >= state.look or (known.file == state.file and known.mark == state.mark)

    def is_still(self, file: str | None, slots: NDArray[np.int64], *, is_exact: bool) -> bool:
        """Return whether a shard of these frames of an hour would be the same: a frame sent twice has one vector."""
        same_kind = self.state.file == file and self.shard.is_exact == is_exact
        return same_kind and np.array_equal(self.shard.slots, slots)


@dataclass(frozen=True, slots=True)
class _Sealed:
    """The sealed hours of a source as of a mark."""

    mark: str
    manifests: Mapping[int, Manifest]


class ShardCache:
    """At most so many bytes of shards; those whose last use is longest ago go first. Raises StoreUnavailable."""

    def __init__(self, timeline: Timeline, max_bytes: int) -> None:
        self._timeline = timeline
        self._max_bytes = max_bytes
        self._shards: OrderedDict[tuple[str, int], _Held] = OrderedDict()  # the longest unused first
        self._sealed: dict[str, _Sealed] = {}
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

    async def hours(self, source_ids: Sequence[str]) -> dict[str, dict[int, HourState]]:
        """Return by source how each hour that may have frames stands now, the oldest hour first."""
        self._looks += 1
        look = self._looks  # counted before the look: what is made later shows at least what this look saw
        marks = await self._timeline.hour_marks(source_ids)
        states = {}
        for source_id, (hot, sealed_mark) in zip(source_ids, marks, strict=True):
            manifests = await self._manifests(source_id, sealed_mark)
            states[source_id] = {
                hour: HourState(source_id, hour, manifests.get(hour), hot.get(hour, ""), look)
                for hour in sorted({*manifests, *hot})
            }
        for key in [(known, hour) for known, hour in self._shards if known in states and hour not in states[known]]:
            self._forget(key)
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
            if task is None:
                task = asyncio.create_task(self._make(state))
                self._making[state.key] = task
                task.add_done_callback(lambda done: self._made(state, done))
            held = await asyncio.shield(task)
            if held.is_good(state):  # though it may be forgotten already
                return held.shard
        return shard

    async def forget_erased(self, source_id: str) -> None:
        """Let go of each hour of a source that is not any more as it was; whoever reads one just now keeps nothing."""
        states = (await self.hours([source_id]))[source_id]
        self._erased[source_id] = self._looks
        for key, held in list(self._shards.items()):
            if key[0] == source_id and not held.is_good(states[key[1]]):
                self._forget(key)

    def drop(self, source_id: str) -> None:
        """Free all that is held of a source."""
        for key in [key for key in self._shards if key[0] == source_id]:
            self._forget(key)
        self._sealed.pop(source_id, None)
        self._erased.pop(source_id, None)

    async def _manifests(self, source_id: str, mark: str) -> Mapping[int, Manifest]:
        """Return the sealed hours of a source, read anew if they are not those of the mark."""
        sealed = self._sealed.get(source_id)
        if sealed is None or sealed.mark != mark or not mark:  # without a mark nothing tells of a change
            manifests = await self._timeline.sealed(source_id)
            sealed = _Sealed(mark, {manifest.hour: manifest for manifest in manifests})
            self._sealed[source_id] = sealed
        return sealed.manifests

    async def _make(self, state: HourState) -> _Held:
        async with self._reading:
            held = self._shards.get(state.key)
            known = None if held is None else held.shard
            slots = state.slots
            for _ in range(TRIES):
                if slots is None:
                    first = state.hour * HOUR_SLOTS
                    slots = await self._timeline.slots(state.source_id, first, first + HOUR_SLOTS)
                is_exact = state.manifest is None or not np.isin(slots, state.manifest.slots).all()
                if held is not None and held.is_still(state.file, slots, is_exact=is_exact):
                    return self._remember(held.shard, state)
                try:
                    vectors = await self._vectors(state.source_id, known, slots)
                except FrameNotKept:  # sealed anew or erased in between
                    slots = None
                    continue
                except HourFileDamaged as error:
                    raise StoreUnavailable(f"{error}: restore it or erase the hour") from None
                make = Shard.exact if is_exact or not len(slots) else Shard.in_bytes
                return self._remember(await asyncio.to_thread(make, slots, vectors), state)
        raise StoreUnavailable(f"the memory of {state.source_id} changes all the time; search it again")

    async def _vectors(self, source_id: str, known: Shard | None, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the vectors (n, P) of slots, reading only those that an exact shard does not hold."""
        if known is None or not known.is_exact:
            return await self._timeline.vectors(source_id, slots)
        is_known = np.isin(slots, known.slots)
        vectors = np.empty((len(slots), self._timeline.format.vector_width), np.float32)
        vectors[~is_known] = await self._timeline.vectors(source_id, slots[~is_known])
        vectors[is_known] = (await asyncio.to_thread(known.vectors))[np.isin(known.slots, slots)]
        return vectors

    def _made(self, state: HourState, task: "asyncio.Task[_Held]") -> None:
        del self._making[state.key]
        if not task.cancelled():
            task.exception()  # whoever waits for it has it; if nobody does any more, nobody is to be told

    def _remember(self, shard: Shard, state: HourState) -> _Held:
        self._forget(state.key)
        held = _Held(shard, state)
        if state.look < self._erased.get(state.source_id, 0):
            return held
        self._shards[state.key] = held
        self._bytes += shard.nbytes
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
