"""Recorded files: what they are, and the picture of each of their slots.

A file's clock starts at its first picture. Two passes: the first reads the time stamps alone (a hundredth of the cost
of decoding), the second decodes only what the wanted pictures need, exactly as if everything had been decoded.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
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
from ingest.packet_index import DecodePlan, PacketIndex
from ingest.sampler import Pick, Sampler, slot_of
from ingest.settings import IngestSettings
from ingest.stated import Stated, duration_s, is_inconsistent

# One format that can name other files or addresses (playlists, ffconcat, SDP) would open them: only plain containers.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,h264,hevc,mjpeg,ogg"
PROBED_PACKETS = 500
_FFMPEG_STREAMS = 1000  # that it opens at most unless told otherwise


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


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """What a file may ask for at most: pixels of a picture, seconds of video, streams beside each other."""

    pixels: int = 8192 * 4320
    video_s: float = 7 * 86400.0
    streams: int = 64

    @classmethod
    def of(cls, settings: IngestSettings) -> "ArchiveLimits":
        return cls(settings.max_pixels, settings.max_video_s, settings.max_streams)

    def check_length(self, seconds: float) -> None:
        """Raise UnsupportedMedia for more video than is read."""
        if seconds > self.video_s:
            raise UnsupportedMedia(
                f"the file states {seconds:.0f} s of video; at most {self.video_s:g} s are read; "
                "TOKENLINE_INGEST__MAX_VIDEO_S sets the limit"
            )


def probe(path: Path, limits: ArchiveLimits) -> ArchiveFacts:
    """Read the head of a file until its first picture. Blocks; raises UnsupportedMedia."""
    with open_archive(path, limits) as container:
        stream = video_stream(container)
        for number, packet in enumerate(packets(container)):
            for image in decode(packet):
                return ArchiveFacts(duration_s(container, stream), image.width, image.height, stream.codec_context.name)
            if number >= PROBED_PACKETS:
                break
        for image in flush(stream):
            return ArchiveFacts(duration_s(container, stream), image.width, image.height, stream.codec_context.name)
    raise UnsupportedMedia("the file holds no picture that can be decoded: it is empty, cut short or damaged")


def open_archive(path: Path, limits: ArchiveLimits) -> InputContainer:
    """Open a file without following anything it may refer to. Raises UnsupportedMedia and MemoryError."""
    container = _open(path, limits)
    try:
        if len(container.streams) > limits.streams:
            raise UnsupportedMedia(
                f"the file has more than {limits.streams} streams; TOKENLINE_INGEST__MAX_STREAMS sets the limit"
            )
        stream = video_stream(container)
        context = stream.codec_context
        if context is None:
            raise UnsupportedMedia("the video is in a codec that is not known, or its header is damaged")
        if context.width * context.height > limits.pixels:
            raise UnsupportedMedia(
                f"the pictures have {context.width}x{context.height} pixels; at most {limits.pixels} are decoded; "
                "TOKENLINE_INGEST__MAX_PIXELS sets the limit"
            )
        limits.check_length(duration_s(container, stream) or 0.0)
        context.thread_count = 1  # also what makes skip_frame act on the very next packet
        context.options = {"max_pixels": str(limits.pixels)}
    except UnsupportedMedia:
        container.close()
        raise
    return container


def _open(path: Path, limits: ArchiveLimits) -> InputContainer:
    # A header may name thousands of streams, each of which takes memory: FFmpeg stops at the first that is too many.
    # Some formats go on without the rest; of others it says that there is no memory, also when there is.
    with suppress(MemoryError):
        return _open_with(path, limits.streams + 1)
    return _open_with(path, _FFMPEG_STREAMS)


def _open_with(path: Path, streams: int) -> InputContainer:
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "max_streams": str(streams)}
    try:
        return av.open(f"file:{path.absolute()}", options=options)
    except MemoryError:  # says nothing about the file
        raise
    except FileNotFoundError:
        reason = "the file is not there any more"
    except (FFmpegError, OSError, ValueError):  # their texts hold the path
        reason = "the file is not a video in a known format, or its index was cut off"
    raise UnsupportedMedia(reason)


def video_stream(container: InputContainer) -> VideoStream:
    """Return the first video stream that is no cover picture. Raises UnsupportedMedia."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise UnsupportedMedia("the file holds no video")


def packets(container: InputContainer, on_damage: Callable[[], None] = lambda: None) -> "Iterator[Packet[VideoStream]]":
    """Yield the packets of the video that hold something, up to where the file ends or is cut off."""
    try:
        for packet in container.demux(video_stream(container)):
            if packet.size:  # an empty one would end the decoder, and AVI has them in the middle
                yield packet
    except MemoryError:
        raise
    except IndexError:  # PyAV's own, behind the last packet of a file in which a stream came up on the way
        return
    except FFmpegError:
        on_damage()


def decode(packet: "Packet[VideoStream]", on_damage: Callable[[], None] = lambda: None) -> list[av.VideoFrame]:
    """Decode one packet; a damaged one yields nothing, and the file goes on behind it. Raises MemoryError."""
    try:
        return packet.decode()
    except MemoryError:
        raise
    except FFmpegError:
        on_damage()
        return []


def flush(stream: VideoStream) -> list[av.VideoFrame]:
    """Return the pictures that the decoder still holds; it is of no use after that."""
    try:
        return stream.codec_context.decode(None)
    except FFmpegError:
        return []


class ArchiveReader:
    """Reads the pictures of a file's slots that come after `last_slot`.

    `duration_s` is the length that the file states and `held_s` what it holds of it, known once the first picture
    comes; `is_cut` tells whether that is less. `damaged` counts the errors of reading and decoding, the pictures that
    the decoder had to repair and what the file says of itself but cannot be. `missing` grows by what the reader could
    not get before each picture: slots whose pictures are damaged, those in a hole of a steady film and, at last, those
    between the file's real and its stated end. A slot for which a film without a steady rate has no picture is absent
    without being missing. `beat` is called at every packet.
    """

    def __init__(
        self,
        path: Path,
        *,
        fps: float,
        last_slot: int | None,
        limits: ArchiveLimits,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.duration_s: float | None = None
        self.held_s: float | None = None
        self.is_cut = False
        self.damaged = 0
        self.missing: list[Missing] = []
        self._path = path
        self._fps = fps
        self._first_slot = 0 if last_slot is None else last_slot + 1
        self._limits = limits
        self._beat = beat

    def pictures(self, halt: Event) -> Generator[ArchivePicture]:
        """Yield the pictures in slot order until the end of the file or `halt`. Raises UnsupportedMedia."""
        with open_archive(self._path, self._limits) as container:
            stream = video_stream(container)
            stated = Stated.of(container, stream, self._path)
            if is_inconsistent(container, stream, self._path, self._beat):
                self._note_damage()
            found = self._beating(packets(container, self._note_damage))
            index = PacketIndex.read(stream, found, halt)
        if halt.is_set():
            return
        self.held_s = index.end_s
        self.duration_s = max(index.end_s, stated.end_s(index.start_s))
        self.is_cut = self.duration_s - self.held_s > stated.tolerance_s
        if self.is_cut and stated.is_of_all and self._last_s() - index.start_s >= self.duration_s - stated.tolerance_s:
            self.is_cut, self.duration_s = False, self.held_s  # only the sound goes on
        self._limits.check_length(self.duration_s)
        sampler = Sampler(self._fps, last_slot=self._first_slot - 1, frame_s=index.frame_s)
        plan = DecodePlan.build(index, self._fps, self._first_slot)
        expected = self._expected(index, plan.slots)
        next_slot = self._first_slot
        for pick, image in self._walk(index, plan, sampler, halt):
            self.missing += _runs(expected[slice(*np.searchsorted(expected, [next_slot, pick.slot]))])
            next_slot = pick.slot + 1
            yield ArchivePicture(pick.slot, pick.time_s, image)
        if halt.is_set():
            return
        if next_slot == 0:
            raise UnsupportedMedia("no picture of the file can be decoded: it is empty or damaged")
        self.missing += _runs(expected[expected >= next_slot])

    def _last_s(self) -> float:
        """Return when the last packet of any stream comes, by the file's own clock."""
        last_s = 0.0
        with open_archive(self._path, self._limits) as container, suppress(FFmpegError, IndexError):
            for packet in container.demux():
                self._beat()
                if packet.pts is not None and packet.time_base:
                    last_s = max(last_s, float(packet.pts * packet.time_base))
        return last_s

    def _walk(
        self, index: PacketIndex, plan: DecodePlan, sampler: Sampler, halt: Event
    ) -> Iterator[tuple[Pick, av.VideoFrame]]:
        with open_archive(self._path, self._limits) as container:
            for image in self._images(container, index, plan, halt):
                pick = sampler.offer(None if image.pts is None else image.pts * index.tick_s)
                if pick is not None:
                    yield pick, image

    def _images(
        self, container: InputContainer, index: PacketIndex, plan: DecodePlan, halt: Event
    ) -> Iterator[av.VideoFrame]:
        """Yield what comes out of the decoder, with presentation times as in the index."""
        stream = video_stream(container)
        found = self._beating(packets(container))
        for packet, needed, wanted, shift in zip(found, plan.needed, plan.wanted, index.shift, strict=False):
            if halt.is_set():
                return
            if needed:
                if plan.skips_unreferenced:
                    stream.codec_context.skip_frame = "DEFAULT" if wanted else "NONREF"
                if packet.pts is not None:
                    packet.pts += int(shift)
                yield from self._checked(decode(packet, self._note_damage), index)
        yield from self._checked(flush(stream), index)

    def _checked(self, images: list[av.VideoFrame], index: PacketIndex) -> list[av.VideoFrame]:
        """Count those pictures in which the decoder itself had to fill in what is damaged."""
        last = int(index.times[-1]) if index.is_timed else None  # often incomplete: there the recording was stopped
        self.damaged += sum(image.is_corrupt and image.pts != last for image in images)
        return images

    def _beating(self, found: "Iterable[Packet[VideoStream]]") -> "Iterator[Packet[VideoStream]]":
        for packet in found:
            self._beat()
            yield packet

    def _note_damage(self) -> None:
        self.damaged += 1

    def _expected(self, index: PacketIndex, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots that should have a picture: those that have one in the index, in a hole, or were cut off."""
        spans = [
            (math.ceil(start_s * self._fps - 1e-6), slot_of(end_s, self._fps))  # the whole slots inside
            for start_s, end_s in index.holes()
        ]
        if self.is_cut:
            spans.append((slot_of(index.end_s, self._fps), math.ceil((self.duration_s or 0) * self._fps - 1e-6)))
        lacking = [np.arange(max(start, self._first_slot), end, dtype=np.int64) for start, end in spans]
        return np.unique(np.concatenate([slots, *lacking]))


def _runs(slots: NDArray[np.int64]) -> list[Missing]:
    """Return sorted slots as runs."""
    if not len(slots):
        return []
    breaks = np.flatnonzero(np.diff(slots) > 1) + 1
    return [Missing(int(run[0]), int(run[-1]) + 1, "decode_error") for run in np.split(slots, breaks)]
