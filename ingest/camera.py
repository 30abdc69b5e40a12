"""One connection to a live camera, read on the caller's thread.

Facts about FFmpeg and cameras that shape this file, all measured:
the end of iteration on a live source is a loss, not an end; closing a container from another thread crashes the
process; the text of every PyAV error holds the whole URL, password included; `fflags=nobuffer` drops up to a GOP;
`stimeout` is silently ignored; a read timeout is noticed after twice its time.
"""

import logging
import ssl
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from threading import Event

import av
from av import Packet, VideoStream
from av.container import InputContainer
from av.error import FFmpegError, HTTPForbiddenError, HTTPNotFoundError, HTTPUnauthorizedError

from ingest.address import AddressPolicy, UnknownHost, resolve_camera
from ingest.assignment import Camera
from ingest.clock import CaptureClock
from ingest.keyframe import snapshot
from ingest.relay import NotRtsp, Redirects, Relay
from ingest.sampler import Sampler, slot_of
from ingest.settings import IngestSettings

logger = logging.getLogger(__name__)

_WATCHED_S = 1.0
_WAITED_S = 0.01  # a packet that took so long to get was not there before it was asked for
_HELD_PACKETS = 250
_SAME_S = 1e-3  # times that differ less are the same
_JITTER_S = 0.1  # of the time stamps of keyframes
_FASTEST_FPS = 240.0  # of cameras: every picture has a slot of its own


class CameraFault(Exception):
    """Why a connection did not come about or ended; messages hold neither URL nor password."""


class CameraUnreachable(CameraFault, ConnectionError):
    """Nothing answers at the address, or what answers is no RTSP server."""


class CameraAuthFailed(CameraFault, PermissionError):
    """The camera refused the user name or the password."""


class CameraPathNotFound(CameraFault, LookupError):
    """The camera answers, but has no such stream."""


class CameraRedirects(CameraFault, ConnectionError):
    """The camera sends its readers to another address."""


class CameraTimeout(CameraFault, TimeoutError):
    """The camera stopped sending, or never answered."""


class CameraEnded(CameraFault, ConnectionError):
    """The camera ended the connection."""


class NoVideo(CameraFault, ValueError):
    """The stream carries no video that can be decoded."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The picture chosen for a slot; `time_s` is its capture time in unix seconds."""

    slot: int
    time_s: float
    image: av.VideoFrame


@dataclass(frozen=True, slots=True)
class CameraFacts:
    """What a camera sends: seen in about a second of it.

    `fps` is measured, None where the camera sent too little; `first_frame_ms` counts from the first attempt to connect
    to the first picture; `snapshot` is that picture as JPEG, made smaller if it is large.
    """

    codec: str
    width: int
    height: int
    fps: float | None
    first_frame_ms: int
    snapshot: bytes


class CameraSession:
    """Opens a camera once and yields the pictures of new slots until the connection is lost.

    `halt` ends it at the next packet; `beat` is called whenever something arrives. `damaged` counts the packets that
    could not be decoded, `clock` says whose clock gave the times; `codec` is known with the first picture.
    """

    def __init__(
        self, camera: Camera, sampler: Sampler, settings: IngestSettings, halt: Event, beat: Callable[[], None]
    ) -> None:
        self.damaged = 0
        self.codec: str | None = None
        self._camera = camera
        self._sampler = sampler
        self._settings = settings
        self._halt = halt
        self._beat = beat
        self.clock = CaptureClock()
        self._gate = PacketGate(sampler)

    def pictures(self) -> Generator[Picture]:
        """Yield chosen pictures; returns only when halted. Raises CameraFault, and BadUrl for a forbidden address."""
        with self._connected() as relay:
            container = self._open(relay)
            try:
                for packet, time_s in self._packets(container):
                    if self._gate.wants(packet.is_keyframe, time_s):
                        yield from self._decode(packet, _start_realtime(container))
            finally:
                container.close()
        if not self._halt.is_set():
            raise CameraEnded("the camera ended the connection")

    def _connected(self) -> Relay:
        fault: CameraFault
        try:
            address = resolve_camera(self._camera.url, AddressPolicy(self._settings.allowed_networks))
            return Relay(self._camera.url, address, self._settings.open_timeout_s)
        except UnknownHost as error:
            fault = CameraUnreachable(str(error))
        except OSError as error:
            fault = _fault(error)
        raise fault

    def _open(self, relay: Relay) -> InputContainer:
        camera, settings = self._camera, self._settings
        url = relay.reader_url(camera.username, camera.password)
        options = {
            "rtsp_transport": camera.transport,
            "allowed_media_types": "video",  # sound would keep a connection alive whose video has stalled
            "fpsprobesize": "0",
            "analyzeduration": "2000000",
            "protocol_whitelist": "rtsp,rtp,tcp,udp",
        }
        fault: CameraFault
        try:
            timeout = (settings.open_timeout_s, settings.read_timeout_s)
            container = av.open(url, format="rtsp", options=options, timeout=timeout)
        except (FFmpegError, OSError, ValueError) as error:
            fault = _fault(relay.error or error)
        else:
            if container.streams.video:
                return container
            container.close()
            fault = NoVideo("the stream carries no video")
        raise fault  # outside of the handler: the original error, which holds the password, is not chained

    def _packets(self, container: InputContainer) -> "Iterator[tuple[Packet[VideoStream], float | None]]":
        """Yield packets with their capture time; a packet without a time stamp (often the first) has None.

        What came while the connection was opened arrives late and at once, a second and more of it. It is held until
        the first packet that had to be waited for: only that one tells by its arrival when it was taken.
        """
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(self._settings.max_pixels)}
        self.codec = stream.codec_context.name
        fault: CameraFault | None = None
        held: list[Packet[VideoStream]] = []
        is_opening, asked = True, time.monotonic()
        try:
            for packet in container.demux(stream):
                if self._halt.is_set() or packet.size == 0:  # empty packets flush decoders: the camera is gone
                    break
                arrived, monotonic = time.time(), time.monotonic()
                self._beat()
                if packet.pts is not None:
                    self.clock.observe(_stream_time(packet), arrived, monotonic, _start_realtime(container))
                held.append(packet)
                is_opening = is_opening and monotonic - asked < _WAITED_S and len(held) < _HELD_PACKETS
                if not is_opening:
                    yield from self._timed(held, container)
                    held = []
                asked = time.monotonic()
        except (FFmpegError, OSError) as error:
            fault = _fault(error)
        yield from self._timed(held, container)
        if fault is not None:
            raise fault

    def _timed(
        self, packets: "Sequence[Packet[VideoStream]]", container: InputContainer
    ) -> "Iterator[tuple[Packet[VideoStream], float | None]]":
        start_realtime = _start_realtime(container)
        for packet in packets:
            yield packet, None if packet.pts is None else self.clock.wall(_stream_time(packet), start_realtime)

    def _decode(self, packet: "Packet[VideoStream]", start_realtime: float | None) -> Iterator[Picture]:
        context = packet.stream.codec_context
        try:
            images = list(packet.decode())
            if self._gate.skips_rest:
                # The decoder holds pictures back to reorder them: with nothing to follow, make it let go.
                images += context.decode(None)
                context.flush_buffers()
        except FFmpegError:
            self.damaged += 1
            return
        for image in images:
            if image.pts is None:
                continue
            time_s = self.clock.wall(float(image.pts * packet.time_base), start_realtime)
            pick = None if time_s is None or not self._gate.is_whole(time_s) else self._sampler.offer(time_s)
            if pick is not None:
                yield Picture(pick.slot, pick.time_s, image)


def look_at_camera(camera: Camera, settings: IngestSettings) -> CameraFacts:
    """Open a camera, watch it for a second and close it. Raises CameraFault, and BadUrl for a forbidden address."""
    started = time.monotonic()
    session = CameraSession(camera, Sampler(_FASTEST_FPS), settings, Event(), lambda: None)
    with closing(session.pictures()) as pictures:
        first = next(pictures)
        first_frame_ms = round(1000 * (time.monotonic() - started))
        last, count = first, 1
        try:
            for last in pictures:
                count += 1
                if last.time_s - first.time_s >= _WATCHED_S:
                    break
        except CameraFault:  # it has shown what it sends
            pass
    seconds = last.time_s - first.time_s
    image = first.image
    return CameraFacts(
        codec=session.codec or "",
        width=image.width,
        height=image.height,
        fps=round((count - 1) / seconds, 2) if seconds > 0 else None,
        first_frame_ms=first_frame_ms,
        snapshot=snapshot(image),
    )


class PacketGate:
    """Decides which packets are worth decoding: with frequent keyframes, they alone cost a fifth.

    Applies where four keyframes in a row are at most 1.05 slots apart and a slot lasts a second or more. Where the
    next keyframe may come too late for the next slot, the pictures behind this one are decoded until one lies in it.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.skips_rest = False  # up to the next keyframe
        self._sampler = sampler
        self._keys: list[float] = []
        self._next_slot: int | None = None  # for which the pictures behind the keyframe are decoded
        self._whole_from: float | None = None

    def wants(self, is_keyframe: bool, time_s: float | None) -> bool:
        """Tell whether to decode the packet; to be asked of every packet in order."""
        if not is_keyframe:
            return not (self.skips_rest or (self._next_slot is not None and self._sampler.is_taken(self._next_slot)))
        self.skips_rest, self._next_slot, self._whole_from = False, None, None
        if time_s is None:
            return True
        self._keys = [*self._keys[-3:], time_s]
        spacing = max((later - earlier for earlier, later in pairwise(self._keys)), default=0.0)
        fps = self._sampler.fps
        if fps > 1 or len(self._keys) < 4 or not 0 < spacing <= 1.05 / fps:
            return True
        slot, self._whole_from = slot_of(time_s, fps), time_s
        if slot_of(time_s + spacing + _JITTER_S, fps) > slot + 1:
            self._next_slot = slot + 1
            return True
        self.skips_rest = True
        return not self._sampler.is_taken(slot)

    def is_whole(self, time_s: float) -> bool:
        """Tell whether a picture was predicted from decoded ones only; those shown before a keyframe may not be."""
        return self._whole_from is None or time_s > self._whole_from - _SAME_S


def _stream_time(packet: "Packet[VideoStream]") -> float:
    assert packet.pts is not None
    return float(packet.pts * packet.time_base)


def _start_realtime(container: InputContainer) -> float | None:
    """Return the unix time of stream time 0 by the camera's clock; None until it has reported one."""
    micros = container.start_time_realtime
    return micros / 1e6 if micros else None


def _fault(error: Exception) -> CameraFault:
    """Name what happened. Of the error only its kind and `strerror` may be told: the rest holds the password."""
    if isinstance(error, HTTPUnauthorizedError | HTTPForbiddenError):
        return CameraAuthFailed("the camera refused the user name or the password")
    if isinstance(error, HTTPNotFoundError):
        return CameraPathNotFound("the camera has no stream at this path")
    if isinstance(error, TimeoutError | av.error.ExitError):
        return CameraTimeout("the camera sent nothing for too long")
    if isinstance(error, Redirects):
        return CameraRedirects("the camera redirects to another address: register that one if it is the right one")
    if isinstance(error, ssl.SSLError):
        return CameraUnreachable("what answers at this address does not speak TLS as we do: try rtsp:// if you may")
    if isinstance(error, av.error.InvalidDataError | NotRtsp):
        return CameraUnreachable("what answers at this address does not speak RTSP, or answers too late")
    if isinstance(error, ConnectionRefusedError):
        return CameraUnreachable("connection refused: nothing listens on this port")
    reason = error.strerror if isinstance(error, OSError | FFmpegError) and error.strerror else type(error).__name__
    return CameraUnreachable(f"the connection failed: {reason}")
