"""The keyframes: a JPEG a slot in a folder or an object store, and one pack for each hour that is over.

What is packed counts before what is loose: a frame that is sent again has the same picture.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from redis.asyncio import Redis

from store.connection import StoreUnavailable
from store.files import Files
from store.format import HOUR_SLOTS, hours_of
from store.hot import FrameNotKept
from store.hour_files import HourFileGone
from store.packs import LABEL, Pack, Packs
from store.sealed import PackedHours

TRIES = 20  # of what meets packing and erasing again and again


class Keyframes:
    """JPEGs at `<root>/<source>/keyframes/<hour>/<slot>.jpg`, or in packs; file system calls run in threads.

    Raises StoreUnavailable when Redis is away, or the folder or the object store cannot be read or written.
    """

    def __init__(self, redis: Redis, root_url: str) -> None:
        self._files = Files(root_url)
        self._packs = Packs(root_url)
        self._packed = PackedHours(redis)

    async def put(self, source_id: str, slot: int, jpeg: bytes) -> None:
        """Keep one keyframe; a slot that is kept already is overwritten."""
        await self.put_many({(source_id, slot): jpeg})

    async def put_many(self, jpegs: Mapping[tuple[str, int], bytes]) -> None:
        """Keep the keyframes of many (source id, slot) at once. A keyframe is there wholly or not at all."""
        files = {self._path(source_id, slot): jpeg for (source_id, slot), jpeg in jpegs.items()}
        await asyncio.to_thread(self._files.write, files)

    async def get(self, source_id: str, slot: int) -> bytes:
        """Return one keyframe; FrameNotKept."""
        return (await self.get_many(source_id, [slot]))[0]

    async def get_many(self, source_id: str, slots: Sequence[int]) -> list[bytes]:
        """Return the keyframes of the slots in the order asked; FrameNotKept names the first absent one."""
        if not len(slots):
            return []
        first, last = int(min(slots)) // HOUR_SLOTS, int(max(slots)) // HOUR_SLOTS
        before: list[Pack] | None = None
        for _ in range(TRIES):
            packed = await self._packed.between(source_id, first, last)
            lost: str | None = None
            try:
                found = await self._read(source_id, packed, slots)
                absent = next((slot for slot in slots if slot not in found), None)
                if absent is None:
                    return [found[slot] for slot in slots]
            except HourFileGone as error:
                lost = str(error)
            # Packed or erased between the looks? Only what is absent twice in the same state is not kept.
            if packed == before and lost is not None:
                raise StoreUnavailable(f"the pack {lost} of {source_id} is lost: restore it or erase the hour")
            if packed == before and absent is not None:
                raise FrameNotKept(source_id, int(absent))
            before = packed
        raise StoreUnavailable(f"the keyframes of {source_id} change all the time; read them again")

    async def loose_hours(self, source_id: str) -> list[int]:
        """Return the hours that have keyframes outside of packs."""
        return await asyncio.to_thread(lambda: [hour for hour, _ in self._numbered(self._folder(source_id), "")])

    async def pack(self, source_id: str, hour: int) -> bool:
        """Put the loose keyframes of an hour into its pack; False if the hour changed meanwhile: it stays as it was.

        Raises HourFileDamaged if the pack does not read back as it was written; then nothing is moved.
        """
        old = next(iter(await self._packed.between(source_id, hour, hour)), None)
        changes = await self._packed.changes(source_id, hour)
        loose = await asyncio.to_thread(self._loose, source_id, hour)
        if not loose:
            return True
        contents = await asyncio.to_thread(self._files.read, list(loose.values()))
        jpegs = {slot: jpeg for slot, jpeg in zip(loose, contents, strict=True) if jpeg is not None}
        try:
            jpegs |= {} if old is None else await self._content(source_id, old)
        except HourFileGone:
            return False
        if not await self._replace(source_id, hour, old, jpegs, changes):
            return False
        await asyncio.to_thread(self._files.remove, list(loose.values()))
        await asyncio.to_thread(self._files.remove_if_empty, [f"{self._folder(source_id)}/{hour}"])
        return True

    async def adopt(self, source_id: str, found: Pack, lost: Pack | None) -> bool:
        """Let a pack count of whose hour none is known, or one (`lost`) that is not there any more.

        False, and nothing is changed, if the hour changed meanwhile.
        """
        changes = await self._packed.changes(source_id, found.hour)
        return await self._packed.replace(source_id, found.hour, lost, found, changes=changes)

    async def packed(self, source_id: str) -> list[Pack]:
        """Return the packs of the hours that are packed, in order."""
        return await self._packed.between(source_id)

    async def erase(self, source_id: str, start: int | None = None, end: int | None = None) -> int:
        """Erase the keyframes of slots [start, end) and return how many; None leaves a side unbounded."""
        erased = await self._erase(source_id, start, end, start, end)
        await self._packed.remove_leftovers(self._packs, source_id, LABEL, *hours_of(start, end))
        if start is None and end is None:
            await self._packed.drop(source_id)
        return erased

    async def expire(self, source_id: str, before: int) -> int:
        """Erase what is older than a slot and return how many; a packed hour goes as one, when all of it is older."""
        return await self._erase(source_id, None, before, None, before // HOUR_SLOTS * HOUR_SLOTS)

    async def writable(self) -> bool:
        """Return whether a file can be written and removed now."""
        return await asyncio.to_thread(self._files.is_writable)

    async def _read(self, source_id: str, packed: Sequence[Pack], slots: Sequence[int]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for pack in packed:
            if here := [slot for slot in slots if slot // HOUR_SLOTS == pack.hour]:
                found |= await self._packs.read(source_id, pack, here)
        loose = [slot for slot in dict.fromkeys(slots) if slot not in found]
        contents = await asyncio.to_thread(self._files.read, [self._path(source_id, slot) for slot in loose])
        return found | {slot: jpeg for slot, jpeg in zip(loose, contents, strict=True) if jpeg is not None}

    async def _content(self, source_id: str, pack: Pack) -> dict[int, bytes]:
        return await self._packs.read(source_id, pack, (await self._packs.slots(source_id, pack)).tolist())

    async def _replace(
        self, source_id: str, hour: int, old: Pack | None, jpegs: Mapping[int, bytes], changes: str
    ) -> bool:
        """Let a pack of these keyframes, or none if they are none, stand for an hour as it was at `changes`."""
        new = None
        if jpegs:
            generation = 1 if old is None else old.generation + 1
            new = await self._packs.write(source_id, hour, generation, jpegs)
        done = await self._packed.replace(source_id, hour, old, new, changes=changes)
        superseded = old if done else new
        if superseded is not None:
            await self._packs.remove(source_id, hour, superseded.file)
        return done

    async def _erase(
        self, source_id: str, start: int | None, end: int | None, packed_start: int | None, packed_end: int | None
    ) -> int:
        erased, hours = await asyncio.to_thread(self._erase_loose, source_id, start, end)
        for hour in hours:  # who packs them just now has read what is gone
            await self._packed.touch(source_id, hour)
        first, last = hours_of(packed_start, packed_end)
        for _ in range(TRIES):
            done = [
                await self._erase_packed(source_id, pack, packed_start, packed_end)
                for pack in await self._packed.between(source_id, first, last)
            ]
            erased += sum(count for count in done if count is not None)
            if None not in done:
                return erased
        raise StoreUnavailable(f"the keyframes of {source_id} change all the time; erase them again")

    async def _erase_packed(self, source_id: str, pack: Pack, start: int | None, end: int | None) -> int | None:
        """Erase packed keyframes and return their number; None if the hour changed meanwhile."""
        changes = await self._packed.changes(source_id, pack.hour)
        try:
            slots = await self._packs.slots(source_id, pack)
            low = 0 if start is None else int(np.searchsorted(slots, start))
            high = len(slots) if end is None else int(np.searchsorted(slots, end))
            if low >= high:
                return 0
            content = await self._content(source_id, pack)
        except HourFileGone:
            return None
        doomed = set(slots[low:high].tolist())
        left = {slot: jpeg for slot, jpeg in content.items() if slot not in doomed}
        return len(doomed) if await self._replace(source_id, pack.hour, pack, left, changes) else None

    def _path(self, source_id: str, slot: int) -> str:
        return f"{self._folder(source_id)}/{slot // HOUR_SLOTS}/{slot}.jpg"

    def _folder(self, source_id: str) -> str:
        return self._files.folder(source_id, "keyframes")

    def _loose(self, source_id: str, hour: int) -> dict[int, str]:
        return dict(self._numbered(f"{self._folder(source_id)}/{hour}", ".jpg"))

    def _erase_loose(self, source_id: str, start: int | None, end: int | None) -> tuple[int, list[int]]:
        """Erase loose keyframes; return their number and the hours that had some in the range."""
        folder = self._folder(source_id)
        low = float("-inf") if start is None else start
        high = float("inf") if end is None else end
        erased, hours = 0, []
        for hour, path in self._numbered(folder, ""):
            if hour * HOUR_SLOTS >= high or (hour + 1) * HOUR_SLOTS <= low:
                continue
            hours.append(hour)
            doomed = [file for slot, file in self._numbered(path, ".jpg") if low <= slot < high]
            erased += len(doomed)
            if low <= hour * HOUR_SLOTS and (hour + 1) * HOUR_SLOTS <= high:
                self._files.remove([path], recursive=True)  # with whatever a crash left there
            else:
                self._files.remove(doomed)
                self._files.remove_if_empty([path])
        self._files.remove_if_empty([folder])
        return erased, hours

    def _numbered(self, folder: str, suffix: str) -> Iterator[tuple[int, str]]:
        """List the hour folders or slot files of a folder."""
        for name in self._files.names(folder):
            if name.endswith(suffix) and (number := name.removesuffix(suffix)).isdecimal():
                yield int(number), f"{folder}/{name}"
