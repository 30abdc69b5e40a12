"""Decoded pictures to JPEG: keyframes, upright and squashed to the model's square, and snapshots for people."""

import io

import numpy as np
from av import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image

JPEG_QUALITY = 95
SNAPSHOT_PX = 640


class KeyframeMaker:
    """Makes keyframes of one size. Keep one for each source: it reuses the scaler's tables."""

    def __init__(self, size_px: int) -> None:
        self._size_px = size_px
        self._reformatter = VideoReformatter()

    def make(self, picture: VideoFrame) -> bytes:
        """Return the JPEG (quality 95, 4:4:4) of a picture, turned as its container says it was held."""
        return jpeg(self.pixels(picture))

    def pixels(self, picture: VideoFrame) -> NDArray[np.uint8]:
        """Return the pixels (size, size, 3) that the keyframe of a picture is made of."""
        square = self._reformatter.reformat(
            picture, self._size_px, self._size_px, "rgb24", interpolation=Interpolation.AREA
        )
        # Turning after the squash gives the same as before it, for the price of a small picture.
        return np.rot90(square.to_ndarray(), picture.rotation // 90)


def snapshot(picture: VideoFrame) -> bytes:
    """Return a JPEG of a picture in its own shape, upright, at most 640 pixels long."""
    shrunk = min(1.0, SNAPSHOT_PX / max(picture.width, picture.height))
    width, height = (max(1, round(side * shrunk)) for side in (picture.width, picture.height))
    small = picture.reformat(width, height, "rgb24", interpolation=Interpolation.AREA)
    return jpeg(np.rot90(small.to_ndarray(), picture.rotation // 90))


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels (H, W, 3) as JPEG (quality 95, 4:4:4)."""
    target = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(target, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return target.getvalue()
