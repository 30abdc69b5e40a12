"""Files of the store under one root: a local folder, or an object store by fsspec. Everything here blocks."""

import errno
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from store.connection import NO_ROOM, StoreFull, StoreUnavailable

logger = logging.getLogger(__name__)

ERASE_TRIES = 5
WRITE_ATTEMPTS = 10  # erasures remove empty folders; a write comes between them soon
_UNUSABLE = (
    "the files of the store cannot be read or written ({}); check TOKENLINE_STORE__SEGMENTS_URL and its permissions"
)
_FULL = (
    "the disk of the store is full: make room, or shorten what streams keep; what could not be written is tried again"
)
_DRAFT = ".tmp"
_SOURCE_ID = re.compile(r"[A-Za-z0-9_-]+")  # a part of a path: nothing that leaves the root


class Files:
    """Reads and writes whole files and ranges of them.

    Raises FileNotFoundError, StoreUnavailable when the folder or the object store cannot be read or written, and, of
    those, StoreFull when it has no room.
    """

    def __init__(self, root_url: str) -> None:
        self._fs, root = fsspec.url_to_fs(root_url)
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def folder(self, source_id: str, kind: str) -> str:
        """Return the folder of one kind of files of a source. ValueError for what is no source id."""
        if not _SOURCE_ID.fullmatch(source_id):
            raise ValueError("a source id consists of letters, digits, - and _")
        return f"{self._root}/{source_id}/{kind}"

    def write(self, files: Mapping[str, bytes], *, synced: bool = False) -> None:
        """Write files so that readers see each of them whole or not at all; `synced` waits for the disk."""
        with _named_failures():
            if not self._local:
                self._fs.pipe(dict(files))  # object stores show an object only when it is whole
                return
            for path, content in files.items():
                _write_whole(Path(path), content, synced=synced)

    def read(self, paths: Sequence[str]) -> list[bytes | None]:
        """Return the contents of files in the order asked, None for those that are not there."""
        with _named_failures():
            if self._local:
                return [_local_content(path) for path in paths]
            everything: list[None] = [None] * len(paths)
            return [
                _content(one) for one in self._fs.cat_ranges(list(paths), everything, everything, on_error="return")
            ]

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each target with the bytes of a file from an offset on. FileNotFoundError; EOFError if it ends."""
        with _named_failures(is_reading=True):
            if self._local:
                with Path(path).open("rb", buffering=0) as file:
                    for start, target in ranges:
                        file.seek(start)
                        _fill(file.readinto, target)
                return
            starts = [start for start, _ in ranges]
            ends = [start + target.nbytes for start, target in ranges]
            parts = self._fs.cat_ranges([path] * len(ranges), starts, ends, on_error="raise")
            for part, (_, target) in zip(parts, ranges, strict=True):
                if len(part) < target.nbytes:
                    raise EOFError
                target[:] = part

    def names(self, folder: str) -> list[str]:
        """Return the names of what lies in a folder, sorted; nothing if there is no such folder."""
        with _named_failures():
            self._fs.invalidate_cache()
            try:
                paths: Iterable[str] = self._fs.ls(folder, detail=False)
            except FileNotFoundError:
                return []
            return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def sources(self) -> list[str]:
        """Return the ids of the sources that have files, sorted."""
        return [name for name in self.names(self._root) if _SOURCE_ID.fullmatch(name)]

    def tree(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder, relative to it, sorted; nothing if there is no such folder."""
        with _named_failures():
            if self._local:
                return sorted(_files_below(folder))
            self._fs.invalidate_cache()
            inside = f"{self._fs._strip_protocol(folder)}/"
            paths: Iterable[str] = self._fs.find(folder)
            return sorted(path.removeprefix(inside) for path in paths)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of what lies in a folder, by name; nothing if there is no such folder."""
        with _named_failures():
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(folder, detail=True)
            except FileNotFoundError:
                return {}
            return {about["name"].rstrip("/").rpartition("/")[2]: int(about["size"] or 0) for about in found}

    def remove(self, paths: Sequence[str], *, recursive: bool = False) -> None:
        """Remove files or folders, though others write and erase there at the same time."""
        doomed = list(paths)
        with _named_failures():
            for tries_left in reversed(range(ERASE_TRIES)):
                if not doomed:
                    return
                try:
                    self._fs.rm(doomed, recursive=recursive)
                    return
                except FileNotFoundError:
                    doomed = [path for path in doomed if self._fs.exists(path)]
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY or tries_left == 0:
                        raise

    def remove_drafts(self, folder: str) -> None:
        """Remove what a crash left of files that were being written there; who still writes one begins anew."""
        if self._local:  # elsewhere there are none
            with _named_failures():
                for draft in Path(folder).glob(f".*{_DRAFT}"):
                    draft.unlink(missing_ok=True)

    def remove_if_empty(self, folders: Iterable[str]) -> None:
        """Remove those of the folders that hold nothing, and then their parents."""
        if self._local:  # elsewhere folders are only names
            for path in map(Path, folders):
                for empty in (path, path.parent):
                    with suppress(OSError):
                        empty.rmdir()

    def check_writable(self) -> None:
        """Write and remove a file. Raises StoreFull, or StoreUnavailable with what else stands in the way."""
        probe = f"{self._root}/.writable-{uuid.uuid4().hex}"
        self.write({probe: b"ok"})
        with _named_failures():
            self._fs.rm_file(probe)


def _files_below(folder: str) -> Iterator[str]:
    """Yield the paths of files, relative to a folder. fsspec takes a folder that cannot be read for an empty one."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # erased meanwhile
            raise error

    for parent, _, names in os.walk(folder, onerror=failed):
        for name in names:
            yield os.path.relpath(os.path.join(parent, name), folder)  # noqa: PTH118


def _local_content(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None


def _content(found: bytes | Exception) -> bytes | None:
    if isinstance(found, FileNotFoundError):
        return None
    if isinstance(found, Exception):
        raise found
    return found


def _fill(readinto: Callable[[memoryview], int | None], target: memoryview) -> None:
    """Read until a target is full: one read may give less. EOFError."""
    done = 0
    while done < target.nbytes:
        count = readinto(target[done:])
        if not count:
            raise EOFError
        done += count


def _write_whole(path: Path, content: bytes, *, synced: bool) -> None:
    """Write a file so that readers see it whole or not at all."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_DRAFT}")
    for attempt in range(WRITE_ATTEMPTS):
        try:
            new = [folder for folder in path.parents if not folder.exists()] if synced else []
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(content)
                if synced:
                    file.flush()
                    os.fsync(file.fileno())
            draft.replace(path)
            if synced:
                for folder in (path.parent, *(folder.parent for folder in new)):
                    _sync_folder(folder)
            return
        except (FileNotFoundError, FileExistsError):  # an erasure removed an empty folder just now
            if attempt == WRITE_ATTEMPTS - 1:
                raise
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def _sync_folder(path: Path) -> None:
    """Make the name of a new file outlive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named_failures(*, is_reading: bool = False) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        if is_reading:
            raise
        raise StoreUnavailable(_UNUSABLE.format("the folder vanished")) from None
    except EOFError:
        raise
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StoreFull(_FULL) from error
        reason = error.strerror or type(error).__name__
        raise StoreUnavailable(_UNUSABLE.format(reason)) from error
    except Exception as error:
        # Object stores have errors of their own, one of which for a server that is away; their texts name addresses.
        logger.warning("the object store failed with %s", type(error).__name__)
        raise StoreUnavailable(_UNUSABLE.format(type(error).__name__)) from None
