"""The time stamps of a file, and which of its packets must be decoded for the pictures that are wanted."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Event

import numpy as np
from av import Packet, VideoStream
from numpy.typing import NDArray

SKIPPABLE_CODECS = frozenset({"h264", "hevc"})  # FFmpeg's decoders of these skip unreferenced pictures exactly
_FEWEST_FOR_RATE = 10  # pictures, to tell whether a film has a steady rate ...
_STEADY_SHARE = 0.9  # ... which so many of their steps must show
_HOLE_STEPS = 3.0  # a longer step is no jitter

_PLAIN_SLICE, _IDR_SLICE = 1, 5  # H.264 NAL unit types


@dataclass(frozen=True)
class PacketIndex:
    """The time stamps of a file's packets, in the order of the file, in its own ticks.

    `times` (n,) are the presentation times with steps between joined parts taken out by `shift` (n,);
    `ends` (n,) the times at which their pictures end, `is_timed` tells whether every packet has one; `is_entry` (n,)
    marks packets to jump to, `is_shown` (n,) those whose pictures belong to the film: what was trimmed off without
    encoding again is only there to be decoded. `start_s` is the time of the first picture by the file's own clock; all
    else counts from it, as does `end_s`, the end of the last picture.
    """

    times: NDArray[np.int64]
    ends: NDArray[np.int64]
    shift: NDArray[np.int64]
    is_entry: NDArray[np.bool_]
    is_shown: NDArray[np.bool_]
    is_timed: bool
    tick_s: float
    frame_s: float
    start_s: float
    end_s: float
    codec: str

    @classmethod
    def read(cls, stream: VideoStream, packets: "Iterable[Packet[VideoStream]]", halt: Event) -> "PacketIndex":
        """Read the time stamps of all packets of a stream, or of those before `halt`."""
        rate = stream.average_rate or stream.guessed_rate
        frame_s = float(1 / rate) if rate else 1 / 25
        tick_s = float(stream.time_base) if stream.time_base else 1e-6
        frame_ticks = max(1, round(frame_s / tick_s))
        times: list[int | None] = []
        ticks: list[int] = []
        shifts: list[int] = []
        entries: list[bool] = []
        shown: list[bool] = []
        joints = _Joints(frame_ticks)
        for packet in packets:
            if halt.is_set():
                break
            shift = joints.shift(packet.dts)
            times.append(None if packet.pts is None else packet.pts + shift)
            ticks.append(packet.duration or frame_ticks)
            shifts.append(shift)
            entries.append(_is_entry(packet))
            shown.append(not packet.is_discard)
        known = [time for time in times if time is not None]
        film = [time for time, is_shown in zip(times, shown, strict=True) if is_shown and time is not None]
        start = min(film, default=0)
        is_timed = bool(film) and len(known) == len(times)
        moments = np.array(known if is_timed else [], np.int64) - start
        return cls(
            times=moments,
            ends=moments + np.array(ticks[: len(moments)], np.int64),
            shift=np.array(shifts, np.int64) - start,
            is_entry=np.array(entries, np.bool_),
            is_shown=np.array(shown, np.bool_),
            is_timed=is_timed,
            tick_s=tick_s,
            frame_s=frame_s,
            start_s=start * tick_s,
            end_s=_end_ticks(film, list(itertools.compress(ticks, shown)), start) * tick_s,
            codec=stream.codec_context.name,
        )

    def holes(self) -> list[tuple[float, float]]:
        """Return where a film of a steady rate has no picture, in seconds from the first.

        A picture that is said to last through a hole fills it. Without a steady rate holes mean nothing: cameras and
        screen recorders leave pictures out while nothing changes.
        """
        order = self.in_time()
        if len(order) < _FEWEST_FOR_RATE:
            return []
        times, ends = self.times[order], self.ends[order]
        steps = np.diff(times)
        usual = float(np.median(steps))
        if np.mean(steps <= 1.5 * usual) < _STEADY_SHARE:
            return []
        found = np.flatnonzero((steps > _HOLE_STEPS * usual) & (times[1:] - ends[:-1] > _HOLE_STEPS * usual))
        return [(float(ends[at]) * self.tick_s, float(times[at + 1]) * self.tick_s) for at in found]

    def in_time(self) -> NDArray[np.int64]:
        """Return the numbers of the packets that are shown, in the order of showing."""
        order = np.argsort(self.times, kind="stable")
        return order[self.is_shown[order]]


@dataclass(frozen=True)
class DecodePlan:
    """Which packets must be decoded so that every wanted picture comes out as if all had been.

    `slots` are the slots that have a picture, `wanted` (n,) marks the first packet of each, `needed` (n,) what those
    depend on: their group of pictures up to them. An untimed file needs all of its packets.
    """

    slots: NDArray[np.int64]
    wanted: NDArray[np.bool_]
    needed: NDArray[np.bool_]
    skips_unreferenced: bool

    @classmethod
    def build(cls, index: PacketIndex, fps: float, first_slot: int) -> "DecodePlan":
        if not index.is_timed:
            count = len(index.shift)
            return cls(np.empty(0, np.int64), np.zeros(count, np.bool_), np.ones(count, np.bool_), False)
        of_packet = np.floor(index.times * index.tick_s * fps + 1e-6).astype(np.int64)
        in_time = index.in_time()
        slots, first = np.unique(of_packet[in_time], return_index=True)
        keep = slots >= first_slot
        wanted = np.zeros(len(index.times), np.bool_)
        wanted[in_time[first[keep]]] = True
        return cls(slots[keep], wanted, _needed(index, wanted), index.codec in SKIPPABLE_CODECS)


def _needed(index: PacketIndex, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark what wanted packets depend on: all of their group up to them. (n,) -> (n,)"""
    needed = np.zeros(len(wanted), np.bool_)
    starts = np.flatnonzero(index.is_entry)
    groups = list(itertools.pairwise([0, *starts[starts > 0].tolist(), len(wanted)]))
    # Pictures shown before their keyframe (an open group) are predicted from the group before it: one group, both.
    closed = [start for start, end in groups if start == 0 or index.times[start:end].min() == index.times[start]]
    for start, end in itertools.pairwise([*closed, len(wanted)]):
        targets = np.flatnonzero(wanted[start:end])
        if len(targets):
            needed[start : start + targets[-1] + 1] = True
    return needed


def _is_entry(packet: "Packet[VideoStream]") -> bool:
    """Tell whether a decoder can jump to this packet without losing pictures that it still holds.

    A keyframe can be entered, but FFmpeg's H.264 decoder drops held pictures when it meets a gap before a keyframe
    that is no IDR picture (one with a recovery point only).
    """
    if not packet.is_keyframe:
        return False
    context = packet.stream.codec_context
    return context.name != "h264" or _slice_type(bytes(packet), context.extradata or b"") == _IDR_SLICE


def _slice_type(data: bytes, extradata: bytes) -> int | None:
    """Return the NAL unit type of the first slice of an H.264 picture, with either kind of framing."""
    is_length_prefixed = extradata[:1] == b"\x01"
    prefix = (extradata[4] & 3) + 1 if is_length_prefixed and len(extradata) > 4 else 4
    position = 0
    while position < len(data):
        if is_length_prefixed:
            unit = position + prefix
            position = unit + int.from_bytes(data[position:unit], "big")
        else:
            unit = data.find(b"\x00\x00\x01", position) + 3
            if unit < 3:
                return None
            position = unit
        if unit < len(data) and data[unit] & 31 in (_PLAIN_SLICE, _IDR_SLICE):
            return data[unit] & 31
    return None


class _Joints:
    """Takes out the steps back in time where files were joined end to end."""

    def __init__(self, frame_ticks: int) -> None:
        self._frame_ticks = frame_ticks
        self._shift = 0
        self._last: int | None = None

    def shift(self, dts: int | None) -> int:
        """Return what to add to the time stamps of a packet that is decoded at `dts`."""
        if dts is None:
            return self._shift
        # A packet or two out of order is bad muxing, not a joint.
        if self._last is not None and dts + self._shift < self._last - 25 * self._frame_ticks:
            self._shift = self._last + self._frame_ticks - dts
        self._last = dts + self._shift
        return self._shift


def _end_ticks(times: list[int], durations: list[int], start: int) -> int:
    """Return the end of the last picture; a file without times is as long as its pictures together."""
    if len(times) < len(durations) or not times:
        return sum(durations)
    return max(time + duration for time, duration in zip(times, durations, strict=True)) - start
