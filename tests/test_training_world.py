"""The world that the embedded model is trained on: scenes that hold together, and questions with one right answer."""

from collections import Counter

import numpy as np
import pytest

from compressor_service.training.questions import (
    CLIP_FAMILIES,
    PICTURE_FAMILIES,
    Story,
    ask_clip,
    ask_picture,
)
from compressor_service.training.scene import (
    COLOURS,
    KINDS,
    MAX_EVENTS,
    MAX_THINGS,
    PLACES,
    Clip,
    Event,
    Leg,
    Placed,
    Setting,
    Thing,
    View,
    draw_clip,
    draw_slots,
    draw_view,
)

CAR = Thing("car", "red", "big")
DOG = Thing("dog", "black", "small")
FIRE = Thing("fire", None, "big")
DAY = Setting(street=True, night=False, rain=False, look=1)


def clips(count: int, seed: int = 0, **kwargs: float) -> list[Clip]:
    random = np.random.default_rng(seed)
    return [draw_clip(random, slots=draw_slots(random), phase_s=float(random.random())) for _ in range(count)]


def view(*things: Placed, gate_open: bool = False, lamp_on: bool = False) -> View:
    return View(DAY, gate_open, lamp_on, things)


def answers(family: str, scene: View, tries: int = 200) -> dict[str, str]:
    random = np.random.default_rng(0)
    made = (ask_picture(random, scene, family) for _ in range(tries))
    return {one.question.lower().rstrip("?."): one.answer for one in made if one is not None}


def story_answers(family: str, clip: Clip, tries: int = 400) -> dict[str, str]:
    random = np.random.default_rng(0)
    made = (ask_clip(random, Story.of(clip), family) for _ in range(tries))
    return {one.question.lower().rstrip("?."): one.answer for one in made if one is not None}


@pytest.fixture
def visit() -> Clip:
    """A dog stands there, a red car comes in, then the gate opens, then the dog goes away."""
    way_in, stay = Leg(3, 5, "far", -0.3, 0.5), Leg(5, 99, "far", 0.5, 0.5)
    before, way_out = Leg(-1, 12, "near", 0.2, 0.2), Leg(12, 13.5, "near", 0.2, -0.3)
    events = (
        Event("comes", 3, 5, CAR),
        Event("gate", 8, 8, on=True),
        Event("goes", 12, 13.5, DOG),
    )
    return Clip(DAY, 16, 0.0, False, True, ((DOG, (before, way_out)), (CAR, (way_in, stay))), events)


def test_the_same_seed_draws_the_same_world_and_another_seed_another():
    assert clips(5) == clips(5)
    assert clips(5) != clips(5, seed=1)


def test_clips_have_up_to_four_events_and_pictures_up_to_three_things():
    drawn = clips(400)
    assert {len(clip.events) for clip in drawn} == set(range(MAX_EVENTS + 1))
    assert {len(one.visible) for clip in drawn for one in clip.views()} == set(range(MAX_THINGS + 1))
    assert {4 <= clip.slots <= 64 for clip in drawn} == {True}


def test_every_kind_colour_and_place_is_drawn():
    random = np.random.default_rng(3)
    seen = [one for _ in range(1500) for one in draw_view(random).visible]
    assert {one.thing.kind for one in seen} == set(KINDS)
    assert {one.thing.colour for one in seen} == {None, *COLOURS}
    assert {(one.lane, one.column) for one in seen} == set(PLACES)


def test_events_follow_one_another_and_lie_between_the_first_look_and_the_last():
    for clip in clips(300):
        times = [time for event in clip.events for time in (event.start_s, event.end_s)]
        assert times == sorted(times)
        assert all(clip.phase_s < time < clip.seconds for time in times)


def test_what_comes_is_absent_before_and_there_after_and_what_crosses_is_seen_twice():
    for clip in clips(300):
        for event in clip.events:
            before, after = (
                {one.thing for one in clip.view(time).visible} for time in (event.start_s - 0.01, event.end_s + 0.01)
            )
            match event.verb:
                case "comes":
                    assert event.thing not in before
                    assert event.thing in after
                case "goes":
                    assert event.thing in before
                    assert event.thing not in after
                case "crosses":
                    assert sum(event.thing in [one.thing for one in each.visible] for each in clip.views()) >= 2
                    assert event.thing not in before | after


def test_no_two_things_of_a_clip_share_kind_and_colour_or_stand_in_one_place():
    for clip in clips(200):
        names = Counter((thing.kind, thing.colour) for thing, _ in clip.tracks)
        assert max(names.values(), default=1) == 1
        for each in (clip.views()[0], clip.views()[-1]):
            places = Counter((one.lane, one.column) for one in each.visible)
            assert max(places.values(), default=1) == 1


def test_questions_about_a_picture_have_the_right_answers():
    scene = view(Placed(CAR, "far", 0.5), Placed(DOG, "near", 0.1), Placed(FIRE, "near", 0.9), gate_open=True)
    assert answers("what", scene)["what is there"] == "a red car, a black dog and a fire"
    assert answers("colour", scene)["what colour is the dog"] == "black"
    assert answers("presence", scene)["is there a red car"] == "yes"
    assert answers("presence", scene)["is there a cat"] == "no"
    assert answers("count", scene)["how many things are there"] == "three"
    assert answers("place", scene)["where is the car"] == "far middle"
    assert answers("at_place", scene)["what is near left"] == "a black dog"
    assert answers("at_place", scene)["what is far right"] == "nothing"
    assert answers("size", scene)["is the dog big or small"] == "small"
    assert answers("gate", scene)["is the gate closed"] == "no"
    assert answers("lamp", scene)["how is the lamp"] == "off"


def test_what_stands_half_outside_is_not_asked_about():
    assert answers("what", view(Placed(CAR, "far", -0.05)))["what is there"] == "nothing"


def test_a_colour_is_never_asked_of_two_of_a_kind():
    scene = view(Placed(CAR, "far", 0.5), Placed(Thing("car", "blue", "big"), "near", 0.5))
    assert answers("colour", scene) == {}
    assert answers("count", scene)["how many cars are there"] == "two"


def test_questions_about_a_clip_have_the_right_answers(visit):
    told = "a red car comes in, then the gate opens, then a black dog goes away"
    assert story_answers("caption", visit)["what happened"] == told
    assert story_answers("did", visit)["did a dog leave"] == "yes"
    assert story_answers("did", visit)["did the gate close"] == "no"
    assert story_answers("who", visit)["what came in"] == "a red car"
    assert story_answers("now", visit)["is there a dog now"] == "no"
    assert story_answers("at_start", visit)["was there a dog at the start"] == "yes"
    assert story_answers("ever", visit)["was there a dog"] == "yes"
    assert story_answers("what_now", visit)["what is there now"] == "a red car"
    assert story_answers("changed", visit)["what has changed"] == (
        "a red car is new, a black dog is gone and the gate is open"
    )
    assert story_answers("gate", visit)["is the gate open or closed now"] == "open"
    first = story_answers("first", visit)
    assert first["what happened first: a red car comes in or the gate opens"] == "a red car comes in"
    order = story_answers("order", visit)
    assert order["what happened right after a red car comes in"] == "the gate opens"
    assert order["what came right before a black dog goes away"] == "the gate opens"
    assert order["what came next after a black dog goes away"] == "nothing"
    assert order["what happened right before a red car comes in"] == "nothing"


@pytest.mark.parametrize("family", sorted(PICTURE_FAMILIES))
def test_no_answer_about_pictures_is_a_good_guess(family):
    random = np.random.default_rng(5)
    made = [ask_picture(random, draw_view(random), family) for _ in range(1200)]
    counts = Counter(one.answer for one in made if one is not None)
    assert counts.most_common(1)[0][1] / counts.total() < 0.6


@pytest.mark.parametrize("family", sorted(CLIP_FAMILIES))
def test_no_answer_about_clips_is_a_good_guess(family):
    random = np.random.default_rng(6)
    made = [ask_clip(random, Story.of(clip), family) for clip in clips(1200, seed=7)]
    counts = Counter(one.answer for one in made if one is not None)
    assert counts.most_common(1)[0][1] / counts.total() < 0.6
