"""How the hours of sources stand: what is sealed of each, and what is not.

n hours of a source. A thousand sources have some hundred thousand hours, and nobody needs most of them one by one: they
are rows of arrays here, and only an hour that somebody is about to read or to search becomes an object.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from store.format import HOUR_SLOTS
from store.segments import Manifest
from store.shards import shard_bytes
from store.slots import union

UNKNOWN = -1  # frames of an hour of which something is not sealed: one has to look

Run = tuple[int, int]
"""Slots [start, end) of a source."""


@dataclass(frozen=True, slots=True)
class HourState:
    """How an hour of a source stood when somebody looked, at the `look`-th look; `file` is its segment."""

    source_id: str
    hour: int
    file: str | None
    mark: str
    look: int

    @property
    def key(self) -> tuple[str, int]:
        return self.source_id, self.hour


@dataclass(frozen=True, slots=True)
class Sealed:
    """The sealed hours of a source (n,), ascending, as of a mark: 90 bytes an hour, of 20 times that in a manifest."""

    mark: str
    hours: NDArray[np.int64]
    frames: NDArray[np.int64]
    files: NDArray[np.bytes_]

    @classmethod
    def of(cls, mark: str, manifests: Sequence[Manifest]) -> Self:
        """Take what is needed of manifests, in order of their hours."""
        return cls(
            mark,
            np.array([manifest.hour for manifest in manifests], np.int64),
            np.array([manifest.frames for manifest in manifests], np.int64),
            np.array([manifest.file.encode() for manifest in manifests], np.bytes_),
        )

    def file(self, hour: int) -> str | None:
        """Return the segment of an hour, None if it has none."""
        at = int(np.searchsorted(self.hours, hour))
        return self.files[at].decode() if at < len(self.hours) and self.hours[at] == hour else None


@dataclass(frozen=True, slots=True)
class SourceHours:
    """The hours (n,) of a source that may have frames, ascending, and their frames (n,), as of the `look`-th look."""

    source_id: str
    look: int
    hours: NDArray[np.int64]
    frames: NDArray[np.int64]
    _sealed: Sealed
    _marks: Mapping[int, str]  # by hour of which something is not sealed

    @classmethod
    def of(cls, source_id: str, look: int, sealed: Sealed, marks: Mapping[int, str]) -> Self:
        if not marks:
            return cls(source_id, look, sealed.hours, sealed.frames, sealed, marks)
        hot = np.fromiter(marks, np.int64, len(marks))
        hours = union(sealed.hours, np.sort(hot))
        frames = np.empty(len(hours), np.int64)
        frames[np.searchsorted(hours, sealed.hours)] = sealed.frames
        frames[np.searchsorted(hours, hot)] = UNKNOWN
        return cls(source_id, look, hours, frames, sealed, marks)

    def state(self, hour: int) -> HourState:
        """Return how an hour stands; one without frames has neither a file nor a mark."""
        return HourState(self.source_id, hour, self._sealed.file(hour), self._marks.get(hour, ""), self.look)

    def has(self, hour: int) -> bool:
        """Return whether an hour may have frames."""
        return hour in self._marks or self._sealed.file(hour) is not None

    def touched(self, runs: Iterable[Run]) -> NDArray[np.bool_]:
        """Return which of the hours (n,) have slots in a run."""
        found = np.zeros(len(self.hours), np.bool_)
        for start, end in runs:
            found[slice(*np.searchsorted(self.hours, [start // HOUR_SLOTS, -(-end // HOUR_SLOTS)]))] = True
        return found

    def covered(self, runs: Iterable[Run]) -> NDArray[np.bool_]:
        """Return which of the hours (n,) lie wholly in a run."""
        found = np.zeros(len(self.hours), np.bool_)
        for start, end in runs:
            found[slice(*np.searchsorted(self.hours, [-(-start // HOUR_SLOTS), end // HOUR_SLOTS]))] = True
        return found

    def bytes_of_shards(self, width: int) -> NDArray[np.int64]:
        """Return the bytes (n,) that shards of vectors (P,) of the hours need at most, or nearly so."""
        empty, one = (shard_bytes(frames, width, is_exact=False) for frames in (0, 1))
        sealed = empty + self.frames * (one - empty)
        return np.where(self.frames == UNKNOWN, shard_bytes(HOUR_SLOTS, width, is_exact=True), sealed)
