"""The keyframes: one JPEG a slot, in a local folder or an object store."""

import asyncio
import errno
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from store.connection import StoreUnavailable
from store.format import HOUR_SLOTS
from store.timeline import FrameNotKept

ERASE_TRIES = 5
WRITE_ATTEMPTS = 10  # erasures remove empty folders; a write comes between them soon
_SOURCE_ID = re.compile(r"[A-Za-z0-9_-]+")  # a part of a path: nothing that leaves the root


class Keyframes:
    """JPEGs at `<root>/<source>/keyframes/<hour>/<slot>.jpg`; file system calls run in threads.

    Raises StoreUnavailable when the folder or the object store cannot be read or written.
    """

    def __init__(self, root_url: str) -> None:
        self._fs, root = fsspec.url_to_fs(root_url)
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    async def put(self, source_id: str, slot: int, jpeg: bytes) -> None:
        """Keep one keyframe; a slot that is kept already is overwritten."""
        await self.put_many({(source_id, slot): jpeg})

    async def put_many(self, jpegs: Mapping[tuple[str, int], bytes]) -> None:
        """Keep the keyframes of many (source id, slot) at once. A keyframe is there wholly or not at all."""
        files = {self._path(source_id, slot): jpeg for (source_id, slot), jpeg in jpegs.items()}
        await asyncio.to_thread(self._write, files)

    async def get(self, source_id: str, slot: int) -> bytes:
        """Return one keyframe; FrameNotKept."""
        return (await self.get_many(source_id, [slot]))[0]

    async def get_many(self, source_id: str, slots: Sequence[int]) -> list[bytes]:
        """Return the keyframes of the slots in the order asked; FrameNotKept names the first absent one."""
        return await asyncio.to_thread(self._read, source_id, slots)

    async def erase(self, source_id: str, start: int | None = None, end: int | None = None) -> int:
        """Erase the keyframes of slots [start, end) and return how many; None leaves a side unbounded."""
        return await asyncio.to_thread(self._erase, source_id, start, end)

    async def writable(self) -> bool:
        """Return whether a file can be written and removed now."""
        probe = f"{self._root}/.writable-{uuid.uuid4().hex}"
        try:
            await asyncio.to_thread(self._write, {probe: b"ok"})
            await asyncio.to_thread(self._fs.rm_file, probe)
        except OSError:  # StoreUnavailable is one
            return False
        return True

    def _path(self, source_id: str, slot: int) -> str:
        return f"{self._folder(source_id)}/{slot // HOUR_SLOTS}/{slot}.jpg"

    def _folder(self, source_id: str) -> str:
        if not _SOURCE_ID.fullmatch(source_id):
            raise ValueError("a source id consists of letters, digits, - and _")
        return f"{self._root}/{source_id}/keyframes"

    def _write(self, files: Mapping[str, bytes]) -> None:
        with _named_failures():
            if not self._local:
                self._fs.pipe(dict(files))  # object stores show an object only when it is whole
                return
            for path, content in files.items():
                _write_whole(Path(path), content)

    def _read(self, source_id: str, slots: Sequence[int]) -> list[bytes]:
        paths = [self._path(source_id, slot) for slot in slots]
        with _named_failures():
            # An object store reads a list at once, and returns what went wrong in place of an object's content.
            fetched = (
                self._fs.cat(list(dict.fromkeys(paths)), on_error="return") if self._fs.async_impl and paths else {}
            )
            jpegs = []
            for slot, path in zip(slots, paths, strict=True):
                try:
                    jpeg = fetched[path] if path in fetched else self._fs.cat_file(path)
                    if isinstance(jpeg, Exception):
                        raise jpeg
                except FileNotFoundError:
                    raise FrameNotKept(source_id, slot) from None
                jpegs.append(jpeg)
            return jpegs

    def _erase(self, source_id: str, start: int | None, end: int | None) -> int:
        folder = self._folder(source_id)
        low = float("-inf") if start is None else start
        high = float("inf") if end is None else end
        erased = 0
        with _named_failures():
            self._fs.invalidate_cache()
            for hour, path in self._numbered(folder, ""):
                if hour * HOUR_SLOTS >= high or (hour + 1) * HOUR_SLOTS <= low:
                    continue
                files = list(self._numbered(path, ".jpg"))
                doomed = [file for slot, file in files if low <= slot < high]
                erased += len(doomed)
                if low <= hour * HOUR_SLOTS and (hour + 1) * HOUR_SLOTS <= high:
                    self._remove([path], recursive=True)  # with whatever a crash left there
                elif doomed:
                    self._remove(doomed)
                    self._remove_if_empty([path])
            self._remove_if_empty([folder, folder.rpartition("/")[0]])
        return erased

    def _remove(self, paths: list[str], *, recursive: bool = False) -> None:
        """Remove files or folders, though others write and erase there at the same time."""
        for tries_left in reversed(range(ERASE_TRIES)):
            try:
                self._fs.rm(paths, recursive=recursive)
                return
            except FileNotFoundError:
                paths = [path for path in paths if self._fs.exists(path)]
                if not paths:
                    return
            except OSError as error:
                if error.errno != errno.ENOTEMPTY or tries_left == 0:
                    raise

    def _numbered(self, folder: str, suffix: str) -> Iterator[tuple[int, str]]:
        """List the hour folders or slot files of a folder."""
        try:
            paths: Iterable[str] = self._fs.ls(folder, detail=False)
        except FileNotFoundError:
            return
        for path in sorted(paths):
            name = path.rstrip("/").rpartition("/")[2]
            if name.endswith(suffix) and (number := name.removesuffix(suffix)).isdecimal():
                yield int(number), path.rstrip("/")

    def _remove_if_empty(self, folders: Iterable[str]) -> None:
        if self._local:  # elsewhere folders are only names
            for folder in folders:
                with suppress(OSError):
                    Path(folder).rmdir()


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that readers see it whole or not at all."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    for attempt in range(WRITE_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(content)
            draft.replace(path)
            return
        except (FileNotFoundError, FileExistsError):  # an erasure removed an empty folder just now
            if attempt == WRITE_ATTEMPTS - 1:
                raise
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


@contextmanager
def _named_failures() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StoreUnavailable(
            f"keyframes cannot be read or written ({reason}); check TOKENLINE_STORE__SEGMENTS_URL, "
            "its permissions and its free space"
        ) from error
