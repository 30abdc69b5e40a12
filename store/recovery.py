"""What only Redis knew, known again from the files: sealed hours, packs and, if Redis has lost them, their sources.

Beside the hours of a source lies a note of what it is, without its password. A file counts again if its hour has none
that counts; of several the one of the highest generation does.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from redis.asyncio import Redis

from store.files import Files
from store.format import hours_of
from store.hour_files import HourFileDamaged, HourFileGone, HourFiles, HourManifest
from store.keys import KeyframeKeys, TimelineKeys
from store.memory import Memory
from store.packs import LABEL, Pack, Packs
from store.segments import Manifest, Segments
from store.source import Source, SourceNotFound, Stream, Video
from store.sources import Sources
from store.timeline import Timeline

logger = logging.getLogger(__name__)

_NOTE = "source.json"
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
    """Compares the registry and the manifests with a listing of the files. Raises StoreUnavailable."""

    def __init__(self, redis: Redis, sources: Sources, memory: Memory, root_url: str) -> None:
        self._redis = redis
        self._sources = sources
        self._memory = memory
        self._files = Files(root_url)
        self._segments = Segments(root_url)
        self._packs = Packs(root_url)
        self._noted: dict[str, bytes] = {}

    async def note(self, source: Source) -> None:
        """Write down what a source is, beside its hours, if that has changed."""
        if isinstance(source, Video) and source.status != "ready":
            return
        content = SourceNote(source=source).model_dump_json(indent=1).encode()
        if self._noted.get(source.id) != content:
            await asyncio.to_thread(self._files.write, {self._note(source.id): content})
            self._noted[source.id] = content

    async def forget(self, source_id: str) -> None:
        """Remove the note of a source."""
        await asyncio.to_thread(self._files.remove, [self._note(source_id)])
        await asyncio.to_thread(self._files.remove_if_empty, [self._files.folder(source_id, "note")])
        self._noted.pop(source_id, None)

    async def run(self, before_each: Callable[[], Awaitable[None]] | None = None) -> Recovered:
        """Let every file count that should, of every source that the registry knows or that has left a note."""
        done = Recovered()
        for source_id in await asyncio.to_thread(self._files.sources):
            if before_each is not None:
                await before_each()
            try:
                await self._sources.source(source_id)
            except SourceNotFound:
                if not await self._restore_source(source_id):
                    continue
                done += Recovered(sources=1)
            done += await self._recover(source_id)
        if done != Recovered():
            logger.warning("recovered from files: %s", done)
        return done

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

    async def _recover(self, source_id: str) -> Recovered:
        # What is known is read before the listing: what is sealed in between then looks lost, and is not taken for it,
        # because its hour has changed. The other way round a new file would look like one that nothing names.
        packs = {pack.hour: pack for pack in await self._memory.keyframes.packed(source_id)}
        known = {
            timeline.format.fingerprint: {one.hour: one for one in await timeline.sealed(source_id)}
            for timeline in await self._memory.timelines(source_id)
        }
        listing = await self._segments.listing(source_id)
        disowned = await self._disowned(source_id, {_label(file) for files in listing.values() for file in files})
        listed: dict[str, dict[int, list[str]]] = {label: {} for label in (LABEL, *known)}
        for hour, files in listing.items():
            await self._segments.remove(source_id, hour, *disowned.intersection(files))
            for file in files:
                if file not in disowned:
                    listed.setdefault(_label(file), {}).setdefault(hour, []).append(file)
        done = await self._recover_packs(source_id, packs, listed.pop(LABEL))
        for fingerprint, files_by_hour in listed.items():
            done += await self._recover_segments(source_id, known.get(fingerprint, {}), files_by_hour)
        await self._finish_erasures(source_id)
        return done

    async def _recover_segments(
        self, source_id: str, known: Mapping[int, Manifest], listed: Mapping[int, Sequence[str]]
    ) -> Recovered:
        async def adopt(hour: int, file: str, lost: Manifest | None) -> bool:
            format, found = await self._segments.describe(source_id, hour, file)
            timeline = Timeline(self._redis, format, self._segments)
            return await timeline.adopt(source_id, found, lost)

        counts = await _recover(source_id, known, listed, adopt, self._segments)
        return Recovered(hours=counts[0], lost=counts[1])

    async def _recover_packs(
        self, source_id: str, known: Mapping[int, Pack], listed: Mapping[int, Sequence[str]]
    ) -> Recovered:
        async def adopt(hour: int, file: str, lost: Pack | None) -> bool:
            found = await self._packs.describe(source_id, hour, file)
            return await self._memory.keyframes.adopt(source_id, found, lost)

        counts = await _recover(source_id, known, listed, adopt, self._packs)
        return Recovered(packs=counts[0], lost=counts[1])

    async def _disowned(self, source_id: str, labels: Iterable[str]) -> frozenset[str]:
        """Return the files that somebody was about to remove."""
        keys = [KeyframeKeys(source_id).disowned, *(TimelineKeys(source_id, label).disowned for label in labels)]
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


def _label(file: str) -> str:
    return file.partition("-")[0]


async def _recover(
    source_id: str,
    known: Mapping[int, M],
    listed: Mapping[int, Sequence[str]],
    adopt: Callable[[int, str, M | None], Awaitable[bool]],
    files: HourFiles,
) -> tuple[int, int]:
    """Go through the hours of one kind of files; return how many were adopted, and how many have no whole file."""
    adopted = lost = 0
    for hour in sorted({*known, *listed}, reverse=True):
        names, manifest = sorted(listed.get(hour, ())), known.get(hour)
        if manifest is not None and manifest.file in names:
            # Of a lower generation: a crash came before their removal. A higher one is being written just now.
            await files.remove(source_id, hour, *names[: names.index(manifest.file)])
            continue
        for name in reversed(names):
            try:
                adopted += await adopt(hour, name, manifest)
                break
            except (HourFileDamaged, HourFileGone) as error:
                logger.error("hour %d of %s: %s", hour, source_id, error)
        else:
            logger.error("hour %d of %s has no whole file: restore it from a copy, or erase the hour", hour, source_id)
            lost += 1
    return adopted, lost
