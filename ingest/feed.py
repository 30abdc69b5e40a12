"""What ingest has of a source that another process reads: its frames, its gaps and how it does."""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from ingest.assignment import ArchiveReport, Assignment, CameraReport, Damage, Missing, MissingReason
from ingest.backoff import HourCount
from ingest.exchange import ArchiveNews, CameraNews, SourceNews
from ingest.frame import Frame

ARCHIVE_TRIES = 3  # of a file whose process dies, without one more frame in between
BACKLOG_S = 5.0  # queues empty within it, and the reading process has told what they had to let go


class Feed(ABC):
    """One source. Two sides use it, each from its own thread.

    The service takes frames and says what became of them: `take`, `settled`, `shed`, `note_full`, `take_missing`,
    `give_back`, `report`. The process that reads brings what is new: `room`, `bring`, `take_shed`, `interrupt`.
    """

    kind: ClassVar[str]  # of its news

    def __init__(self, assignment: Assignment, queue_frames: int) -> None:
        self._assignment = assignment
        self._queue_frames = queue_frames
        self._lock = threading.Lock()
        self._queue: deque[Frame] = deque()
        self._missing: list[Missing] = []
        self._last_slot = assignment.last_slot

    @property
    def assignment(self) -> Assignment:
        """The work that is left: it goes on after the last frame that came."""
        return replace(self._assignment, last_slot=self._last_slot)

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether nothing is left to do."""

    def take(self, limit: int) -> list[Frame]:
        """Remove and return at most `limit` frames, oldest first."""
        with self._lock:
            return [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]

    @abstractmethod
    def settled(self, frames: Sequence[Frame], now: float) -> None:
        """Note that frames are durable."""

    @abstractmethod
    def shed(self, frames: Sequence[Frame]) -> None:
        """Note that frames taken before are given up."""

    @abstractmethod
    def note_full(self, advice: str) -> None:
        """Note that frames taken before find no room, and what to do about it; the next that are settled end it."""

    def take_missing(self) -> list[Missing]:
        """Remove and return the slots known to stay empty since the last call."""
        with self._lock:
            missing, self._missing = self._missing, []
            return missing

    def give_back(self, missing: Sequence[Missing]) -> None:
        """Return what was taken and could not be told."""
        with self._lock:
            self._missing[:0] = missing

    @abstractmethod
    def report(self, now: float) -> CameraReport | ArchiveReport:
        """Say how the source does."""

    def room(self) -> int:
        """Return how many frames may be brought."""
        with self._lock:
            return self._queue_frames - len(self._queue)

    def take_shed(self) -> tuple[int, ...]:
        """Remove and return the slots that were given up since the last call."""
        return ()

    def bring(self, news: SourceNews, keyframes: Sequence[bytes]) -> None:
        """Add what is new, with the keyframes of its frames."""
        source_id, epoch = self._assignment.source_id, self._assignment.epoch
        with self._lock:
            for head, keyframe in zip(news.frames, keyframes, strict=True):
                self._queue.append(Frame(source_id, head.slot, head.time_ms, keyframe, epoch))
                self._last_slot = head.slot
            for run in self._explained(news.missing):
                self._add_missing(run)
            self._note(news)

    def _add_missing(self, run: Missing) -> None:
        """Join a run with the one before it: while nobody can be told, there are more and more of them."""
        last = self._missing[-1] if self._missing else None
        if last is not None and (last.end_slot, last.reason) == (run.start_slot, run.reason):
            self._missing[-1] = replace(last, end_slot=run.end_slot)
        else:
            self._missing.append(run)

    def _explained(self, missing: Sequence[Missing]) -> Sequence[Missing]:
        """Say why slots are missing as far as it is known here; called with the lock held."""
        return missing

    @abstractmethod
    def _note(self, news: SourceNews) -> None:
        """Note how the source does; called with the lock held."""

    @abstractmethod
    def interrupt(self, reason: str) -> None:
        """Note that the process that read the source `reason`, such as "ended with code 1"; another one goes on."""


class CameraFeed(Feed):
    """A live camera. It never ends."""

    kind = "camera"

    def __init__(self, assignment: Assignment, queue_frames: int) -> None:
        super().__init__(assignment, queue_frames)
        self._shed: list[int] = []
        self._news = CameraNews(
            state="connecting",
            reason=None,
            since=time.time(),
            reconnects_1h=0,
            dropped_frames=0,
            next_retry_at=None,
            clock="arrival",
        )
        self._frames = HourCount()
        self._last_frame_at: float | None = None
        self._lag_s: float | None = None
        self._full: tuple[float, str] | None = None  # since when, and what to do about it
        self._shed_reason: MissingReason = "shed"
        self._room_since = 0.0

    @property
    def is_over(self) -> bool:
        return False

    def settled(self, frames: Sequence[Frame], now: float) -> None:
        with self._lock:
            self._frames.add(now, len(frames))
            self._last_frame_at = frames[-1].time_ms / 1000
            self._lag_s = max(0.0, now - self._last_frame_at)
            if self._full is not None:
                self._full, self._room_since = None, time.monotonic()

    def note_full(self, advice: str) -> None:
        with self._lock:
            self._full = (time.time() if self._full is None else self._full[0], advice)
            self._shed_reason = "store_full"

    def shed(self, frames: Sequence[Frame]) -> None:
        with self._lock:
            self._shed += [frame.slot for frame in frames]
            # Told from here: the process that read them counts them, but it may die before it says so.
            self._missing += [Missing(frame.slot, frame.slot + 1, self._shed_reason) for frame in frames]

    def take_shed(self) -> tuple[int, ...]:
        with self._lock:
            shed, self._shed = self._shed, []
            return tuple(shed)

    def interrupt(self, reason: str) -> None:
        reason = f"the process that reads the camera {reason} and is started again"
        update = {"state": "reconnecting", "reason": reason, "since": time.time(), "next_retry_at": None}
        with self._lock:
            self._news = self._news.model_copy(update=update)

    def report(self, now: float) -> CameraReport:
        with self._lock:
            news = self._news
            state, reason, since = news.state, news.reason, news.since
            if self._full is not None and state in ("online", "degraded"):
                state, since, reason = "degraded", self._full[0], f"frames are not kept: {self._full[1]}"
            return CameraReport(
                state=state,
                reason=reason,
                since=since,
                last_frame_at=self._last_frame_at,
                lag_s=self._lag_s,
                reconnects_1h=news.reconnects_1h,
                frames_1h=self._frames.total(now),
                dropped_frames=news.dropped_frames,
                next_retry_at=news.next_retry_at,
                clock=news.clock,
            )

    def _note(self, news: SourceNews) -> None:
        assert isinstance(news.news, CameraNews)
        self._news = news.news

    def _explained(self, missing: Sequence[Missing]) -> Sequence[Missing]:
        told = [replace(run, reason=self._shed_reason) if run.reason == "shed" else run for run in missing]
        is_over = self._full is None and time.monotonic() - self._room_since > BACKLOG_S
        if is_over and not any(run.reason == "shed" for run in missing):
            self._shed_reason = "shed"
        return told


class ArchiveFeed(Feed):
    """A recorded file. It is ready when all of its frames are durable; it gives up none of them in silence."""

    kind = "archive"

    def __init__(self, assignment: Assignment, queue_frames: int) -> None:
        super().__init__(assignment, queue_frames)
        self._news = ArchiveNews(is_read=False, duration_s=None, held_s=None, is_cut=False, damaged=0, error=None)
        self._in_flight = 0
        self._lost_s = 0.0 if assignment.damage is None else assignment.damage.lost_s
        self._errors = 0 if assignment.damage is None else assignment.damage.errors  # before this process
        self._settled_s = 0.0
        self._started_at = time.monotonic()
        self._first_progress: float | None = None
        self._deaths = 0  # of its process since the last frame
        self._error: str | None = None

    @property
    def is_over(self) -> bool:
        with self._lock:
            return self._failure() is not None or self._is_done()

    def take(self, limit: int) -> list[Frame]:
        frames = super().take(limit)
        with self._lock:
            self._in_flight += len(frames)
        return frames

    def settled(self, frames: Sequence[Frame], now: float) -> None:
        with self._lock:
            self._in_flight -= len(frames)
            self._settled_s = frames[-1].time_ms / 1000

    def shed(self, frames: Sequence[Frame]) -> None:
        with self._lock:
            self._in_flight -= len(frames)
            self._error = "the service could not take the pictures of the file"

    def note_full(self, advice: str) -> None:
        """Files wait as long as it takes, and lose nothing."""

    def interrupt(self, reason: str) -> None:
        with self._lock:
            self._deaths += 1
            self._errors += self._news.damaged
            self._news = self._news.model_copy(update={"damaged": 0})
            if self._deaths >= ARCHIVE_TRIES:
                read_s = 0 if self._last_slot is None else (self._last_slot + 1) / self._assignment.fps
                self._error = (
                    f"the file cannot be decoded beyond {read_s:g} s: the process that decodes it {reason}, "
                    f"{self._deaths} times"
                )

    def report(self, now: float) -> ArchiveReport:
        with self._lock:
            duration_s, failure = self._news.duration_s, self._failure()
            if failure is not None:
                return ArchiveReport("failed", self._progress(), None, duration_s, failure, self._damage())
            if self._is_done():
                return ArchiveReport("ready", 1.0, 0.0, duration_s, None, self._damage())
            progress = self._progress()
            return ArchiveReport("processing", progress, self._eta_s(progress), duration_s, None, self._damage())

    def _note(self, news: SourceNews) -> None:
        assert isinstance(news.news, ArchiveNews)
        self._news = news.news
        self._lost_s += sum(run.end_slot - run.start_slot for run in news.missing) / self._assignment.fps
        if news.frames:
            self._deaths = 0

    def _failure(self) -> str | None:
        return self._error or self._news.error

    def _is_done(self) -> bool:
        return self._news.is_read and not self._queue and self._in_flight == 0

    def _damage(self) -> Damage | None:
        held_s, errors = self._news.held_s, self._errors + self._news.damaged
        if held_s is None or not (self._news.is_cut or self._lost_s or errors):
            return None
        return Damage(held_s=held_s, lost_s=self._lost_s, errors=errors)

    def _progress(self) -> float:
        duration_s = self._news.duration_s
        return min(0.999, self._settled_s / duration_s) if duration_s else 0.0

    def _eta_s(self, progress: float) -> float | None:
        """Extrapolate from the progress since the first that was seen: a resumed file begins in the middle."""
        if progress == 0:
            return None
        if self._first_progress is None:
            self._first_progress, self._started_at = progress, time.monotonic()
        gained = progress - self._first_progress
        return (time.monotonic() - self._started_at) * (1 - progress) / gained if gained > 0 else None
