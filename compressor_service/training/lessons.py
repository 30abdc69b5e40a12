"""Lessons: scenes drawn at random, each with several questions of the families that are open and least known."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from compressor_service.training.curriculum import Curriculum
from compressor_service.training.questions import LONG_TEXTS, Asked, Story, ask_clip, ask_picture
from compressor_service.training.scene import Clip, View, draw_clip, draw_slots, draw_view

PICTURE_ORDER = (
    "setting", "weather", "light", "gate", "lamp", "presence", "colour", "count", "place", "size", "at_place", "what",
)  # fmt: skip
CLIP_ORDER = (
    "light", "gate", "lamp", "now", "at_start", "ever", "colour", "what_now", "what_at_start", "did", "who", "caption",
    "direction", "how_often", "first", "order", "changed",
)  # fmt: skip
_OPEN_PICTURES, _OPEN_CLIPS = 6, 4
_BAR = 0.6
_CLIPS_FROM = 0.87  # of the questions about pictures are answered right when the first clips are shown
_ROWS_OF_QUESTION = {False: 15, True: 30}  # about, by whether texts are long
_IN_PICTURE = {False: 4, True: 2}  # few questions: many scenes are better, and rows of text cost most
_IN_CLIP = {False: 7, True: 4}
_USUAL_LONGEST, _LONG_SHARE = 64, 0.15
_ATTEMPTS = 20  # to find a question, before another clip is drawn


@dataclass(frozen=True, slots=True)
class Lesson:
    """B scenes of as many views each (one view: a picture), and n questions to each of them."""

    views: tuple[tuple[View, ...], ...]
    asked: tuple[tuple[Asked, ...], ...]
    clips: tuple[Clip, ...] = ()  # of which these are the views: none for pictures


class Lessons:
    """Draws lessons, and keeps what was learned of which family."""

    def __init__(self, *, clip_share: float, rows: int, longest: int) -> None:
        """`rows` is about how many rows of text and frames a lesson has; clips reach `longest` slots in the end."""
        self._clip_share, self._rows, self._longest = clip_share, rows, longest
        self._pictures = Curriculum(PICTURE_ORDER, opened=_OPEN_PICTURES, bar=_BAR)
        self._clips = Curriculum(CLIP_ORDER, opened=_OPEN_CLIPS, bar=_BAR)
        self._with_clips = False

    def draw(self, random: np.random.Generator) -> Lesson:
        if self._with_clips and random.random() < self._clip_share:
            return self._draw_clips(random)
        return self._draw_pictures(random)

    def learn(self, lesson: Lesson, right: list[list[bool]]) -> None:
        """Take note of which answers (B, n) were right."""
        curriculum = self._clips if lesson.clips else self._pictures
        for asked, answers in zip(lesson.asked, right, strict=True):
            curriculum.learn((one.family, good) for one, good in zip(asked, answers, strict=True))
        self._with_clips = self._with_clips or self._pictures.right > _CLIPS_FROM

    def told(self) -> dict[str, float]:
        return {"pictures_right": self._pictures.right, "clips_right": self._clips.right}

    def state(self) -> dict[str, Any]:
        return {"pictures": self._pictures.state(), "clips": self._clips.state(), "with_clips": self._with_clips}

    def restore(self, state: dict[str, Any]) -> None:
        self._pictures.restore(state["pictures"])
        self._clips.restore(state["clips"])
        self._with_clips = state["with_clips"]

    def _draw_pictures(self, random: np.random.Generator) -> Lesson:
        families, shares, long = _group(random, self._pictures)
        count = _IN_PICTURE[long]
        scenes, asked = [], []
        for _ in range(max(1, self._rows // (count * _ROWS_OF_QUESTION[long]))):
            view = draw_view(random)
            scenes.append((view,))
            asked.append(_ask(random, families, shares, count, partial(ask_picture, random, view)))
        return Lesson(tuple(scenes), tuple(asked))

    def _draw_clips(self, random: np.random.Generator) -> Lesson:
        families, shares, long = _group(random, self._clips)
        count, slots = _IN_CLIP[long], draw_slots(random, 4, self._longest_now(random))
        stories: list[Story] = []
        asked: list[tuple[Asked, ...]] = []
        while len(stories) < max(2, self._rows // (slots + count * _ROWS_OF_QUESTION[long])):
            story = Story.of(draw_clip(random, slots=slots, phase_s=float(random.random())))
            questions = _ask(random, families, shares, count, partial(ask_clip, random, story))
            if len(questions) == count:
                stories.append(story)
                asked.append(questions)
        views = tuple(story.views for story in stories)
        return Lesson(views, tuple(asked), tuple(story.clip for story in stories))

    def _longest_now(self, random: np.random.Generator) -> int:
        """Clips grow with what is known, up to the longest."""
        if self._clips.complete:
            return self._longest if random.random() < _LONG_SHARE else _USUAL_LONGEST
        return min(8 * 2 ** max(0, len(self._clips.families) - 7), _USUAL_LONGEST)


def _group(random: np.random.Generator, curriculum: Curriculum) -> tuple[tuple[str, ...], Any, bool]:
    """Choose families whose texts are all short or all long: short ones need not be padded to long ones then."""
    shares = curriculum.shares()
    are_long = np.array([family in LONG_TEXTS for family in curriculum.families])
    long = bool(random.random() < shares[are_long].sum())
    families = tuple(family for family, one in zip(curriculum.families, are_long, strict=True) if one == long)
    chosen = shares[are_long == long]
    return families, chosen / chosen.sum(), long


def _ask(
    random: np.random.Generator, families: tuple[str, ...], shares: Any, count: int, ask: Callable[[str], Asked | None]
) -> tuple[Asked, ...]:
    asked: list[Asked] = []
    for family in random.choice(len(families), size=_ATTEMPTS * count, p=shares):
        one = ask(families[family])
        if one is not None:
            asked.append(one)
        if len(asked) == count:
            break
    return tuple(asked)
