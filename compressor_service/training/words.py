"""How the world is put into English: names of things, of places and of what happens."""

from collections.abc import Sequence

from compressor_service.training.scene import COLUMNS, Event, Placed, Thing

NOTHING = "nothing"
NUMBERS = ("none", "one", "two", "three", "four")
PLURALS = {
    "person": "people",
    "car": "cars",
    "truck": "trucks",
    "bicycle": "bicycles",
    "dog": "dogs",
    "cat": "cats",
    "parcel": "parcels",
    "fire": "fires",
}
# What a kind of thing does, where it is more natural to say so than "comes in" and "goes away".
_COMES = {"parcel": "is put down", "fire": "starts"}
_GOES = {"parcel": "is taken away", "fire": "goes out"}


def noun(kind: str, colour: str | None = None) -> str:
    """Name a kind, or a kind of a colour: "car", "red car", "person in red"."""
    if colour is None:
        return kind
    return f"person in {colour}" if kind == "person" else f"{colour} {kind}"


def name(thing: Thing) -> str:
    return noun(thing.kind, thing.colour)


def listed(things: Sequence[Thing]) -> str:
    """List things as an answer: "a red car, a dog and a fire"; none are "nothing"."""
    return joined([f"a {name(thing)}" for thing in things])


def joined(parts: Sequence[str]) -> str:
    if not parts:
        return NOTHING
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def place(placed: Placed) -> str:
    return where(placed.lane, placed.column)


def where(lane: str, column: int) -> str:
    return f"{lane} {COLUMNS[column]}"


def comes(kind: str) -> str:
    return _COMES.get(kind, "comes in")


def goes(kind: str) -> str:
    return _GOES.get(kind, "goes away")


def told(event: Event) -> str:
    """Tell an event: "a red car comes in", "the gate opens"."""
    match event.verb:
        case "gate":
            return "the gate opens" if event.on else "the gate closes"
        case "lamp":
            return "the lamp goes on" if event.on else "the lamp goes off"
    assert event.thing is not None
    who = f"a {name(event.thing)}"
    match event.verb:
        case "comes":
            return f"{who} {comes(event.thing.kind)}"
        case "goes":
            return f"{who} {goes(event.thing.kind)}"
        case "crosses":
            return f"{who} crosses to the {event.side}"
        case "moves":
            return f"{who} moves to the {event.side}"
