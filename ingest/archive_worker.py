"""Brings one recorded file in: fetch it if need be, read it, hand every picture over."""

import logging
import threading
import time
from collections import deque
from contextlib import closing
from pathlib import Path
from threading import Event, Thread

from ingest.address import AddressPolicy, BadUrl
from ingest.archive import ArchiveReader, UnsupportedMedia
from ingest.assignment import Archive, ArchiveReport, Assignment, Missing
from ingest.backoff import Backoff
from ingest.download import Downloader, DownloadFailed, DownloadTooLarge
from ingest.frame import Frame
from ingest.keyframe import KeyframeMaker
from ingest.sampler import milliseconds
from ingest.settings import IngestSettings

logger = logging.getLogger(__name__)

DOWNLOAD_TRIES = 4


class ArchiveWorker:
    """Reads one file to its end, no faster than frames are taken, and is ready when all of them are durable.

    `take` and `settled` are the consumer's side: frames taken, and frames that became durable.
    """

    def __init__(self, assignment: Assignment, settings: IngestSettings, size_px: int, upload_dir: Path) -> None:
        assert isinstance(assignment.media, Archive)
        self.assignment = assignment
        self.stuck_threads = 0
        self._archive = assignment.media
        self._settings = settings
        self._size_px = size_px
        self._upload_dir = upload_dir
        self._changed = threading.Condition()
        self._halt = Event()
        self._thread: Thread | None = None
        self._reader: ArchiveReader | None = None
        self._queue: deque[Frame] = deque()
        self._in_flight = 0
        self._missing: list[Missing] = []
        self._started_at = time.monotonic()
        self._first_progress: float | None = None
        self._settled_s = 0.0
        self._is_read = False
        self._error: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do: every frame is durable, or the file failed."""
        with self._changed:
            return self._error is not None or self._is_done()

    def start(self) -> None:
        self._thread = Thread(target=self._run, name=f"archive-{self.assignment.source_id}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end, and return at once."""
        self._halt.set()
        with self._changed:
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def take(self, limit: int) -> list[Frame]:
        """Remove and return at most `limit` frames, in slot order."""
        with self._changed:
            frames = [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]
            self._in_flight += len(frames)
            self._changed.notify_all()
            return frames

    def settled(self, frames: list[Frame], now: float) -> None:
        """Note that frames are durable."""
        with self._changed:
            self._in_flight -= len(frames)
            self._settled_s = frames[-1].time_ms / 1000

    def shed(self, frames: list[Frame]) -> None:
        """Fail: an archive gives up none of its frames in silence."""
        with self._changed:
            self._in_flight -= len(frames)
            self._error = "the service could not take the pictures of the file"

    def take_missing(self) -> list[Missing]:
        """Remove and return the slots known to stay empty since the last call."""
        with self._changed:
            missing, self._missing = self._missing, []
            return missing

    def supervise(self, monotonic: float) -> None:
        """Files on a disk need no watchdog."""

    def report(self, now: float) -> ArchiveReport:
        with self._changed:
            duration_s = None if self._reader is None else self._reader.duration_s
            if self._error is not None:
                return ArchiveReport("failed", self._progress(duration_s), None, duration_s, self._error)
            if self._is_done():
                return ArchiveReport("ready", 1.0, 0.0, duration_s, None)
            progress = self._progress(duration_s)
            return ArchiveReport("processing", progress, self._eta_s(progress), duration_s, None)

    def _is_done(self) -> bool:
        return self._is_read and not self._queue and self._in_flight == 0

    def _progress(self, duration_s: float | None) -> float:
        return min(0.999, self._settled_s / duration_s) if duration_s else 0.0

    def _eta_s(self, progress: float) -> float | None:
        """Extrapolate from the progress since the first that was seen: a resumed file begins in the middle."""
        if progress == 0:
            return None
        if self._first_progress is None:
            self._first_progress, self._started_at = progress, time.monotonic()
        gained = progress - self._first_progress
        return (time.monotonic() - self._started_at) * (1 - progress) / gained if gained > 0 else None

    def _run(self) -> None:
        source_id = self.assignment.source_id
        try:
            error = self._bring_in()
        except (UnsupportedMedia, BadUrl, DownloadFailed, DownloadTooLarge) as failure:
            error = str(failure)
        except OSError as failure:  # its text holds the path
            error = f"the file could not be read or written: {failure.strerror}"
        except Exception as failure:  # the thread's last line of defence: an unforeseen file must not stay `processing`
            logger.exception("%s reading failed", source_id)
            error = f"reading failed with {type(failure).__name__}"
        if error is not None and not self._halt.is_set():
            logger.warning("%s failed: %s", source_id, error)
            with self._changed:
                self._error = error

    def _bring_in(self) -> str | None:
        """Fetch and read the file; return why it failed, or None."""
        if self._archive.path is not None:
            path = (self._upload_dir / self._archive.path).resolve()
            if not path.is_relative_to(self._upload_dir.resolve()):
                return "the file lies outside of the upload folder"
            self._read(path)
            return None
        path = self._upload_dir / f"{self.assignment.source_id}.download"
        self._fetch(self._archive.url or "", path)
        try:
            if not self._halt.is_set():
                self._read(path)
        finally:
            if not self._halt.is_set():  # halted means that somebody goes on with it
                path.unlink(missing_ok=True)
        return None

    def _fetch(self, url: str, path: Path) -> None:
        """Download unless an owner before us already has; network trouble is retried a few times."""
        if path.exists():
            return
        settings = self._settings
        policy = AddressPolicy(settings.allowed_networks)
        loader = Downloader(policy, max_bytes=settings.max_download_bytes, timeout_s=settings.download_timeout_s)
        backoff = Backoff(settings.backoff_min_s, settings.backoff_max_s)
        for tries_left in reversed(range(DOWNLOAD_TRIES)):
            try:
                loader.fetch(url, path, self._halt)
                return
            except DownloadFailed as error:
                if tries_left == 0 or error.is_final:
                    raise
                logger.warning("%s download failed, %d tries left: %s", self.assignment.source_id, tries_left, error)
            if self._halt.wait(backoff.next_s()):
                return

    def _read(self, path: Path) -> None:
        assignment, settings = self.assignment, self._settings
        reader = ArchiveReader(path, fps=assignment.fps, last_slot=assignment.last_slot, max_pixels=settings.max_pixels)
        with self._changed:
            self._reader = reader
        maker = KeyframeMaker(self._size_px)
        known = 0
        with closing(reader.pictures(self._halt)) as pictures:
            for picture in pictures:
                time_ms = milliseconds(picture.time_s)
                keyframe = maker.make(picture.image)
                with self._changed:  # before the picture: who goes on behind it does not look back
                    self._missing += reader.missing[known:]
                    known = len(reader.missing)
                self._put(Frame(assignment.source_id, picture.slot, time_ms, keyframe, assignment.epoch))
        with self._changed:
            if not self._halt.is_set():
                self._missing += reader.missing[known:]
                self._is_read = True

    def _put(self, frame: Frame) -> None:
        """Queue a frame once there is room."""
        with self._changed:
            self._changed.wait_for(lambda: self._halt.is_set() or len(self._queue) < self._settings.queue_frames)
            self._queue.append(frame)
