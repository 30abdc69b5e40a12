"""Which of the frames that are kept an answer reads, and which of them its text looks at again."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qa_service.coverage import Reading


def thinned(reading: Reading, stride: int) -> NDArray[np.int64]:
    """Return the first kept slot of every `stride` slots of the range, counted from its start."""
    _, first = np.unique((reading.present - reading.start) // stride, return_index=True)
    return reading.present[first]


def expected(reading: Reading, stride: int) -> int:
    """Return how many slots `thinned` would give of a source without gaps."""
    return -(-(reading.end - reading.start) // stride)


def smallest_stride(readings: Sequence[Reading], max_frames: int) -> int:
    """Return the smallest stride with which the frames of all readings are at most `max_frames`.

    With more sources than `max_frames` there is none, and the stride that leaves a frame a source is returned.
    """
    longest = max((reading.end - reading.start for reading in readings), default=1)

    def fits(stride: int) -> bool:
        return sum(len(thinned(reading, stride)) for reading in readings) <= max_frames

    # Frames fall as the stride grows, all but for a few where strides cut a range unevenly: start at the bound below
    # which nothing fits and go up.
    kept = sum(len(reading.present) for reading in readings)
    stride = max(1, -(-kept // max(max_frames, 1)))
    while stride < longest and not fits(stride):
        stride += 1
    return stride


def stratified(slots: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return `count` of `slots` (T,), the middle ones of equal parts: always the same, spread over all."""
    if len(slots) <= count:
        return slots
    middles = (2 * np.arange(count) + 1) * len(slots) // (2 * count)
    return slots[middles]
