"""What only Redis knew, known again from the files: sealed hours, packs and, if Redis has lost them, their sources.

Beside the hours of a source lies a note of what it is, without its password. A file counts again if its hour has none
that counts; of several the one of the highest generation does.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from redis.asyncio import Redis

from store.connection import StoreUnavailable
from store.files import Files
from store.format import hours_of
from store.hour_files import (
    HourFileDamaged,
    HourFileGone,
    HourFiles,
    HourManifest,
    generation,
    label,
)
from store.keys import LOST_SOURCES, KeyframeKeys, TimelineKeys
from store.memory import Memory
from store.packs import LABEL, Pack, Packs
from store.rounds import Rounds
from store.segments import Manifest, Segments
from store.source import Source, SourceNotFound, Stream, Video
from store.sources import Sources
from store.timeline import Timeline

logger = logging.getLogger(__name__)

_NOTE = "source.json"
_LOST_AT_ONCE = 1000
_EVER = 1 << 62
M = TypeVar("M", bound=HourManifest)


class SourceNote(BaseModel):
    """A source as its files remember it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    source: Stream | Video


@dataclass(frozen=True, slots=True)
class Recovered:
    """How many sources, sealed hours and packs are known again, and how many hours have no whole file."""

    sources: int = 0
    hours: int = 0
    packs: int = 0
    lost: int = 0

    def __add__(self, other: "Recovered") -> "Recovered":
        return Recovered(
            self.sources + other.sources,
            self.hours + other.hours,
            self.packs + other.packs,
            self.lost + other.lost,
        )


class Recovery:
    """Compares the registry and the manifests with a listing of the files. Raises StoreUnavailable and Stopped."""

    def __init__(self, redis: Redis, sources: Sources, memory: Memory, root_url: str, rounds: Rounds) -> None:
        self._redis = redis
        self._sources = sources
        self._memory = memory
        self._files = Files(root_url)
        self._segments = Segments(root_url)
        self._packs = Packs(root_url)
        self._rounds = rounds
        self._noted: dict[str, bytes] = {}
        self._pending: dict[str, None] = {}  # in order: those that failed come last

    @property
    def pending(self) -> Set[str]:
        """The sources that are to be looked at, those that were looked at in vain included."""
        return self._pending.keys()

    async def note(self, source: Source) -> None:
        """Write down what a source is, beside its hours, if that has changed."""
        if isinstance(source, Video) and source.status != "ready":
            return
        content, path = SourceNote(source=source).model_dump_json(indent=1).encode(), self._note(source.id)
        if self._noted.get(source.id) != content:
            if await asyncio.to_thread(self._files.read, [path]) != [content]:
                await asyncio.to_thread(self._files.write, {path: content}, synced=True)
            self._noted[source.id] = content

    async def forget(self, source_id: str) -> None:
        """Remove the note of a source."""
        await asyncio.to_thread(self._files.remove, [self._note(source_id)])
        await asyncio.to_thread(self._files.remove_if_empty, [self._files.folder(source_id, "note")])
        self._noted.pop(source_id, None)

    async def begin(self) -> None:
        """Look for what Redis may have lost of every source that has files, from the next `go_on` on."""
        self._pending = dict.fromkeys(await asyncio.to_thread(self._files.sources))

    async def go_on(self, patience_s: float | None = None) -> Recovered:
        """Let every file count that should, of each pending source that the registry knows or that has left a note.

        Pending are those of `begin`, and those of which anybody has met files that Redis has lost sight of.
        No source is begun any more when the patience ends.
        """
        met: Any = await self._redis.spop(LOST_SOURCES, _LOST_AT_ONCE)
        self._pending |= dict.fromkeys(source_id.decode() for source_id in met)

        async def recover(source_id: str) -> Recovered:
            self._pending[source_id] = self._pending.pop(source_id)
            left_out = self._rounds.left_out
            done = await self._recover(source_id)
            if self._rounds.left_out == left_out:
                del self._pending[source_id]
            return done

        found = await self._rounds.for_each(list(self._pending), recover, str, patience_s=patience_s)
        done = sum(found, Recovered())
        if done != Recovered():
            logger.warning("recovered from files: %s", done)
        return done

    async def _recover(self, source_id: str) -> Recovered:
        try:
            await self._sources.source(source_id)
        except SourceNotFound:
            if not await self._restore_source(source_id):
                return Recovered()
            return Recovered(sources=1) + await self._recover_files(source_id)
        return await self._recover_files(source_id)

    async def _restore_source(self, source_id: str) -> bool:
        """Register a source as its note says; False if it left none: it was purged, or never was ours."""
        [content] = await asyncio.to_thread(self._files.read, [self._note(source_id)])
        if content is None:
            return False
        try:
            source = SourceNote.model_validate_json(content).source
        except ValidationError as error:
            logger.error("the note of %s cannot be read: %d errors", source_id, error.error_count())
            return False
        if source.id != source_id:
            logger.error("the note of %s speaks of %s", source_id, source.id)
            return False
        return await self._sources.restore(source)

    async def _recover_files(self, source_id: str) -> Recovered:
        # What is known is read before the listing: what is sealed in between then looks lost, and is not taken for it,
        # because its hour has changed. The other way round a new file would look like one that nothing names.
        packs = {pack.hour: pack for pack in await self._memory.keyframes.packed(source_id)}
        known = {
            timeline.format.fingerprint: {one.hour: one for one in await timeline.sealed(source_id)}
            for timeline in await self._memory.timelines(source_id)
        }
        listing = await self._segments.listing(source_id)
        disowned = await self._disowned(source_id, {label(file) for files in listing.values() for file in files})
        listed: dict[str, dict[int, list[str]]] = {name: {} for name in (LABEL, *known)}
        for hour, files in listing.items():
            if doomed := disowned.intersection(files):
                await self._segments.remove(source_id, hour, *doomed)
            for file in files:
                if file not in doomed:
                    listed.setdefault(label(file), {}).setdefault(hour, []).append(file)
        done = await self._recover_packs(source_id, packs, listed.pop(LABEL))
        for fingerprint, files_by_hour in listed.items():
            done += await self._recover_segments(source_id, known.get(fingerprint, {}), files_by_hour)
        await self._memory.keyframes.loose_hours(source_id)  # which notes those that are not noted any more
        with suppress(SourceNotFound):  # purged meanwhile
            await self._finish_erasures(source_id)
        return done

    async def _recover_segments(
        self, source_id: str, known: Mapping[int, Manifest], listed: Mapping[int, Sequence[str]]
    ) -> Recovered:
        async def adopt(hour: int, file: str, lost: Manifest | None) -> bool:
            format, found = await self._segments.describe(source_id, hour, file)
            timeline = Timeline(self._redis, format, self._segments)
            return await timeline.adopt(source_id, found, lost)

        adopted, lost = await self._recover_hours(source_id, known, listed, adopt, self._segments)
        return Recovered(hours=adopted, lost=lost)

    async def _recover_packs(
        self, source_id: str, known: Mapping[int, Pack], listed: Mapping[int, Sequence[str]]
    ) -> Recovered:
        async def adopt(hour: int, file: str, lost: Pack | None) -> bool:
            found = await self._packs.manifest(source_id, hour, file)
            return await self._memory.keyframes.adopt(source_id, found, lost)

        adopted, lost = await self._recover_hours(source_id, known, listed, adopt, self._packs)
        return Recovered(packs=adopted, lost=lost)

    async def _recover_hours(
        self,
        source_id: str,
        known: Mapping[int, M],
        listed: Mapping[int, Sequence[str]],
        adopt: Callable[[int, str, M | None], Awaitable[bool]],
        files: HourFiles,
    ) -> tuple[int, int]:
        """Go through the hours of one kind of files; return how many were adopted, and how many have no whole file."""

        async def recover(hour: int) -> tuple[bool, bool]:
            names, manifest = listed.get(hour, ()), known.get(hour)
            if manifest is not None and manifest.file in names:
                # A crash came before their removal. One of a higher generation is being written just now.
                others = [name for name in names if name != manifest.file and generation(name) <= manifest.generation]
                if others:
                    await files.remove(source_id, hour, *others)
                return False, False
            for name in sorted(names, reverse=True):
                try:
                    if not await adopt(hour, name, manifest):
                        raise StoreUnavailable("it changes just now")
                    return True, False
                except (HourFileDamaged, HourFileGone) as error:
                    logger.error("hour %d of %s: %s", hour, source_id, error)
            logger.error("hour %d of %s has no whole file: restore it from a copy, or erase the hour", hour, source_id)
            return False, True

        hours = sorted({*known, *listed}, reverse=True)
        found = await self._rounds.for_each(hours, recover, lambda hour: f"hour {hour} of {source_id}")
        return sum(adopted for adopted, _ in found), sum(lost for _, lost in found)

    async def _disowned(self, source_id: str, labels: Iterable[str]) -> frozenset[str]:
        """Return the files that somebody was about to remove."""
        keys = [KeyframeKeys(source_id).disowned, *(TimelineKeys(source_id, name).disowned for name in labels)]
        found: Any = await self._redis.sunion(keys)
        return frozenset(file.decode() for file in found)

    async def _finish_erasures(self, source_id: str) -> None:
        """Erase what is said to be erased and is there: an erasure died before it had removed all of its files."""
        timelines = await self._memory.timelines(source_id)
        for gap in await self._sources.gaps(source_id, 0, _EVER):
            if gap.reason != "erased":
                continue
            start, end = gap.start_slot, gap.end_slot
            for timeline in timelines:
                if len(await timeline.slots(source_id, start, end)):
                    await timeline.erase(source_id, start, end)
            first, last = hours_of(start, end)
            for pack in await self._memory.keyframes.packed(source_id, first, last):
                if ((pack.slots >= start) & (pack.slots < end)).any():
                    await self._memory.keyframes.erase(source_id, start, end)
                    break

    def _note(self, source_id: str) -> str:
        return f"{self._files.folder(source_id, 'note')}/{_NOTE}"
