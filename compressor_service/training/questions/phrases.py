"""What questions of several families have in common: what to ask about, and the words for it."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from compressor_service.training import words
from compressor_service.training.scene import COLOURS, KINDS, Thing, View

Random = np.random.Generator
Item = TypeVar("Item")


def single(random: Random, things: Sequence[Thing]) -> Thing | None:
    """One of the things that are the only ones of their kind: so that "the car" is clear."""
    kinds = [thing.kind for thing in things]
    alone = [thing for thing in things if kinds.count(thing.kind) == 1]
    return any_of(random, alone) if alone else None


def referred(random: Random, things: Sequence[Thing]) -> tuple[Thing, str] | None:
    """Any thing, with a noun that is clear: its kind alone where that is enough, and not always then."""
    if not things:
        return None
    thing = any_of(random, things)
    alone = [other.kind for other in things].count(thing.kind) == 1
    return thing, thing.kind if alone and random.random() < 0.6 else words.name(thing)


def sought(random: Random, things: Sequence[Thing], chance: float = 0.5) -> tuple[str, str] | None:
    """Something to look for, there by `chance`: a kind or a kind of a colour; a no is often nearly a yes."""
    with_colour = random.random() < 0.5
    if random.random() < chance:
        if not things:
            return None
        thing = any_of(random, things)
        return words.noun(thing.kind, thing.colour if with_colour else None), "yes"
    kind = str(random.choice(KINDS))
    if with_colour and things and random.random() < 0.6:
        kind = any_of(random, things).kind
    colour = str(random.choice(COLOURS)) if with_colour and kind != "fire" else None
    if any(fits(thing, kind, colour) for thing in things):
        return None
    return words.noun(kind, colour), "no"


def fits(thing: Thing, kind: str, colour: str | None) -> bool:
    return thing.kind == kind and colour in (None, thing.colour)


def counted(random: Random, kinds: Sequence[str]) -> tuple[str, str] | None:
    """A kind of which there are as many as was drawn first, so that no number is a good guess."""
    number = int(random.choice(4, p=(0.15, 0.2, 0.3, 0.35)))
    fitting = [kind for kind in KINDS if kinds.count(kind) == number]
    return (any_of(random, fitting), words.NUMBERS[number]) if fitting else None


def of_colour(random: Random, kind: str, tense: str) -> str:
    if kind == "person":
        wears = "does the person wear" if tense == "is" else "did the person wear"
        return one_of(random, f"What colour {wears}?", f"What colour {tense} the person?")
    return one_of(
        random, "What colour {1} the {0}?", "What is the colour of the {0}?", "Of what colour {1} the {0}?"
    ).format(kind, tense)


def day_or_night(random: Random, view: View) -> tuple[str, str]:
    if random.random() < 0.5:
        return one_of(
            random, "Is it day or night?", "What time of day is it?"
        ), "night" if view.setting.night else "day"
    night = random.random() < 0.5
    return ("Is it night?" if night else "Is it day?"), yes(view.setting.night == night)


def gate_word(is_open: bool) -> str:
    return "open" if is_open else "closed"


def lamp_word(on: bool) -> str:
    return "on" if on else "off"


def yes(true: bool) -> str:
    return "yes" if true else "no"


def any_of(random: Random, items: Sequence[Item]) -> Item:
    return items[int(random.integers(len(items)))]


def one_of(random: Random, *phrases: str) -> str:
    return any_of(random, phrases)
