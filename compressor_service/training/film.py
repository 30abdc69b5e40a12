"""Clips to films: real H.264, as a camera would deliver it, and back to the keyframes that the model gets of it."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from compressor_service.training.draw import KEYFRAME_PX, Camera, Picture, Size, draw
from compressor_service.training.scene import Clip
from ingest.keyframe import KeyframeMaker

FILM_PX: Size = (320, 240)
_GROUP_S = 2  # between two pictures that stand alone
# Without it the vectorised look-ahead (mbtree) now and then gives other bytes for the same pictures.
_REPEATABLE = "cpu-independent=1"


def film_frames(clip: Clip, *, fps: int = 8, size_px: Size = FILM_PX, seed: int = 0) -> Iterator[Picture]:
    """Yield the pictures (H, W, 3) that one camera takes of a clip, from its beginning to its last look."""
    random = np.random.default_rng(seed)
    camera = Camera.draw(random, compress=False) if random.random() < 0.88 else None
    for number in range(int(clip.seconds * fps) + 1):
        picture = draw(clip.view(number / fps), size_px, moment=number)
        yield camera.take(picture, random) if camera else picture


def write_film(
    clip: Clip, target: str | Path | io.BytesIO, *, fps: int = 8, size_px: Size = FILM_PX, seed: int = 0
) -> None:
    """Write an MP4 in which the frame at a time shows the clip's view of that time."""
    crf = int(np.random.default_rng((seed, 1)).integers(23, 33))
    where = target if isinstance(target, io.BytesIO) else str(target)
    with av.open(where, "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": "veryfast", "g": str(_GROUP_S * fps), "x264-params": _REPEATABLE}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height = size_px
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in film_frames(clip, fps=fps, size_px=size_px, seed=seed):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


def film_keyframes(clip: Clip, *, fps: int = 8, size_px: Size = FILM_PX, seed: int = 0) -> list[Picture]:
    """Return what the model is given (H, W, 3) in each of the clip's slots, once it was filmed, coded and decoded."""
    film = io.BytesIO()
    write_film(clip, film, fps=fps, size_px=size_px, seed=seed)
    film.seek(0)
    wanted = [round((slot + clip.phase_s) * fps) for slot in range(clip.slots)]
    maker = KeyframeMaker(KEYFRAME_PX[0])
    found: dict[int, Picture] = {}
    with av.open(film, "r") as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                with Image.open(io.BytesIO(maker.make(frame))) as opened:
                    found[number] = np.array(opened)
    last = max(found)
    return [found[min(number, last)] for number in wanted]
