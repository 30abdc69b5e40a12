"""A small street scene as a real H.264 file, so that the demo needs neither a camera nor a download."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT, RATE = 640, 360, 10
ROAD_TOP, ROAD_BOTTOM = 210, 330


def _mover(draw: ImageDraw.ImageDraw, x: float, y: int, size: tuple[int, int], colour: str) -> None:
    width, height = size
    draw.rounded_rectangle((x, y, x + width, y + height), radius=8, fill=colour)
    for wheel in (0.2, 0.8):
        centre = x + wheel * width
        draw.ellipse((centre - 9, y + height - 9, centre + 9, y + height + 9), fill="#202020")


def _picture(time_s: float) -> Image.Image:
    """Draw the street at `time_s`: a red car crosses first, a white van follows, a person walks by in the end."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "#a8c6e4")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((60, 70, 250, ROAD_TOP), fill="#b08968")
    draw.rectangle((390, 110, 600, ROAD_TOP), fill="#8d99ae")
    draw.rectangle((0, ROAD_TOP, WIDTH, ROAD_BOTTOM), fill="#4a4e52")
    draw.rectangle((0, ROAD_BOTTOM, WIDTH, HEIGHT), fill="#7a9e5b")
    for x in range(0, WIDTH, 80):
        draw.rectangle((x, 266, x + 40, 272), fill="#d8d8d8")
    if 4 <= time_s < 14:
        _mover(draw, (time_s - 4) / 10 * (WIDTH + 120) - 120, 220, (110, 36), "#c1121f")
    if 16 <= time_s < 28:
        _mover(draw, WIDTH - (time_s - 16) / 12 * (WIDTH + 160), 276, (150, 42), "#f4f4f4")
    if time_s >= 30:
        left = (time_s - 30) * 24
        draw.ellipse((left, 296, left + 14, 310), fill="#e0ac69")
        draw.rectangle((left + 1, 310, left + 13, 342), fill="#1d3557")
    return picture


def _pictures(seconds: int) -> Iterator[av.VideoFrame]:
    for index in range(seconds * RATE):
        frame = av.VideoFrame.from_ndarray(np.asarray(_picture(index / RATE)), format="rgb24")
        frame.pts, frame.time_base = index, Fraction(1, RATE)
        yield frame


def write_sample_clip(path: Path, seconds: int = 40) -> None:
    """Write the clip: 640 x 360 at 10 pictures a second, one keyframe a second, as security cameras send it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "g": str(RATE), "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in _pictures(seconds):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
