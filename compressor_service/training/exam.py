"""What a model is examined on: pictures and clips that it never saw, with one question of every family to each.

One question of a family a scene: the answers of a family are then independent, and no scene counts for more.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import av
import numpy as np
from PIL import Image

from compressor_service.training.draw import KEYFRAME_PX, Picture, degrade, draw
from compressor_service.training.film import film_keyframes
from compressor_service.training.questions import CLIP_FAMILIES, PICTURE_FAMILIES, Asked, Story, ask_clip, ask_picture
from compressor_service.training.scene import Clip, View, draw_clip, draw_slots, draw_view
from compressor_service.training.score import Blind
from compressor_service.training.seeds import Split, split_seed
from ingest.keyframe import KeyframeMaker

Group = Literal["pictures", "clips", "long", "cameras"]

GROUPS: tuple[Group, ...] = ("pictures", "clips", "long", "cameras")
SLOTS: dict[Group, tuple[int, int]] = {"clips": (4, 64), "long": (128, 300), "cameras": (6, 24)}
_TRIES = 8  # to find a question of a family, before a scene counts as having none
_BLIND_SCENES = 3000  # that answering without looking is learned from


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture (a View) or a clip, and what is asked about it; `seed` is that of its camera."""

    group: Group
    number: int
    shown: View | Clip
    asked: tuple[Asked, ...]
    seed: int

    @property
    def name(self) -> str:
        return f"{self.group}/{self.number}"

    @property
    def views(self) -> list[View]:
        """What is seen in every slot; of a picture there is one."""
        return [self.shown] if isinstance(self.shown, View) else self.shown.views()

    @property
    def starts_as_a_file(self) -> bool:
        """Whether a film of it, read as a file, is looked at when the clip is: its clock starts with its film."""
        return isinstance(self.shown, Clip) and self.shown.phase_s == 0

    def keyframes(self) -> list[Picture]:
        """Return what ingest would make of it (H, W, 3), one a slot; a clip goes through a real H.264 film."""
        if isinstance(self.shown, Clip):
            return film_keyframes(self.shown, seed=self.seed)
        random = np.random.default_rng(self.seed)
        frame = av.VideoFrame.from_ndarray(degrade(draw(self.shown), random), format="rgb24")
        with Image.open(io.BytesIO(KeyframeMaker(KEYFRAME_PX[0]).make(frame))) as opened:
            return [np.array(opened)]


def draw_scenes(split: Split, seed: int, group: Group, count: int) -> Iterator[Scene]:
    """Draw the first `count` scenes of a group: fewer of them are the same ones."""
    for number in range(count):
        yield draw_scene(split, seed, group, number)


def draw_scene(split: Split, seed: int, group: Group, number: int) -> Scene:
    """Draw one scene; every other clip is looked at as a file is, the others at some part of a second, as cameras."""
    random = np.random.default_rng(split_seed(split, seed, GROUPS.index(group), number))
    if group == "pictures":
        view = draw_view(random)
        asked = _ask_all(PICTURE_FAMILIES, lambda family: ask_picture(random, view, family))
        return Scene(group, number, view, asked, _film_seed(random))
    slots, anyhow = draw_slots(random, *SLOTS[group]), float(random.random())
    if group == "cameras":
        clip = any_phase(draw_clip(random, slots=slots, phase_s=1.0))
    else:
        clip = draw_clip(random, slots=slots, phase_s=0.0 if number % 2 == 0 else anyhow)
    story = Story.of(clip)
    asked = _ask_all(CLIP_FAMILIES, lambda family: ask_clip(random, story, family))
    return Scene(group, number, clip, asked, _film_seed(random))


def any_phase(clip: Clip) -> Clip:
    """Make a clip of phase 1 one that may be looked at at any part of a second, and be asked the same.

    Its events begin after the first second has passed and end before the last one begins; with one slot more, looks
    at p, 1 + p ... see the same beginning, events and end for any p from 0 up to 1. One of 0.5 is returned.
    """
    if clip.phase_s != 1:
        raise ValueError(f"phase_s is {clip.phase_s}, not 1")
    return replace(clip, slots=clip.slots + 1, phase_s=0.5)


def learn_blind(split: Split, seed: int, group: Group) -> Blind:
    """Hear the questions to many scenes of a split that is not examined; none of them is drawn as a picture."""
    blind = Blind()
    for scene in draw_scenes(split, seed, group, _BLIND_SCENES):
        for asked in scene.asked:
            blind.learn(asked)
    return blind


def _ask_all(families: Iterable[str], ask: Callable[[str], Asked | None]) -> tuple[Asked, ...]:
    """Ask a question of every family that has one; which families those are is not what the answer depends on."""
    asked = []
    for family in families:
        tries = (ask(family) for _ in range(_TRIES))
        one = next((made for made in tries if made is not None), None)
        if one is not None:
            asked.append(one)
    return tuple(asked)


def _film_seed(random: np.random.Generator) -> int:
    return int(random.integers(2**31))
