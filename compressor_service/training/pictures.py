"""Pictures to learn from, each with what it shows: drawn at rest or in motion, some out of real films."""

from typing import NamedTuple

import numpy as np

from compressor_service.training.draw import Drawn, Picture, Size, degrade, draw_owned, jpeg_round
from compressor_service.training.film import film_keyframes
from compressor_service.training.scene import View, draw_clip, draw_slots, draw_view

_FILM_SLOTS, _FILM_FPS = 6, 4
_FILM_SIZES: tuple[Size, ...] = ((320, 240), (426, 240), (320, 180))


class Pictures(NamedTuple):
    """F views, each as it was drawn, and as a keyframe of some camera shows it (H, W, 3)."""

    views: list[View]
    drawn: list[Drawn]
    keyframes: list[Picture]


def draw_pictures(random: np.random.Generator, *, count: int, films: int) -> Pictures:
    """Draw `count` pictures; the first of them come out of `films` films."""
    filmed = [
        (draw_clip(random, slots=_FILM_SLOTS), _FILM_SIZES[int(random.integers(len(_FILM_SIZES)))])
        for _ in range(films)
    ]
    keyframes: list[Picture] = []
    for clip, size_px in filmed:
        keyframes += film_keyframes(clip, fps=_FILM_FPS, size_px=size_px, seed=int(random.integers(2**31)))
    views = [view for clip, _ in filmed for view in clip.views()]
    views += [draw_seen(random) for _ in range(count - len(views))]
    drawn = [draw_owned(view, moment=int(random.integers(1000))) for view in views]
    keyframes += [jpeg_round(degrade(one.picture, random)) for one in drawn[len(keyframes) :]]
    assert len(keyframes) == len(views) == count
    return Pictures(views, drawn, keyframes)


def draw_seen(random: np.random.Generator) -> View:
    """Draw a View: at rest, or of a clip at some time, often while something moves."""
    if random.random() < 0.5:
        return draw_view(random)
    clip = draw_clip(random, slots=draw_slots(random, 4, 16))
    if clip.events and random.random() < 0.6:
        event = clip.events[int(random.integers(len(clip.events)))]
        return clip.view(float(random.uniform(event.start_s, event.end_s)))
    return clip.view(float(random.uniform(0, clip.seconds)))
