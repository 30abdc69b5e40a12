"""Phrases that are true or false of a View, as people type them into a search box, and their tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from compressor_service.training.scene import (
    COLOURS,
    COLUMNS,
    KINDS,
    LANES,
    MAX_THINGS,
    SIZES,
    Placed,
    Thing,
    View,
)

_NAMES: dict[str, tuple[str, ...]] = {
    "person": ("person", "person", "man", "woman"),
    "car": ("car",),
    "truck": ("truck",),
    "bicycle": ("bicycle", "bicycle", "bike"),
    "dog": ("dog",),
    "cat": ("cat",),
    "parcel": ("parcel", "parcel", "package", "box"),
    "fire": ("fire", "fire", "flame"),
}
_GROUPS: dict[str, tuple[str, ...]] = {
    "vehicle": ("car", "truck"),
    "animal": ("dog", "cat"),
}
_PLURALS = {"person": "people", "man": "men", "woman": "women", "box": "boxes"}
_NUMBERS = ("no", "one", "two", "three")
_LANE_WORDS = {"near": ("near", "close", "in front", "near the camera"), "far": ("far away", "in the back", "far")}
_COLUMN_WORDS = {
    "left": ("on the left", "left", "on the left side"),
    "middle": ("in the middle", "in the centre", "middle"),
    "right": ("on the right", "right", "on the right side"),
}
_FRAMES = (
    "{a}", "{a}", "{a}", "{bare}", "{bare}", "{bare}", "{the}", "{the}", "a photo of {a}", "a picture of {a}",
    "there is {a}", "show me {the}", "find {a}", "where is {the}?", "where was {the}?", "is there {a}?",
    "was there {a}?", "when was {the} there?", "when did {the} come?", "did you see {a}?", "I see {a}", "{a} is here",
    "what is {the} doing?", "when did {the} leave?",
)  # fmt: skip
_STATE_WORDS: dict[tuple[str, bool], tuple[str, ...]] = {
    ("night", True): ("at night", "in the dark"),
    ("night", False): ("by day", "during the day"),
    ("rain", True): ("in the rain", "in rain"),
    ("rain", False): ("in dry weather", "without rain"),
    ("street", True): ("on the street", "in the street", "on the road"),
    ("street", False): ("in the yard",),
    ("gate", True): ("with the gate open", "at the open gate"),
    ("gate", False): ("with the gate closed", "at the closed gate"),
    ("lamp", True): ("with the lamp on", "under the lit lamp"),
    ("lamp", False): ("with the lamp off",),
}
_STATE_PHRASES: dict[tuple[str, bool], tuple[str, ...]] = {
    ("night", True): ("night", "it is night", "at night", "is it dark?", "a dark picture"),
    ("night", False): ("day", "it is day", "by day", "daylight", "during the day"),
    ("rain", True): ("rain", "it is raining", "in the rain", "is it raining?", "when did it rain?"),
    ("rain", False): ("no rain", "dry weather", "it is dry", "it is not raining"),
    ("street", True): ("a street", "the street", "the road", "a road with houses"),
    ("street", False): ("a yard", "the yard", "the yard with a wall"),
    ("gate", True): ("the gate is open", "an open gate", "open gate", "is the gate open?", "when was the gate open?"),
    ("gate", False): ("the gate is closed", "a closed gate", "closed gate", "is the gate closed?", "the gate is shut"),
    ("lamp", True): ("the lamp is on", "the light is on", "lamp on", "a lit lamp", "is the lamp on?"),
    ("lamp", False): ("the lamp is off", "the light is off", "lamp off", "an unlit lamp", "is the lamp off?"),
}
_EMPTY_PHRASES = ("nothing", "nothing is there", "an empty picture", "empty scene", "nobody and nothing")
_STATES = tuple(_STATE_PHRASES)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Things to look for: of these kinds (none: any), and with what else is given; `count` is how many exactly."""

    kinds: tuple[str, ...] = ()
    colour: str | None = None
    size: str | None = None
    lane: str | None = None
    column: int | None = None
    count: int | None = None

    def fits(self, placed: Placed) -> bool:
        thing = placed.thing
        return (
            (not self.kinds or thing.kind in self.kinds)
            and (self.colour is None or thing.colour == self.colour)
            and (self.size is None or thing.size == self.size)
            and (self.lane is None or placed.lane == self.lane)
            and (self.column is None or placed.column == self.column)
        )

    def holds(self, visible: Sequence[Placed]) -> bool:
        found = sum(1 for placed in visible if self.fits(placed))
        return found > 0 if self.count is None else found == self.count


@dataclass(frozen=True, slots=True)
class Caption:
    """A phrase and what makes it true: each of `wanted`, and each of `states`; `empty` is a picture without things."""

    text: str
    wanted: tuple[Wanted, ...] = ()
    states: tuple[tuple[str, bool], ...] = ()
    empty: bool = False


def holds(caption: Caption, view: View) -> bool:
    """Tell whether a caption is true of what is visible in a View."""
    visible = view.visible
    if caption.empty and visible:
        return False
    return all(state(view, name) == value for name, value in caption.states) and all(
        wanted.holds(visible) for wanted in caption.wanted
    )


def state(view: View, name: str) -> bool:
    """Look up a state by the name that captions give it."""
    match name:
        case "night":
            return view.setting.night
        case "rain":
            return view.setting.rain
        case "street":
            return view.setting.street
        case "gate":
            return view.gate_open
        case "lamp":
            return view.lamp_on
    raise KeyError(name)


def object_caption(kind: str, colour: str | None = None) -> Caption:
    """The plain phrase for a thing: "a red car"."""
    noun = " ".join(word for word in (colour, kind) if word)
    return Caption(f"a {noun}", (Wanted((kind,), colour),))


def draw_caption(random: np.random.Generator, view: View | None = None) -> Caption:
    """Draw a caption; one that is true of the view if one is given."""
    visible = view.visible if view else ()
    shape = float(random.random())
    if view and not visible and shape < 0.86:
        shape = 0.86 + 0.14 * float(random.random())
    if shape < 0.62:
        return _about_thing(random, _pick(random, visible))
    if shape < 0.72:
        return _about_count(random, visible, given=view is not None)
    if shape < 0.79:
        return _about_two(random, visible, given=view is not None)
    if shape < 0.86:
        return _about_thing_in(random, _pick(random, visible), view)
    if shape < 0.97:
        return _about_states(random, view)
    return _about_nothing(random, view)


def _one_of(random: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(random.integers(len(options)))]


def _pick(random: np.random.Generator, visible: Sequence[Placed]) -> Placed:
    if visible:
        return visible[int(random.integers(len(visible)))]
    kind = _one_of(random, KINDS)
    thing = Thing(kind, None if kind == "fire" else _one_of(random, COLOURS), _one_of(random, SIZES))
    return Placed(thing, LANES[int(random.integers(2))], (float(random.integers(3)) + 0.5) / len(COLUMNS))


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


def _noun(random: np.random.Generator, placed: Placed, chances: tuple[float, float]) -> tuple[str, Wanted]:
    """Name a thing in short, with colour and size by `chances`, and say what that name means."""
    thing, (colour_chance, size_chance) = placed.thing, chances
    colour = thing.colour if random.random() < colour_chance else None
    size = thing.size if random.random() < size_chance else None
    before = " ".join(word for word in (size, colour) if word)
    luck = float(random.random())
    if luck < 0.05 and colour:
        return f"{before} thing", Wanted((), colour, size)
    groups = [group for group, kinds in _GROUPS.items() if thing.kind in kinds]
    if luck > 0.94 and groups:
        return f"{before} {groups[0]}".strip(), Wanted(_GROUPS[groups[0]], colour, size)
    name = _one_of(random, _NAMES[thing.kind])
    wanted = Wanted((thing.kind,), colour, size)
    if thing.kind == "person" and colour and random.random() < 0.5:
        return f"{f'{size} ' if size else ''}{name} in {colour}", wanted
    return f"{before} {name}".strip(), wanted


def _about_thing(random: np.random.Generator, placed: Placed) -> Caption:
    noun, wanted = _noun(random, placed, (0.65, 0.2))
    luck = float(random.random())
    if luck < 0.2:
        noun, wanted = (
            f"{noun} {_one_of(random, _COLUMN_WORDS[COLUMNS[placed.column]])}",
            replace(wanted, column=placed.column),
        )
    elif luck < 0.32:
        noun, wanted = f"{noun} {_one_of(random, _LANE_WORDS[placed.lane])}", replace(wanted, lane=placed.lane)
    elif luck < 0.4:
        where = f"{_one_of(random, _LANE_WORDS[placed.lane])} {_COLUMN_WORDS[COLUMNS[placed.column]][0]}"
        noun, wanted = f"{noun} {where}", replace(wanted, lane=placed.lane, column=placed.column)
    frame = _one_of(random, _FRAMES)
    return Caption(frame.format(a=_article(noun), bare=noun, the=f"the {noun}"), (wanted,))


def _about_thing_in(random: np.random.Generator, placed: Placed, view: View | None) -> Caption:
    noun, wanted = _noun(random, placed, (0.4, 0.1))
    name, value = _draw_state(random, view)
    frame = _one_of(random, ("{a}", "{bare}", "is there {a}", "{the}"))
    text = frame.format(a=_article(noun), bare=noun, the=f"the {noun}")
    return Caption(f"{text} {_one_of(random, _STATE_WORDS[name, value])}", (wanted,), ((name, value),))


def _about_count(random: np.random.Generator, visible: Sequence[Placed], *, given: bool) -> Caption:
    placed = _pick(random, visible)
    noun, wanted = _noun(random, placed, (0.15, 0.05))
    found = sum(1 for other in visible if wanted.fits(other)) if given else int(random.integers(MAX_THINGS + 1))
    *before, name = noun.split() if " in " not in noun else (noun.split(" in ")[0]).split()
    plural = name if found == 1 else _PLURALS.get(name, f"{name}s")
    after = f" in {wanted.colour}" if " in " in noun else ""
    phrase = " ".join((_NUMBERS[found], *before, plural)) + after
    frame = _one_of(random, ("{}", "{}", "there {be} {}", "a picture of {}"))
    text = frame.format(phrase, be="is" if found == 1 else "are")
    return Caption(text, (replace(wanted, count=found),))


def _about_two(random: np.random.Generator, visible: Sequence[Placed], *, given: bool) -> Caption:
    if given and len(visible) < 2:
        return _about_thing(random, _pick(random, visible))
    order = random.permutation(len(visible))[:2] if given else ()
    pair = [visible[int(number)] for number in order] or [_pick(random, ()) for _ in range(2)]
    (noun, wanted), (other_noun, other) = (_noun(random, placed, (0.4, 0.05)) for placed in pair)
    if set(wanted.kinds) & set(other.kinds) or not (wanted.kinds and other.kinds):
        return _about_thing(random, pair[0])  # one thing could stand for both
    both = f"{_article(noun)} and {_article(other_noun)}" if random.random() < 0.7 else f"{noun} and {other_noun}"
    return Caption(both, (wanted, other))


def _draw_state(random: np.random.Generator, view: View | None) -> tuple[str, bool]:
    name, value = _STATES[int(random.integers(len(_STATES)))]
    return name, value if view is None else state(view, name)


def _about_states(random: np.random.Generator, view: View | None) -> Caption:
    first = _draw_state(random, view)
    text = _one_of(random, _STATE_PHRASES[first])
    second = _draw_state(random, view)
    if random.random() < 0.6 or second[0] == first[0] or text.endswith("?"):
        return Caption(text, states=(first,))
    return Caption(f"{text} {_one_of(random, _STATE_WORDS[second])}", states=(first, second))


def _about_nothing(random: np.random.Generator, view: View | None) -> Caption:
    if view and view.visible:
        return _about_states(random, view)
    if random.random() < 0.4:
        return Caption(_one_of(random, _EMPTY_PHRASES), empty=True)
    name, value = _draw_state(random, view)
    if name == "street" and random.random() < 0.7:
        return Caption("an empty street" if value else "an empty yard", states=((name, value),), empty=True)
    text = f"{_one_of(random, _EMPTY_PHRASES)} {_one_of(random, _STATE_WORDS[name, value])}"
    return Caption(text, states=((name, value),), empty=True)


_END_OF_WORD = "</w>"
CONTEXT = 77  # positions of the text half


def _words() -> list[str]:
    """All words of captions, sorted; the most needed first would only shorten ids, which count nothing."""
    names = [name for names in _NAMES.values() for name in names] + list(_GROUPS)
    frames = [frame.format(a="", bare="", the="the") for frame in _FRAMES]
    phrases = [*frames, *_EMPTY_PHRASES, *_NUMBERS, *COLOURS, *SIZES, "an empty street yard thing things and are"]
    for table in (_LANE_WORDS, _COLUMN_WORDS, _STATE_WORDS, _STATE_PHRASES):
        phrases += [phrase for options in table.values() for phrase in options]
    plain = " ".join(phrases).lower().replace("?", " ")
    return sorted({*plain.split(), *names, *(_PLURALS.get(name, f"{name}s") for name in names)})


@lru_cache(maxsize=1)
def clip_tokenizer() -> CLIPTokenizer:
    """Build CLIP's kind of tokenizer, whose merges spell the words of captions out; others it reads in pieces."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in _words():
        for end in range(1, len(word)):
            merges[word[:end], word[end] + (_END_OF_WORD if end + 1 == len(word) else "")] = None
    whole = dict.fromkeys(left + right for left, right in merges)
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters), *whole, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=list(merges),  # type: ignore[arg-type]
        model_max_length=CONTEXT,
    )
