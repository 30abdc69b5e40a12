"""Search by meaning: which moments look like a vector, among any time ranges of any sources.

P width of the search vector.

A source-hour is one flat FAISS shard, whose rows are the hour's present slots in order. So the time filter chooses
shards and a range of rows, and nothing is ever deleted from an index. Hours that still grow are exact (float32);
complete ones hold 8 bits a number. All of it is derived: at each search a shard is compared with the presence in the
timeline and made again if it differs. That shows frames added and erased; a frame sent twice has the same vector.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from store.format import HOUR_SLOTS
from store.hot import FrameNotKept
from store.settings import StoreSettings
from store.timeline import Timeline

NEIGHBOUR_SLOTS = 2  # hits at most so far apart are one moment: one frame of another view does not cut it in two
HITS_PER_MOMENT = 8  # frames that are looked at for each moment that is asked for, so that moments get their extent


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
class _Shard:
    """The vectors of an hour's present slots, row for row. Never changed: a new state is a new shard."""

    slots: NDArray[np.int64]
    index: Any  # faiss.IndexFlatIP or faiss.IndexScalarQuantizer
    exact: bool

    @property
    def nbytes(self) -> int:
        return len(self.slots) * (8 + self.index.d * (4 if self.exact else 1))

    def scores(self, vector: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the cosine of each of the ascending rows with the vector (P,)."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        whole = last - first == len(rows)
        selector = faiss.IDSelectorRange(first, last) if whole else faiss.IDSelectorBatch(rows)
        found, labels = self.index.search(vector[None], len(rows), params=faiss.SearchParameters(sel=selector))  # type: ignore[call-arg]
        scores = np.full(len(self.slots), -np.inf, np.float32)
        scores[labels[0][labels[0] >= 0]] = found[0][labels[0] >= 0]
        return scores[rows]


class Moments:
    """The search over all sources. Raises StoreUnavailable."""

    def __init__(self, timeline: Timeline, settings: StoreSettings) -> None:
        self._timeline = timeline
        self._max_bytes = settings.moments_max_bytes
        self._settle_slots = settings.moments_settle_slots
        self._shards: OrderedDict[tuple[str, int], _Shard] = OrderedDict()  # the longest unused first
        self._bytes = 0
        self._locks: dict[str, asyncio.Lock] = {}

    async def search(
        self,
        vector: NDArray[np.float32],
        spans: Sequence[Span],
        *,
        top_k: int,
        min_score: float | None = None,
        slots: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> list[Moment]:
        """Return at most `top_k` moments of the spans, best first.

        Of the best frames those at most NEIGHBOUR_SLOTS apart make one moment. `slots` restricts the sources it names
        to those slots.
        ValueError unless the vector is (P,) and finite.
        """
        query = self._checked(vector)
        if top_k < 1:
            return []
        found = await asyncio.gather(
            *(
                self._search_source(query, source_id, runs, None if slots is None else slots.get(source_id))
                for source_id, runs in _by_source(spans).items()
            )
        )
        hits = _Hits.join(found)
        return hits.moments(top_k, -np.inf if min_score is None else min_score)

    async def drop(self, source_id: str) -> None:
        """Free the shards of a source."""
        for key in [key for key in self._shards if key[0] == source_id]:
            self._forget(key)
        self._locks.pop(source_id, None)

    def _checked(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        width = self._timeline.format.vector_width
        query = np.ascontiguousarray(vector, np.float32)
        if query.shape != (width,) or not np.isfinite(query).all():
            raise ValueError(f"the query vector is {query.shape}, wanted is a finite one of ({width},)")
        return query

    async def _search_source(
        self,
        query: NDArray[np.float32],
        source_id: str,
        runs: Sequence[tuple[int, int]],
        allowed: NDArray[np.int64] | None,
    ) -> "_Hits":
        found = []
        extent = await self._timeline.extent(source_id)
        if extent is None:
            await self.drop(source_id)
            return _Hits.join([])
        settled = extent[1] - self._settle_slots
        hours = _by_hour(runs, extent)
        if not hours:
            return _Hits.join([])
        present = await self._timeline.slots(source_id, min(hours) * HOUR_SLOTS, (max(hours) + 1) * HOUR_SLOTS)
        for hour, parts in hours.items():
            mine = present[_between(present, hour * HOUR_SLOTS, (hour + 1) * HOUR_SLOTS)]
            shard = await self._shard(source_id, hour, mine, complete=(hour + 1) * HOUR_SLOTS <= settled)
            if shard is None:
                continue
            chosen = np.concatenate([_between(shard.slots, start, end) for start, end in parts])
            if allowed is not None:
                chosen = chosen[np.isin(shard.slots[chosen], allowed)]
            if len(chosen):
                scores = await asyncio.to_thread(shard.scores, query, chosen)
                found.append(_Hits(np.full(len(chosen), source_id, object), shard.slots[chosen], scores))
        return _Hits.join(found)

    async def _shard(self, source_id: str, hour: int, present: NDArray[np.int64], *, complete: bool) -> _Shard | None:
        """Return the shard of an hour of which these slots are kept, None if that is none."""
        key = source_id, hour
        async with self._locks.setdefault(source_id, asyncio.Lock()):  # two searches need not do the same work
            while True:
                known = self._shards.get(key)
                if len(present) == 0:
                    self._forget(key)
                    return None
                if known is not None and np.array_equal(known.slots, present) and not (known.exact and complete):
                    self._shards.move_to_end(key)
                    return known
                try:
                    vectors = await self._vectors(source_id, known, present)
                    break
                except FrameNotKept:  # erased in between
                    present = await self._timeline.slots(source_id, hour * HOUR_SLOTS, (hour + 1) * HOUR_SLOTS)
            shard = await asyncio.to_thread(_build, present, vectors, exact=not complete)
            self._remember(key, shard)
            return shard

    async def _vectors(self, source_id: str, known: _Shard | None, present: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the vectors of an hour (T, P), reading only those that an exact shard does not hold yet."""
        if known is None or not known.exact:
            return await self._timeline.vectors(source_id, present)
        old = np.isin(present, known.slots)
        vectors = np.empty((len(present), known.index.d), np.float32)
        rows = np.flatnonzero(np.isin(known.slots, present))
        vectors[old] = known.index.reconstruct_n(0, len(known.slots))[rows]
        vectors[~old] = await self._timeline.vectors(source_id, present[~old])
        return vectors

    def _remember(self, key: tuple[str, int], shard: _Shard) -> None:
        self._forget(key)
        self._shards[key] = shard
        self._bytes += shard.nbytes
        while self._bytes > self._max_bytes and len(self._shards) > 1:
            self._forget(next(iter(self._shards)))

    def _forget(self, key: tuple[str, int]) -> None:
        shard = self._shards.pop(key, None)
        if shard is not None:
            self._bytes -= shard.nbytes


@dataclass(frozen=True, slots=True)
class _Hits:
    """Frames and their scores, in rows."""

    sources: NDArray[np.object_]
    slots: NDArray[np.int64]
    scores: NDArray[np.float32]

    @classmethod
    def join(cls, parts: Iterable["_Hits"]) -> "_Hits":
        nothing = cls(np.empty(0, object), np.empty(0, np.int64), np.empty(0, np.float32))
        every = [nothing, *parts]
        return cls(
            np.concatenate([part.sources for part in every]),
            np.concatenate([part.slots for part in every]),
            np.concatenate([part.scores for part in every]),
        )

    def moments(self, top_k: int, min_score: float) -> list[Moment]:
        best = np.argsort(-self.scores, kind="stable")
        best = best[self.scores[best] >= min_score]
        wanted = top_k * HITS_PER_MOMENT
        while True:
            moments = self._merged(best[:wanted])
            if len(moments) >= top_k or wanted >= len(best):
                return moments[:top_k]
            wanted *= 2  # one long scene took all the hits: look further

    def _merged(self, rows: NDArray[np.int64]) -> list[Moment]:
        """Join neighbouring rows to moments, best first."""
        ordered = sorted((self.sources[row], int(self.slots[row]), float(self.scores[row])) for row in rows)
        runs: list[list[tuple[str, int, float]]] = []
        for hit in ordered:
            last = runs[-1][-1] if runs else None
            if last is not None and last[0] == hit[0] and hit[1] - last[1] <= NEIGHBOUR_SLOTS:
                runs[-1].append(hit)
            else:
                runs.append([hit])
        moments = []
        for run in runs:
            source_id, slot, score = max(run, key=lambda hit: hit[2])
            moments.append(Moment(source_id, run[0][1], run[-1][1] + 1, slot, score))
        return sorted(moments, key=lambda moment: -moment.score)


def _build(slots: NDArray[np.int64], vectors: NDArray[np.float32], *, exact: bool) -> _Shard:
    width = vectors.shape[1]
    index: Any
    if exact:
        index = faiss.IndexFlatIP(width)
    else:
        index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
    index.add(vectors)
    return _Shard(slots, index, exact)


def _between(slots: NDArray[np.int64], start: int, end: int) -> NDArray[np.int64]:
    """Return the rows whose slots lie in [start, end)."""
    first, last = np.searchsorted(slots, [start, end])
    return np.arange(first, last, dtype=np.int64)


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


def _by_hour(runs: Iterable[tuple[int, int]], extent: tuple[int, int]) -> dict[int, list[tuple[int, int]]]:
    """Group ascending runs by the hours that they touch within what the source has."""
    hours: dict[int, list[tuple[int, int]]] = {}
    for start, end in runs:
        first, last = max(start, extent[0]), min(end, extent[1] + 1) - 1
        for hour in range(first // HOUR_SLOTS, last // HOUR_SLOTS + 1 if first <= last else 0):
            hours.setdefault(hour, []).append((start, end))
    return hours
