"""The slot rule: of each slot, the first picture whose capture time lies in it."""

import math
from dataclasses import dataclass

_ROUNDING = 1e-6  # 0.7 s at 10 fps must be slot 7, whatever binary fractions make of it


def slot_of(time_s: float, fps: float) -> int:
    """Return the slot [n/fps, (n+1)/fps) that holds a time."""
    return math.floor(time_s * fps + _ROUNDING)


def milliseconds(time_s: float) -> int:
    """Return a capture time as a frame carries it, rounded so that it stays in its slot."""
    return math.floor(time_s * 1000 + 1000 * _ROUNDING)


@dataclass(frozen=True, slots=True)
class Pick:
    """A picture that was chosen: its slot and its capture time."""

    slot: int
    time_s: float


class Sampler:
    """Chooses at most one picture a slot, in slot order, whatever the times of the pictures do.

    A hole leaves its slots empty: nothing is repeated to fill them. Times that step back choose nothing until they
    have caught up. A picture without a time counts as one `frame_s` after the picture before it.
    """

    def __init__(self, fps: float, *, last_slot: int | None = None, frame_s: float = 0.0) -> None:
        self.fps = fps
        self.last_slot = last_slot
        self._frame_s = frame_s
        self._time_s: float | None = None

    def offer(self, time_s: float | None) -> Pick | None:
        """Return the pick if this picture is the first of a new slot, else None."""
        if time_s is None:
            time_s = 0.0 if self._time_s is None else self._time_s + self._frame_s
        self._time_s = time_s
        slot = slot_of(time_s, self.fps)
        if self.is_taken(slot):
            return None
        self.last_slot = slot
        return Pick(slot, time_s)

    def is_taken(self, slot: int) -> bool:
        """Tell whether a picture of this slot, or of a later one, was chosen before."""
        return self.last_slot is not None and slot <= self.last_slot
