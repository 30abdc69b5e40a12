"""The keyframes: a JPEG a slot in a folder or an object store, and one pack for each hour that is over.

What is packed counts before what is loose: a frame that is sent again has the same picture. A loose keyframe is not
synced: of one that was written just before the machine crashed there may be an empty file, which counts as none.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from store.connection import StoreUnavailable
from store.files import Files
from store.format import HOUR_SLOTS, hours_cut, hours_of
from store.hot import FrameNotKept
from store.hour_files import HourFileDamaged, HourFileGone
from store.loose import LooseHours
from store.packs import Pack, Packs
from store.sealed import Before, PackedHours
from store.slots import union

TRIES = 20  # of what meets packing and erasing again and again
_DAMAGED = "{}: restore the file, or erase the hour"
_LOST = "the pack {} of {} is lost: restore it, or erase the hour"


class Keyframes:
    """JPEGs at `<root>/<source>/keyframes/<hour>/<slot>.jpg`, or in packs; file system calls run in threads.

    Those outside of packs may lie under a root of their own: on an object store each would be a request.
    Raises StoreUnavailable when Redis is away, or the folder or the object store cannot be read or written.
    """

    def __init__(self, redis: Redis, root_url: str, loose_root_url: str | None = None) -> None:
        self._are_apart = loose_root_url not in (None, root_url)
        self._files = Files(loose_root_url or root_url)
        self._packs = Packs(root_url)
        self._packed = PackedHours(redis)
        self._loose = LooseHours(redis)

    async def put(self, source_id: str, slot: int, jpeg: bytes) -> None:
        """Keep one keyframe; a slot that is kept already is overwritten."""
        await self.put_many({(source_id, slot): jpeg})

    async def put_many(self, jpegs: Mapping[tuple[str, int], bytes]) -> None:
        """Keep the keyframes of many (source id, slot) at once. A keyframe is there wholly or not at all."""
        files = {self._path(source_id, slot): jpeg for (source_id, slot), jpeg in jpegs.items()}
        sizes = Counter[tuple[str, int]]()
        for (source_id, slot), jpeg in jpegs.items():
            sizes[source_id, slot // HOUR_SLOTS] += len(jpeg)
        await self._loose.add(sizes)
        try:
            await asyncio.to_thread(self._files.write, files)
        except StoreUnavailable:  # or bytes that were never written would make retention end others
            for (source_id, hour), nbytes in sizes.items():
                await self._loose.take(source_id, hour, nbytes)
            raise
        await self._loose.note(sizes)

    async def get(self, source_id: str, slot: int) -> bytes:
        """Return one keyframe; FrameNotKept."""
        return (await self.get_many(source_id, [slot]))[0]

    async def get_many(self, source_id: str, slots: Sequence[int]) -> list[bytes]:
        """Return the keyframes of the slots in the order asked; FrameNotKept names the first absent one."""
        found = await self.find(source_id, slots)
        absent = next((slot for slot in slots if slot not in found), None)
        if absent is not None:
            raise FrameNotKept(source_id, int(absent))
        return [found[slot] for slot in slots]

    async def find(self, source_id: str, slots: Sequence[int]) -> dict[int, bytes]:
        """Return those of the slots' keyframes that are kept."""
        if not len(slots):
            return {}
        first, last = int(min(slots)) // HOUR_SLOTS, int(max(slots)) // HOUR_SLOTS
        before: list[Pack] | None = None
        for _ in range(TRIES):
            packed = await self._packed.between(source_id, first, last)
            lost: str | None = None
            found: dict[int, bytes] = {}
            try:
                found = await self._read(source_id, packed, slots)
            except HourFileGone as error:
                lost = str(error)
            # Packed or erased between the looks? Only what is absent twice in the same state is not kept.
            if packed == before and lost is not None:
                raise StoreUnavailable(_LOST.format(lost, source_id))
            if lost is None and (packed == before or all(slot in found for slot in slots)):
                return found
            before = packed
        raise StoreUnavailable(f"the keyframes of {source_id} change all the time; read them again")

    async def kept(self, source_id: str, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return for each of the slots (T,) whether its keyframe is kept, as far as Redis knows: no file is looked at.

        One that came after its hour was packed counts once it is packed too.
        """
        kept = np.zeros(len(slots), np.bool_)
        if not len(slots):
            return kept
        loose = await self._loose.read(source_id)  # first: an hour that is packed meanwhile is found twice, not never
        hours = slots // HOUR_SLOTS
        packed = await self._packed.between(source_id, int(hours.min()), int(hours.max()))
        for hour, one in loose.items():
            kept |= (hours == hour) & (slots >= one.start)
        for pack in packed:
            here = hours == pack.hour
            kept[here] = np.isin(slots[here], pack.slots)
        return kept

    async def hours(self, source_id: str) -> list[int]:
        """Return the hours that have keyframes, in order."""
        loose = await self.loose_hours(source_id)  # first: one that is packed meanwhile is then found twice
        return sorted({*loose, *(pack.hour for pack in await self._packed.between(source_id))})

    async def slots(self, source_id: str, hour: int) -> NDArray[np.int64]:
        """Return the slots of an hour that have a keyframe, ascending."""
        is_noted = hour in await self._loose.read(source_id)  # first, as above; a listing costs money
        sizes = await asyncio.to_thread(self._sizes, f"{self._folder(source_id)}/{hour}") if is_noted else {}
        loose = [slot for slot, nbytes in sizes.items() if nbytes]
        packed = await self._packed.between(source_id, hour, hour)
        return union(np.array(loose, np.int64), *(pack.slots for pack in packed))

    async def noted_hours(self, source_ids: Sequence[str]) -> dict[str, list[int]]:
        """Return by source the hours that have keyframes outside of packs, as far as they are noted: in few trips."""
        return {source_id: sorted(hours) for source_id, hours in (await self._loose.read_many(source_ids)).items()}

    async def loose_hours(self, source_id: str) -> list[int]:
        """Return the hours that have keyframes outside of packs, by a listing, and note what was not noted of them."""
        noted = await self._loose.read(source_id)
        listed = await asyncio.to_thread(lambda: dict(self._numbered(self._folder(source_id), "")))
        for hour, folder in listed.items():
            if hour not in noted:
                sizes = await asyncio.to_thread(self._sizes, folder)
                await self._loose.note({(source_id, hour): sum(sizes.values())})
        return sorted({*listed, *noted})

    async def recount(self, source_id: str) -> None:
        """Count anew what the packs of a source add up to."""
        await self._packed.recount(source_id)

    async def pack(self, source_id: str, hour: int) -> bool:
        """Put the loose keyframes of an hour into its pack; False if the hour changed meanwhile: it stays as it was.

        Raises HourFileDamaged if the pack does not read back as it was written; then nothing is moved.
        """
        before = await self._packed.before(source_id, hour)
        noted = (await self._loose.read(source_id)).get(hour)  # before the listing: what comes later stays noted
        loose = await asyncio.to_thread(self._files_of, source_id, hour)
        if not loose:
            if noted is not None:
                await self._take(source_id, hour, noted.nbytes)
            return True
        contents = await asyncio.to_thread(self._files.read, list(loose.values()))
        jpegs = {slot: jpeg for slot, jpeg in zip(loose, contents, strict=True) if jpeg}
        packed = await self._content(source_id, before)
        if packed is None or not await self._replace(source_id, before, jpegs | packed, before.as_of):
            return False
        await asyncio.to_thread(self._remove_loose, f"{self._folder(source_id)}/{hour}", list(loose.values()))
        if noted is not None:
            await self._take(source_id, hour, noted.nbytes)
        return True

    async def adopt(self, source_id: str, found: Pack, lost: Pack | None) -> bool:
        """Let a pack count of whose hour none is known, or one (`lost`) that is not there any more.

        False, and nothing is changed, if the hour changed meanwhile.
        """
        return await self._packed.adopt(source_id, found, lost)

    async def packed(self, source_id: str, first: int | None = None, last: int | None = None) -> list[Pack]:
        """Return the packs of the hours first to last that are packed, in order; None leaves a side unbounded."""
        return await self._packed.between(source_id, first, last)

    async def restore(self, source_id: str, hour: int, jpegs: Mapping[int, bytes], as_of: str) -> bool:
        """Add keyframes of an hour that is over straight to its pack; those that are packed stay as they are.

        False, and nothing is added, if the hour changed meanwhile, or if anything of the source was erased since
        `as_of`. Raises HourFileDamaged if the pack does not read back as it was written.
        """
        before = await self._packed.before(source_id, hour)
        packed = await self._content(source_id, before)
        if packed is None:
            return False
        if jpegs.keys() <= packed.keys():
            return True
        return await self._replace(source_id, before, {**jpegs, **packed}, as_of)

    async def erase(self, source_id: str, start: int | None = None, end: int | None = None) -> int:
        """Erase the keyframes of slots [start, end) and return how many; None leaves a side unbounded.

        StoreUnavailable, and nothing is erased, as long as an hour of which a part stays has packs that Redis lost.
        """
        for hour in hours_cut(start, end):
            loose = np.array(list(await asyncio.to_thread(self._files_of, source_id, hour)), np.int64)
            await self._packed.require_known(self._packs, source_id, hour, loose)
        erased = await self._erase(source_id, start, end, end)
        await self._packed.remove_leftovers(self._packs, source_id, *hours_of(start, end))
        if start is None and end is None:
            await self._packed.drop(source_id)
            await self._loose.drop(source_id)
        return erased

    async def expire(self, source_id: str, before: int) -> int:
        """Erase what is older than a slot and return how many; a packed hour goes as one, when all of it is older."""
        return await self._erase(source_id, None, before, before // HOUR_SLOTS * HOUR_SLOTS)

    async def check_writable(self) -> None:
        """Write and remove files. Raises StoreFull, or StoreUnavailable with what else stands in the way."""
        await asyncio.to_thread(self._files.check_writable)
        if self._are_apart:
            await self._packs.check_writable()

    async def _read(self, source_id: str, packed: Sequence[Pack], slots: Sequence[int]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for pack in packed:
            if here := [slot for slot in slots if slot // HOUR_SLOTS == pack.hour]:
                try:
                    found |= await self._packs.read(source_id, pack, here)
                except HourFileDamaged as error:
                    raise StoreUnavailable(_DAMAGED.format(error)) from None
        loose = [slot for slot in dict.fromkeys(slots) if slot not in found]
        contents = await asyncio.to_thread(self._files.read, [self._path(source_id, slot) for slot in loose])
        return found | {slot: jpeg for slot, jpeg in zip(loose, contents, strict=True) if jpeg}

    async def _content(self, source_id: str, before: Before[Pack]) -> dict[int, bytes] | None:
        """Return all that is packed of an hour; None if another pack has taken its place."""
        pack = before.manifest
        if pack is None:
            return {}
        try:
            return await self._packs.read(source_id, pack, pack.slots.tolist())
        except HourFileDamaged as error:
            raise StoreUnavailable(_DAMAGED.format(error)) from None
        except HourFileGone:
            if await self._packed.at(source_id, pack.hour) == pack:
                raise StoreUnavailable(_LOST.format(pack.file, source_id)) from None
            return None

    async def _replace(
        self, source_id: str, before: Before[Pack], jpegs: Mapping[int, bytes], as_of: str | None = None
    ) -> bool:
        """Let a pack of these keyframes, or none if they are none, stand for an hour."""
        await self._packed.require_known(self._packs, source_id, before.hour, np.array(list(jpegs), np.int64))
        swap = partial(self._packed.replace, source_id, before, as_of=as_of)
        writing = self._packs.write(source_id, before.hour, before.next_generation, jpegs) if jpegs else None
        return await self._packed.put(self._packs, source_id, before, writing, swap)

    async def _erase(self, source_id: str, start: int | None, end: int | None, packed_end: int | None) -> int:
        noted = await self._loose.read(source_id)  # before the listing, as above
        erased, left = await asyncio.to_thread(self._erase_loose, source_id, start, end)
        for hour in left:
            await self._packed.touch(source_id, hour)  # who packs them just now has read what is gone
        for hour, one in noted.items():
            if hour not in left and _is_within(hour, start, end):  # a crash has kept them from being written
                await self._take(source_id, hour, one.nbytes)
        for hour, nbytes in left.items():
            before = noted[hour].nbytes if hour in noted else 0
            await self._take(source_id, hour, before - nbytes, end if start is None else None)
        first, last = hours_of(start, packed_end)
        for _ in range(TRIES):
            done = [
                await self._erase_packed(source_id, pack, start, packed_end)
                for pack in await self._packed.between(source_id, first, last)
            ]
            erased += sum(count for count in done if count is not None)
            if None not in done:
                return erased
        raise StoreUnavailable(f"the keyframes of {source_id} change all the time; erase them again")

    async def _erase_packed(self, source_id: str, pack: Pack, start: int | None, end: int | None) -> int | None:
        """Erase packed keyframes and return their number; None if the hour changed meanwhile."""
        before = replace(await self._packed.before(source_id, pack.hour), manifest=pack)
        slots = pack.slots
        low = 0 if start is None else int(np.searchsorted(slots, start))
        high = len(slots) if end is None else int(np.searchsorted(slots, end))
        if low >= high:
            return 0
        doomed = set(slots[low:high].tolist())
        content = await self._content(source_id, before) if len(doomed) < len(slots) else {}
        if content is None:
            return None
        left = {slot: jpeg for slot, jpeg in content.items() if slot not in doomed}
        return len(doomed) if await self._replace(source_id, before, left) else None

    async def _take(self, source_id: str, hour: int, nbytes: int, start: int | None = None) -> None:
        """Note that so many bytes of an hour are not loose any more, and what is there if nothing would be noted then.

        They may be those of a keyframe that was written a moment after the listing: nobody would find it again.
        """
        if not await self._loose.take(source_id, hour, nbytes, start):
            sizes = await asyncio.to_thread(self._sizes, f"{self._folder(source_id)}/{hour}")
            if sizes:
                await self._loose.note({(source_id, hour): sum(sizes.values())})

    def _path(self, source_id: str, slot: int) -> str:
        return f"{self._folder(source_id)}/{slot // HOUR_SLOTS}/{slot}.jpg"

    def _folder(self, source_id: str) -> str:
        return self._files.folder(source_id, "keyframes")

    def _files_of(self, source_id: str, hour: int) -> dict[int, str]:
        return dict(self._numbered(f"{self._folder(source_id)}/{hour}", ".jpg"))

    def _sizes(self, folder: str) -> dict[int, int]:
        """Return the bytes of the loose keyframes of an hour's folder, by slot."""
        sizes = self._files.sizes(folder)
        return {slot: sizes[f"{slot}.jpg"] for slot in _numbers(sizes, ".jpg")}

    def _erase_loose(self, source_id: str, start: int | None, end: int | None) -> tuple[int, dict[int, int]]:
        """Erase loose keyframes; return their number and, of the hours that had some in the range, the bytes left."""
        folder = self._folder(source_id)
        low = float("-inf") if start is None else start
        high = float("inf") if end is None else end
        erased, left = 0, {}
        for hour, path in self._numbered(folder, ""):
            if hour * HOUR_SLOTS >= high or (hour + 1) * HOUR_SLOTS <= low:
                continue
            sizes = self._sizes(path)
            doomed = [slot for slot in sizes if low <= slot < high]
            erased += len(doomed)
            left[hour] = sum(sizes.values()) - sum(sizes[slot] for slot in doomed)
            if _is_within(hour, start, end):
                self._files.remove([path], recursive=True)  # with whatever a crash left there
            else:
                self._remove_loose(path, [f"{path}/{slot}.jpg" for slot in doomed])
        self._files.remove_if_empty([folder])
        return erased, left

    def _remove_loose(self, folder: str, paths: Sequence[str]) -> None:
        """Remove loose keyframes of an hour, and what a crash has left in its folder."""
        self._files.remove(paths)
        self._files.remove_drafts(folder)
        self._files.remove_if_empty([folder])

    def _numbered(self, folder: str, suffix: str) -> Iterator[tuple[int, str]]:
        """List the hour folders or slot files of a folder."""
        for number in _numbers(self._files.names(folder), suffix):
            yield number, f"{folder}/{number}{suffix}"


def _numbers(names: Iterable[str], suffix: str) -> list[int]:
    """Return the hours or slots that names of hour folders or slot files tell."""
    return sorted(
        int(number)
        for name in names
        if name.endswith(suffix) and (number := name.removesuffix(suffix)).isdecimal() and str(int(number)) == number
    )


def _is_within(hour: int, start: int | None, end: int | None) -> bool:
    """Return whether all slots of an hour lie in [start, end)."""
    return (start is None or start <= hour * HOUR_SLOTS) and (end is None or (hour + 1) * HOUR_SLOTS <= end)
