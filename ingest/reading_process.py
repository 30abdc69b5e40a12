"""The processes that read sources: which source is read where, and what happens when one of them dies."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, islice, pairwise
from pathlib import Path
from threading import Event, Lock, Thread

from pydantic import ValidationError

from ingest.assignment import Archive, Assignment
from ingest.backoff import Backoff
from ingest.child import START_S, Child, ChildDied
from ingest.exchange import Reply, Request, Setup
from ingest.feed import ArchiveFeed, CameraFeed, Feed
from ingest.settings import IngestSettings

logger = logging.getLogger(__name__)

CRASHES_BEFORE_SPLIT = 2
CRASH_MEMORY_S = 600.0  # a process that lived longer starts with a clean record
JOIN_S = 2.0

_BUSY_TICK_S = 0.05  # between two looks at a file: it is read as fast as its frames are taken
_NONSENSE = "said what cannot be understood"


class ReadingProcesses:
    """Reads sources in child processes: a handful of cameras in each, a file alone.

    A process that crashes, or gives no answer, is started again, and its sources go on after the last frame that came:
    so what was missed meanwhile is told like every other gap. Cameras of a process that crashed twice get a process
    each: then only the guilty one goes on crashing.
    """

    def __init__(self, settings: IngestSettings, upload_dir: Path, spare_bytes: int = 0) -> None:
        self._settings = settings
        self._upload_dir = upload_dir
        self._spare_bytes = spare_bytes
        self._lock = Lock()
        self._processes: list[ReadingProcess] = []

    def open(self, assignment: Assignment, size_px: int) -> Feed:
        """Begin to read a source; returns at once."""
        setup = Setup(
            settings=self._settings,
            size_px=size_px,
            upload_dir=str(self._upload_dir),
            spare_bytes=self._spare_bytes,
        )
        if isinstance(assignment.media, Archive):
            file = ArchiveFeed(assignment, self._settings.queue_frames)
            self._start(setup, [file])
            return file
        camera = CameraFeed(assignment, self._settings.queue_frames)
        with self._lock:
            if any(process.add(camera) for process in self._processes):
                return camera
        self._start(setup, [camera])
        return camera

    def close(self, feed: Feed) -> None:
        """Stop reading a source; returns at once."""
        with self._lock:
            for process in self._processes:
                process.remove(feed)
            self._processes = [process for process in self._processes if not process.has_ended]

    @property
    def has_failed(self) -> bool:
        """Whether sources are not read any more though they should be: a fault of this code."""
        with self._lock:
            return any(process.has_failed for process in self._processes)

    @property
    def pids(self) -> list[int]:
        """The processes that run just now."""
        with self._lock:
            return [pid for process in self._processes if (pid := process.pid) is not None]

    def shut(self) -> None:
        """End all processes. Blocks for a moment."""
        with self._lock:
            processes, self._processes = self._processes, []
        for process in processes:
            process.halt()
        for process in processes:
            process.join(JOIN_S)

    def _start(self, setup: Setup, feeds: Sequence[Feed], *, takes_more: bool = True) -> None:
        process = ReadingProcess(setup, feeds, self._split, takes_more=takes_more)
        process.start()
        with self._lock:
            self._processes.append(process)

    def _split(self, process: "ReadingProcess") -> None:
        """Give every camera of a process that crashes again and again a process of its own."""
        with self._lock:
            if process not in self._processes:
                return
            self._processes.remove(process)
        feeds = process.retire()
        logger.error("the process that reads %s crashes: each gets one of its own", _names(feeds))
        for feed in feeds:
            self._start(process.setup, [feed], takes_more=False)


class ReadingProcess:
    """One child process, asked every tick by a thread of its own, for as long as it has sources.

    `on_crashes` is called, on that thread, when several sources share a process that crashes again and again;
    `takes_more` tells whether cameras may be added.
    """

    def __init__(
        self, setup: Setup, feeds: Sequence[Feed], on_crashes: Callable[["ReadingProcess"], None], *, takes_more: bool
    ) -> None:
        self.setup = setup
        self._on_crashes = on_crashes
        self._tick_s = setup.settings.tick_s if isinstance(feeds[0], CameraFeed) else _BUSY_TICK_S
        self._takes_more = takes_more and isinstance(feeds[0], CameraFeed)
        self._lock = Lock()
        self._feeds = {feed.assignment.source_id: feed for feed in feeds}
        self._child: Child | None = None
        self._halt = Event()
        self._wake = Event()
        self._crashes = 0
        self._thread = Thread(target=self._run, name="reading", daemon=True)

    @property
    def pid(self) -> int | None:
        """The child's; None while there is none, and when it is to end."""
        child = self._child
        return None if child is None or self._halt.is_set() else child.pid

    @property
    def has_failed(self) -> bool:
        """Whether nobody asks the process any more though it has sources."""
        return not (self._thread.is_alive() or self._halt.is_set())

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left of it; a while after the halt."""
        return self._halt.is_set() and not self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def halt(self) -> None:
        """End the process, and the thread soon after."""
        self._halt.set()
        self._wake.set()
        if self._child is not None:
            self._child.kill()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def add(self, feed: CameraFeed) -> bool:
        """Read one more camera; False if there is no room for it."""
        with self._lock:
            has_room = self._takes_more and len(self._feeds) < self.setup.settings.cameras_per_process
            if self._halt.is_set() or self._crashes or not has_room:
                return False
            self._feeds[feed.assignment.source_id] = feed
        self._wake.set()
        return True

    def remove(self, feed: Feed) -> None:
        """Read a source no longer; the process ends with its last one."""
        with self._lock:
            if self._feeds.get(feed.assignment.source_id) is not feed:
                return
            del self._feeds[feed.assignment.source_id]
            if not self._feeds:
                self.halt()

    def retire(self) -> list[Feed]:
        """End, and return what was read."""
        with self._lock:
            feeds, self._feeds = list(self._feeds.values()), {}
            self.halt()
            return feeds

    def _run(self) -> None:
        settings = self.setup.settings
        backoff = Backoff(settings.backoff_min_s, settings.backoff_max_s)
        while not self._halt.is_set():
            started = time.monotonic()
            try:
                with Child("ingest.reading", str(settings.max_decoder_bytes)) as child:
                    self._child = child
                    self._serve(child)
            except TimeoutError:
                how = "gave no answer and was ended"
            except ChildDied as death:
                how = str(death)
            except OSError as error:
                how = f"could not be started: {error.strerror}"
            self._child = None
            if self._halt.is_set():
                return
            lived_s = time.monotonic() - started
            if lived_s >= settings.healthy_s:
                backoff.reset()
            self._crashes = 1 if lived_s > CRASH_MEMORY_S else self._crashes + 1
            with self._lock:
                feeds = list(self._feeds.values())
            logger.error("the process that reads %s %s; it is started again", _names(feeds), how)
            for feed in feeds:
                feed.interrupt(how)
            if self._crashes >= CRASHES_BEFORE_SPLIT and len(feeds) > 1:
                self._on_crashes(self)
            self._halt.wait(backoff.next_s())

    def _serve(self, child: Child) -> None:
        """Ask the process until the halt. Raises TimeoutError and ChildDied."""
        settings = self.setup.settings
        child.ask(self.setup.model_dump_json().encode(), START_S)
        told: dict[str, Feed] = {}
        while not self._halt.is_set():
            began = time.monotonic()
            self._wake.clear()
            with self._lock:
                feeds = dict(self._feeds)
            request = Request(
                open=tuple(feed.assignment for name, feed in feeds.items() if told.get(name) is not feed),
                close=tuple(name for name, feed in told.items() if feeds.get(name) is not feed),
                take={name: feed.room() for name, feed in feeds.items()},
                shed={name: slots for name, feed in feeds.items() if (slots := feed.take_shed())},
            )
            words, bulk = child.ask(request.model_dump_json().encode(), settings.process_timeout_s)
            told = feeds
            _spread(words, bulk, request, feeds)
            self._wake.wait(max(0.0, began + self._tick_s - time.monotonic()))


def _spread(words: bytes, bulk: bytes, request: Request, feeds: Mapping[str, Feed]) -> None:
    """Bring every feed what is new of it. Raises ChildDied."""
    try:
        reply = Reply.model_validate_json(words)
    except ValidationError:
        raise ChildDied(_NONSENSE) from None
    heads = [head for news in reply.sources.values() for head in news.frames]
    ends = list(accumulate((head.size for head in heads), initial=0))
    if ends[-1] != len(bulk) or not all(
        name in feeds and news.news.kind == feeds[name].kind and len(news.frames) <= request.take[name]
        for name, news in reply.sources.items()
    ):
        raise ChildDied(_NONSENSE)
    for level, text in reply.log:
        logger.log(level, "%s", text)
    keyframes = (bulk[start:end] for start, end in pairwise(ends))
    for name, news in reply.sources.items():
        feeds[name].bring(news, list(islice(keyframes, len(news.frames))))


def _names(feeds: Sequence[Feed]) -> str:
    return ", ".join(feed.assignment.source_id for feed in feeds)
