"""The janitor: seals full hours, erases what retention ends, what was purged and what belongs to nothing."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from redis.asyncio import Redis

from store.connection import StoreUnavailable
from store.format import HOUR_SLOTS
from store.hot import has_tokens
from store.imports import ImportNotFound, Imports
from store.leases import Leases
from store.memory import Erased, Memory
from store.recovery import Recovery
from store.retention import Retention
from store.rounds import Rounds, Stopped
from store.settings import StoreSettings
from store.source import Source, Stream, Video
from store.sources import Kept, Sources

logger = logging.getLogger(__name__)

LEASE_ID = "janitor"
SEALS_AT_ONCE = 4  # which mostly wait for the disk; each needs some 100 MB for a moment
_EVER = 1 << 62
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What one sweep did: hours sealed; frames, keyframes and uploaded files erased; sources forgotten.

    `left_out` counts sources and hours with which something was wrong.
    """

    sealed: int = 0
    frames: int = 0
    keyframes: int = 0
    uploads: int = 0
    sources: int = 0
    left_out: int = 0


class Janitor:
    """Sweeps the store again and again; of several janitors one works, by a lease."""

    def __init__(self, redis: Redis, sources: Sources, memory: Memory, settings: StoreSettings) -> None:
        self._rounds = Rounds(redis, self._stay)
        self._recovery = Recovery(redis, sources, memory, settings.segments_root, self._rounds)
        self._recovered: str | None = None  # the server of which what it may have lost was last looked for
        self._redis = redis
        self._sources = sources
        self._memory = memory
        self._settings = settings
        self._leases = Leases(redis)
        self._imports = Imports(redis, sources)
        self._owner = f"janitor-{uuid4().hex[:12]}"
        self._held: dict[str, int] = {}
        self._renewed = 0.0
        self._retention = Retention(redis, sources, memory, settings, self._rounds)
        self._clean: frozenset[str] = frozenset()  # sources to forget of which the last sweep found nothing more

    async def run(self) -> None:
        """Sweep until cancelled, and give the lease back then."""
        try:
            while True:
                postponed = self._rounds.postponed
                try:
                    await self._hold()
                    if self._held:
                        await self.sweep()
                except (StoreUnavailable, Stopped) as error:
                    logger.warning("sweep put off: %s", error)
                except Exception:
                    logger.exception("sweep failed; the next one tries again")
                else:
                    if self._rounds.postponed > postponed:  # there is more to do than there was time for
                        continue
                await asyncio.sleep(self._settings.janitor_interval_s)
        finally:
            with contextlib.suppress(StoreUnavailable):  # then the lease runs out by itself
                await self._leases.release(self._owner, self._held)

    async def sweep(self) -> SweepReport:
        """Recover, erase and seal once what is due. StoreUnavailable if it was not finished; the next sweep goes on.

        What is wrong with one source is left out, and does not hold up the others.
        Sealing comes last: on a disk that is full, the rest makes room for it. StoreFull if that was not enough.
        """
        before = self._rounds.left_out
        await self._recover()
        everything = [kept for kept in await self._sources.everything() if not await self._is_coming(kept)]
        stays: list[Source] = []
        leaves: list[Source] = []
        for kept in everything:
            (leaves if await self._leaves(kept) else stays).append(kept.source)
        clean: set[str] = set()

        async def purge(source: Source) -> Erased:
            await self._recovery.forget(source.id)
            purged = await self._memory.erase(source.id)
            if purged == Erased():
                clean.add(source.id)
            return purged

        erased = sum(await self._for_each(leaves, purge), Erased())
        erased += await self._retention.sweep(stays)
        # A frame may still be on its way when a source is purged: only one found empty twice is forgotten.
        forgotten = clean & self._clean
        for source_id in forgotten:
            await self._sources.forget(source_id)
            self._retention.forget(source_id)
        self._clean = frozenset(clean - forgotten)
        if forgotten:
            await self._memory.scrub()
        videos = [kept.source for kept in everything if isinstance(kept.source, Video) and not kept.purge]
        uploads = await asyncio.to_thread(self._erase_uploads, videos)
        await asyncio.to_thread(self._settings.room.check)
        await self._for_each(stays, self._recovery.note)
        sealed = sum(await self._for_each(stays, self._seal, at_once=SEALS_AT_ONCE))
        await self._pack(stays)
        left_out = self._rounds.left_out - before
        report = SweepReport(sealed, erased.frames.total, erased.keyframes, uploads, len(forgotten), left_out)
        if report != SweepReport():
            logger.info("swept %s", report)
        return report

    async def _recover(self) -> None:
        """Look for what Redis may have lost, once at first and after each start of it: it may lack its last seconds.

        Sealing has its turn in between, for that may take long.
        """
        try:
            about: Any = await self._redis.info("server")
            if self._recovered != about["run_id"]:
                await self._recovery.begin()
                self._recovered = about["run_id"]
            await self._recovery.go_on(self._settings.janitor_interval_s)
        except StoreUnavailable as error:  # a sweep may be what helps: on a full disk it makes room
            logger.error("what Redis may have lost is looked for later: %s", error)

    async def _for_each(
        self, sources: Sequence[Source], act: Callable[[Source], Awaitable[T]], *, at_once: int = 1
    ) -> list[T]:
        return await self._rounds.for_each(sources, act, lambda source: source.id, at_once=at_once)

    async def _stay(self) -> None:
        """Keep the lease during long work. Raises Stopped if another janitor has it."""
        if self._held and time.monotonic() - self._renewed > self._settings.janitor_interval_s:
            await self._hold()
            if not self._held:
                raise Stopped("another janitor goes on with it")

    async def _hold(self) -> None:
        """Take or keep the lease, or see that another janitor has it."""
        ttl_s = 3 * self._settings.janitor_interval_s
        self._renewed = time.monotonic()
        if self._held and not await self._leases.renew(self._owner, self._held, ttl_s):
            return
        self._held = await self._leases.acquire_many([LEASE_ID], self._owner, ttl_s)
        if self._held:  # another one was here last: what this one remembers may be wrong by now
            self._retention.forget_all()

    async def _is_coming(self, kept: Kept) -> bool:
        """Return whether a source is being imported. An import that has stopped is purged from the next sweep on."""
        if kept.hidden and not await self._imports.is_alive(kept.source.id):
            with contextlib.suppress(ImportNotFound):  # it was completed a moment ago
                await self._imports.abandon(kept.source.id)
        return kept.hidden

    async def _leaves(self, kept: Kept) -> bool:
        """Return whether a source is to be forgotten: purged, or deleted and past its retention."""
        if kept.purge:
            return True
        deleted = isinstance(kept.source, Stream) and kept.source.deleted
        return deleted and not await has_tokens(self._redis, kept.source.id)

    async def _seal(self, source: Source) -> int:
        """Seal the full hours of a source and return how many; one that changes meanwhile has its turn later."""
        sealed = 0
        for timeline in await self._memory.timelines(source.id):
            if hours := await timeline.hot_hours(source.id):
                before = await self._full_before(source)
                full = [hour for hour in hours if hour < before]
                sealed += sum(await self._for_each_hour(source, full, partial(timeline.seal, source.id)))
        return sealed

    async def _pack(self, sources: Sequence[Source]) -> None:
        """Pack keyframes of full hours for as long as a sweep may last; the next one goes on.

        Redis holds what is not sealed: pictures must not keep frames there.
        """
        noted = await self._memory.keyframes.noted_hours([source.id for source in sources])

        async def due(source: Source) -> list[tuple[int, str]]:
            before = await self._full_before(source)
            return [(hour, source.id) for hour in noted[source.id] if hour < before]

        found = await self._for_each([source for source in sources if noted[source.id]], due)
        await self._rounds.for_each(
            sorted(chain.from_iterable(found)),
            lambda one: self._memory.keyframes.pack(one[1], one[0]),
            lambda one: f"the keyframes of hour {one[0]} of {one[1]}",
            patience_s=self._settings.janitor_interval_s,
        )

    async def _for_each_hour(self, source: Source, hours: Iterable[int], act: Callable[[int], Awaitable[T]]) -> list[T]:
        return await self._rounds.for_each(hours, act, lambda hour: f"hour {hour} of {source.id}")

    async def _full_before(self, source: Source) -> int:
        """Return the hour before which no more frames of a source are expected."""
        settle = int(self._settings.seal_settle_s * source.fps)
        if isinstance(source, Stream):
            return (int(time.time() * source.fps) - settle) // HOUR_SLOTS
        if not source.is_being_read:
            return _EVER
        extents = [await timeline.extent(source.id) for timeline in await self._memory.timelines(source.id)]
        newest = max((extent[1] for extent in extents if extent is not None), default=0)
        return (newest - settle) // HOUR_SLOTS

    def _erase_uploads(self, videos: Iterable[Video]) -> int:
        """Remove files of the upload folder that no video needs, unless so young that a video may be on its way.

        A video needs its upload and, until it is read, what was downloaded for it: files that begin with its id.
        """
        folder: Path = self._settings.uploads_dir
        if not folder.is_dir():
            return 0
        uploads, reading = set(), set()
        for video in videos:
            uploads.add(video.file)
            if video.is_being_read:
                reading.add(video.id)
        oldest = time.time() - self._settings.upload_grace_s
        erased = 0
        for path in folder.iterdir():
            if path.name in uploads or path.name.partition(".")[0] in reading:
                continue
            try:
                if path.is_file() and path.stat().st_mtime < oldest:
                    path.unlink()
                    erased += 1
            except FileNotFoundError:  # its owner was quicker
                pass
            except OSError as error:
                logger.error("an upload that nobody needs cannot be removed: %s (%s)", path.name, error.strerror)
        return erased
