"""Reads one recorded file in a thread: fetch it if need be, decode it, hand every picture over."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from threading import Event, Thread

from ingest.address import AddressPolicy, BadUrl
from ingest.archive import ArchiveLimits, ArchiveReader, UnsupportedMedia
from ingest.assignment import Archive, Assignment, Missing
from ingest.backoff import Backoff
from ingest.download import Downloader, DownloadFailed, DownloadTooLarge, NoRoom
from ingest.exchange import ArchiveNews
from ingest.frame import Frame
from ingest.keyframe import KeyframeMaker
from ingest.sampler import milliseconds
from ingest.settings import IngestSettings

logger = logging.getLogger(__name__)

DOWNLOAD_TRIES = 4


class ArchiveWorker:
    """Reads one file to its end, no faster than frames are taken: `take` is the consumer's side."""

    def __init__(
        self, assignment: Assignment, settings: IngestSettings, size_px: int, upload_dir: Path, spare_bytes: int
    ) -> None:
        assert isinstance(assignment.media, Archive)
        self.assignment = assignment
        self._archive = assignment.media
        self._settings = settings
        self._size_px = size_px
        self._upload_dir = upload_dir
        self._spare_bytes = spare_bytes
        self._changed = threading.Condition()
        self._halt = Event()
        self._thread: Thread | None = None
        self._reader: ArchiveReader | None = None
        self._queue: deque[Frame] = deque()
        self._missing: list[Missing] = []
        self._beat_at: float | None = None  # None while nothing is decoded
        self._is_read = False
        self._error: str | None = None

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
            self._changed.notify_all()
            return frames

    def take_missing(self) -> list[Missing]:
        """Remove and return the slots known to stay empty since the last call."""
        with self._changed:
            missing, self._missing = self._missing, []
            return missing

    def shed(self, slots: Sequence[int]) -> None:
        """Files shed nothing."""

    def supervise(self, monotonic: float) -> None:
        """Fail when the decoder has been at the same packet for too long; the thread is left to itself."""
        patience_s = self._settings.look_timeout_s
        with self._changed:
            if self._beat_at is not None and monotonic - self._beat_at > patience_s:
                self._halt.set()
                self._error = f"the file cannot be decoded: one of its pictures takes more than {patience_s:g} s"

    def news(self, now: float) -> ArchiveNews:
        with self._changed:
            reader = self._reader
            return ArchiveNews(
                is_read=self._is_read and not self._queue,
                duration_s=None if reader is None else reader.duration_s,
                held_s=None if reader is None else reader.held_s,
                is_cut=reader is not None and reader.is_cut,
                damaged=0 if reader is None else reader.damaged,
                error=self._error,
            )

    def _run(self) -> None:
        source_id = self.assignment.source_id
        try:
            error = self._bring_in()
        except (UnsupportedMedia, BadUrl, DownloadFailed, DownloadTooLarge, NoRoom) as failure:
            error = str(failure)
        except OSError as failure:  # its text holds the path
            error = f"the file could not be read or written: {failure.strerror}"
        except MemoryError:
            error = (
                f"the file asks for more memory than {self._settings.max_decoder_bytes} bytes; "
                "TOKENLINE_INGEST__MAX_DECODER_BYTES sets the limit"
            )
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
        loader = Downloader(
            policy,
            max_bytes=settings.max_download_bytes,
            spare_bytes=self._spare_bytes,
            timeout_s=settings.download_timeout_s,
        )
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
        reader = ArchiveReader(
            path,
            fps=assignment.fps,
            last_slot=assignment.last_slot,
            limits=ArchiveLimits.of(settings),
            beat=self._beat,
        )
        with self._changed:
            self._reader = reader
        maker = KeyframeMaker(self._size_px)
        known = 0
        self._beat()
        with closing(reader.pictures(self._halt)) as pictures:
            for picture in pictures:
                time_ms = milliseconds(picture.time_s)
                keyframe = maker.make(picture.image)
                with self._changed:  # before the picture: who goes on behind it does not look back
                    self._missing += reader.missing[known:]
                    known = len(reader.missing)
                self._put(Frame(assignment.source_id, picture.slot, time_ms, keyframe, assignment.epoch))
        with self._changed:
            self._beat_at = None
            if not self._halt.is_set():
                self._missing += reader.missing[known:]
                self._is_read = True

    def _put(self, frame: Frame) -> None:
        """Queue a frame once there is room."""
        with self._changed:
            self._beat_at = None
            self._changed.wait_for(lambda: self._halt.is_set() or len(self._queue) < self._settings.queue_frames)
            self._queue.append(frame)
            self._beat_at = time.monotonic()

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
