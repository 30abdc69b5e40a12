"""Search by meaning: which moments look like a vector, among any time ranges of any sources.

P width of the search vector.

A source-hour is one flat FAISS shard, whose rows are the hour's present slots in order. So the time filter chooses
shards and rows of them, and nothing is ever deleted from an index. All of it is derived from the timeline: shards are
loaded when the process starts, and a search makes those it misses itself, for as long as its patience lasts.
"""

import asyncio
import os
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from heapq import merge
from operator import itemgetter
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from store.connection import StoreUnavailable
from store.format import HOUR_SLOTS, span_of
from store.hour_states import UNKNOWN, HourState, Run, SourceHours
from store.settings import StoreSettings
from store.shard_cache import SOURCES_AT_ONCE, ShardCache, each
from store.shard_loader import ShardLoader
from store.shards import Rows, Shard, search_on_this_thread
from store.sources import Sources
from store.timeline import Timeline

NEIGHBOUR_SLOTS = 2  # hits at most so far apart are one moment: one frame of another view does not cut it in two
HITS_PER_MOMENT = 8  # frames that are looked at for each moment that is asked for, so that moments get their extent
FIRST_HITS = 64  # of each shard; FAISS is as quick to return them as to return one
DEEPER = 4  # times as many of a shard that may have more good ones
HOURS_PER_READ = 8  # of which only the presence is read: less than a ms each on the event loop
MAX_THREADS = 8  # more only wait for memory
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Span:
    """Slots [start, end) of a source."""

    source_id: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Moment:
    """Slots [start, end) of a source that match; `slot` is its best frame and `score` that frame's cosine."""

    source_id: str
    start: int
    end: int
    slot: int
    score: float


@dataclass(frozen=True, slots=True)
class Found:
    """Moments, best first, and how many of the frames that are kept in the spans were looked at for them."""

    moments: tuple[Moment, ...]
    frames_kept: int
    frames_searched: int

    @property
    def partial(self) -> bool:
        """Whether anything that is kept was left out."""
        return self.frames_searched < self.frames_kept


class Moments:
    """The search over all sources. Raises StoreUnavailable."""

    def __init__(self, timeline: Timeline, settings: StoreSettings) -> None:
        self._timeline = timeline
        self._max_bytes = settings.moments_max_bytes
        self._patience_s = settings.moments_patience_s
        self._cache = ShardCache(timeline, settings.moments_max_bytes)
        self._threads = min(os.cpu_count() or 1, MAX_THREADS)
        self._pool = ThreadPoolExecutor(self._threads, "moments", initializer=search_on_this_thread)

    @property
    def nbytes(self) -> int:
        """Bytes of the shards that are held."""
        return self._cache.nbytes

    def loader(self, sources: Sources) -> ShardLoader:
        """Return what loads the newest hours of all sources, so that searches need not."""
        width = self._timeline.format.vector_width
        return ShardLoader(self._cache, sources, width=width, max_bytes=self._max_bytes)

    async def search(
        self,
        vector: NDArray[np.float32],
        spans: Sequence[Span],
        *,
        top_k: int,
        min_score: float | None = None,
        slots: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> Found:
        """Return at most `top_k` moments of the spans, best first.

        Of the best frames those at most NEIGHBOUR_SLOTS apart make one moment. `slots` restricts the sources it names
        to those slots. What could not be read in time is left out, and told.
        ValueError unless the vector is (P,) and finite.
        """
        query = self._checked(vector)
        if top_k < 1:
            return Found((), 0, 0)
        asked = await self._asked(spans, slots or {})
        held = self._held(asked)
        made, failures = await self._made(asked, {look.part.state.key for look in held})
        if failures and not held and not made:
            raise failures[0]
        left_out = await self._left_out(asked, [look.part.state.key for look in (*held, *made)])
        looks = sorted((look for look in (*held, *made) if look.frames), key=_Look.order)
        searched = sum(look.frames for look in looks)
        moments = await self._moments(query, looks, top_k, -np.inf if min_score is None else min_score)
        return Found(tuple(moments), searched + left_out, searched)

    async def forget(self, source_id: str) -> None:
        """Let go of what is held of a source's hours that changed, for frames of it were erased."""
        await self._cache.forget_erased(source_id)

    def _checked(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        width = self._timeline.format.vector_width
        query = np.ascontiguousarray(vector, np.float32)
        if query.shape != (width,) or not np.isfinite(query).all():
            raise ValueError(f"the query vector is {query.shape}, wanted is a finite one of ({width},)")
        return query

    async def _asked(self, spans: Sequence[Span], slots: Mapping[str, NDArray[np.int64]]) -> "dict[str, _Asked]":
        """Return by source what the spans ask of it."""
        runs = _by_source(spans)
        known = await self._cache.hours(list(runs))
        return {
            source_id: _Asked.of(known[source_id], mine, slots.get(source_id))
            async for source_id, mine in _in_turns(runs.items())
        }

    def _held(self, asked: "Mapping[str, _Asked]") -> "list[_Look]":
        """Return those asked hours of which there are shards as they stand."""
        looks = []
        for source_id, hour in self._cache.keys:  # far fewer than all hours that were asked for may be
            if source_id in asked and asked[source_id].has(hour):
                part = asked[source_id].part(hour)
                shard = self._cache.get(part.state)
                if shard is not None:
                    looks.append(_Look(part, shard))
        return looks

    async def _made(
        self, asked: "Mapping[str, _Asked]", held: Set[tuple[str, int]]
    ) -> "tuple[list[_Look], list[StoreUnavailable]]":
        """Make missing shards, the newest first, until the patience ends; return them, and why others are not made."""
        looks: list[_Look] = []
        failures: list[StoreUnavailable] = []

        async def make(key: tuple[str, int]) -> None:
            part = asked[key[0]].part(key[1])
            try:
                looks.append(_Look(part, await self._cache.make(part.state)))
            except StoreUnavailable as error:
                failures.append(error)

        newest = merge(*(one.newest_first() for one in asked.values()), key=itemgetter(1), reverse=True)
        await each((key for key in newest if key not in held), make, self._patience_s)
        return looks, failures

    async def _left_out(self, asked: "Mapping[str, _Asked]", seen: Iterable[tuple[str, int]]) -> int:
        """Return how many frames are kept of what was asked for in all other hours than those that were seen."""
        seen_hours: dict[str, list[int]] = {}
        for source_id, hour in seen:
            seen_hours.setdefault(source_id, []).append(hour)
        frames, unread = 0, []
        async for source_id, one in _in_turns(asked.items()):
            known, hours = one.without(seen_hours.get(source_id, []))
            frames += known
            unread += [(one, some) for some in _near(hours)]

        async def count(item: tuple[_Asked, NDArray[np.int64]]) -> None:
            nonlocal frames
            one, hours = item
            slots = await self._timeline.slots(
                one.known.source_id, int(hours[0]) * HOUR_SLOTS, (int(hours[-1]) + 1) * HOUR_SLOTS
            )
            frames += one.frames_of(hours, slots)

        await each(unread, count)
        return frames

    async def _moments(
        self, query: NDArray[np.float32], looks: "Sequence[_Look]", top_k: int, min_score: float
    ) -> list[Moment]:
        """Look into each shard as deep as the best moments of all of them need, and no deeper."""
        wanted = top_k * HITS_PER_MOMENT
        await self._deepen(query, looks)
        while True:
            hits = _Hits.of(looks, min_score)
            bar = max(hits.score_of(wanted), min_score)
            if short := [look for look in looks if look.floor > bar]:
                await self._deepen(query, short)
                continue
            count, moments = hits.moments(wanted, top_k)
            if count >= top_k or wanted >= len(hits.scores):
                return moments
            wanted *= 2  # one long scene took all the hits: look further

    async def _deepen(self, query: NDArray[np.float32], looks: "Sequence[_Look]") -> None:
        def deepen(some: Sequence[_Look]) -> None:
            for look in some:
                look.deepen(query)

        run = asyncio.get_running_loop().run_in_executor
        await asyncio.gather(*(run(self._pool, deepen, looks[turn :: self._threads]) for turn in range(self._threads)))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of a source: ascending runs of slots, narrowed to those that are `allowed` unless that is None.

    `hours` (n,) are those of the `known` ones that the runs touch, ascending, and `frames` (n,) what is kept of them.
    """

    known: SourceHours
    runs: Sequence[Run]
    allowed: NDArray[np.int64] | None
    hours: NDArray[np.int64]
    frames: NDArray[np.int64]

    @classmethod
    def of(cls, known: SourceHours, runs: Sequence[Run], allowed: NDArray[np.int64] | None) -> Self:
        """Take those of the known hours that the runs touch; of those they cut, the frames are not known."""
        touched = known.touched(runs)
        certain = known.covered(runs) if allowed is None else False
        return cls(known, runs, allowed, known.hours[touched], np.where(certain, known.frames, UNKNOWN)[touched])

    def has(self, hour: int) -> bool:
        """Return whether an hour is asked for and may have frames."""
        at = int(np.searchsorted(self.hours, hour))
        return at < len(self.hours) and bool(self.hours[at] == hour)

    def part(self, hour: int) -> "_Part":
        """Return what is asked of an hour."""
        start, end = span_of(hour)
        first = bisect_right(self.runs, start, key=itemgetter(1))
        last = bisect_left(self.runs, end, key=itemgetter(0))
        allowed = self.allowed
        if allowed is not None:
            allowed = allowed[(allowed >= start) & (allowed < end)]
        return _Part(self.known.state(hour), tuple(self.runs[first:last]), allowed)

    def newest_first(self) -> Iterator[tuple[str, int]]:
        """Yield source and hour of each hour that is asked for."""
        return ((self.known.source_id, int(hour)) for hour in self.hours[::-1])

    def without(self, seen: Sequence[int]) -> tuple[int, NDArray[np.int64]]:
        """Return how many frames are kept of all hours but those seen, and the hours of which one has to look."""
        left = ~np.isin(self.hours, seen) if seen else np.ones(len(self.hours), np.bool_)
        unknown = left & (self.frames == UNKNOWN)
        return int(self.frames[left & ~unknown].sum()), self.hours[unknown]

    def frames_of(self, hours: NDArray[np.int64], slots: NDArray[np.int64]) -> int:
        """Return how many of ascending slots are asked for in some hours."""
        bounds = np.searchsorted(slots, [hours * HOUR_SLOTS, (hours + 1) * HOUR_SLOTS]).T
        return sum(
            self.part(int(hour)).rows(slots[first:last])[1] for hour, (first, last) in zip(hours, bounds, strict=True)
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """What is asked of an hour: runs of slots, narrowed to those that are `allowed` unless that is None."""

    state: HourState
    runs: tuple[Run, ...]
    allowed: NDArray[np.int64] | None

    @property
    def is_whole(self) -> bool:
        """Whether a run reaches over all of the hour."""
        start = self.state.hour * HOUR_SLOTS
        return any(first <= start and start + HOUR_SLOTS <= last for first, last in self.runs)

    def rows(self, slots: NDArray[np.int64]) -> tuple[Rows | None, int]:
        """Return which of the rows of ascending slots are asked for, None for all, and their number."""
        if self.allowed is None and self.is_whole:
            return None, len(slots)
        bounds = [tuple(np.searchsorted(slots, run).tolist()) for run in self.runs]
        if self.allowed is None and len(bounds) == 1:
            first, last = bounds[0]
            return (first, last), last - first
        mask = np.zeros(len(slots), np.bool_)
        for first, last in bounds:
            mask[first:last] = True
        if self.allowed is not None:
            mask &= np.isin(slots, self.allowed)
        return mask, int(mask.sum())


class _Look:
    """A part of a shard, and the best hits in it that were seen so far."""

    def __init__(self, part: _Part, shard: Shard) -> None:
        self.part = part
        self._shard = shard
        self._rows, self.frames = part.rows(shard.slots)
        self.slots = np.empty(0, np.int64)
        self.scores = np.empty(0, np.float32)
        self.floor = np.inf  # no better hit than this was left out

    def order(self) -> tuple[int, str]:
        """Return what sorts the newest first: of hits that are as good as each other the first ones count."""
        return -self.part.state.hour, self.part.state.source_id

    def deepen(self, query: NDArray[np.float32]) -> None:
        """Take more hits, as many as there are at most."""
        count = min(max(FIRST_HITS, DEEPER * len(self.scores)), self.frames)
        self.slots, self.scores = self._shard.best(query, count, self._rows)
        self.floor = float(self.scores[-1]) if len(self.scores) == count < self.frames else -np.inf


@dataclass(frozen=True, slots=True)
class _Hits:
    """Frames and their scores, in rows; `places` are those of their sources in `sources`."""

    sources: Sequence[str]
    places: NDArray[np.int64]
    slots: NDArray[np.int64]
    scores: NDArray[np.float32]

    @classmethod
    def of(cls, looks: Sequence[_Look], min_score: float) -> Self:
        """Join the hits of all shards."""
        sources = sorted({look.part.state.source_id for look in looks})
        place = {source_id: at for at, source_id in enumerate(sources)}
        scores = np.concatenate([np.empty(0, np.float32), *(look.scores for look in looks)])
        slots = np.concatenate([np.empty(0, np.int64), *(look.slots for look in looks)])
        of_look = np.array([place[look.part.state.source_id] for look in looks], np.int64)
        places = np.repeat(of_look, [len(look.slots) for look in looks])
        if min_score > -np.inf:
            good = scores >= min_score
            places, slots, scores = places[good], slots[good], scores[good]
        return cls(sources, places, slots, scores)

    def score_of(self, rank: int) -> float:
        """Return the score of the best hit (rank 1) and so on; minus infinity if there are not more than so many."""
        if rank >= len(self.scores):
            return -np.inf
        return float(np.partition(self.scores, -rank)[-rank])

    def moments(self, wanted: int, top_k: int) -> tuple[int, list[Moment]]:
        """Join neighbours among the best `wanted` hits; return the number of moments, and the best of them in order."""
        best = np.argsort(-self.scores, kind="stable")[:wanted]
        if not len(best):
            return 0, []
        rows = best[np.lexsort((self.slots[best], self.places[best]))]
        places, slots, scores = self.places[rows], self.slots[rows], self.scores[rows]
        is_first = np.ones(len(rows), np.bool_)
        is_first[1:] = (np.diff(places) != 0) | (np.diff(slots) > NEIGHBOUR_SLOTS)
        starts = np.flatnonzero(is_first)
        ends = np.append(starts[1:], len(rows)) - 1
        peaks = np.lexsort((slots, -scores, np.cumsum(is_first)))[starts]  # the best hit of each moment
        order = np.argsort(-scores[peaks], kind="stable")[:top_k]
        return len(starts), [
            Moment(
                self.sources[places[starts[at]]],
                int(slots[starts[at]]),
                int(slots[ends[at]]) + 1,
                int(slots[peaks[at]]),
                float(scores[peaks[at]]),
            )
            for at in order
        ]


async def _in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield items, one for each of many sources, and let others have the event loop in between."""
    for turn, item in enumerate(items):
        if turn % SOURCES_AT_ONCE == 0:
            await asyncio.sleep(0)
        yield item


def _by_source(spans: Iterable[Span]) -> dict[str, list[Run]]:
    """Return the slots of each source as ascending runs that do not overlap; empty spans vanish."""
    runs: dict[str, list[Run]] = {}
    for span in sorted(spans, key=lambda span: (span.source_id, span.start)):
        if span.start >= span.end:
            continue
        mine = runs.setdefault(span.source_id, [])
        if mine and span.start <= mine[-1][1]:
            mine[-1] = mine[-1][0], max(mine[-1][1], span.end)
        else:
            mine.append((span.start, span.end))
    return runs


def _near(hours: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
    """Split ascending hours into groups that are quickly read at once."""
    return np.split(hours, np.flatnonzero(np.diff(hours // HOURS_PER_READ)) + 1) if len(hours) else []
