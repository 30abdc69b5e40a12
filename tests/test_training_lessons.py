"""Lessons: which scenes are drawn, and what is asked about them."""

from collections import Counter

import numpy as np
import pytest

from compressor_service.training.lessons import CLIP_ORDER, PICTURE_ORDER, Lesson, Lessons
from compressor_service.training.questions import CLIP_FAMILIES, LONG_TEXTS, PICTURE_FAMILIES


def lessons_that_know(right: dict[str, float]) -> Lessons:
    """Lessons with every family open, of which some are answered right that often."""
    lessons = Lessons(clip_share=1.0, rows=1024, longest=64)
    state = lessons.state()
    for name, families in (("pictures", PICTURE_ORDER), ("clips", CLIP_ORDER)):
        state[name] = {"opened": len(families), "right": {family: right.get(family, 1.0) for family in families}}
    lessons.restore({**state, "with_clips": True})
    return lessons


def drawn(lessons: Lessons, count: int) -> list[Lesson]:
    return [lessons.draw(np.random.default_rng((1, number))) for number in range(count)]


def test_every_family_is_taught():
    assert sorted(PICTURE_ORDER) == sorted(PICTURE_FAMILIES)
    assert sorted(CLIP_ORDER) == sorted(CLIP_FAMILIES)


def test_a_lesson_asks_as_much_about_each_of_its_scenes_which_are_all_as_long():
    for lesson in drawn(lessons_that_know({}), 20):
        assert len({len(asked) for asked in lesson.asked}) == 1
        assert {len(views) for views in lesson.views} == {clip.slots for clip in lesson.clips}
        assert len(lesson.views) == len(lesson.asked) == len(lesson.clips)


def test_a_family_that_is_not_known_is_asked_often_though_few_scenes_have_a_question_of_it():
    asked = Counter(
        one.family
        for lesson in drawn(lessons_that_know({"order": 0.5}), 60)
        for questions in lesson.asked
        for one in questions
    )
    assert asked["order"] > 2 * asked.total() / len(CLIP_ORDER)
    assert set(asked) == set(CLIP_ORDER)  # what is known is asked on, so that it stays known


def test_what_is_told_at_length_is_asked_about_clips_in_which_more_happens():
    happening: dict[bool, list[int]] = {True: [], False: []}
    for lesson in drawn(lessons_that_know({}), 200):
        happening[lesson.asked[0][0].family in LONG_TEXTS] += [len(clip.events) for clip in lesson.clips]
    assert np.mean(happening[True]) > np.mean(happening[False]) + 0.4


def test_one_who_has_learned_before_is_asked_everything_from_the_first_lesson_on():
    lessons = Lessons(clip_share=0.8, rows=1024, longest=64, open_all=True)
    everything = [lessons.draw(np.random.default_rng((3, number))) for number in range(120)]
    asked = {one.family for lesson in everything for questions in lesson.asked for one in questions}
    assert asked == {*PICTURE_ORDER, *CLIP_ORDER}


def test_clips_come_when_pictures_are_known():
    lessons = Lessons(clip_share=1.0, rows=256, longest=64)
    lesson = lessons.draw(np.random.default_rng(0))
    assert not lesson.clips
    lessons.learn(lesson, [[False] * len(asked) for asked in lesson.asked])
    assert not lessons.draw(np.random.default_rng(1)).clips
    for number in range(2000):
        lesson = lessons.draw(np.random.default_rng((2, number)))
        if lesson.clips:
            break
        lessons.learn(lesson, [[True] * len(asked) for asked in lesson.asked])
    assert lesson.clips
    assert lessons.told()["pictures_right"] > 0.8


@pytest.mark.parametrize("number", range(3))
def test_the_same_seed_draws_the_same_lesson(number):
    first, again = (lessons_that_know({}).draw(np.random.default_rng((9, number))) for _ in range(2))
    assert first == again
