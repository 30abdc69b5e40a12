"""What a recorded file says of its own length: with it, what is missing at its end can be told."""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
from av import VideoStream
from av.container import InputContainer

RAW_FORMATS = frozenset({"h264", "hevc", "mjpeg", "mpegvideo"})

_TOLERANCE_S = 0.25
_TOLERANCE_OF_ALL_S = 1.5
_AVI_UNKNOWN = 2**30  # frames; FFmpeg writes it where it cannot come back to the header
_ASF_HEAD_BYTES = 2**16
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_TIMES = struct.Struct("<64x Q 8x Q I")  # behind those bytes: the play time (100 ns), the preroll (ms), flags
_ASF_LIVE = 1
_MOVIE_HEADERS = struct.Struct(">12x I I"), struct.Struct(">20x I Q")  # by version: ticks in a second, length in them
_TRACK_HEADERS = struct.Struct(">12x I 4x I"), struct.Struct(">20x I 4x Q")  # number, length
_MP4_UNKNOWN = (2**32 - 1, 2**64 - 1)
_INEXACT = 2.0  # times that a statement may differ from another one
_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Stated:
    """When the video of a file starts and how long it is, as the file says; None where it does not.

    A file that holds less by more than `tolerance_s` was cut. What `is_of_all` streams together may be the length of
    the sound. To be read before the packets are: FFmpeg changes what it says by what it has seen.
    """

    start_s: float | None
    length_s: float | None
    is_of_all: bool = False

    @classmethod
    def of(cls, container: InputContainer, stream: VideoStream, path: Path) -> "Stated":
        name = container.format.name
        tick_s = float(stream.time_base) if stream.time_base else 0.0
        has_others = len(container.streams) > 1
        if name in RAW_FORMATS:
            return cls(None, None)  # they hold no length: FFmpeg guesses one from the bit rate
        if name == "avi":  # FFmpeg makes the length of one that was cut shorter, by as much as the file is
            return cls(0.0, stream.frames * tick_s if 0 < stream.frames < _AVI_UNKNOWN else None)
        if name == "asf":  # of one that was cut FFmpeg tells none
            return cls(0.0, _asf_length_s(path), has_others)
        if stream.duration and tick_s:
            start_s = None if stream.start_time is None else stream.start_time * tick_s
            return cls(start_s, stream.duration * tick_s)
        start_s = None if container.start_time is None else container.start_time / av.time_base
        return cls(start_s, duration_s(container, stream), has_others)

    @property
    def tolerance_s(self) -> float:
        return _TOLERANCE_OF_ALL_S if self.is_of_all else _TOLERANCE_S

    def end_s(self, first_s: float) -> float:
        """Return the end counted from the first picture, which comes at `first_s`; 0 where it is not stated."""
        if self.length_s is None:
            return 0.0
        return self.length_s if self.start_s is None else self.start_s + self.length_s - first_s


def duration_s(container: InputContainer, stream: VideoStream) -> float | None:
    """Return the length of the video as FFmpeg tells it, None when it does not."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if not container.duration:
        return None
    # Matroska and FLV count from time 0, also when the first picture comes later.
    return (container.duration - max(0, container.start_time or 0)) / av.time_base or None


def is_inconsistent(container: InputContainer, stream: VideoStream, path: Path, beat: Callable[[], None]) -> bool:
    """Tell whether what a file says of itself cannot be true, where FFmpeg finds no fault with it.

    `beat` is called at every part that is looked at.
    """
    tick_s = float(stream.time_base) if stream.time_base else 0.0
    with path.open("rb") as file:
        if container.format.name == "avi":
            return _differ(_avi_frame_s(file), tick_s)
        if not container.format.name.startswith("mov"):
            return False
        known_s = ((stream.start_time or 0) + (stream.duration or 0)) * tick_s
        return _is_inconsistent_mp4(file, stream.id, known_s, beat)


def _differ(one_s: float, other_s: float) -> bool:
    """Tell whether two statements of the same time, 0 if there is none, are not only inexact."""
    return bool(one_s and other_s) and not 1 / _INEXACT < one_s / other_s < _INEXACT


def _avi_frame_s(file: BinaryIO) -> float:
    """Return the time of a picture by the header of an AVI file; its video has a header of its own."""
    head = file.read(36)
    is_head = head[:4] == b"RIFF" and head[24:28] == b"avih" and len(head) == 36
    return int.from_bytes(head[32:36], "little") / 1e6 if is_head else 0.0


def _is_inconsistent_mp4(file: BinaryIO, track: int, known_s: float, beat: Callable[[], None]) -> bool:
    length_s, end, has_fragments = 0.0, 0, False
    for box in _boxes(file, 0, file.seek(0, os.SEEK_END), beat):
        has_fragments |= box.kind == b"moof"
        end = box.end
        if box.kind == b"moov":
            length_s = _track_length_s(file, box, track, beat)
    # The header of a fragmented file speaks of a part of it or of none.
    return _goes_on(file, end, beat) if has_fragments else _differ(length_s, known_s)


def _track_length_s(file: BinaryIO, movie: "_Box", track: int, beat: Callable[[], None]) -> float:
    """Return the length of a track by its own header; its media has another one. 0 if it is not known."""
    ticks_s, together = 0, 0
    for part in _boxes(file, movie.start, movie.end, beat):
        if part.kind == b"mvhd":
            ticks_s, together = _fields(file, part, _MOVIE_HEADERS)
        for header in _boxes(file, part.start, part.end, beat) if part.kind == b"trak" else ():
            if header.kind == b"tkhd":
                number, length = _fields(file, header, _TRACK_HEADERS)
                # There are programs that write it in ticks of the media: then it is longer than all together.
                if number == track and ticks_s and length <= together and length not in _MP4_UNKNOWN:
                    return length / ticks_s
    return 0.0


def _goes_on(file: BinaryIO, end: int, beat: Callable[[], None]) -> bool:
    """Tell whether a fragmented file goes on where its last part ends.

    FFmpeg takes what is no part for the end of the file, and only an unfragmented one says how long it is.
    """
    file.seek(end)
    while rest := file.read(_BLOCK_BYTES):
        beat()
        if any(rest):  # zeros are room that was never used
            return True
    return False


@dataclass(frozen=True, slots=True)
class _Box:
    """A part of an MP4 file: what it holds lies from `start` to `end`."""

    kind: bytes
    start: int
    end: int


def _boxes(file: BinaryIO, start: int, end: int, beat: Callable[[], None]) -> Iterator[_Box]:
    """Yield the boxes that lie side by side, up to the first that cannot be one."""
    while start + 8 <= end:
        beat()
        file.seek(start)
        length, kind, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        head = 16 if length == 1 else 8
        length = long_length if length == 1 else length
        if length == 0 and any(kind):
            length = end - start
        if length < head or start + length > end:
            return
        yield _Box(kind, start + head, start + length)
        start += length


def _fields(file: BinaryIO, box: _Box, layouts: tuple[struct.Struct, struct.Struct]) -> tuple[int, int]:
    """Return two numbers of a header that comes in two versions."""
    file.seek(box.start)
    data = file.read(max(layout.size for layout in layouts)).ljust(64, b"\0")
    first, second = layouts[data[0] == 1].unpack_from(data)
    return first, second


def _asf_length_s(path: Path) -> float | None:
    """Return the length that the header of an ASF file states; None for a broadcast, which has none."""
    with path.open("rb") as file:
        head = file.read(_ASF_HEAD_BYTES)
    at = head.find(_ASF_PROPERTIES)
    if at < 0 or len(head) < at + _ASF_TIMES.size:
        return None
    play_time, preroll, flags = _ASF_TIMES.unpack_from(head, at)
    length_s = play_time / 1e7 - preroll / 1e3
    return None if flags & _ASF_LIVE or length_s <= 0 else length_s
