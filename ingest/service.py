"""Owns sources by leases, reads them, and hands their frames on in micro-batches."""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from ingest.assignment import ArchiveReport, AssignmentDesk, CameraReport
from ingest.feed import ArchiveFeed, CameraFeed, Feed
from ingest.frame import Frame, FrameSink, Receipt, SinkFull, SinkUnavailable
from ingest.reading_process import ReadingProcesses
from ingest.settings import IngestSettings

logger = logging.getLogger(__name__)

STOP_PATIENCE_S = 5.0
SINK_RETRY_S = 0.5
FULL_RETRY_S = 5.0  # room does not come from one moment to the next
UNEXPECTED_ERRORS_A_BATCH = 5


class IngestUnhealthy(RuntimeError):
    """This process should be replaced; its sources are claimed by others when their leases expire."""


class IngestService:
    """Claims sources from the desk, sends their frames to the sink and reports how they do.

    Three loops: leases, frames and reports. None of them waits for another, so a sink that is away costs neither the
    leases nor the reports: cameras shed their oldest frames meanwhile and archives wait.
    `upload_dir` is the folder that archives are read from and downloaded to; `spare_bytes` of its disk stay free.
    """

    def __init__(
        self,
        settings: IngestSettings,
        desk: AssignmentDesk,
        sink: FrameSink,
        upload_dir: Path,
        *,
        spare_bytes: int = 0,
    ) -> None:
        self._settings = settings
        self._desk = desk
        self._sink = sink
        self._owner = f"ing_{uuid.uuid4().hex[:12]}"
        self._processes = ReadingProcesses(settings, upload_dir, spare_bytes)
        self._feeds: dict[str, Feed] = {}
        self._reported: dict[str, tuple[str, float]] = {}
        self._troubles: dict[str, str] = {}  # what fails just now, and with what error: told once, not at every try
        self._size_px: int | None = None
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to claim sources; returns at once."""
        loops = {"leases": self._keep_leases, "frames": self._send_frames, "reports": self._send_reports}
        self._tasks = [asyncio.create_task(loop(), name=f"ingest-{name}") for name, loop in loops.items()]

    async def stop(self) -> None:
        """Stop reading, send what was read, and give the leases back."""
        self._stopping.set()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=STOP_PATIENCE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await asyncio.to_thread(self._processes.shut)
        held = self._held()
        self._feeds.clear()
        if held:
            try:
                await self._desk.release(self._owner, held)
            except ConnectionError:
                logger.warning("%s the desk is away: its leases will expire", self._owner)

    def stats(self) -> dict[str, int]:
        """Return how many sources are owned and how many more may be."""
        owned = len(self._feeds)
        return {"owned": owned, "room": self._settings.max_sources - owned}

    def check_health(self) -> None:
        """Raise IngestUnhealthy when this process cannot do its work any more."""
        for task in self._tasks:
            if task.done() and not self._stopping.is_set():
                raise IngestUnhealthy(f"the loop {task.get_name()} has ended")
        if self._processes.has_failed:
            raise IngestUnhealthy("sources are not read any more")

    # leases

    async def _keep_leases(self) -> None:
        settings = self._settings
        next_renewal = 0.0
        while not self._stopping.is_set():
            if time.monotonic() >= next_renewal:
                next_renewal = time.monotonic() + settings.renew_s
                await self._guarded("renewing", self._renew)
            await self._guarded("claiming", self._claim)
            await self._pause(min(settings.poll_s, max(0.0, next_renewal - time.monotonic())))

    async def _renew(self) -> None:
        held = self._held()
        if held:
            lost = await self._desk.renew(self._owner, held)
            # A source may have been claimed anew, with a higher epoch, while the answer was under way.
            self._lose(source_id for source_id in lost if self._epoch(source_id) == held.get(source_id))

    async def _claim(self) -> None:
        room = self._settings.max_sources - len(self._feeds)
        if room <= 0:
            return
        if self._size_px is None:
            self._size_px = await self._sink.input_size_px()
        archives = sum(isinstance(feed, ArchiveFeed) for feed in self._feeds.values())
        for assignment in await self._desk.claim(self._owner, room, self._settings.archives_at_once - archives):
            self._lose([assignment.source_id])
            logger.info("%s claimed with epoch %d", assignment.source_id, assignment.epoch)
            self._feeds[assignment.source_id] = self._processes.open(assignment, self._size_px)

    def _held(self) -> Mapping[str, int]:
        return {source_id: feed.assignment.epoch for source_id, feed in self._feeds.items()}

    def _epoch(self, source_id: str) -> int | None:
        feed = self._feeds.get(source_id)
        return None if feed is None else feed.assignment.epoch

    def _lose(self, source_ids: Iterable[str]) -> None:
        for source_id in list(source_ids):
            feed = self._feeds.pop(source_id, None)
            if feed is None:
                continue
            self._processes.close(feed)
            self._reported.pop(source_id, None)
            logger.info("%s is not ours any more", source_id)

    # frames

    async def _send_frames(self) -> None:
        while True:
            stopping = self._stopping.is_set()
            batch = self._gather()
            if batch:
                await self._put(batch)
            if stopping:
                return
            if len(batch) < self._settings.batch_frames:  # a full batch says that more is waiting
                await self._pause(self._settings.tick_s)

    def _gather(self) -> list[Frame]:
        """Take one micro-batch: cameras first, for they do not wait; then archives, all in fair shares."""
        batch: list[Frame] = []
        for kind in (CameraFeed, ArchiveFeed):
            feeds = [feed for feed in self._feeds.values() if isinstance(feed, kind)]
            feeds.sort(key=lambda feed: feed.assignment.source_id)
            for position, feed in enumerate(feeds):
                room = self._settings.batch_frames - len(batch)
                batch += feed.take(-(-room // (len(feeds) - position)))
        return batch

    async def _put(self, batch: list[Frame]) -> None:
        """Send a batch until it is durable, lost with its leases, or the service stops.

        What is missing before its frames is told before them: who goes on behind a durable frame does not look back.
        """
        for feed, _ in self._by_feed(batch):
            await self._guarded("telling gaps", partial(self._tell_missing, feed))
        errors = 0
        while batch:
            pause_s = SINK_RETRY_S
            try:
                receipt = await self._sink.put(batch)
            except SinkFull as error:
                self._note_trouble("sending frames", error)
                pause_s = FULL_RETRY_S
                for feed in self._feeds.values():
                    feed.note_full(str(error))
            except SinkUnavailable as error:
                self._note_trouble("sending frames", error)
            except Exception:
                # The sink's own fault, such as a frame that it cannot stand: the other sources must not wait for ever.
                logger.exception("%s the sink failed", self._owner)
                errors += 1
            else:
                self._note_success("sending frames")
                self._settle(batch, receipt)
                return
            if self._stopping.is_set():
                self._shed(batch)
                return
            if errors >= UNEXPECTED_ERRORS_A_BATCH:
                await self._put_apart(batch)
                return
            await self._pause(pause_s)
            batch = [frame for frame in batch if self._epoch(frame.source_id) == frame.epoch]

    async def _put_apart(self, batch: list[Frame]) -> None:
        """Send the frames of a batch source by source, so that only the one that the sink cannot stand suffers."""
        sources = self._by_feed(batch)
        if len(sources) == 1:
            self._shed(batch)
            return
        for _, frames in sources:
            await self._put(frames)

    def _settle(self, batch: list[Frame], receipt: Receipt) -> None:
        epochs = {frame.source_id: frame.epoch for frame in batch}
        self._lose(source_id for source_id in receipt.lost if self._epoch(source_id) == epochs.get(source_id))
        now = time.time()
        for feed, frames in self._by_feed(batch):
            feed.settled(frames, now)

    def _shed(self, batch: list[Frame]) -> None:
        for feed, frames in self._by_feed(batch):
            feed.shed(frames)

    def _by_feed(self, batch: list[Frame]) -> list[tuple[Feed, list[Frame]]]:
        """Group frames by the feed that made them; frames of feeds that are gone are left out."""
        groups: dict[str, list[Frame]] = {}
        for frame in batch:
            if self._epoch(frame.source_id) == frame.epoch:
                groups.setdefault(frame.source_id, []).append(frame)
        return [(self._feeds[source_id], frames) for source_id, frames in groups.items()]

    # reports

    async def _send_reports(self) -> None:
        while True:
            stopping = self._stopping.is_set()
            for feed in list(self._feeds.values()):
                if not await self._guarded("reporting", partial(self._report, feed)):
                    break  # the desk is away for all of them, and each try takes its time
            if stopping:
                return
            await self._pause(self._settings.tick_s)

    async def _report(self, feed: Feed) -> None:
        """Report one source: its missing slots, then its state if that is new or due; finish it if it is over."""
        is_over = feed.is_over
        source_id, epoch = feed.assignment.source_id, feed.assignment.epoch
        await self._tell_missing(feed)
        report = feed.report(time.time())
        state, due_at = self._reported.get(source_id, ("", 0.0))
        if is_over or _state(report) != state or time.monotonic() >= due_at:
            await self._desk.report(source_id, epoch, report)
            if self._feeds.get(source_id) is feed:
                self._reported[source_id] = (_state(report), time.monotonic() + self._settings.report_s)
        if is_over:
            await self._desk.release(self._owner, {source_id: epoch})
            if self._epoch(source_id) == epoch:
                self._lose([source_id])

    async def _tell_missing(self, feed: Feed) -> None:
        missing = feed.take_missing()
        if not missing:
            return
        try:
            await self._desk.missing(feed.assignment.source_id, feed.assignment.epoch, missing)
        except BaseException:
            feed.give_back(missing)
            raise

    async def _guarded(self, doing: str, step: Callable[[], Awaitable[None]]) -> bool:
        """Run a step that is repeated anyway; False if it is to be repeated because the other side is away."""
        try:
            await step()
        except (ConnectionError, SinkUnavailable) as error:
            self._note_trouble(doing, error)
            return False
        except Exception:
            logger.exception("%s %s failed, to be repeated", self._owner, doing)
        else:
            self._note_success(doing)
        return True

    def _note_trouble(self, doing: str, error: Exception) -> None:
        if self._troubles.get(doing) != str(error):
            logger.warning("%s %s fails and is repeated until it succeeds: %s", self._owner, doing, error)
        self._troubles[doing] = str(error)

    def _note_success(self, doing: str) -> None:
        if self._troubles.pop(doing, None) is not None:
            logger.info("%s %s succeeds again", self._owner, doing)

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond the beginning of the stop."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass


def _state(report: CameraReport | ArchiveReport) -> str:
    return report.state if isinstance(report, CameraReport) else report.status
