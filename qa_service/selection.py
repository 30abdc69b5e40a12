"""Which of the frames that are kept an answer reads, and which of them its text looks at again."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qa_service.coverage import Reading


def thinned(reading: Reading, stride: int) -> NDArray[np.int64]:
    """Return the first kept slot of every `stride` slots of the range, counted from its start."""
    stretches = (reading.present - reading.start) // stride
    return reading.present[np.diff(stretches, prepend=-1) > 0]


def expected(reading: Reading, stride: int) -> int:
    """Return how many slots `thinned` would give of a source without gaps."""
    edges = np.flatnonzero(np.diff(reading.present, prepend=-2) > 1)
    kept = ((int(run[0]), int(run[-1]) + 1) for run in np.split(reading.present, edges) if len(run))
    missing = ((gap.start_slot, gap.end_slot) for gap in reading.gaps)
    count, counted = 0, -1  # stretches so far, and the last of them: two runs may share one
    for start, end in sorted((*kept, *missing)):
        first, last = (start - reading.start) // stride, (end - 1 - reading.start) // stride
        count += last - max(first - 1, counted)
        counted = last
    return count


def smallest_stride(readings: Sequence[Reading], max_frames: int) -> int:
    """Return the smallest stride with which the frames of all readings are at most `max_frames`.

    With more sources than `max_frames` there is none, and one that leaves a frame a source is returned.
    """

    def fits(stride: int) -> bool:
        return sum(len(thinned(reading, stride)) for reading in readings) <= max_frames

    # Frames fall as the stride grows, but for a few where a stride cuts a range unevenly: the halving finds the
    # neighbourhood, the walk after it the smallest one there.
    low, high = 1, max(reading.end - reading.start for reading in readings) or 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    while low > 1 and fits(low - 1):
        low -= 1
    return low


def stratified(slots: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return `count` of `slots` (T,), the middle ones of equal parts: always the same, spread over all."""
    if len(slots) <= count:
        return slots
    middles = (2 * np.arange(count) + 1) * len(slots) // (2 * count)
    return slots[middles]
