"""What can be seen: a yard or a street in which things stand, come, go, cross and move, second by second.

Everything is drawn from a numpy generator: the same seed gives the same clip. Nothing here knows of pixels or words.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Lane = Literal["near", "far"]
Side = Literal["left", "right"]
Verb = Literal["comes", "goes", "crosses", "moves", "gate", "lamp"]

SIDES: tuple[Side, ...] = ("left", "right")
VERBS: tuple[Verb, ...] = ("comes", "goes", "crosses", "moves", "gate", "lamp")
KINDS = ("person", "car", "truck", "bicycle", "dog", "cat", "parcel", "fire")
MOVING = KINDS[:6]  # a parcel is put down and taken away, a fire starts and goes out
COLOURS = ("red", "blue", "green", "yellow", "white", "black")
SIZES = ("small", "big")
LANES: tuple[Lane, Lane] = ("near", "far")
COLUMNS = ("left", "middle", "right")
PLACES = tuple((lane, column) for lane in LANES for column in range(len(COLUMNS)))
MAX_THINGS, MAX_EVENTS = 3, 4

_CHANCES = (0.24, 0.18, 0.26, 0.16, 0.09, 0.07)  # of the verbs; what does not fit leaves its chance to the others
_EDGE = 0.3  # how far beyond the picture's border a thing is surely out of sight, as a part of its width
_REST_S = 1.3  # quiet time between two events: at one look a second, each is over before the next begins


@dataclass(frozen=True, slots=True)
class Thing:
    """Something with a kind, a colour and a size; a fire has no colour."""

    kind: str
    colour: str | None
    size: str

    @property
    def order(self) -> tuple[int, int]:
        """Where it stands in a list of things: by kind, then by colour."""
        return KINDS.index(self.kind), COLOURS.index(self.colour) if self.colour else 0


@dataclass(frozen=True, slots=True)
class Placed:
    """A thing in a picture: its lane, and `x` of its middle from 0 (left border) to 1 (right border)."""

    thing: Thing
    lane: Lane
    x: float

    @property
    def column(self) -> int:
        return min(max(int(self.x * len(COLUMNS)), 0), len(COLUMNS) - 1)


@dataclass(frozen=True, slots=True)
class Setting:
    """What stays the same for a whole clip. `look` seeds everything that is drawn and never asked about."""

    street: bool
    night: bool
    rain: bool
    look: int


@dataclass(frozen=True, slots=True)
class View:
    """What one picture shows; `things` includes those that are partly outside, `visible` leaves them out."""

    setting: Setting
    gate_open: bool
    lamp_on: bool
    things: tuple[Placed, ...]

    @property
    def visible(self) -> tuple[Placed, ...]:
        """The things whose middle is in the picture, in the order of lists."""
        inside = (one for one in self.things if 0 <= one.x <= 1)
        return tuple(sorted(inside, key=lambda one: one.thing.order))


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens from `start_s` to `end_s`; a `thing` crosses or moves to a `side`.

    For the gate `on` is open, for the lamp it is lit.
    """

    verb: Verb
    start_s: float
    end_s: float
    thing: Thing | None = None
    side: Side | None = None
    on: bool = False


@dataclass(frozen=True, slots=True)
class Leg:
    """A thing's way between two times in one lane, at an even pace; outside of its legs it is not there."""

    start_s: float
    end_s: float
    lane: Lane
    from_x: float
    to_x: float


@dataclass(frozen=True, slots=True)
class Clip:
    """`seconds` of one camera, looked at `slots` times: at `phase_s`, `phase_s` + 1 and so on."""

    setting: Setting
    slots: int
    phase_s: float
    gate_open: bool  # at the beginning
    lamp_on: bool
    tracks: tuple[tuple[Thing, tuple[Leg, ...]], ...]
    events: tuple[Event, ...]

    @property
    def seconds(self) -> float:
        return self.slots - 1 + self.phase_s

    def view(self, time_s: float) -> View:
        """Return what the camera shows at a time."""
        things = []
        for thing, legs in self.tracks:
            for leg in legs:
                if leg.start_s <= time_s < leg.end_s:
                    way = (time_s - leg.start_s) / (leg.end_s - leg.start_s) if leg.to_x != leg.from_x else 0.0
                    things.append(Placed(thing, leg.lane, leg.from_x + way * (leg.to_x - leg.from_x)))
        past = [event for event in self.events if event.start_s <= time_s]
        return View(
            self.setting,
            gate_open=_latest(past, "gate", self.gate_open),
            lamp_on=_latest(past, "lamp", self.lamp_on),
            things=tuple(things),
        )

    def views(self) -> list[View]:
        """Return what is seen in every slot."""
        return [self.view(slot + self.phase_s) for slot in range(self.slots)]


def draw_setting(random: np.random.Generator) -> Setting:
    street, night, rain = (bool(one) for one in random.integers(2, size=3))
    return Setting(street, night, rain, look=int(random.integers(2**31)))


def draw_view(random: np.random.Generator) -> View:
    """Draw a picture with nothing to three things at rest, each at a place of its own."""
    count = int(random.choice(4, p=(0.1, 0.25, 0.3, 0.35)))
    places = random.permutation(len(PLACES))[:count]
    things = draw_things(random, count)
    placed = tuple(
        Placed(thing, PLACES[place][0], _rest_x(random, PLACES[place][1]))
        for thing, place in zip(things, places, strict=True)
    )
    gate_open, lamp_on = (bool(one) for one in random.integers(2, size=2))
    return View(draw_setting(random), gate_open, lamp_on, placed)


def draw_things(random: np.random.Generator, count: int) -> list[Thing]:
    """Draw things of which no two share kind and colour; often several of one kind, so that counts differ."""
    things: list[Thing] = []
    kind = str(random.choice(KINDS))
    alike = random.random() < 0.5
    while len(things) < count:
        one = _draw_thing(random, kind if alike and kind != "fire" else str(random.choice(KINDS)))
        alike = alike and random.random() < 0.8
        if all(_name(one) != _name(other) for other in things):
            things.append(one)
    return things


def draw_clip(random: np.random.Generator, *, slots: int, phase_s: float = 0.0) -> Clip:
    """Draw a clip of at most four events that fit into its time, one after the other."""
    return _Director(random, slots, phase_s).shoot()


def draw_slots(random: np.random.Generator, low: int = 4, high: int = 64) -> int:
    """Draw a length: short clips as likely as long ones, by the logarithm."""
    return round(float(np.exp(random.uniform(np.log(low), np.log(high)))))


def _name(thing: Thing) -> tuple[str, str | None]:
    return thing.kind, thing.colour


def _draw_thing(random: np.random.Generator, kind: str) -> Thing:
    colour = None if kind == "fire" else str(random.choice(COLOURS))
    return Thing(kind, colour, str(random.choice(SIZES)))


def _rest_x(random: np.random.Generator, column: int) -> float:
    """A place to stand in a column, clear of its borders."""
    return float((column + random.uniform(0.3, 0.7)) / len(COLUMNS))


def _latest(past: list[Event], verb: Verb, before: bool) -> bool:
    states = [event.on for event in past if event.verb == verb]
    return states[-1] if states else before


class _Director:
    """Plays a clip through once, event by event, and keeps who stands where."""

    def __init__(self, random: np.random.Generator, slots: int, phase_s: float) -> None:
        self._random = random
        self._slots, self._phase_s = slots, phase_s
        self._end_s = slots - 1 + phase_s
        self._standing: dict[Thing, tuple[Lane, float, float]] = {}  # its lane, its x, since when
        self._legs: dict[Thing, list[Leg]] = {}
        self._events: list[Event] = []
        self._gate, self._lamp = (bool(one) for one in random.integers(2, size=2))

    def shoot(self) -> Clip:
        random = self._random
        gate, lamp = self._gate, self._lamp
        # The first things and those that come later are drawn together, so that names stay unique in a clip.
        count = int(random.choice(4, p=(0.2, 0.3, 0.3, 0.2)))
        cast = draw_things(random, count + MAX_EVENTS)
        for place, thing in zip(random.permutation(len(PLACES))[:count], cast, strict=False):
            lane, column = PLACES[place]
            self._standing[thing] = lane, _rest_x(random, column), -1.0
        waiting = cast[count:]
        wanted = int(random.choice(MAX_EVENTS + 1, p=(0.08, 0.23, 0.23, 0.23, 0.23)))
        now = self._phase_s + 0.1
        for left in range(wanted, 0, -1):
            # Rests are long at random, but leave the events still to come their time.
            slack = self._end_s - 0.1 - now - left * 3.2 - (left - 1) * _REST_S
            if slack < 0 and left > 1:
                continue
            now += float(random.uniform(0, max(slack, 0) / left * 1.4))
            end = self._happen(now, waiting)
            now = now if end is None else end + _REST_S
        for thing, (lane, x, since) in self._standing.items():
            self._leg(thing, since, self._end_s + 2, lane, x, x)
        tracks = tuple((thing, tuple(legs)) for thing, legs in self._legs.items())
        setting = draw_setting(random)
        return Clip(setting, self._slots, self._phase_s, gate, lamp, tracks, tuple(self._events))

    def _happen(self, now: float, waiting: list[Thing]) -> float | None:
        """Let one event happen at `now`, and return when it is over; None when nothing fits any more."""
        if now > self._end_s - 0.1:
            return None
        for number in self._random.choice(len(VERBS), size=len(VERBS), replace=False, p=_CHANCES):
            event = self._try(VERBS[number], now, waiting)
            if event is not None:
                self._events.append(event)
                return event.end_s
        return None

    def _try(self, verb: Verb, now: float, waiting: list[Thing]) -> Event | None:
        room = self._end_s - 0.1 - now
        match verb:
            case "gate":
                self._gate = not self._gate
                return Event("gate", now, now, on=self._gate)
            case "lamp":
                self._lamp = not self._lamp
                return Event("lamp", now, now, on=self._lamp)
            case "comes" if waiting and len(self._standing) < MAX_THINGS:
                return self._come(now, room, waiting)
            case "goes" if self._standing:
                return self._go(now, room)
            case "crosses" if waiting and len(self._standing) < MAX_THINGS:
                return self._cross(now, room, waiting)
            case "moves" if self._standing:
                return self._move(now, room)
        return None

    def _come(self, now: float, room: float, waiting: list[Thing]) -> Event | None:
        free = [place for place in PLACES if not self._taken(place)]
        lane, column = free[self._random.integers(len(free))]
        x = _rest_x(self._random, column)
        thing = waiting[0]
        if thing.kind not in MOVING:
            waiting.pop(0)
            self._standing[thing] = lane, x, now
            return Event("comes", now, now, thing)
        start_x = self._way_in(lane, x)
        if start_x is None:
            return None
        took = abs(x - start_x) / self._pace()
        if took > room:
            return None
        waiting.pop(0)
        self._leg(thing, now, now + took, lane, start_x, x)
        self._standing[thing] = lane, x, now + took
        return Event("comes", now, now + took, thing)

    def _go(self, now: float, room: float) -> Event | None:
        thing = self._someone(list(self._standing))
        lane, x, _ = self._standing[thing]
        if thing.kind not in MOVING:
            self._leave(thing, now)
            return Event("goes", now, now, thing)
        end_x = self._way_in(lane, x)
        if end_x is None:
            return None
        took = abs(x - end_x) / self._pace()
        if took > room:
            return None
        self._leave(thing, now)
        self._leg(thing, now, now + took, lane, x, end_x)
        return Event("goes", now, now + took, thing)

    def _cross(self, now: float, room: float, waiting: list[Thing]) -> Event | None:
        lanes = [lane for lane in LANES if all(held[0] != lane for held in self._standing.values())]
        if not lanes or waiting[0].kind not in MOVING:
            return None
        took = (1 + 2 * _EDGE) / (0.75 * self._pace())
        if took > room:
            return None
        thing = waiting.pop(0)
        lane = lanes[self._random.integers(len(lanes))]
        right = bool(self._random.integers(2))
        ends = (-_EDGE, 1 + _EDGE) if right else (1 + _EDGE, -_EDGE)
        self._leg(thing, now, now + took, lane, *ends)
        return Event("crosses", now, now + took, thing, "right" if right else "left")

    def _move(self, now: float, room: float) -> Event | None:
        able = [thing for thing in self._standing if thing.kind in MOVING]
        if not able:
            return None
        thing = self._someone(able)
        lane, x, _ = self._standing[thing]
        here = Placed(thing, lane, x).column
        targets = [
            column for column in range(len(COLUMNS)) if column != here and not self._blocked(lane, x, column, thing)
        ]
        if not targets:
            return None
        to_x = _rest_x(self._random, targets[self._random.integers(len(targets))])
        took = abs(x - to_x) / self._pace()
        if took > room:
            return None
        self._leave(thing, now)
        self._leg(thing, now, now + took, lane, x, to_x)
        self._standing[thing] = lane, to_x, now + took
        return Event("moves", now, now + took, thing, "right" if to_x > x else "left")

    def _pace(self) -> float:
        """Picture widths a second: whoever crosses is seen at least twice."""
        return float(self._random.uniform(0.4, 0.6))

    def _someone(self, things: list[Thing]) -> Thing:
        return things[self._random.integers(len(things))]

    def _leave(self, thing: Thing, now: float) -> None:
        lane, x, since = self._standing.pop(thing)
        self._leg(thing, since, now, lane, x, x)

    def _leg(self, thing: Thing, start_s: float, end_s: float, lane: Lane, from_x: float, to_x: float) -> None:
        self._legs.setdefault(thing, []).append(Leg(start_s, end_s, lane, from_x, to_x))

    def _taken(self, place: tuple[Lane, int]) -> bool:
        return any(
            lane == place[0] and Placed(thing, lane, x).column == place[1]
            for thing, (lane, x, _) in self._standing.items()
        )

    def _way_in(self, lane: Lane, x: float) -> float | None:
        """Return a border, as an x out of sight, with nobody between it and `x`."""
        others = [held[1] for held in self._standing.values() if held[0] == lane and held[1] != x]
        free = []
        if all(other > x for other in others):
            free.append(-_EDGE)
        if all(other < x for other in others):
            free.append(1 + _EDGE)
        return free[self._random.integers(len(free))] if free else None

    def _blocked(self, lane: Lane, x: float, column: int, mover: Thing) -> bool:
        first, last = sorted((Placed(mover, lane, x).column, column))
        return any(
            thing is not mover and held[0] == lane and first <= Placed(thing, lane, held[1]).column <= last
            for thing, held in self._standing.items()
        )
