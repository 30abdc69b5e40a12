"""Import: the memory of a source that another service exported, hour by hour, and not seen before all is there."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np

from compressor_service.facts import BadPicture
from compressor_service.pictures import MAX_REPEATS, opened
from qa_service import clock
from qa_service.errors import DamagedExport, FileTooLarge, ModelMismatch, StateConflict, StreamTaken
from qa_service.keys import Caller
from qa_service.memory_schemas import (
    ImportAbandoned,
    ImportBody,
    ImportCompletion,
    ImportDone,
    ImportedHour,
    TimelineExport,
)
from qa_service.once import Once
from qa_service.upload import receive_body
from store.connection import StoreUnavailable
from store.finish import finish
from store.format import TokenFormat, span_of
from store.gaps import Gap
from store.hour_files import HourFileDamaged
from store.imports import IDLE_S, ImportedTooMuch, Imports, NewImport
from store.keyframes import Keyframes
from store.portable import DamagedHour, max_frames_bytes, read_frames, read_keyframes
from store.room import Room
from store.segments import Hour
from store.source import Stream, StreamExists
from store.timeline import Timeline

logger = logging.getLogger(__name__)

TRIES = 20
HOURS_AT_ONCE = 1  # that are in memory, of all imports: an hour of keyframes has some 150 MB

T = TypeVar("T")
Take = Callable[[Path, NewImport], Coroutine[Any, Any, int]]
"""Takes in the file of an hour, and returns how many frames or keyframes it had."""


class Importer:
    """Takes timelines in. Raises ImportNotFound, SourceForbidden and StoreUnavailable.

    Hours come one by one: behind Ray's proxy a request lies in memory until it is read. An import that is not
    completed is erased by the janitor.
    """

    def __init__(
        self,
        imports: Imports,
        once: Once,
        timeline: Timeline,
        keyframes: Keyframes,
        *,
        side_px: int,
        folder: Path,
        room: Room,
        max_bytes: int,
        max_hour_bytes: int,
    ) -> None:
        self._imports = imports
        self._once = once
        self._timeline = timeline
        self._keyframes = keyframes
        self._side_px = side_px
        self._folder = folder
        self._disk = room
        self._max_bytes = max_bytes
        self._max_hour_bytes = max_hour_bytes
        self._room = asyncio.Semaphore(HOURS_AT_ONCE)

    async def begin(self, caller: Caller, described: TimelineExport, *, key: str | None = None) -> ImportBody:
        """Begin an import. Raises ModelMismatch, StreamTaken and IdempotencyConflict."""
        caller.require_new_sources()
        _require_format(described.format, self._timeline.format)
        recorded_at = None if described.recorded_at is None else clock.parse_stream_time(described.recorded_at)
        fields = described.model_dump(include=set(NewImport.model_fields)) | {"recorded_at": recorded_at}

        async def create() -> ImportBody:
            with _name_taken():
                source_id = await self._imports.begin(NewImport(**fields), described.gaps)
            return ImportBody(id=source_id, expires_in_s=IDLE_S)

        return await self._once(caller, "imports", key, described.model_dump_json(), ImportBody, create)

    async def frames(self, caller: Caller, source_id: str, hour: int, chunks: AsyncIterator[bytes]) -> ImportedHour:
        """Take the frames of an hour, but for those that were erased where they come from.

        Raises DamagedExport, FileTooLarge and StorageFull.
        """
        as_of = await self._timeline.as_of(source_id)  # an import that was given up must not come back

        async def take(file: Path, new: NewImport) -> int:
            rows = await _read(lambda: read_frames(file.read_bytes(), self._timeline.format, hour))
            _require_within(new, hour, int(rows.slots[0]), int(rows.slots[-1]))
            rows = _without(rows, await self._imports.erased(source_id, *span_of(hour)))
            if not len(rows.slots):
                return 0
            await self._keep(source_id, hour, lambda: self._timeline.restore(source_id, rows, as_of))
            return len(rows.slots)

        limit = min(self._max_hour_bytes, max_frames_bytes(self._timeline.format))
        return await self._received(caller, source_id, chunks, limit, take)

    async def keyframes(self, caller: Caller, source_id: str, hour: int, chunks: AsyncIterator[bytes]) -> ImportedHour:
        """Take the keyframes of those frames of an hour that are here: others came while it was exported.

        Raises as `frames` does.
        """
        as_of = await self._timeline.as_of(source_id)

        async def take(file: Path, new: NewImport) -> int:
            jpegs = await _read(lambda: self._pictures(file.read_bytes(), hour))
            _require_within(new, hour, min(jpegs), max(jpegs))
            kept = set((await self._timeline.slots(source_id, *span_of(hour))).tolist())
            pictures = {slot: jpeg for slot, jpeg in jpegs.items() if slot in kept}
            await self._keep(source_id, hour, lambda: self._keyframes.restore(source_id, hour, pictures, as_of))
            return len(pictures)

        return await self._received(caller, source_id, chunks, self._max_hour_bytes, take)

    async def complete(self, caller: Caller, source_id: str, sent: ImportCompletion) -> ImportDone:
        """Let everyone see the source. Raises StateConflict if frames are missing, and StreamTaken.

        Who did not get the answer may ask again.
        """
        caller.require_new_sources()
        if (known := await self._imports.completed(source_id)) is not None:
            source, frames = known
            return ImportDone(id=source_id, kind="stream" if isinstance(source, Stream) else "video", frames=frames)
        new = await self._imports.go_on(source_id)
        frames = await self._timeline.count(source_id)
        if frames != sent.frames:
            raise StateConflict(
                f"{frames} frames are here, {sent.frames} were sent: send the missing hours, or begin again.",
                param="frames",
                details={"frames": frames},
            )
        with _name_taken():
            await self._imports.complete(source_id, frames)
        logger.info("imported %s: %d frames of %r", source_id, frames, new.name)
        return ImportDone(id=source_id, kind=new.kind, frames=frames)

    async def abandon(self, caller: Caller, source_id: str) -> ImportAbandoned:
        """Give an import up."""
        caller.require_new_sources()
        await self._imports.abandon(source_id)
        return ImportAbandoned(id=source_id)

    async def _received(
        self, caller: Caller, source_id: str, chunks: AsyncIterator[bytes], max_bytes: int, take: Take
    ) -> ImportedHour:
        """Receive a body onto the disk, where many may wait, and let it be taken in once there is room in memory."""
        caller.require_new_sources()
        await self._imports.go_on(source_id)
        file = self._folder / f"{uuid4().hex}.import"
        try:
            size = await receive_body(chunks, file, max_bytes, self._disk)
            async with self._room:
                try:
                    new = await self._imports.go_on(source_id, size, self._max_bytes)
                except ImportedTooMuch:
                    raise FileTooLarge(
                        f"An import has at most {self._max_bytes} bytes here.", details={"max_bytes": self._max_bytes}
                    ) from None
                return ImportedHour(frames=await finish(take(file, new)))
        except HourFileDamaged as error:
            raise StoreUnavailable(f"an hour does not read back as it was written: {error}") from None
        finally:
            await asyncio.to_thread(file.unlink, missing_ok=True)

    async def _keep(self, source_id: str, hour: int, restore: Callable[[], Awaitable[bool]]) -> None:
        """Add to an hour until it has not changed meanwhile."""
        for _ in range(TRIES):
            await self._imports.go_on(source_id)
            if await restore():
                return
        raise StoreUnavailable(f"hour {hour} of {source_id} changes all the time; send it again")

    def _pictures(self, content: bytes, hour: int) -> Mapping[int, bytes]:
        """Raises DamagedHour."""
        jpegs = read_keyframes(content, hour)
        for slot, jpeg in jpegs.items():
            if not _is_keyframe(jpeg, self._side_px):
                raise DamagedHour(
                    f"the keyframe of slot {slot} is no JPEG of {self._side_px} x {self._side_px} pixels in colour, "
                    f"of at most {_max_keyframe_bytes(self._side_px)} bytes and {MAX_REPEATS} scans"
                )
        return jpegs


async def _read(read: Callable[[], T]) -> T:
    """Read an hour in a thread. Raises DamagedExport."""
    try:
        return await asyncio.to_thread(read)
    except DamagedHour as error:
        raise DamagedExport(f"This is no hour that an export wrote: {error}.") from None


def _without(rows: Hour, gone: Sequence[Gap]) -> Hour:
    """Return the frames that lie in none of the gaps."""
    stays = np.ones(len(rows.slots), np.bool_)
    for gap in gone:
        stays &= (rows.slots < gap.start_slot) | (rows.slots >= gap.end_slot)
    return Hour(rows.slots[stays], rows.tokens[stays], rows.vectors[stays], rows.times[stays])


def _is_keyframe(jpeg: bytes, side_px: int) -> bool:
    """Read a picture to its end: what is kept can be decoded whenever a question needs it."""
    if len(jpeg) > _max_keyframe_bytes(side_px):
        return False
    try:
        with opened(jpeg, ("JPEG",)) as picture:
            if picture.size != (side_px, side_px) or picture.mode != "RGB":
                return False
            picture.draft("RGB", (1, 1))  # every bit is read, but an eighth of the size is computed, which is quicker
            picture.load()
    except BadPicture:
        return False
    return True


def _max_keyframe_bytes(side_px: int) -> int:
    """Return how many bytes a keyframe has at most: ingest makes less of noise than it has unpacked."""
    return 3 * side_px**2 + (64 << 10)


def _require_format(theirs: TokenFormat, ours: TokenFormat) -> None:
    if theirs == ours:
        return
    why = (
        f"The tokens are those of the model {theirs.fingerprint}, the model that runs here is {ours.fingerprint}: it "
        "cannot read them. Import them where their model runs."
        if theirs.fingerprint != ours.fingerprint
        else f"The tokens are said to be of the model {ours.fingerprint}, but have another layout."
    )
    raise ModelMismatch(
        why, param="format", details={"fingerprint": theirs.fingerprint, "fingerprint_here": ours.fingerprint}
    )


def _require_within(new: NewImport, hour: int, first: int, last: int) -> None:
    if first < new.start_slot or last >= new.end_slot:
        raise DamagedExport(f"Hour {hour} has slots outside of [{new.start_slot}, {new.end_slot}), which is imported.")


@contextmanager
def _name_taken() -> Iterator[None]:
    try:
        yield
    except StreamExists:
        raise StreamTaken("Another stream has this name: import it under a name of its own.", param="name") from None
