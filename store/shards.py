"""A shard: the search vectors of one source-hour, as FAISS searches them.

n frames of the hour, P width of the search vector.

The open hour is exact: the 16-bit numbers of the store, as they are. A sealed hour holds 8 bits a number, on a grid of
its own for each of the P dimensions, as FAISS' `QT_8bit` does; but the grid is folded into the query, and FAISS scores
the bare bytes by the quicker `QT_8bit_uniform`. (`QT_8bit_direct` would be quicker still: it rounds the query, too.)
"""

from dataclasses import dataclass
from typing import Any, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from store.format import VECTOR_DTYPE

_HIGHEST = 255  # of a byte
_ROWS_AT_ONCE = 256  # that stay in the processor's cache while they are rounded: 4 times as fast as all at once

Rows = tuple[int, int] | NDArray[np.bool_]
"""The rows of a shard that count: first and behind the last, or a mask (n,)."""


@dataclass(frozen=True, slots=True)
class _Grid:
    """What bytes stand for in each dimension: `low` (P,) for 0, and a `step` (P,) more for each further one."""

    low: NDArray[np.float32]
    step: NDArray[np.float32]

    @classmethod
    def of(cls, vectors: NDArray[np.float32]) -> Self:
        low, high = vectors.min(axis=0), vectors.max(axis=0)
        step = (high - low) / np.float32(_HIGHEST)
        return cls(low, np.where(step > 0, step, np.float32(1)))

    def rounded(self, vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the vectors (n, P) as bytes."""
        codes = np.empty(vectors.shape, np.uint8)
        per_step = 1 / self.step
        shift = np.float32(0.5) - self.low * per_step  # a cast to bytes cuts off: half a step more rounds
        for first in range(0, len(vectors), _ROWS_AT_ONCE):
            piece = vectors[first : first + _ROWS_AT_ONCE] * per_step
            piece += shift
            codes[first : first + _ROWS_AT_ONCE] = np.clip(piece, 0, _HIGHEST, out=piece)
        return codes

    def folded(self, query: NDArray[np.float32]) -> tuple[NDArray[np.float32], np.float32]:
        """Return what to multiply bytes and a half with, as FAISS reads them, and what to add, for a query (P,)."""
        scaled = query * self.step
        return scaled, query @ self.low - scaled.sum() / 2


@dataclass(frozen=True, slots=True)
class Shard:
    """The frames of an hour: slots (n,) ascending, and their vectors. Never changed: a new state is a new shard."""

    slots: NDArray[np.int64]
    _index: Any  # faiss.IndexScalarQuantizer
    _grid: _Grid | None

    @classmethod
    def exact(cls, slots: NDArray[np.int64], vectors: NDArray[np.float32]) -> Self:
        """Hold vectors (n, P) as the store keeps them."""
        halves = np.ascontiguousarray(vectors, VECTOR_DTYPE)
        return cls(slots, _index(faiss.ScalarQuantizer.QT_fp16, halves.view(np.uint8), vectors.shape[1]), None)

    @classmethod
    def in_bytes(cls, slots: NDArray[np.int64], vectors: NDArray[np.float32]) -> Self:
        """Hold vectors (n, P), at least one, with 8 bits a number."""
        grid = _Grid.of(vectors)
        return cls(slots, _index(faiss.ScalarQuantizer.QT_8bit_uniform, grid.rounded(vectors), vectors.shape[1]), grid)

    @property
    def is_exact(self) -> bool:
        return self._grid is None

    @property
    def nbytes(self) -> int:
        return shard_bytes(len(self.slots), self._index.d, is_exact=self.is_exact)

    def vectors(self) -> NDArray[np.float32]:
        """Return the vectors (n, P) of an exact shard."""
        assert self.is_exact
        found: NDArray[np.float32] = self._index.reconstruct_n(0, len(self.slots))
        return found

    def best(
        self, query: NDArray[np.float32], count: int, rows: Rows | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the slots and the cosines of at most `count` rows, those nearest to a query (P,) first.

        May be called in many threads at once.
        """
        base = np.float32(0)
        if self._grid is not None:
            query, base = self._grid.folded(query)
        parameters = None if rows is None else faiss.SearchParameters(sel=_selector(rows))  # type: ignore[call-arg]
        scores, places = self._index.search(query[None], min(count, len(self.slots)), params=parameters)
        found = places[0] >= 0  # fewer rows count than were asked for
        return self.slots[places[0][found]], scores[0][found] + base


def shard_bytes(frames: int, width: int, *, is_exact: bool) -> int:
    """Return the bytes that a shard of so many frames holds."""
    if is_exact:
        return frames * (8 + width * VECTOR_DTYPE.itemsize)
    return frames * (8 + width) + 2 * 4 * width


def search_on_this_thread() -> None:
    """Let FAISS use no threads of its own for searches of the calling thread: one query gains nothing from them."""
    faiss.omp_set_num_threads(1)


def _selector(rows: Rows) -> faiss.IDSelector:
    if isinstance(rows, tuple):
        return faiss.IDSelectorRange(*rows)
    return faiss.IDSelectorBitmap(np.packbits(rows, bitorder="little"))  # type: ignore[call-arg, arg-type]


def _index(kind: int, codes: NDArray[np.uint8], width: int) -> Any:
    """Return an index that holds vectors as they are encoded already."""
    index = faiss.IndexScalarQuantizer(width, kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(np.array([[0] * width, [_HIGHEST] * width], np.float32))  # so that a byte stands for itself
    index.add_sa_codes(codes)
    return index
