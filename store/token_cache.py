"""What a replica has read of timelines: a question about the same hours fetches only what is new.

T frames of a read, C2 tokens a frame, D model width.

Rows are held by block, beside the mark that the block had before they were read. A write, an erasure or a seal leaves
another mark: so one small look at the marks tells which rows are still those of the timeline, and none can be stale.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.format import BLOCK_SLOTS
from store.timeline import BlockMark, Timeline


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows (n, C2, D) of ascending slots (n,) of one block, as they were at `mark`."""

    mark: BlockMark
    slots: NDArray[np.int64]
    rows: NDArray[np.generic]

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes + self.rows.nbytes


class TokenCache:
    """Reads tokens of one timeline, and holds those read last, up to a number of bytes. For one event loop."""

    def __init__(self, timeline: Timeline, max_bytes: int) -> None:
        self._timeline = timeline
        self._max_bytes = max_bytes
        self._held: OrderedDict[tuple[str, int], _Block] = OrderedDict()
        self._bytes = 0
        self._turn = 0  # another one after every `forget`

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self._bytes

    async def read(self, source_id: str, slots: NDArray[np.int64]) -> NDArray[np.generic]:
        """Return the tokens (T, C2, D) of the slots, in the order asked; FrameNotKept names the first absent one."""
        wanted, places = np.unique(np.asarray(slots, np.int64), return_inverse=True)
        if not len(wanted) or not self._max_bytes:
            return await self._timeline.read(source_id, slots)
        numbers = wanted // BLOCK_SLOTS
        blocks, starts = np.unique(numbers, return_index=True)
        turn = self._turn
        marks = await self._timeline.marks(source_id, blocks.tolist())
        parts = dict(zip(blocks.tolist(), np.split(np.arange(len(wanted)), starts[1:]), strict=True))
        known = {block: self._known(source_id, block, mark) for block, mark in zip(parts, marks, strict=True)}
        is_new = np.concatenate([~np.isin(wanted[rows], _slots(known[block])) for block, rows in parts.items()])
        read = await self._timeline.read(source_id, wanted[is_new])
        tokens = np.empty((len(wanted), *read.shape[1:]), read.dtype)
        tokens[is_new] = read
        for (block, rows), mark in zip(parts.items(), marks, strict=True):
            old = known[block]
            if old is not None:
                here = rows[~is_new[rows]]
                tokens[here] = old.rows[np.searchsorted(old.slots, wanted[here])]
            if is_new[rows].any() and turn == self._turn:  # else it may have been read before the erasure
                fresh = rows[is_new[rows]]
                self._hold(source_id, block, _joined(old, _Block(mark, wanted[fresh], tokens[fresh])))
        return tokens if np.array_equal(wanted, slots) else tokens[places]

    def forget(self, source_id: str) -> None:
        """Let go of every row of a source, and hold none that is being read now."""
        self._turn += 1
        for key in [key for key in self._held if key[0] == source_id]:
            self._bytes -= self._held.pop(key).nbytes

    def _known(self, source_id: str, block: int, mark: BlockMark) -> _Block | None:
        """Return what is held of a block, if that is how the block is now."""
        found = self._held.get((source_id, block))
        if found is None or found.mark != mark:
            return None
        self._held.move_to_end((source_id, block))
        return found

    def _hold(self, source_id: str, block: int, content: _Block) -> None:
        key = source_id, block
        if (old := self._held.pop(key, None)) is not None:
            self._bytes -= old.nbytes
        self._held[key] = content
        self._bytes += content.nbytes
        while self._bytes > self._max_bytes:
            _, dropped = self._held.popitem(last=False)
            self._bytes -= dropped.nbytes


def _slots(block: _Block | None) -> NDArray[np.int64]:
    return np.empty(0, np.int64) if block is None else block.slots


def _joined(old: _Block | None, new: _Block) -> _Block:
    """Return the rows of both, which share no slot."""
    if old is None:
        return new
    slots = np.concatenate([old.slots, new.slots])
    order = np.argsort(slots)
    return _Block(new.mark, slots[order], np.concatenate([old.rows, new.rows])[order])
