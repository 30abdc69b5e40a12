"""Packs: the keyframes of one source-hour in a file, so that an hour is not 3,600 of them.

`jpegs` are the pictures one behind the other, `ends` (n,) int64 where each of them ends, and `slots` (n,) int32 those
of the hour that have one, ascending.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from store.format import HOUR_SLOTS
from store.hour_files import SLOT_DTYPE, HourFileDamaged, HourFiles, HourManifest, Parsed, Tensors

LABEL = "keyframes"
READ_THROUGH_BYTES = 2**18  # that nobody asked for, between two keyframes that are wanted: read along, which is quicker
END_DTYPE = np.dtype("<i8")
_KNOWN_PACKS = 256  # whose index of some 40 KB is held


class Pack(HourManifest):
    """What is known of the packed keyframes of an hour."""


@dataclass(frozen=True, slots=True)
class _Index:
    """Where the pictures of ascending `slots` (n,) lie: the i-th in [bounds[i], bounds[i + 1])."""

    slots: NDArray[np.int64]
    bounds: NDArray[np.int64]


class Packs(HourFiles):
    """The packs of all sources."""

    def __init__(self, root_url: str) -> None:
        super().__init__(root_url)
        self._known: OrderedDict[str, _Index] = OrderedDict()
        self._lock = Lock()

    async def write(self, source_id: str, hour: int, generation: int, jpegs: Mapping[int, bytes]) -> Pack:
        """Write keyframes by slot, wait until they are on disk, read them back and check them. HourFileDamaged."""
        return await asyncio.to_thread(self._write, source_id, hour, generation, jpegs)

    async def read(self, source_id: str, pack: Pack, slots: Sequence[int]) -> dict[int, bytes]:
        """Return those of the keyframes that the pack has. Raises HourFileGone and HourFileDamaged."""
        return await asyncio.to_thread(self._read, source_id, pack, slots)

    async def manifest(self, source_id: str, hour: int, file: str) -> Pack:
        """Return what a pack says it is, without reading its pictures. Raises HourFileDamaged and HourFileGone."""
        return _described(file, await asyncio.to_thread(self._read_head, source_id, hour, file))

    def _write(self, source_id: str, hour: int, generation: int, jpegs: Mapping[int, bytes]) -> Pack:
        written = self._write_checked(source_id, hour, LABEL, generation, keyframe_tensors(hour, jpegs), {})
        return _described(*written)

    def _read(self, source_id: str, pack: Pack, slots: Sequence[int]) -> dict[int, bytes]:
        index = self._index(source_id, pack)
        wanted = np.unique(np.array(slots, np.int64))
        rows = np.flatnonzero(np.isin(index.slots, wanted))
        if not len(rows):
            return {}
        starts, ends = index.bounds[rows], index.bounds[rows + 1]
        breaks = np.flatnonzero(starts[1:] - ends[:-1] > READ_THROUGH_BYTES) + 1
        found: dict[int, bytes] = {}
        ranges, runs = [], np.split(np.arange(len(rows)), breaks)
        for run in runs:
            target = memoryview(bytearray(int(ends[run[-1]] - starts[run[0]])))
            ranges.append((pack.offsets["jpegs"] + int(starts[run[0]]), target))
        self._read_ranges(source_id, pack.hour, pack.file, ranges)
        for run, (_, target) in zip(runs, ranges, strict=True):
            for one in run:
                low, high = int(starts[one] - starts[run[0]]), int(ends[one] - starts[run[0]])
                found[int(index.slots[rows[one]])] = bytes(target[low:high])
        return found

    def _index(self, source_id: str, pack: Pack) -> _Index:
        with self._lock:
            if (known := self._known.get(pack.file)) is not None:
                self._known.move_to_end(pack.file)
                return known
        ends, slots = np.empty(pack.frames, END_DTYPE), np.empty(pack.frames, SLOT_DTYPE)
        ranges = [(pack.offsets["ends"], ends.data.cast("B")), (pack.offsets["slots"], slots.data.cast("B"))]
        self._read_ranges(source_id, pack.hour, pack.file, ranges)
        index = _Index(slots.astype(np.int64) + pack.hour * HOUR_SLOTS, np.concatenate(([0], ends)).astype(np.int64))
        is_whole = (np.diff(index.bounds) >= 0).all() and index.bounds[-1] <= pack.size
        if not is_whole or not np.array_equal(index.slots, pack.slots):
            raise HourFileDamaged(f"{pack.file} is not as it was written: its index differs")
        with self._lock:
            self._known[pack.file] = index
            while len(self._known) > _KNOWN_PACKS:
                self._known.popitem(last=False)
        return index


def keyframe_tensors(hour: int, jpegs: Mapping[int, bytes]) -> Tensors:
    """Return the keyframes of an hour, by slot, as a pack holds them."""
    slots = sorted(jpegs)
    return {
        "jpegs": ("uint8", np.frombuffer(b"".join(jpegs[slot] for slot in slots), np.uint8)),
        "ends": ("int64", np.cumsum([len(jpegs[slot]) for slot in slots], dtype=END_DTYPE)),
        "slots": ("int32", (np.array(slots, np.int64) - hour * HOUR_SLOTS).astype(SLOT_DTYPE)),
    }


def _described(file: str, parsed: Parsed) -> Pack:
    """Raises HourFileDamaged."""
    try:
        return Pack(**parsed.facts(file))
    except (ValueError, KeyError, IndexError) as error:
        raise HourFileDamaged(f"{file} is no pack: {type(error).__name__}") from None
