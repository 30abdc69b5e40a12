"""The families of questions about a clip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compressor_service.training import words
from compressor_service.training.questions.phrases import (
    Random,
    any_of,
    day_or_night,
    fits,
    gate_word,
    lamp_word,
    of_colour,
    one_of,
    single,
    sought,
    yes,
)
from compressor_service.training.scene import COLOURS, KINDS, MAX_EVENTS, MOVING, VERBS, Clip, Event, Thing, View


@dataclass(frozen=True, slots=True)
class Story:
    """A clip with what its questions are about, worked out once."""

    clip: Clip
    views: tuple[View, ...]

    @classmethod
    def of(cls, clip: Clip) -> "Story":
        return cls(clip, tuple(clip.views()))

    @property
    def events(self) -> tuple[Event, ...]:
        return self.clip.events

    @property
    def told(self) -> tuple[str, ...]:
        """The events in words."""
        return tuple(words.told(event) for event in self.events)

    @property
    def start(self) -> View:
        return self.views[0]

    @property
    def end(self) -> View:
        return self.views[-1]

    @property
    def cast(self) -> list[Thing]:
        """Everything that is seen at any time, in the order of lists."""
        return sorted((thing for thing, _ in self.clip.tracks), key=lambda thing: thing.order)


def _caption(random: Random, story: Story) -> tuple[str, str]:
    question = one_of(
        random,
        "What happened?",
        "What happens?",
        "Describe what happened.",
        "Tell me what happened.",
        "What is going on?",
    )
    told = [words.told(event) for event in story.events]
    return question, ", then ".join(told) if told else words.NOTHING


def _did(random: Random, story: Story) -> tuple[str, str] | None:
    """Did something happen, yes or no: as often a thing that was there but did something else as one that was not."""
    wanted = bool(random.integers(2))
    verbs = [event.verb for event in story.events]
    if wanted and not verbs:
        return None
    verb = any_of(random, verbs) if wanted else str(random.choice(VERBS, p=(0.25, 0.25, 0.2, 0.1, 0.1, 0.1)))
    happened = [event for event in story.events if event.verb == verb]
    if verb in ("gate", "lamp"):
        on = bool(random.integers(2))
        if any(event.on == on for event in happened) != wanted:
            return None
        return one_of(random, *_DID[verb, on]), yes(wanted)
    if wanted:
        thing = any_of(random, happened).thing
        assert thing is not None
        kind, colour = thing.kind, thing.colour if random.random() < 0.5 else None
    else:
        doers = {event.thing for event in happened}
        others = [
            thing for thing in story.cast if thing not in doers and not (verb == "moves" and thing.kind not in MOVING)
        ]
        if others and random.random() < 0.6:
            kind, colour = any_of(random, others).kind, None
        else:
            kind, colour = str(random.choice(MOVING if verb in ("crosses", "moves") else KINDS)), None
        if kind != "fire" and random.random() < 0.5:
            colour = str(random.choice(COLOURS))
        if any(thing is not None and fits(thing, kind, colour) for thing in doers):
            return None
    if verb == "crosses" and kind not in MOVING:
        return None
    return one_of(random, *_did_phrases(verb, kind)).format(words.noun(kind, colour)), yes(wanted)


def _who(random: Random, story: Story) -> tuple[str, str] | None:
    verb = str(random.choice(("comes", "goes", "crosses", "moves")))
    doers = [event.thing for event in story.events if event.verb == verb and event.thing is not None]
    if len(doers) != 1:
        return None
    kind = doers[0].kind
    phrases: tuple[str, ...] = {
        "comes": ("What came in?", "What is it that came in?", "What appeared?"),
        "goes": ("What went away?", "What disappeared?", "What is it that went away?"),
        "crosses": ("What crossed?", "What passed by?", "What went across?"),
        "moves": ("What moved?", "What changed its place?", "What moved to another place?"),
    }[verb]
    if verb == "comes" and kind not in MOVING:
        phrases = ("What appeared?", "What is new?")
    if verb == "goes" and kind not in MOVING:
        phrases = ("What disappeared?", "What is no longer there?")
    return one_of(random, *phrases), words.listed(doers)


def _direction(random: Random, story: Story) -> tuple[str, str] | None:
    sided = [event for event in story.events if event.side is not None]
    if not sided:
        return None
    event = any_of(random, sided)
    assert event.thing is not None
    same = [other for other in sided if other.thing is not None and other.thing.kind == event.thing.kind]
    noun = event.thing.kind if len(same) == 1 and random.random() < 0.5 else words.name(event.thing)
    if len([other for other in sided if other.thing == event.thing]) != 1:
        return None
    question = one_of(
        random, "Which way did the {0} go?", "In which direction did the {0} move?", "To which side did the {0} go?"
    )
    return question.format(noun), f"to the {event.side}"


def _order(random: Random, story: Story) -> tuple[str, str] | None:
    """What came right before or right after an event; of the first and the last it is now and then nothing."""
    told, after = story.told, random.random() < 0.5
    edge = len(told) - 1 if after else 0
    alone = random.random() < 0.2
    fitting = [number for number, one in enumerate(told) if told.count(one) == 1 and (number == edge) == alone]
    if not fitting:
        return None
    number = any_of(random, fitting)
    if after:
        question = one_of(
            random, "What happened right after {0}?", "What came right after {0}?", "What came next after {0}?"
        )
    else:
        question = one_of(random, "What happened right before {0}?", "What came right before {0}?")
    return question.format(told[number]), words.NOTHING if alone else told[number + (1 if after else -1)]


def _first(random: Random, story: Story) -> tuple[str, str] | None:
    pair = _pair(random, story)
    if pair is None:
        return None
    early_asked = random.random() < 0.7
    told = [words.told(event) for event in pair]
    shown = told if random.random() < 0.5 else told[::-1]
    if early_asked:
        question = one_of(random, "What happened first: {0} or {1}?", "Which came first, {0} or {1}?")
        return question.format(*shown), told[0]
    question = one_of(random, "What happened last: {0} or {1}?", "Which came later, {0} or {1}?")
    return question.format(*shown), told[1]


def _now(random: Random, story: Story) -> tuple[str, str] | None:
    return _there(
        random, story, story.end, ("Is there a {0} now?", "Is there a {0} at the end?", "Do you see a {0} now?")
    )


def _at_start(random: Random, story: Story) -> tuple[str, str] | None:
    return _there(
        random,
        story,
        story.start,
        ("Was there a {0} at the start?", "Was there a {0} in the beginning?", "Was a {0} there at first?"),
    )


def _there(random: Random, story: Story, view: View, phrases: Sequence[str]) -> tuple[str, str] | None:
    """Yes or no about one time of a clip; a no is as often about something that is there at another time."""
    things = [one.thing for one in view.visible]
    elsewhere = [thing for thing in story.cast if thing not in things]
    if elsewhere and random.random() < 0.3:
        thing = any_of(random, elsewhere)
        colour = thing.colour if random.random() < 0.5 else None
        if any(fits(other, thing.kind, colour) for other in things):
            return None
        return one_of(random, *phrases).format(words.noun(thing.kind, colour)), "no"
    found = sought(random, things, chance=0.65)
    return None if found is None else (one_of(random, *phrases).format(found[0]), found[1])


def _ever(random: Random, story: Story) -> tuple[str, str] | None:
    found = sought(random, story.cast)
    if found is None:
        return None
    question = one_of(
        random, "Was there a {0}?", "Did you see a {0}?", "Was a {0} there at any time?", "Has there been a {0}?"
    )
    return question.format(found[0]), found[1]


def _what_now(random: Random, story: Story) -> tuple[str, str]:
    return one_of(random, "What is there now?", "What is there at the end?", "What do you see now?"), words.listed(
        [one.thing for one in story.end.visible]
    )


def _what_at_start(random: Random, story: Story) -> tuple[str, str]:
    return one_of(
        random, "What was there at the start?", "What was there in the beginning?", "What did you see at first?"
    ), (words.listed([one.thing for one in story.start.visible]))


def _changed(random: Random, story: Story) -> tuple[str, str]:
    question = one_of(
        random,
        "What has changed?",
        "What is different now?",
        "What changed since the start?",
        "What is different at the end?",
    )
    return question, _changes(story)


def _clip_colour(random: Random, story: Story) -> tuple[str, str] | None:
    found = single(random, [thing for thing in story.cast if thing.colour])
    if found is None or found.colour is None:
        return None
    verbs = [event.verb for event in story.events if event.thing == found]
    if verbs and random.random() < 0.5:
        past = {"comes": "came in", "goes": "went away", "crosses": "crossed", "moves": "moved"}[verbs[0]]
        if found.kind not in MOVING:
            past = {"comes": "was put down", "goes": "was taken away"}[verbs[0]]
        if found.kind == "person":
            return f"What colour did the person that {past} wear?", found.colour
        return f"What colour was the {found.kind} that {past}?", found.colour
    return of_colour(random, found.kind, "was"), found.colour


def _how_often(random: Random, story: Story) -> tuple[str, str] | None:
    number = int(random.choice(MAX_EVENTS, p=(0.15, 0.25, 0.4, 0.2)))
    verbs = [event.verb for event in story.events]
    fitting = [verb for verb in VERBS[:4] if verbs.count(verb) == number]
    if not fitting:
        return None
    verb = any_of(random, fitting)
    phrases = {
        "comes": ("How many things came in or appeared?", "How many new things came?"),
        "goes": ("How many things went away?", "How many things disappeared?"),
        "crosses": ("How many things crossed?", "How many things passed by?"),
        "moves": ("How often did something move to another place?", "How many moves were there?"),
    }[verb]
    return one_of(random, *phrases), words.NUMBERS[number]


def _gate_now(random: Random, story: Story) -> tuple[str, str]:
    if random.random() < 0.5:
        question, view = one_of(random, "Is the gate open or closed now?", "How is the gate now?"), story.end
    else:
        question = one_of(random, "Was the gate open or closed at the start?", "How was the gate at the start?")
        view = story.start
    return question, gate_word(view.gate_open)


def _lamp_now(random: Random, story: Story) -> tuple[str, str]:
    if random.random() < 0.5:
        question, view = one_of(random, "Is the lamp on or off now?", "How is the lamp now?"), story.end
    else:
        question, view = (
            one_of(random, "Was the lamp on or off at the start?", "How was the lamp at the start?"),
            story.start,
        )
    return question, lamp_word(view.lamp_on)


def _clip_light(random: Random, story: Story) -> tuple[str, str]:
    return day_or_night(random, story.start)


OnClip = Callable[[Random, Story], tuple[str, str] | None]
CLIP_FAMILIES: dict[str, OnClip] = {
    "caption": _caption,
    "did": _did,
    "who": _who,
    "direction": _direction,
    "order": _order,
    "first": _first,
    "now": _now,
    "at_start": _at_start,
    "ever": _ever,
    "what_now": _what_now,
    "what_at_start": _what_at_start,
    "changed": _changed,
    "colour": _clip_colour,
    "how_often": _how_often,
    "gate": _gate_now,
    "lamp": _lamp_now,
    "light": _clip_light,
}

_DID: dict[tuple[str, bool], tuple[str, ...]] = {
    ("gate", True): ("Did the gate open?", "Did somebody open the gate?", "Was the gate opened?"),
    ("gate", False): ("Did the gate close?", "Did somebody close the gate?", "Was the gate closed by somebody?"),
    ("lamp", True): ("Did the lamp go on?", "Did somebody turn the lamp on?", "Was the lamp turned on?"),
    ("lamp", False): ("Did the lamp go off?", "Did somebody turn the lamp off?", "Was the lamp turned off?"),
}


def _did_phrases(verb: str, kind: str) -> tuple[str, ...]:
    match verb, kind:
        case "comes", "parcel":
            return ("Was a {0} put down?", "Did somebody leave a {0}?", "Was a {0} delivered?")
        case "comes", "fire":
            return ("Did a {0} start?", "Did a {0} break out?")
        case "comes", _:
            return ("Did a {0} come in?", "Did a {0} arrive?", "Has a {0} come in?")
        case "goes", "parcel":
            return ("Was a {0} taken away?", "Did somebody take a {0}?", "Was a {0} stolen?")
        case "goes", "fire":
            return ("Did a {0} go out?", "Was a {0} put out?")
        case "goes", _:
            return ("Did a {0} go away?", "Did a {0} leave?", "Has a {0} gone away?")
        case "crosses", _:
            return ("Did a {0} cross?", "Did a {0} pass by?", "Has a {0} crossed?")
        case _:
            return (
                "Did a {0} move to another place?",
                "Did a {0} change its place?",
                "Has a {0} moved to another place?",
            )


def _changes(story: Story) -> str:
    start = {one.thing: one for one in story.start.visible}
    end = {one.thing: one for one in story.end.visible}
    told = [f"a {words.name(thing)} is new" for thing in end if thing not in start]
    told += [f"a {words.name(thing)} is gone" for thing in start if thing not in end]
    told += [
        f"a {words.name(thing)} has moved"
        for thing, placed in end.items()
        if thing in start and words.place(placed) != words.place(start[thing])
    ]
    if story.start.gate_open != story.end.gate_open:
        told.append(f"the gate is {gate_word(story.end.gate_open)}")
    if story.start.lamp_on != story.end.lamp_on:
        told.append(f"the lamp is {lamp_word(story.end.lamp_on)}")
    return words.joined(told)


def _pair(random: Random, story: Story) -> tuple[Event, Event] | None:
    """Two events, the earlier first, that are told in different words."""
    if len(story.events) < 2:
        return None
    one, other = sorted(random.choice(len(story.events), size=2, replace=False))
    first, second = story.events[one], story.events[other]
    told = [words.told(event) for event in story.events]
    return (first, second) if told.count(told[one]) == told.count(told[other]) == 1 else None
