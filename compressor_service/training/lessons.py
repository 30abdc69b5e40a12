"""Lessons: scenes drawn at random, each with several questions of the families that are open and least known."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

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
ROWS_OF_QUESTION = {False: 15, True: 30}  # about, by whether texts are long
_IN_PICTURE = {False: 4, True: 2}  # few questions: many scenes are better, and rows of text cost most
_IN_CLIP = {False: 7, True: 4}
_USUAL_LONGEST, _LONG_SHARE = 64, 0.15
_EVENTFUL = 3  # clips are drawn, once all is open, for the one in which most happens: two events are soon told
_ATTEMPTS = 12  # to find a scene or a question, before others are drawn

Scene = TypeVar("Scene")


@dataclass(frozen=True, slots=True)
class Lesson:
    """B scenes of as many views each (one view: a picture), and n questions to each of them."""

    views: tuple[tuple[View, ...], ...]
    asked: tuple[tuple[Asked, ...], ...]
    clips: tuple[Clip, ...] = ()  # of which these are the views: none for pictures


class Lessons:
    """Draws lessons, and keeps what was learned of which family."""

    def __init__(self, *, clip_share: float, rows: int, longest: int, open_all: bool = False) -> None:
        """`rows` is about how many rows of text and frames a lesson has; clips reach `longest` slots in the end.

        `open_all` asks everything from the first lesson on: of one who has learned before.
        """
        self._clip_share, self._rows, self._longest = clip_share, rows, longest
        self._pictures = Curriculum(PICTURE_ORDER, opened=None if open_all else _OPEN_PICTURES, bar=_BAR)
        self._clips = Curriculum(CLIP_ORDER, opened=None if open_all else _OPEN_CLIPS, bar=_BAR)
        self._with_clips = open_all

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
        group = Group.draw(random, self._pictures)
        count = _IN_PICTURE[group.long]
        scenes, asked = [], []
        for _ in range(max(1, self._rows // (count * ROWS_OF_QUESTION[group.long]))):
            view, questions = _find(random, group, count, draw_view, ask_picture)
            scenes.append((view,))
            asked.append(questions)
        return Lesson(tuple(scenes), tuple(asked))

    def _draw_clips(self, random: np.random.Generator) -> Lesson:
        group = Group.draw(random, self._clips)
        count, slots = _IN_CLIP[group.long], draw_slots(random, 4, self._longest_now(random))

        def draw_story(random: np.random.Generator) -> Story:
            many = _EVENTFUL if group.long and self._clips.complete else 1
            clips = (draw_clip(random, slots=slots, phase_s=float(random.random())) for _ in range(many))
            return Story.of(max(clips, key=lambda clip: len(clip.events)))

        scenes, asked = [], []
        for _ in range(max(2, self._rows // (slots + count * ROWS_OF_QUESTION[group.long]))):
            story, questions = _find(random, group, count, draw_story, ask_clip)
            scenes.append(story)
            asked.append(questions)
        views = tuple(story.views for story in scenes)
        return Lesson(views, tuple(asked), tuple(story.clip for story in scenes))

    def _longest_now(self, random: np.random.Generator) -> int:
        """Clips grow with what is known, up to the longest."""
        if self._clips.complete:
            return self._longest if random.random() < _LONG_SHARE else _USUAL_LONGEST
        return min(8 * 2 ** max(0, len(self._clips.families) - 7), _USUAL_LONGEST)


@dataclass(frozen=True, slots=True)
class Group:
    """Families whose texts are all short or all long, so that short ones need not be padded to long ones."""

    families: tuple[str, ...]
    shares: Any  # how often each is asked; they sum to 1
    long: bool

    @classmethod
    def draw(cls, random: np.random.Generator, curriculum: Curriculum) -> "Group":
        shares = curriculum.shares()
        are_long = np.array([family in LONG_TEXTS for family in curriculum.families])
        long = bool(random.random() < shares[are_long].sum())
        families = tuple(family for family, one in zip(curriculum.families, are_long, strict=True) if one == long)
        chosen = shares[are_long == long]
        return cls(families, chosen / chosen.sum(), long)


def _find(
    random: np.random.Generator,
    group: Group,
    count: int,
    draw: Callable[[np.random.Generator], Scene],
    ask: Callable[[np.random.Generator, Scene, str], Asked | None],
) -> tuple[Scene, tuple[Asked, ...]]:
    """Draw a family first, then a scene that it can be asked about, and then what else to ask.

    The other way round what few scenes can be asked about would hardly be learned: the order of events needs two.
    """
    while True:
        leading, *others = random.choice(group.families, size=1 + _ATTEMPTS * count, p=group.shares).tolist()
        scene = next((one for one in (draw(random) for _ in range(_ATTEMPTS)) if ask(random, one, leading)), None)
        if scene is None:
            continue
        asked: list[Asked] = []
        for family in (*[leading] * (count // 2), *others):
            one = ask(random, scene, family)
            if one is not None:
                asked.append(one)
            if len(asked) == count:
                return scene, tuple(asked)
