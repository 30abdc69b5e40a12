"""Recorded files: what they are, and the picture of each of their slots.

A file's clock starts at its first picture. Two passes: the first reads the time stamps alone (a hundredth of the cost
of decoding), the second decodes only what the wanted pictures need, exactly as if everything had been decoded.
"""

import itertools
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import av
import numpy as np
from av import Packet, VideoStream
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from numpy.typing import NDArray

from ingest.assignment import Missing
from ingest.sampler import Pick, Sampler, slot_of

# One format that can name other files or addresses (playlists, ffconcat, SDP) would open them: only plain containers.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,h264,hevc,mjpeg,ogg"
SKIPPABLE_CODECS = frozenset({"h264", "hevc"})  # FFmpeg's decoders of these skip unreferenced pictures exactly
RAW_FORMATS = frozenset({"h264", "hevc", "mjpeg", "mpegvideo"})
PROBED_PACKETS = 500
_PLAIN_SLICE, _IDR_SLICE = 1, 5  # H.264 NAL unit types


class UnsupportedMedia(ValueError):
    """The file is no video that can be read; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class ArchiveFacts:
    """What a file says of itself. `duration_s` is None when it does not say."""

    duration_s: float | None
    width: int
    height: int
    codec: str


@dataclass(frozen=True, slots=True)
class ArchivePicture:
    """The picture chosen for a slot; `time_s` counts from the file's first picture."""

    slot: int
    time_s: float
    image: av.VideoFrame


def probe(path: Path, *, max_pixels: int = 8192 * 4320) -> ArchiveFacts:
    """Read the head of a file until its first picture. Blocks; raises UnsupportedMedia."""
    with open_archive(path, max_pixels=max_pixels) as container:
        stream = video_stream(container)
        for number, packet in enumerate(packets(container)):
            for image in decode(packet):
                return ArchiveFacts(duration_s(container), image.width, image.height, stream.codec_context.name)
            if number >= PROBED_PACKETS:
                break
        for image in flush(stream):
            return ArchiveFacts(duration_s(container), image.width, image.height, stream.codec_context.name)
    raise UnsupportedMedia("the file holds no picture that can be decoded: it is empty, cut short or damaged")


def open_archive(path: Path, *, max_pixels: int) -> InputContainer:
    """Open a file without following anything it may refer to. Raises UnsupportedMedia."""
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    reason = None
    try:
        container = av.open(f"file:{path.absolute()}", options=options)
    except FileNotFoundError:
        reason = "the file is not there any more"
    except (FFmpegError, OSError, ValueError):  # their texts hold the path
        reason = "the file is not a video in a known format, or its index was cut off"
    if reason is not None:
        raise UnsupportedMedia(reason)
    try:
        stream = video_stream(container)
        context = stream.codec_context
        if context.width * context.height > max_pixels:
            raise UnsupportedMedia(
                f"the pictures have {context.width}x{context.height} pixels; at most {max_pixels} are decoded"
            )
        context.thread_count = 1  # also what makes skip_frame act on the very next packet
        context.options = {"max_pixels": str(max_pixels)}
    except UnsupportedMedia:
        container.close()
        raise
    return container


def video_stream(container: InputContainer) -> VideoStream:
    """Return the first video stream that is no cover picture. Raises UnsupportedMedia."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise UnsupportedMedia("the file holds no video")


def duration_s(container: InputContainer) -> float | None:
    """Return the length of the video as the file states it, None when it does not."""
    stream = video_stream(container)
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if not container.duration:
        return None
    # Matroska and FLV count from time 0, also when the first picture comes later.
    return (container.duration - max(0, container.start_time or 0)) / av.time_base or None


def packets(container: InputContainer) -> "Iterator[Packet[VideoStream]]":
    """Yield the packets of the video that hold something, up to where the file ends or is cut off."""
    try:
        for packet in container.demux(video_stream(container)):
            if packet.size:  # an empty one would end the decoder, and AVI has them in the middle
                yield packet
    except FFmpegError:
        return


def flush(stream: VideoStream) -> list[av.VideoFrame]:
    """Return the pictures that the decoder still holds; it is of no use after that."""
    try:
        return stream.codec_context.decode(None)
    except FFmpegError:
        return []


def decode(packet: "Packet[VideoStream]") -> list[av.VideoFrame]:
    """Decode one packet; a damaged one yields nothing, and the file goes on behind it."""
    try:
        return packet.decode()
    except FFmpegError:
        return []


class ArchiveReader:
    """Reads the pictures of a file's slots that come after `last_slot`.

    `duration_s` is the stated or found length, `position_s` how far the reader is, `missing` what it could not get:
    slots whose pictures are damaged, and the slots between the file's real and its stated end. A slot in which the
    file simply has no picture is absent without being missing.
    """

    def __init__(self, path: Path, *, fps: float, last_slot: int | None, max_pixels: int) -> None:
        self.duration_s: float | None = None
        self.position_s = 0.0
        self.missing: list[Missing] = []
        self._path = path
        self._fps = fps
        self._first_slot = 0 if last_slot is None else last_slot + 1
        self._max_pixels = max_pixels

    def pictures(self, halt: Event) -> Generator[ArchivePicture]:
        """Yield the pictures in slot order until the end of the file or `halt`. Raises UnsupportedMedia."""
        index = PacketIndex.read(self._path, self._max_pixels, halt)
        if halt.is_set():
            return
        self.duration_s = max(index.end_s, index.stated_end_s or 0.0)
        sampler = Sampler(self._fps, last_slot=self._first_slot - 1, frame_s=index.frame_s)
        plan = DecodePlan.build(index, self._fps, self._first_slot)
        got: list[int] = []
        for pick, image in self._walk(index, plan, sampler, halt):
            got.append(pick.slot)
            self.position_s = pick.time_s
            yield ArchivePicture(pick.slot, pick.time_s, image)
        if halt.is_set():
            return
        if not got and self._first_slot == 0:
            raise UnsupportedMedia("no picture of the file can be decoded: it is empty or damaged")
        self.missing = _runs(self._lost(index, plan, np.array(got, np.int64)))

    def _walk(
        self, index: "PacketIndex", plan: "DecodePlan", sampler: Sampler, halt: Event
    ) -> Iterator[tuple[Pick, av.VideoFrame]]:
        with open_archive(self._path, max_pixels=self._max_pixels) as container:
            for image in self._images(container, index, plan, halt):
                pick = sampler.offer(None if image.pts is None else image.pts * index.tick_s)
                if pick is not None:
                    yield pick, image

    def _images(
        self, container: InputContainer, index: "PacketIndex", plan: "DecodePlan", halt: Event
    ) -> Iterator[av.VideoFrame]:
        """Yield what comes out of the decoder, with presentation times as in the index."""
        stream = video_stream(container)
        for packet, needed, wanted, shift in zip(
            packets(container), plan.needed, plan.wanted, index.shift, strict=False
        ):
            if halt.is_set():
                return
            if needed:
                if plan.skips_unreferenced:
                    stream.codec_context.skip_frame = "DEFAULT" if wanted else "NONREF"
                if packet.pts is not None:
                    packet.pts += int(shift)
                yield from decode(packet)
        yield from flush(stream)

    def _lost(self, index: "PacketIndex", plan: "DecodePlan", got: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots that should have had a picture and have none."""
        expected = plan.slots
        end_s, stated_s = index.end_s, index.stated_end_s
        if stated_s is not None and stated_s - end_s > 1.5 / self._fps:
            tail = np.arange(slot_of(end_s, self._fps), math.ceil(stated_s * self._fps - 1e-6), dtype=np.int64)
            expected = np.union1d(expected, tail[tail >= self._first_slot])
        return np.setdiff1d(expected, got)


@dataclass(frozen=True)
class PacketIndex:
    """The time stamps of a file's packets, in the order of the file, in its own ticks.

    `times` (n,) are the presentation times with steps between joined parts taken out by `shift` (n,);
    `is_timed` tells whether every packet has one; `is_entry` (n,) marks packets to jump to. `end_s` is where the last
    picture that is there ends, `stated_end_s` where the file says it does, both counted from the first picture.
    """

    times: NDArray[np.int64]
    shift: NDArray[np.int64]
    is_entry: NDArray[np.bool_]
    is_timed: bool
    tick_s: float
    frame_s: float
    end_s: float
    stated_end_s: float | None
    codec: str

    @classmethod
    def read(cls, path: Path, max_pixels: int, halt: Event) -> "PacketIndex":
        """Read the time stamps of a file without decoding. Raises UnsupportedMedia."""
        times: list[int | None] = []
        shifts: list[int] = []
        entries: list[bool] = []
        ticks: list[int] = []
        with open_archive(path, max_pixels=max_pixels) as container:
            stream = video_stream(container)
            rate = stream.average_rate or stream.guessed_rate
            frame_s = float(1 / rate) if rate else 1 / 25
            tick_s = float(stream.time_base) if stream.time_base else 1e-6
            frame_ticks = max(1, round(frame_s / tick_s))
            joints = _Joints(frame_ticks)
            for packet in packets(container):
                if halt.is_set():
                    break
                shift = joints.shift(packet.dts if packet.dts is not None else packet.pts)
                times.append(None if packet.pts is None else packet.pts + shift)
                ticks.append(packet.duration or frame_ticks)
                shifts.append(shift)
                entries.append(_is_entry(packet))
            known = [time for time in times if time is not None]
            start = min(known, default=0)
            return cls(
                times=np.array(known if len(known) == len(times) else [], np.int64) - start,
                shift=np.array(shifts, np.int64) - start,
                is_entry=np.array(entries, np.bool_),
                is_timed=bool(known) and len(known) == len(times),
                tick_s=tick_s,
                frame_s=frame_s,
                end_s=_end_ticks(known, ticks, start) * tick_s,
                stated_end_s=_stated_end_s(container, start * tick_s),
                codec=stream.codec_context.name,
            )


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
        in_time = np.argsort(index.times, kind="stable")
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


def _stated_end_s(container: InputContainer, first_s: float) -> float | None:
    """Return where the file says its video ends, counted from its first picture."""
    stream = video_stream(container)
    if container.format.name in RAW_FORMATS:
        return None  # they hold no length: FFmpeg guesses one from the bit rate
    if stream.duration and stream.time_base:
        start = stream.start_time if stream.start_time is not None else round(first_s / stream.time_base)
        return float((start + stream.duration) * stream.time_base) - first_s
    length_s = duration_s(container)
    if length_s is None:
        return None
    start_s = container.start_time / av.time_base if container.start_time is not None else first_s
    return start_s + length_s - first_s


def _runs(slots: NDArray[np.int64]) -> list[Missing]:
    """Return sorted slots as runs."""
    if not len(slots):
        return []
    breaks = np.flatnonzero(np.diff(slots) > 1) + 1
    return [Missing(int(run[0]), int(run[-1]) + 1, "decode_error") for run in np.split(slots, breaks)]
