"""Recorded files: what they are, and the picture of each of their slots.

A file's clock starts at its first picture. Two passes: the first reads the time stamps alone (a hundredth of the cost
of decoding), the second decodes only what the wanted pictures need, exactly as if everything had been decoded.
"""

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
from ingest.packet_index import DecodePlan, PacketIndex
from ingest.sampler import Pick, Sampler, slot_of

# One format that can name other files or addresses (playlists, ffconcat, SDP) would open them: only plain containers.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,h264,hevc,mjpeg,ogg"
RAW_FORMATS = frozenset({"h264", "hevc", "mjpeg", "mpegvideo"})
PROBED_PACKETS = 500


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
    """Open a file without following anything it may refer to. Raises UnsupportedMedia and MemoryError."""
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    reason = None
    try:
        container = av.open(f"file:{path.absolute()}", options=options)
    except MemoryError:  # says nothing about the file
        raise
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
    """Decode one packet; a damaged one yields nothing, and the file goes on behind it. Raises MemoryError."""
    try:
        return packet.decode()
    except MemoryError:
        raise
    except FFmpegError:
        return []


class ArchiveReader:
    """Reads the pictures of a file's slots that come after `last_slot`.

    `duration_s` is the length, known once the first picture comes; `missing` grows by what the reader could not get
    before each picture: slots whose pictures are damaged and, at last, those between the file's real and its stated
    end. A slot in which the file simply has no picture is absent without being missing.
    """

    def __init__(self, path: Path, *, fps: float, last_slot: int | None, max_pixels: int) -> None:
        self.duration_s: float | None = None
        self.missing: list[Missing] = []
        self._path = path
        self._fps = fps
        self._first_slot = 0 if last_slot is None else last_slot + 1
        self._max_pixels = max_pixels

    def pictures(self, halt: Event) -> Generator[ArchivePicture]:
        """Yield the pictures in slot order until the end of the file or `halt`. Raises UnsupportedMedia."""
        with open_archive(self._path, max_pixels=self._max_pixels) as container:
            index = PacketIndex.read(video_stream(container), packets(container), halt)
            stated_end_s = _stated_end_s(container, index.start_s)
        if halt.is_set():
            return
        self.duration_s = max(index.end_s, stated_end_s)
        sampler = Sampler(self._fps, last_slot=self._first_slot - 1, frame_s=index.frame_s)
        plan = DecodePlan.build(index, self._fps, self._first_slot)
        expected = self._expected(index.end_s, plan.slots)
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

    def _walk(
        self, index: PacketIndex, plan: DecodePlan, sampler: Sampler, halt: Event
    ) -> Iterator[tuple[Pick, av.VideoFrame]]:
        with open_archive(self._path, max_pixels=self._max_pixels) as container:
            for image in self._images(container, index, plan, halt):
                pick = sampler.offer(None if image.pts is None else image.pts * index.tick_s)
                if pick is not None:
                    yield pick, image

    def _images(
        self, container: InputContainer, index: PacketIndex, plan: DecodePlan, halt: Event
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

    def _expected(self, end_s: float, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots that should have a picture: those that the index promises, and a tail that was cut off."""
        stated_s = self.duration_s or 0.0
        if stated_s - end_s > 1.5 / self._fps:
            tail = np.arange(slot_of(end_s, self._fps), math.ceil(stated_s * self._fps - 1e-6), dtype=np.int64)
            slots = np.union1d(slots, tail[tail >= self._first_slot])
        return slots


def _stated_end_s(container: InputContainer, first_s: float) -> float:
    """Return where the file says its video ends, counted from its first picture; 0 when it does not say."""
    stream = video_stream(container)
    if container.format.name in RAW_FORMATS:
        return 0.0  # they hold no length: FFmpeg guesses one from the bit rate
    if stream.duration and stream.time_base:
        start = stream.start_time if stream.start_time is not None else round(first_s / stream.time_base)
        return float((start + stream.duration) * stream.time_base) - first_s
    length_s = duration_s(container)
    if length_s is None:
        return 0.0
    start_s = container.start_time / av.time_base if container.start_time is not None else first_s
    return start_s + length_s - first_s


def _runs(slots: NDArray[np.int64]) -> list[Missing]:
    """Return sorted slots as runs."""
    if not len(slots):
        return []
    breaks = np.flatnonzero(np.diff(slots) > 1) + 1
    return [Missing(int(run[0]), int(run[-1]) + 1, "decode_error") for run in np.split(slots, breaks)]
