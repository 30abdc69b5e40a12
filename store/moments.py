"""Search by meaning: which moments look like a vector, among any time ranges of any sources.

P width of the search vector.

A source-hour is one flat FAISS shard, whose rows are the hour's present slots in order. So the time filter chooses
shards and rows of them, and nothing is ever deleted from an index. All of it is derived from the timeline: shards are
loaded when the process starts, and a search makes those it misses itself, for as long as its patience lasts.
"""

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from store.connection import StoreUnavailable
from store.format import HOUR_SLOTS
from store.settings import StoreSettings
from store.shard_cache import HourState, ShardCache, each
from store.shard_loader import ShardLoader
from store.shards import Rows, Shard, search_on_this_thread
from store.sources import Sources
from store.timeline import Timeline

NEIGHBOUR_SLOTS = 2  # hits at most so far apart are one moment: one frame of another view does not cut it in two
HITS_PER_MOMENT = 8  # frames that are looked at for each moment that is asked for, so that moments get their extent
FIRST_HITS = 64  # of each shard; FAISS is as quick to return them as to return one
DEEPER = 4  # times as many of a shard that may have more good ones
MAX_THREADS = 8  # more only wait for memory


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
        parts = await self._parts(spans, slots or {})
        looks, missing = [], []
        for part in parts:
            shard = self._cache.get(part.state)
            if shard is None:
                missing.append(part)
            else:
                looks.append(_Look(part, shard))
        made, failures = await self._made(missing)
        if failures and not looks and not made:
            raise failures[0]
        looks = [look for look in (*looks, *made) if look.frames]
        seen = {look.part.state.key for look in made}
        left_out = sum([await self._frames(part) for part in missing if part.state.key not in seen])
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

    async def _parts(self, spans: Sequence[Span], slots: Mapping[str, NDArray[np.int64]]) -> "list[_Part]":
        """Return the parts of hours that the spans touch, the newest first."""
        runs = _by_source(spans)
        states = await self._cache.hours(list(runs))
        parts = [
            _Part(states[source_id][hour], tuple(mine), slots.get(source_id))
            for source_id, asked in runs.items()
            for hour, mine in _by_hour(asked, states[source_id]).items()
        ]
        return sorted(parts, key=lambda part: part.state.hour, reverse=True)

    async def _made(self, missing: "Sequence[_Part]") -> "tuple[list[_Look], list[StoreUnavailable]]":
        """Make missing shards in their order until the patience ends; return them, and why others cannot be made."""
        looks: list[_Look] = []
        failures: list[StoreUnavailable] = []

        async def make(part: _Part) -> None:
            try:
                looks.append(_Look(part, await self._cache.make(part.state)))
            except StoreUnavailable as error:
                failures.append(error)

        await each(missing, make, self._patience_s)
        return looks, failures

    async def _frames(self, part: "_Part") -> int:
        """Return how many frames are kept of a part of which there is no shard."""
        slots = part.state.slots
        if slots is None:
            first = part.state.hour * HOUR_SLOTS
            slots = await self._timeline.slots(part.state.source_id, first, first + HOUR_SLOTS)
        return part.rows(slots)[1]

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
class _Part:
    """What is asked of an hour: runs of slots, narrowed to those that are `allowed` unless that is None."""

    state: HourState
    runs: tuple[tuple[int, int], ...]
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


def _by_source(spans: Iterable[Span]) -> dict[str, list[tuple[int, int]]]:
    """Return the slots of each source as ascending runs that do not overlap; empty spans vanish."""
    runs: dict[str, list[tuple[int, int]]] = {}
    for span in sorted(spans, key=lambda span: (span.source_id, span.start)):
        if span.start >= span.end:
            continue
        mine = runs.setdefault(span.source_id, [])
        if mine and span.start <= mine[-1][1]:
            mine[-1] = mine[-1][0], max(mine[-1][1], span.end)
        else:
            mine.append((span.start, span.end))
    return runs


def _by_hour(runs: Iterable[tuple[int, int]], hours: Iterable[int]) -> dict[int, list[tuple[int, int]]]:
    """Group ascending runs by those of the hours, ascending, that they touch."""
    known = np.fromiter(hours, np.int64)
    touched: dict[int, list[tuple[int, int]]] = {}
    for start, end in runs:
        first, last = np.searchsorted(known * HOUR_SLOTS, [start - HOUR_SLOTS + 1, end])
        for hour in known[first:last].tolist():
            touched.setdefault(hour, []).append((start, end))
    return touched
