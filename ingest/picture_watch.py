"""Pictures that show no live scene, though they keep coming: black ones, and one that stays the same."""

import numpy as np
from numpy.typing import NDArray

_DARK = 24  # of 255: what cameras call black is 16, and codecs add a little
_BRIGHT_SHARE = 0.001  # of the pixels may be brighter, such as a date in a corner
_NOISE = 6  # of 255: encoding the same picture again changes pixels by less, most of the time
_CHANGED_SHARE = 0.0005  # of the pixels: at 336 px a square of 7 px


class PictureWatch:
    """Looks at the pictures of one camera, one after the other.

    A scene in which nothing happens still shows the noise of its sensor, unless the camera smooths it away: so a
    picture counts as frozen only after `frozen_s` seconds.
    """

    def __init__(self, frozen_s: float) -> None:
        self._frozen_s = frozen_s
        self._first: NDArray[np.int16] | None = None  # the picture that has been there
        self._first_s = 0.0  # since then

    def see(self, pixels: NDArray[np.uint8], time_s: float) -> str | None:
        """Return what is wrong with a picture (H, W, 3) of a capture time, None if nothing is."""
        green = pixels[..., 1].astype(np.int16)
        if self._first is None or self._first.shape != green.shape or _changed(self._first, green):
            self._first, self._first_s = green, time_s
        if np.mean(pixels.max(axis=-1) > _DARK) < _BRIGHT_SHARE:
            return "the picture is black"
        if time_s - self._first_s >= self._frozen_s:
            return "the picture has not changed for a while: the camera may be frozen"
        return None


def _changed(before: NDArray[np.int16], now: NDArray[np.int16]) -> bool:
    return bool(np.mean(np.abs(now - before) > _NOISE) > _CHANGED_SHARE)
