"""A process that reads sources and hands over what it got whenever it is asked: `python -m ingest.reading`.

It knows neither who asks nor what becomes of the frames, and ends when nobody asks any more.
"""

import logging
import os
import sys
import time
from collections import deque
from pathlib import Path

from ingest.archive_worker import ArchiveWorker
from ingest.assignment import Archive, Assignment
from ingest.camera_worker import CameraWorker
from ingest.child import Line, become_child
from ingest.exchange import FrameHead, Reply, Request, Setup, SourceNews

MAX_STUCK_THREADS = 3
START_SPACING_S = 0.1  # between cameras that are begun at once: they may be channels of one recorder

_LOGGED_AT_MOST = 200  # lines a reply


class Reading:
    """The sources that this process reads."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._workers: dict[str, CameraWorker | ArchiveWorker] = {}
        self._log: deque[tuple[int, str]] = deque(maxlen=_LOGGED_AT_MOST)
        handler = logging.Handler()
        handler.emit = lambda record: self._log.append((record.levelno, record.getMessage()[:1000]))  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        logging.getLogger("ingest").setLevel(logging.INFO)

    @property
    def is_stuck(self) -> bool:
        """Whether so many threads hang inside of FFmpeg that this process should be replaced."""
        cameras = (worker for worker in self._workers.values() if isinstance(worker, CameraWorker))
        return sum(camera.stuck_threads for camera in cameras) >= MAX_STUCK_THREADS

    def answer(self, request: Request) -> tuple[Reply, bytes]:
        """Do what is asked for, and return what is new with the keyframes."""
        for source_id in request.close:
            if worker := self._workers.pop(source_id, None):
                worker.stop()
        for number, assignment in enumerate(request.open):
            self._open(assignment, number * START_SPACING_S)
        for source_id, slots in request.shed.items():
            if worker := self._workers.get(source_id):
                worker.shed(slots)
        keyframes: list[bytes] = []
        news: dict[str, SourceNews] = {}
        for source_id, worker in self._workers.items():
            worker.supervise(time.monotonic())
            # The frames first: a gap behind them may be told with them, one before them must be.
            frames = worker.take(max(0, request.take.get(source_id, 0)))
            keyframes += [frame.keyframe for frame in frames]
            news[source_id] = SourceNews(
                frames=tuple(FrameHead(slot=one.slot, time_ms=one.time_ms, size=len(one.keyframe)) for one in frames),
                missing=tuple(worker.take_missing()),
                news=worker.news(time.time()),
            )
        log = [self._log.popleft() for _ in range(len(self._log))]
        return Reply(sources=news, log=log), b"".join(keyframes)

    def _open(self, assignment: Assignment, delay_s: float) -> None:
        setup = self._setup
        if isinstance(assignment.media, Archive):
            archive = ArchiveWorker(
                assignment, setup.settings, setup.size_px, Path(setup.upload_dir), setup.spare_bytes
            )
            archive.start()
            self._workers[assignment.source_id] = archive
        else:
            camera = CameraWorker(assignment, setup.settings, setup.size_px)
            camera.start(delay_s)
            self._workers[assignment.source_id] = camera


def serve(line: Line) -> None:
    """Answer requests until nobody asks any more."""
    reading: Reading | None = None
    while (message := line.receive()) is not None:
        words, _ = message
        if reading is None:
            reading = Reading(Setup.model_validate_json(words))
            line.send(b"{}")
            continue
        reply, keyframes = reading.answer(Request.model_validate_json(words))
        line.send(reply.model_dump_json().encode(), keyframes)
        if reading.is_stuck:
            return


def main() -> None:
    try:
        serve(become_child(int(sys.argv[1])))
    finally:
        os._exit(1)  # at once, for threads may hang


if __name__ == "__main__":
    main()
