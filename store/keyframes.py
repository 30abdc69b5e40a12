"""The keyframes: one JPEG a slot, in a local folder or an object store."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from store.files import Files
from store.format import HOUR_SLOTS
from store.hot import FrameNotKept


class Keyframes:
    """JPEGs at `<root>/<source>/keyframes/<hour>/<slot>.jpg`; file system calls run in threads.

    Raises StoreUnavailable when the folder or the object store cannot be read or written.
    """

    def __init__(self, root_url: str) -> None:
        self._files = Files(root_url)

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
        found = await asyncio.to_thread(self._files.read, [self._path(source_id, slot) for slot in slots])
        jpegs = []
        for slot, jpeg in zip(slots, found, strict=True):
            if jpeg is None:
                raise FrameNotKept(source_id, slot)
            jpegs.append(jpeg)
        return jpegs

    async def erase(self, source_id: str, start: int | None = None, end: int | None = None) -> int:
        """Erase the keyframes of slots [start, end) and return how many; None leaves a side unbounded."""
        return await asyncio.to_thread(self._erase, source_id, start, end)

    async def writable(self) -> bool:
        """Return whether a file can be written and removed now."""
        return await asyncio.to_thread(self._files.is_writable)

    def _path(self, source_id: str, slot: int) -> str:
        return f"{self._folder(source_id)}/{slot // HOUR_SLOTS}/{slot}.jpg"

    def _folder(self, source_id: str) -> str:
        return self._files.folder(source_id, "keyframes")

    def _erase(self, source_id: str, start: int | None, end: int | None) -> int:
        folder = self._folder(source_id)
        low = float("-inf") if start is None else start
        high = float("inf") if end is None else end
        erased = 0
        for hour, path in self._numbered(folder, ""):
            if hour * HOUR_SLOTS >= high or (hour + 1) * HOUR_SLOTS <= low:
                continue
            files = list(self._numbered(path, ".jpg"))
            doomed = [file for slot, file in files if low <= slot < high]
            erased += len(doomed)
            if low <= hour * HOUR_SLOTS and (hour + 1) * HOUR_SLOTS <= high:
                self._files.remove([path], recursive=True)  # with whatever a crash left there
            else:
                self._files.remove(doomed)
                self._files.remove_if_empty([path])
        self._files.remove_if_empty([folder])
        return erased

    def _numbered(self, folder: str, suffix: str) -> Iterator[tuple[int, str]]:
        """List the hour folders or slot files of a folder."""
        for name in self._files.names(folder):
            if name.endswith(suffix) and (number := name.removesuffix(suffix)).isdecimal():
                yield int(number), f"{folder}/{name}"
