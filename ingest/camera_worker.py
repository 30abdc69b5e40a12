"""Keeps one camera coming: a reading thread, a bounded queue, reconnects without end."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from threading import Event, Thread

from ingest.address import BadUrl, public_url
from ingest.assignment import Assignment, Camera, CameraState, Missing, MissingReason
from ingest.backoff import Backoff, HourCount
from ingest.camera import CameraAuthFailed, CameraFault, CameraPathNotFound, CameraSession, Picture
from ingest.clock import CaptureClock
from ingest.exchange import CameraNews
from ingest.frame import Frame
from ingest.keyframe import KeyframeMaker, jpeg
from ingest.picture_watch import PictureWatch
from ingest.sampler import Sampler, milliseconds, slot_of
from ingest.settings import IngestSettings

logger = logging.getLogger(__name__)

TROUBLE_S = 60.0  # how long shed frames and holes keep a camera `degraded`
CLOCK_ERROR_S = 60.0  # how far ahead of ours the clock of a former owner may have been


@dataclass(eq=False)
class _Reading:
    """One life of the reading thread. A thread that hangs inside FFmpeg is left to itself, with `halt` set."""

    halt: Event = field(default_factory=Event)
    beat_at: float = field(default_factory=time.monotonic)
    thread: Thread | None = None


class CameraWorker:
    """Reads one camera until stopped, whatever the camera does.

    `take` is the consumer's side. The queue drops its oldest frame when it is full. No slot is ever sent twice, across
    all connections.
    """

    def __init__(self, assignment: Assignment, settings: IngestSettings, size_px: int) -> None:
        assert isinstance(assignment.media, Camera)
        self.assignment = assignment
        self._camera = assignment.media
        self._settings = settings
        self._size_px = size_px
        self._lock = threading.Lock()
        self._reading = _Reading()
        self._abandoned: list[_Reading] = []
        self._queue: deque[Frame] = deque()
        self._missing: list[Missing] = []
        self._last_slot = _plausible(assignment)
        self._last_picture_at = 0.0
        self._reconnects = HourCount()
        self._dropped = 0
        self._state: CameraState = "connecting"
        self._reason: str | None = None
        self._since = time.time()
        self._next_retry_at: float | None = None
        self._trouble: tuple[float, str] | None = None
        self._wrong: str | None = None  # with the newest picture
        self._clock = CaptureClock()

    @property
    def stuck_threads(self) -> int:
        """How many reading threads were given up and still have not come back out of FFmpeg."""
        self._abandoned = [reading for reading in self._abandoned if reading.thread and reading.thread.is_alive()]
        return len(self._abandoned)

    def start(self, delay_s: float = 0.0) -> None:
        """Begin to read, after a while."""
        logger.info("%s reading %s", self.assignment.source_id, public_url(self._camera.url))
        self._start_reading(delay_s)

    def stop(self) -> None:
        """Ask the thread to end, and return at once: a thread inside FFmpeg may need twice the read timeout."""
        self._reading.halt.set()

    def join(self, timeout_s: float) -> None:
        if self._reading.thread is not None:
            self._reading.thread.join(timeout_s)

    def take(self, limit: int) -> list[Frame]:
        """Remove and return at most `limit` frames, oldest first."""
        with self._lock:
            return [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]

    def shed(self, slots: Sequence[int]) -> None:
        """Count frames taken before that were given up; whoever gave them up tells that they are missing."""
        with self._lock:
            self._count_shed(len(slots))

    def take_missing(self) -> list[Missing]:
        """Remove and return the slots known to stay empty since the last call."""
        with self._lock:
            missing, self._missing = self._missing, []
            return missing

    def news(self, now: float) -> CameraNews:
        with self._lock:
            self._grade(now)
            return CameraNews(
                state=self._state,
                reason=self._reason,
                since=self._since,
                reconnects_1h=self._reconnects.total(now),
                dropped_frames=self._dropped,
                next_retry_at=self._next_retry_at,
                clock=self._clock.source,
            )

    def supervise(self, monotonic: float) -> None:
        """Replace a reading thread that has not stirred for longer than every timeout of FFmpeg together."""
        patience_s = 2 * self._settings.open_timeout_s + 2 * self._settings.read_timeout_s
        reading = self._reading
        if reading.halt.is_set() or monotonic - reading.beat_at < patience_s:
            return
        reading.halt.set()
        self._abandoned.append(reading)
        logger.error("%s reading thread hangs: replaced by a new one", self.assignment.source_id)
        with self._lock:
            self._set("reconnecting", "the connection hung and was given up")
        self._start_reading()

    def _start_reading(self, delay_s: float = 0.0) -> None:
        reading = _Reading()
        name = f"camera-{self.assignment.source_id}"
        reading.thread = Thread(target=self._read, args=(reading, delay_s), name=name, daemon=True)
        self._reading = reading
        reading.thread.start()

    def _read(self, reading: _Reading, delay_s: float) -> None:
        reading.halt.wait(delay_s)
        settings = self._settings
        backoff = Backoff(settings.backoff_min_s, settings.backoff_max_s)
        while not reading.halt.is_set():
            started = time.monotonic()
            fault = self._connect(reading)
            if reading.halt.is_set():
                return
            if self._last_picture_at - started >= settings.healthy_s:
                backoff.reset()
            self._wait(reading, fault, self._wait_s(fault, backoff))

    def _connect(self, reading: _Reading) -> Exception:
        """Read one connection to its end and return why it ended."""

        def beat() -> None:
            reading.beat_at = time.monotonic()

        beat()
        sampler = Sampler(self.assignment.fps, last_slot=self._last_slot)
        session = CameraSession(self._camera, sampler, self._settings, reading.halt, beat)
        maker, watch = KeyframeMaker(self._size_px), PictureWatch(self._settings.frozen_s)
        damaged: int | None = None  # None until the first picture
        self._clock = session.clock
        try:
            with closing(session.pictures()) as pictures:
                for picture in pictures:
                    pixels = maker.pixels(picture.image)
                    wrong, hole = watch.see(pixels, picture.time_s), _hole(damaged, session.damaged)
                    self._keep(reading, picture, jpeg(pixels), hole=hole, wrong=wrong)
                    damaged = session.damaged
        except (CameraFault, BadUrl) as error:
            # Its traceback holds the frames of the connection, and with them the decoder, until the next one ends or,
            # where a frame holds the error too, until a rare collection of garbage.
            return error.with_traceback(None)
        except Exception as error:  # never give up; and no traceback: errors of PyAV hold the URL with the password
            logger.error("%s reading failed with %s", self.assignment.source_id, type(error).__name__)
            return CameraFault(f"reading failed with {type(error).__name__}")
        return CameraFault("stopped")

    def _keep(
        self, reading: _Reading, picture: Picture, keyframe: bytes, *, hole: MissingReason | None, wrong: str | None
    ) -> None:
        """Queue a picture, and note what is `wrong` with it.

        `hole` says what slots before it are missing for; None is a new connection's first.
        """
        assignment = self.assignment
        frame = Frame(assignment.source_id, picture.slot, milliseconds(picture.time_s), keyframe, assignment.epoch)
        with self._lock:
            if reading.halt.is_set():
                return
            if self._last_slot is not None and picture.slot > self._last_slot + 1:
                self._missing.append(Missing(self._last_slot + 1, picture.slot, hole or "stream_down"))
                if hole is not None:
                    self._trouble = (time.time(), "pictures are missing")
            self._wrong = wrong
            self._last_slot = picture.slot
            self._last_picture_at = time.monotonic()
            self._queue.append(frame)
            if len(self._queue) > self._settings.queue_frames:
                self._shed(self._queue.popleft().slot)
            if self._state not in ("online", "degraded"):
                self._set("online", None)
                logger.info("%s online", assignment.source_id)

    def _count_shed(self, frames: int) -> None:
        self._dropped += frames
        self._trouble = (time.time(), "frames were shed: the service is behind")

    def _shed(self, slot: int) -> None:
        self._count_shed(1)
        if self._missing and self._missing[-1].reason == "shed" and self._missing[-1].end_slot == slot:
            self._missing[-1] = Missing(self._missing[-1].start_slot, slot + 1, "shed")
        else:
            self._missing.append(Missing(slot, slot + 1, "shed"))

    def _wait_s(self, fault: Exception, backoff: Backoff) -> float:
        # A camera that had this path is about to start; of one that never had it, somebody mistyped the path.
        never_was = isinstance(fault, CameraPathNotFound) and self._last_picture_at == 0
        if isinstance(fault, CameraAuthFailed) or never_was:
            return self._settings.auth_retry_s
        if isinstance(fault, BadUrl):
            return self._settings.backoff_max_s
        return backoff.next_s()

    def _wait(self, reading: _Reading, fault: Exception, wait_s: float) -> None:
        state: CameraState = "auth_failed" if isinstance(fault, CameraAuthFailed) else "reconnecting"
        with self._lock:
            if reading.halt.is_set():
                return
            if (state, str(fault)) != (self._state, self._reason):  # not every try of a camera that is away for days
                logger.warning("%s %s: %s; tried again until it answers", self.assignment.source_id, state, fault)
            self._set(state, str(fault))
            self._next_retry_at = time.time() + wait_s
        reading.beat_at = time.monotonic() + wait_s
        reading.halt.wait(wait_s)
        with self._lock:
            self._next_retry_at = None
            self._reconnects.add(time.time())

    def _grade(self, now: float) -> None:
        """Choose between online and degraded; other states stay as they are."""
        if self._state not in ("online", "degraded"):
            return
        silent_s, jumped = time.monotonic() - self._last_picture_at, self._clock.jumped
        if jumped is not None and time.monotonic() - jumped[0] < TROUBLE_S:
            self._set("degraded", jumped[1])
        elif silent_s > 2 and self._last_slot is not None and self._last_slot > slot_of(now, self.assignment.fps) + 1:
            self._set("degraded", "waiting for a time that is not in memory yet: a clock was ahead before")
        elif silent_s > 2 + 3 / self.assignment.fps:
            self._set("degraded", "no new picture for several slots")
        elif self._trouble is not None and now - self._trouble[0] < TROUBLE_S:
            self._set("degraded", self._trouble[1])
        elif self._wrong is not None:
            self._set("degraded", self._wrong)
        else:
            self._set("online", None)

    def _set(self, state: CameraState, reason: str | None) -> None:
        if state != self._state:
            self._since = time.time()
        self._state, self._reason = state, reason


def _plausible(assignment: Assignment) -> int | None:
    """Return the assignment's last slot, None if it lies in the future: a clock was wrong, nothing may wait for it."""
    last, now = assignment.last_slot, slot_of(time.time() + CLOCK_ERROR_S, assignment.fps)
    if last is not None and last > now:
        logger.warning("%s last slot %d lies in the future and is ignored", assignment.source_id, last)
        return None
    return last


def _hole(damaged_before: int | None, damaged_now: int) -> MissingReason | None:
    if damaged_before is None:
        return None
    return "decode_error" if damaged_now > damaged_before else "stream_down"
