"""Scenes to pictures: what a camera over a street or a yard sees of a View, in pixels.

Lengths are parts of the picture's width and height, so that a picture of any size squashed to a square shows the same.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from compressor_service.training.scene import Placed, Setting, Thing, View

Picture = NDArray[np.uint8]
Canvas = NDArray[np.float32]
Rgb = tuple[int, int, int]
Size = tuple[int, int]

KEYFRAME_PX: Size = (112, 112)
JPEG_QUALITY = 95  # of a keyframe
_RGB: dict[str, Rgb] = {
    "red": (208, 32, 36),
    "blue": (36, 76, 214),
    "green": (28, 150, 58),
    "yellow": (240, 204, 36),
    "white": (240, 240, 240),
    "black": (26, 26, 30),
}
_DARK_LINE, _LIGHT_LINE, _FAINT_LINE = (22, 22, 26), (205, 205, 205), (124, 124, 130)
# Of a big thing in the near lane: its width and height.
_EXTENTS = {
    "person": (0.125, 0.32),
    "car": (0.27, 0.17),
    "truck": (0.31, 0.25),
    "bicycle": (0.22, 0.185),
    "dog": (0.2, 0.155),
    "cat": (0.135, 0.165),
    "parcel": (0.135, 0.13),
    "fire": (0.15, 0.2),
}
_GROUND = {"near": 0.93, "far": 0.615}  # where a lane's things stand
_DEPTH = {"near": 1.0, "far": 0.72}
_BULK = {"big": 1.0, "small": 0.65}
_VARIANTS = 4
_HORIZON = 0.43  # things hide nothing above it


class Drawn(NamedTuple):
    """A picture (H, W, 3), and for each pixel (H, W) which of `view.things` it shows: its number, or -1."""

    picture: Picture
    owners: NDArray[np.int8]


@dataclass(frozen=True, slots=True, eq=False)
class _Sprite:
    """A thing cut out: colours times alpha (h, w, 3), what shines through it (h, w, 1), and its body (h, w)."""

    paint: Canvas
    through: Canvas
    body: NDArray[np.bool_]
    ground: int  # row at which it stands


def draw(view: View, size_px: Size = KEYFRAME_PX, *, moment: int = 0) -> Picture:
    """Draw (H, W, 3) what the camera sees; of a rain it is the drops at a `moment`."""
    return draw_owned(view, size_px, moment=moment).picture


def draw_owned(view: View, size_px: Size = KEYFRAME_PX, *, moment: int = 0) -> Drawn:
    """Draw a picture, and tell which thing each pixel shows."""
    width, height = size_px
    setting = view.setting
    canvas = _backdrop(setting, view.gate_open, view.lamp_on, size_px).copy()
    owners = np.full((height, width), -1, np.int8)
    order = sorted(range(len(view.things)), key=lambda number: (view.things[number].lane == "near", number))
    for number in order:
        _place(canvas, owners, view.things[number], number, setting, size_px)
    if setting.rain:
        _rain(canvas, setting, size_px, moment)
    np.clip(canvas, 0, 255, out=canvas)
    return Drawn(canvas.astype(np.uint8), owners)


def patch_owners(drawn: Drawn, *, patch_px: int = 16, least: float = 0.1) -> NDArray[np.int8]:
    """Name for every patch (rows, columns) the thing that covers most of it, or -1.

    What covers less than `least` of a patch counts only where it is most of that thing, so that no thing is lost.
    """
    height, width = drawn.owners.shape
    rows, columns = height // patch_px, width // patch_px
    named = np.full((rows, columns), -1, np.int8)
    things = int(drawn.owners.max()) + 1
    if things == 0:
        return named
    parts = drawn.owners[: rows * patch_px, : columns * patch_px].reshape(rows, patch_px, columns, patch_px)
    cover = np.stack([(parts == number).sum(axis=(1, 3)) for number in range(things)])
    most = cover.argmax(axis=0)
    named = np.where(cover.max(axis=0) >= least * patch_px**2, most, -1).astype(np.int8)
    for number in range(things):
        if cover[number].any() and not (named == number).any():
            named[np.unravel_index(cover[number].argmax(), named.shape)] = number
    return named


def degrade(picture: Picture, random: np.random.Generator) -> Picture:
    """Show a picture as some camera would: exposure, colours, blur, noise and compression of a strength by chance."""
    if random.random() < 0.12:
        return picture
    return Camera.draw(random).take(picture, random)


@dataclass(frozen=True, slots=True)
class Camera:
    """What a camera does to all its pictures: `curve` (256, 3) maps levels, the rest are strengths (0 is none)."""

    curve: NDArray[np.uint8]
    blur_px: float
    noise: float
    jpeg_quality: int

    @classmethod
    def draw(cls, random: np.random.Generator, *, compress: bool = True) -> "Camera":
        strength = float(random.uniform(0, 1))
        gain = 1 + strength * random.uniform(-0.2, 0.2)
        gamma = 1 + strength * random.uniform(-0.22, 0.22)
        cast = 1 + strength * random.uniform(-0.09, 0.09, 3)
        level = np.linspace(0, 1, 256)[:, None]
        curve = np.clip(255 * gain * cast * level**gamma + 0.5, 0, 255).astype(np.uint8)
        blur = float(random.uniform(0.2, 0.7)) * strength if random.random() < 0.35 else 0.0
        noise = float(random.uniform(0, 9)) * strength
        quality = int(random.integers(45, 95)) if compress and random.random() < 0.5 else 0
        return cls(curve, blur, noise, quality)

    def take(self, picture: Picture, random: np.random.Generator) -> Picture:
        """Take a picture (H, W, 3), with fresh noise."""
        taken = np.empty_like(picture)
        for channel in range(3):
            taken[..., channel] = self.curve[:, channel][picture[..., channel]]
        if self.blur_px > 0.15:
            scale = picture.shape[1] / KEYFRAME_PX[0]
            taken = np.asarray(Image.fromarray(taken).filter(ImageFilter.GaussianBlur(self.blur_px * scale)))
        if self.noise > 0.5:
            grain = _grain(random, taken.shape[0], taken.shape[1]) * np.float32(self.noise)
            taken = np.clip(taken + grain, 0, 255).astype(np.uint8)
        return jpeg_round(taken, self.jpeg_quality, subsampling=2) if self.jpeg_quality else taken


def jpeg_round(picture: Picture, quality: int = JPEG_QUALITY, *, subsampling: int = 0) -> Picture:
    """Compress a picture (H, W, 3) and return what is decoded of it; without arguments as a keyframe."""
    target = io.BytesIO()
    Image.fromarray(picture).save(target, "JPEG", quality=quality, subsampling=subsampling)
    with Image.open(target) as opened:
        return np.array(opened)


@lru_cache(maxsize=1)
def _grain_table() -> NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal((700, 900, 3), dtype=np.float32)


def _grain(random: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Cut noise (height, width, 3) out of a table: drawing it afresh would cost as much as the picture."""
    table = _grain_table()
    if height >= table.shape[0] or width >= table.shape[1]:
        return random.standard_normal((height, width, 3), dtype=np.float32)
    top, left = int(random.integers(table.shape[0] - height)), int(random.integers(table.shape[1] - width))
    return table[top : top + height, left : left + width]


class _Pen:
    """Draws in parts of a picture's width and height."""

    def __init__(self, image: Image.Image) -> None:
        self._drawing = ImageDraw.Draw(image)
        self._width, self._height = image.size

    def box(self, left: float, top: float, right: float, bottom: float, fill: Rgb) -> None:
        self._drawing.rectangle(self._corners(left, top, right, bottom), fill)

    def oval(self, left: float, top: float, right: float, bottom: float, fill: Rgb) -> None:
        self._drawing.ellipse(self._corners(left, top, right, bottom), fill)

    def ring(self, left: float, top: float, right: float, bottom: float, fill: Rgb, thick: float) -> None:
        corners = self._corners(left, top, right, bottom)
        self._drawing.ellipse(corners, None, fill, max(1, round(thick * self._width)))

    def shape(self, points: Sequence[tuple[float, float]], fill: Rgb) -> None:
        self._drawing.polygon([(x * self._width, y * self._height) for x, y in points], fill)

    def line(self, points: Sequence[tuple[float, float]], fill: Rgb, thick: float) -> None:
        scaled = [(x * self._width, y * self._height) for x, y in points]
        self._drawing.line(scaled, fill, max(1, round(thick * self._width)), joint="curve")

    def _corners(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return left * self._width, top * self._height, right * self._width, bottom * self._height


def _shade(rgb: Rgb, by: float) -> Rgb:
    red, green, blue = (min(255, round(part * by)) for part in rgb)
    return red, green, blue


def _person(pen: _Pen, rgb: Rgb, variant: int) -> None:
    skin = ((236, 188, 150), (198, 140, 100), (130, 84, 56), (224, 172, 130))[variant]
    hair = ((60, 40, 28), (24, 22, 22), (30, 24, 20), (150, 110, 60))[variant]
    stride = (0.16, 0.3, 0.22, 0.1)[variant]
    trousers = _shade(rgb, 0.62)
    for side in (-1, 1):
        foot = 0.5 + side * stride
        pen.shape([(0.5 - 0.16, 0.56), (0.5 + 0.16, 0.56), (foot + 0.12, 0.99), (foot - 0.12, 0.99)], trousers)
        pen.line([(0.5 + side * 0.24, 0.28), (0.5 + side * (0.34 + stride / 3), 0.58)], rgb, 0.17)
    pen.shape([(0.22, 0.24), (0.78, 0.24), (0.72, 0.62), (0.28, 0.62)], rgb)
    pen.oval(0.3, 0.0, 0.7, 0.2, hair)
    pen.oval(0.32, 0.035, 0.68, 0.225, skin)


def _wheel(pen: _Pen, x: float, radius: float, flat: float) -> None:
    pen.oval(x - radius, 1 - 2 * radius * flat, x + radius, 1, (20, 20, 22))
    pen.oval(x - radius / 2.4, 1 - 1.42 * radius * flat, x + radius / 2.4, 1 - 0.58 * radius * flat, (150, 150, 155))


def _car(pen: _Pen, rgb: Rgb, variant: int) -> None:
    back = (0.2, 0.12, 0.24, 0.16)[variant]
    pen.shape([(back, 0.44), (back + 0.1, 0.04), (0.66, 0.04), (0.8, 0.44)], rgb)
    pen.shape([(back + 0.06, 0.42), (back + 0.13, 0.12), (0.43, 0.12), (0.43, 0.42)], (120, 150, 170))
    pen.shape([(0.48, 0.42), (0.48, 0.12), (0.63, 0.12), (0.73, 0.42)], (120, 150, 170))
    pen.shape([(0.0, 0.5), (0.06, 0.4), (0.84, 0.4), (1.0, 0.52), (1.0, 0.84), (0.0, 0.84)], rgb)
    pen.box(0.94, 0.52, 1.0, 0.62, (255, 246, 200))
    for x in (0.22, 0.78):
        _wheel(pen, x, 0.115, 1.55)


def _truck(pen: _Pen, rgb: Rgb, variant: int) -> None:
    top = (0.0, 0.06, 0.02, 0.1)[variant]
    pen.box(0.0, 0.72, 0.98, 0.86, (46, 46, 50))
    pen.box(0.0, top, 0.66, 0.74, rgb)
    for x in (0.16, 0.33, 0.5):
        pen.line([(x, top + 0.05), (x, 0.7)], _shade(rgb, 0.75) if sum(rgb) > 150 else (70, 70, 74), 0.018)
    pen.shape([(0.7, 0.26), (0.9, 0.26), (1.0, 0.52), (1.0, 0.82), (0.7, 0.82)], _shade(rgb, 0.82))
    pen.shape([(0.77, 0.32), (0.88, 0.32), (0.95, 0.52), (0.77, 0.52)], (130, 165, 185))
    for x in (0.13, 0.36, 0.84):
        _wheel(pen, x, 0.09, 1.25)


def _bicycle(pen: _Pen, rgb: Rgb, variant: int) -> None:
    for x in (0.23, 0.77):
        pen.ring(x - 0.23, 0.42, x + 0.23, 1.0, rgb, 0.07)
    pen.line([(0.23, 0.7), (0.4, 0.3), (0.7, 0.28), (0.47, 0.72), (0.23, 0.7)], rgb, 0.075)
    pen.line([(0.47, 0.72), (0.38, 0.2)], rgb, 0.07)
    bend = (0.06, 0.0, 0.1, 0.04)[variant]
    pen.line([(0.77, 0.7), (0.7, 0.28), (0.67, 0.06), (0.82, 0.06 + bend)], rgb, 0.07)
    pen.line([(0.28, 0.17), (0.48, 0.17)], (34, 32, 32), 0.09)


def _dog(pen: _Pen, rgb: Rgb, variant: int) -> None:
    gait = (0.0, 0.05, -0.04, 0.03)[variant]
    for x, step in ((0.16, -gait), (0.27, gait), (0.58, -gait), (0.69, gait)):
        pen.line([(x, 0.6), (x + step, 0.98)], rgb, 0.08)
    pen.line([(0.12, 0.45), (0.02, 0.12 + (0.0, 0.1, 0.05, 0.15)[variant])], rgb, 0.07)
    pen.shape([(0.08, 0.38), (0.7, 0.34), (0.76, 0.62), (0.62, 0.74), (0.2, 0.7), (0.08, 0.6)], rgb)
    pen.shape([(0.6, 0.42), (0.66, 0.08), (0.84, 0.06), (0.86, 0.4), (0.76, 0.56)], rgb)
    pen.shape([(0.8, 0.12), (1.0, 0.24), (0.99, 0.38), (0.8, 0.4)], rgb)
    ear = (110, 110, 114) if sum(rgb) < 150 else _shade(rgb, 0.55)
    pen.shape([(0.64, 0.08), (0.74, 0.08), (0.72, 0.34), (0.62, 0.32)], ear)
    pen.oval(0.94, 0.22, 1.0, 0.3, (15, 15, 15))


def _cat(pen: _Pen, rgb: Rgb, variant: int) -> None:
    tail = (0.3, 0.42, 0.36, 0.26)[variant]
    pen.line([(0.62, 0.94), (0.92, 0.86), (0.93, 0.6), (0.84, tail)], rgb, 0.12)
    pen.shape([(0.3, 0.36), (0.56, 0.36), (0.74, 0.74), (0.72, 1.0), (0.14, 1.0), (0.16, 0.7)], rgb)
    for left in (0.1, 0.46):
        pen.shape([(left, 0.26), (left + (0.04 if left < 0.3 else 0.2), 0.0), (left + 0.26, 0.2)], rgb)
    pen.oval(0.09, 0.12, 0.71, 0.5, rgb)
    eye = (210, 220, 90) if sum(rgb) < 150 else (40, 60, 30)
    pen.oval(0.2, 0.25, 0.32, 0.36, eye)
    pen.oval(0.46, 0.25, 0.58, 0.36, eye)


def _parcel(pen: _Pen, rgb: Rgb, variant: int) -> None:
    deep = (0.2, 0.26, 0.16, 0.22)[variant]
    tape = (222, 190, 140) if sum(rgb) < 470 else (120, 84, 50)
    lid = _shade(rgb, 1.25) if sum(rgb) > 150 else (64, 64, 68)
    pen.shape([(0.0, deep), (0.18, 0.0), (1.0, 0.0), (0.84, deep)], lid)
    pen.shape([(0.84, deep), (1.0, 0.0), (1.0, 0.8), (0.84, 1.0)], _shade(rgb, 0.65))
    pen.box(0.0, deep, 0.84, 1.0, rgb)
    pen.box(0.35, deep, 0.49, 1.0, tape)
    pen.shape([(0.35, deep), (0.5, 0.0), (0.64, 0.0), (0.49, deep)], tape)
    pen.box(0.0, 0.52, 0.84, 0.64, tape)


def _fire(pen: _Pen, rgb: Rgb, variant: int) -> None:
    lean = (0.0, 0.12, -0.12, 0.05)[variant]
    outer = [(0.1, 0.95), (0.02, 0.55), (0.2, 0.62), (0.24, 0.25), (0.4, 0.45), (0.52 + lean, 0.0), (0.66, 0.4)]
    pen.shape([*outer, (0.82, 0.2), (0.86, 0.56), (0.99, 0.46), (0.9, 0.95)], (232, 70, 14))
    inner = [(0.22, 0.95), (0.2, 0.68), (0.36, 0.58), (0.5 + lean, 0.25), (0.64, 0.55), (0.78, 0.62), (0.8, 0.95)]
    pen.shape(inner, (252, 150, 22))
    pen.shape([(0.36, 0.95), (0.36, 0.75), (0.5 + lean / 2, 0.5), (0.64, 0.75), (0.66, 0.95)], (255, 236, 120))
    pen.line([(0.05, 0.97), (0.95, 0.9)], (74, 46, 28), 0.1)
    pen.line([(0.05, 0.9), (0.95, 0.97)], (60, 38, 24), 0.1)


_SHAPES: dict[str, Callable[[_Pen, Rgb, int], None]] = {
    "person": _person,
    "car": _car,
    "truck": _truck,
    "bicycle": _bicycle,
    "dog": _dog,
    "cat": _cat,
    "parcel": _parcel,
    "fire": _fire,
}
_FINE = 4  # drawn this many times larger, for smooth edges


def _luck(look: int, thing: Thing) -> int:
    """Derive a thing's own chance in a setting: 16 bits that stay the same for all its pictures."""
    kind, colour = thing.order
    mixed = look * 1_000_003 + kind * 7919 + colour * 104_729 + (thing.size == "big") * 15_485_863
    return (mixed * 2_654_435_761 >> 12) & 0xFFFF


def _place(
    canvas: Canvas, owners: NDArray[np.int8], placed: Placed, number: int, setting: Setting, size_px: Size
) -> None:
    thing, luck = placed.thing, _luck(setting.look, placed.thing)
    scale = round(_DEPTH[placed.lane] * _BULK[thing.size], 4)
    sprite = _sprite(thing.kind, thing.colour, scale, luck % _VARIANTS, bool(luck & 8), size_px)
    high, wide = sprite.body.shape
    left = round(placed.x * size_px[0] - wide / 2)
    top = round((_GROUND[placed.lane] + ((luck >> 4) % 8 - 4) * 0.004) * size_px[1]) - sprite.ground
    first, last = max(left, 0), min(left + wide, size_px[0])
    bottom = min(top + high, size_px[1])
    if first >= last:
        return
    inside = np.s_[: bottom - top, first - left : last - left]
    light = np.float32(0.88 + (luck >> 7) % 16 / 16 * 0.24)
    if thing.kind == "fire":
        _glow(canvas, placed.x, (top + high / 2) / size_px[1], 0.2, (70, 34, 6), size_px)
        light = np.float32(1)
    elif setting.night:
        light *= np.float32(0.66)
    part = canvas[top:bottom, first:last]
    part *= sprite.through[inside]
    part += sprite.paint[inside] * light
    owners[top:bottom, first:last][sprite.body[inside]] = number


@lru_cache(maxsize=8192)
def _sprite(kind: str, colour: str | None, scale: float, variant: int, turned: bool, size_px: Size) -> _Sprite:
    scale *= 0.94 + 0.04 * variant
    wide, high = (round(part * scale * whole) for part, whole in zip(_EXTENTS[kind], size_px, strict=True))
    edge = max(1, round(size_px[0] / KEYFRAME_PX[0]))
    rgb = _RGB[colour] if colour else (240, 120, 20)
    fine = Image.new("RGB", (wide * _FINE, high * _FINE), (255, 0, 255))
    _SHAPES[kind](_Pen(fine), rgb, variant)
    if turned:
        fine = fine.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    size = (wide + 2 * edge) * _FINE, (high + 2 * edge) * _FINE
    picture, margin = np.asarray(fine), edge * _FINE
    drawn = (picture != (255, 0, 255)).any(axis=2)
    inner = np.zeros(size[::-1], np.uint8)
    inner[margin:-margin, margin:-margin] = drawn * 255
    line = _line(kind, colour)
    colours = np.empty((*size[::-1], 3), np.uint8)
    colours[:] = line
    colours[margin:-margin, margin:-margin][drawn] = picture[drawn]
    reach = round(0.7 * margin) if scale > 0.6 else round(0.45 * margin)
    outline = Image.fromarray(inner)
    if kind != "fire":
        outline = outline.filter(ImageFilter.MaxFilter(2 * reach + 1))
    alpha = np.asarray(outline.reduce(_FINE), np.float32)[..., None] / np.float32(255)
    # Colours are averaged together with their alpha, so that no background colour bleeds in at the edges.
    faded = colours * (np.asarray(outline)[..., None] > 0)
    paint = np.asarray(Image.fromarray(faded.astype(np.uint8)).reduce(_FINE), np.float32)
    shadow = Image.new("L", outline.size, 0)
    low = 0.9 if kind != "fire" else 0.97
    ImageDraw.Draw(shadow).ellipse((0, low * size[1], size[0], size[1] - 1), 110)
    dark = np.asarray(shadow.reduce(_FINE), np.float32)[..., None] / np.float32(255)
    return _Sprite(paint, (np.float32(1) - alpha) * (np.float32(1) - dark), alpha[..., 0] > 0.5, high + edge)


def _line(kind: str, colour: str | None) -> Rgb:
    """Choose an outline that sets a thing off from any ground, yet leaves a thin one its colour."""
    if colour not in ("black", "blue"):
        return _DARK_LINE
    return _FAINT_LINE if kind == "bicycle" else _LIGHT_LINE


@lru_cache(maxsize=16)
def _grid(size_px: Size) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the x (1, W) and the y (H, 1) of pixels."""
    width, height = size_px
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) / np.float32(width)
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(height)
    return x[None], y[:, None]


def _glow(canvas: Canvas, x: float, y: float, radius: float, rgb: Rgb, size_px: Size) -> None:
    """Add light around a place."""
    xs, ys = _grid(size_px)
    first, last = (round(min(max(x + side * radius, 0), 1) * size_px[0]) for side in (-1, 1))
    top, bottom = (round(min(max(y + side * radius, 0), 1) * size_px[1]) for side in (-1, 1))
    away = ((xs[:, first:last] - x) ** 2 + (ys[top:bottom] - y) ** 2) / np.float32(radius**2)
    light = np.clip(1 - away, 0, None) ** 2
    canvas[top:bottom, first:last] += light[..., None] * np.array(rgb, np.float32)


def _rain(canvas: Canvas, setting: Setting, size_px: Size, moment: int) -> None:
    drops = _drops((setting.look + moment) % 16, size_px)
    fall = (setting.look // 16 + moment * 7919) % size_px[1]
    drops = np.concatenate((drops[fall:], drops[:fall]))
    canvas += drops * np.float32(42 if setting.night else 62)


@lru_cache(maxsize=64)
def _drops(variant: int, size_px: Size) -> NDArray[np.float32]:
    """Draw streaks (H, W, 1) from 0 to 1."""
    random = np.random.default_rng(variant)
    image = Image.new("L", (size_px[0] * 2, size_px[1] * 2), 0)
    drawing = ImageDraw.Draw(image)
    slant = float(random.uniform(-0.035, 0.035))
    thick = max(1, round(size_px[0] / KEYFRAME_PX[0] * 1.4))
    for x, y, long in random.uniform((-0.05, -0.1, 0.05), (1.05, 1, 0.12), (85, 3)):
        ends = (x, y, x + slant * long / 0.08, y + long)
        scaled = [end * side for end, side in zip(ends, image.size * 2, strict=True)]
        drawing.line(scaled, int(random.integers(120, 255)), thick)
    return np.asarray(image.reduce(2), np.float32)[..., None] / np.float32(255)


@lru_cache(maxsize=64)
def _backdrop(setting: Setting, gate_open: bool, lamp_on: bool, size_px: Size) -> Canvas:
    """Draw all that stands still (H, W, 3); the last few are kept, for the pictures of a clip share them."""
    random = np.random.default_rng(setting.look)
    image = Image.new("RGB", (size_px[0] * 2, size_px[1] * 2))
    pen = _Pen(image)
    gate_x, lamp_x = float(random.uniform(0.17, 0.33)), float(random.uniform(0.68, 0.84))
    sky = _near(random, (200, 205, 212) if setting.rain else (150, 195, 238), 18)
    pen.box(0, 0, 1, 0.5, sky)
    if not setting.rain:
        for x, y, wide in random.uniform((0, 0.0, 0.1), (1, 0.1, 0.3), (int(random.integers(4)), 3)):
            pen.oval(x - wide / 2, y - 0.03, x + wide / 2, y + 0.04, _shade(sky, 1.15))
    if setting.street:
        _street(pen, random)
    else:
        _yard(pen, random, gate_x)
    _plants(pen, random, (gate_x, lamp_x), setting.street)
    if setting.rain:
        for x, y, wide in random.uniform((0, 0.5, 0.08), (1, 0.97, 0.25), (3, 3)):
            pen.oval(x - wide / 2, y - 0.015, x + wide / 2, y + 0.015, _near(random, (150, 162, 176), 10))
    _gate(pen, random, gate_x, gate_open)
    lamp_y = _lamp(pen, random, lamp_x, lamp_on)
    canvas = np.asarray(image.reduce(2), np.float32)
    return _lit(canvas, random, setting, (lamp_x, lamp_y) if lamp_on else None, size_px)


def _lit(
    canvas: Canvas, random: np.random.Generator, setting: Setting, lamp: tuple[float, float] | None, size_px: Size
) -> Canvas:
    """Shine upon a backdrop: sun from a side, moonlight or the grey of rain, then the lamp."""
    xs, ys = _grid(size_px)
    side, depth = random.uniform(-0.12, 0.12), random.uniform(0, 0.15)
    tint = np.array(random.uniform(0.94, 1.06, 3), np.float32)
    if setting.night:
        tint *= np.array((0.3, 0.33, 0.45), np.float32)
    if setting.rain:
        tint *= np.float32(0.84)
    slope = (1 + np.float32(side) * (xs - 0.5) + np.float32(depth) * (ys - 0.5))[..., None]
    lit: Canvas = canvas * slope * tint
    lit += _grain(random, size_px[1], size_px[0])[..., :1] * np.float32(2.5)
    if lamp is not None:
        x, y = lamp
        _glow(lit, x, y, 0.19, (120, 105, 50) if setting.night else (75, 66, 20), size_px)
        if setting.night:
            _glow(lit, x, 0.5, 0.3, (46, 40, 22), size_px)
        _disc(lit, x, y, size_px)
    return lit


def _disc(canvas: Canvas, x: float, y: float, size_px: Size) -> None:
    """The bulb itself, as bright by night as by day."""
    xs, ys = _grid(size_px)
    inside = np.clip(3 - 3 * (((xs - x) / 0.042) ** 2 + ((ys - y) / 0.042) ** 2), 0, 1)[..., None]
    canvas *= 1 - inside
    canvas += inside * np.array((255, 238, 150), np.float32)


def _near(random: np.random.Generator, rgb: Rgb, by: int) -> Rgb:
    shift = int(random.integers(-by, by + 1))
    red, green, blue = (
        min(255, max(0, part + shift + int(other)))
        for part, other in zip(rgb, random.integers(-by // 2, by // 2 + 1, 3), strict=True)
    )
    return red, green, blue


def _street(pen: _Pen, random: np.random.Generator) -> None:
    left, grey = -0.05, int(random.integers(82, 112))
    walls: tuple[Rgb, ...] = ((172, 150, 132), (150, 120, 104), (182, 176, 164), (134, 138, 146), (190, 166, 130))
    while left < 1:
        wide, top = float(random.uniform(0.16, 0.34)), float(random.uniform(0.0, 0.17))
        wall = _near(random, walls[random.integers(len(walls))], 14)
        pen.box(left, top, left + wide, _HORIZON, wall)
        pane = _shade(wall, float(random.uniform(0.6, 0.75)))
        for row in range(3):
            for column in range(3):
                x, y = left + wide * (0.12 + column * 0.3), top + 0.03 + row * 0.1
                if y < 0.33:
                    pen.box(x, y, x + wide * 0.17, y + 0.05, pane)
        left += wide
    walk = int(random.integers(150, 185))
    pen.box(0, _HORIZON - 0.01, 1, 0.5, (walk, walk - 2, walk - 6))
    pen.box(0, 0.5, 1, 0.515, (walk - 50, walk - 50, walk - 50))
    pen.box(0, 0.515, 1, 1, (grey, grey, grey + 4))
    dash, start = float(random.uniform(0.09, 0.15)), float(random.uniform(-0.2, 0))
    for number in range(10):
        x = start + number * dash * 1.8
        pen.box(x, 0.695, x + dash, 0.712, (206, 206, 200))
    if random.random() < 0.5:
        pen.box(0, 0.965, 1, 0.98, (196, 196, 190))


def _yard(pen: _Pen, random: np.random.Generator, gate_x: float) -> None:
    top = float(random.uniform(0.16, 0.24))
    wall = _near(random, ((150, 108, 74), (164, 92, 76), (168, 164, 156))[random.integers(3)], 14)
    pen.box(0, top, 1, _HORIZON, wall)
    pitch = float(random.uniform(0.05, 0.09))
    for number in range(int(1 / pitch) + 1):
        pen.box(number * pitch, top, number * pitch + 0.008, _HORIZON, _shade(wall, 0.8))
    pen.box(0, top, 1, top + 0.02, _shade(wall, 0.72))
    ground = _near(random, ((108, 138, 74), (150, 140, 112), (128, 146, 92))[random.integers(3)], 14)
    pen.box(0, _HORIZON, 1, 1, ground)
    drift = float(random.uniform(-0.1, 0.3))
    path = [(gate_x - 0.08, _HORIZON), (gate_x + 0.08, _HORIZON), (gate_x + drift + 0.22, 1), (gate_x + drift - 0.2, 1)]
    pen.shape(path, _near(random, (176, 166, 146), 12))
    for x, y in random.uniform((0, 0.46), (1, 1), (14, 2)):
        pen.line([(x, y), (x + 0.012, y - 0.02)], _shade(ground, 0.8), 0.006)


def _plants(pen: _Pen, random: np.random.Generator, taken: tuple[float, float], street: bool) -> None:
    for x, kind, size in random.uniform((0, 0, 0.8), (1, 1, 1.25), (int(random.integers(1, 5)), 3)):
        if any(abs(x - other) < 0.21 for other in taken):
            continue
        leaves = _near(random, (62, 104, 52), 16)
        if kind < 0.5:
            pen.box(x - 0.012, 0.2, x + 0.012, 0.44, (92, 70, 50))
            pen.oval(x - 0.09 * size, 0.26 - 0.2 * size, x + 0.09 * size, 0.3, leaves)
            pen.oval(x - 0.06 * size, 0.24 - 0.2 * size, x + 0.05 * size, 0.2, _shade(leaves, 1.15))
        elif not street:
            pen.oval(x - 0.08 * size, 0.36, x + 0.08 * size, 0.46, leaves)


def _gate(pen: _Pen, random: np.random.Generator, x: float, is_open: bool) -> None:
    """Two posts; between them a light plate with dark bars, or a dark way through with its wings at the sides."""
    metal = _near(random, (206, 202, 192), 10)
    half, top = 0.1, 0.205
    for post in (x - half - 0.02, x + half - 0.005):
        pen.box(post, top - 0.03, post + 0.025, _HORIZON + 0.012, (88, 84, 80))
    if is_open:
        pen.box(x - half, top, x + half, _HORIZON + 0.005, (30, 34, 36))
        foot = _HORIZON + 0.005
        pen.shape([(x - 0.055, foot), (x - 0.02, 0.3), (x + 0.02, 0.3), (x + 0.055, foot)], (112, 108, 98))
        for side in (-1, 1):
            hinge, edge = x + side * half, x + side * (half - 0.028)
            pen.shape([(hinge, top), (edge, top + 0.035), (edge, _HORIZON + 0.025), (hinge, foot)], metal)
        return
    pen.box(x - half, top, x + half, _HORIZON + 0.005, metal)
    for number in range(5):
        bar = x - half + 0.018 + number * 0.041
        pen.box(bar - 0.006, top + 0.015, bar + 0.006, _HORIZON - 0.01, (70, 68, 66))
    pen.box(x - half, 0.3, x + half, 0.325, (70, 68, 66))


def _lamp(pen: _Pen, random: np.random.Generator, x: float, is_on: bool) -> float:
    y = float(random.uniform(0.11, 0.16))
    pen.box(x - 0.012, y, x + 0.012, _HORIZON + 0.02, (58, 60, 64))
    pen.box(x - 0.028, _HORIZON, x + 0.028, _HORIZON + 0.02, (58, 60, 64))
    pen.oval(x - 0.05, y - 0.05, x + 0.05, y + 0.05, (58, 60, 64))
    if not is_on:
        pen.oval(x - 0.036, y - 0.036, x + 0.036, y + 0.036, (104, 108, 114))
    return y
