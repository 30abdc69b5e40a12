"""The families of questions about one picture."""

from collections.abc import Callable

from compressor_service.training import words
from compressor_service.training.questions.phrases import (
    Random,
    any_of,
    counted,
    day_or_night,
    gate_word,
    lamp_word,
    of_colour,
    one_of,
    referred,
    single,
    sought,
    yes,
)
from compressor_service.training.scene import PLACES, SIZES, View

OnPicture = Callable[[Random, View], tuple[str, str] | None]


def _what(random: Random, view: View) -> tuple[str, str]:
    question = one_of(
        random,
        "What is in the picture?",
        "What can you see?",
        "What is there?",
        "List everything that is there.",
        "What do you see in the picture?",
    )
    return question, words.listed([one.thing for one in view.visible])


def _colour(random: Random, view: View) -> tuple[str, str] | None:
    found = single(random, [one.thing for one in view.visible if one.thing.colour])
    if found is None or found.colour is None:
        return None
    return of_colour(random, found.kind, "is"), found.colour


def _presence(random: Random, view: View) -> tuple[str, str] | None:
    found = sought(random, [one.thing for one in view.visible])
    if found is None:
        return None
    noun, answer = found
    question = one_of(
        random,
        "Is there a {0}?",
        "Is there a {0} in the picture?",
        "Do you see a {0}?",
        "Can you see a {0}?",
        "Is a {0} there?",
    )
    return question.format(noun), answer


def _count(random: Random, view: View) -> tuple[str, str] | None:
    things = [one.thing for one in view.visible]
    if random.random() < 0.25:
        question = one_of(random, "How many things are there?", "How many things do you see?", "Count the things.")
        return question, words.NUMBERS[len(things)]
    found = counted(random, [thing.kind for thing in things])
    if found is None:
        return None
    question = one_of(
        random, "How many {0} are there?", "How many {0} do you see?", "Count the {0}.", "What is the number of {0}?"
    )
    return question.format(words.PLURALS[found[0]]), found[1]


def _place(random: Random, view: View) -> tuple[str, str] | None:
    found = referred(random, [one.thing for one in view.visible])
    if found is None:
        return None
    thing, noun = found
    placed = next(one for one in view.visible if one.thing == thing)
    question = one_of(random, "Where is the {0}?", "At what place is the {0}?", "Where do you see the {0}?")
    return question.format(noun), words.place(placed)


def _at_place(random: Random, view: View) -> tuple[str, str]:
    taken = {words.place(one): one.thing for one in view.visible}
    free = [words.where(*place) for place in PLACES if words.where(*place) not in taken]
    wanted = list(taken) if taken and (not free or random.random() < 0.75) else free
    place = any_of(random, wanted)
    question = one_of(random, "What is at the {0}?", "What is {0}?", "What stands at the {0}?", "What do you see {0}?")
    return question.format(place), words.listed([taken[place]] if place in taken else [])


def _size(random: Random, view: View) -> tuple[str, str] | None:
    found = referred(random, [one.thing for one in view.visible])
    if found is None:
        return None
    thing, noun = found
    if random.random() < 0.5:
        return one_of(random, "Is the {0} big or small?", "How big is the {0}?").format(noun), thing.size
    size = str(random.choice(SIZES))
    return f"Is the {noun} {size}?", yes(thing.size == size)


def _light(random: Random, view: View) -> tuple[str, str]:
    return day_or_night(random, view)


def _weather(random: Random, view: View) -> tuple[str, str]:
    return one_of(random, "Is it raining?", "Does it rain?", "Is there rain?"), yes(view.setting.rain)


def _setting(random: Random, view: View) -> tuple[str, str]:
    question = one_of(random, "Is this a street or a yard?", "What place is this?", "What kind of place is it?")
    return question, "street" if view.setting.street else "yard"


def _gate(random: Random, view: View) -> tuple[str, str]:
    if random.random() < 0.5:
        return one_of(random, "Is the gate open or closed?", "How is the gate?"), gate_word(view.gate_open)
    asked_open = random.random() < 0.5
    return f"Is the gate {gate_word(asked_open)}?", yes(view.gate_open == asked_open)


def _lamp(random: Random, view: View) -> tuple[str, str]:
    if random.random() < 0.5:
        return one_of(random, "Is the lamp on or off?", "How is the lamp?"), lamp_word(view.lamp_on)
    asked_on = random.random() < 0.5
    return f"Is the lamp {lamp_word(asked_on)}?", yes(view.lamp_on == asked_on)


PICTURE_FAMILIES: dict[str, OnPicture] = {
    "what": _what,
    "colour": _colour,
    "presence": _presence,
    "count": _count,
    "place": _place,
    "at_place": _at_place,
    "size": _size,
    "light": _light,
    "weather": _weather,
    "setting": _setting,
    "gate": _gate,
    "lamp": _lamp,
}
