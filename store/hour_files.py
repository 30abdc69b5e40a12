"""Immutable files, each of one source-hour: safetensors that say what they are and carry a checksum.

What a name does not tell stands in the file's metadata: a listing is enough to know everything again.
"""

import asyncio
import base64
import hashlib
import json
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from uuid import uuid4

import numpy as np
import safetensors
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from store.files import Files
from store.format import HOUR_SLOTS

SLOT_DTYPE = np.dtype("<i4")  # slots within the hour: every file has them

Tensors = Mapping[str, tuple[str, NDArray[Any]]]
"""The tensors of a file by name, each with its dtype as safetensors calls it."""

_SUFFIX = ".safetensors"
_NAME = re.compile(r"[a-z0-9]+-\d{6,}-[0-9a-f]+\.safetensors")
_KNOWN_HOURS = 1024  # whose slots, 29 KB each, are held
_MAX_HEADER_BYTES = 2**20  # some hundred bytes are usual
_LENGTH = struct.Struct("<Q")


class HourFileGone(LookupError):
    """A file is not there: another one took its place, or the hour was erased."""


class HourFileDamaged(RuntimeError):
    """A file is not what its name says, or not as it was written."""


class HourManifest(BaseModel):
    """What is known of a file without opening it: `frames` of an `hour`, and the places of its tensors.

    Of several files of an hour the one of the highest `generation` counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hour: int
    generation: int
    file: str
    frames: int
    size: int
    checksum: str
    offsets: Mapping[str, int]
    bits: str  # which slots of the hour have a frame, as base64 of zlib of a bitmap

    @property
    def slots(self) -> NDArray[np.int64]:
        """The slots (n,) of the source that have a frame, ascending."""
        return _slots(self.bits, self.hour)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A whole file taken apart: what it says of itself, and where its tensors begin in it."""

    metadata: Mapping[str, str]
    offsets: Mapping[str, int]
    tensors: Mapping[str, memoryview]
    size: int

    @property
    def bits(self) -> str:
        """Which slots of the hour have a frame, as base64 of zlib of a bitmap. Raises KeyError and IndexError."""
        bits = np.zeros(HOUR_SLOTS, np.uint8)
        bits[np.frombuffer(self.tensors["slots"], SLOT_DTYPE)] = 1
        return base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode()

    def facts(self, file: str) -> dict[str, Any]:
        """Return the fields of a manifest. Raises ValueError, KeyError and IndexError if a file does not tell them."""
        return {
            "hour": int(self.metadata["hour"]),
            "generation": int(self.metadata["generation"]),
            "file": file,
            "frames": len(self.tensors["slots"]) // SLOT_DTYPE.itemsize,
            "size": self.size,
            "checksum": self.metadata["checksum"],
            "offsets": self.offsets,
            "bits": self.bits,
        }


class HourFiles(ABC):
    """Files at `<root>/<source>/hours/<hour>/<label>-<generation>-<random>.safetensors`; no name is used twice.

    Raises StoreUnavailable when the folder or the object store cannot be read or written.
    """

    def __init__(self, root_url: str) -> None:
        self._files = Files(root_url)

    async def check_writable(self) -> None:
        """Write and remove a file. Raises StoreFull, or StoreUnavailable with what else stands in the way."""
        await asyncio.to_thread(self._files.check_writable)

    async def remove(self, source_id: str, hour: int, *files: str) -> None:
        """Remove files of an hour, those that are there, and what a crash left of others."""
        await asyncio.to_thread(self._remove, source_id, hour, files)

    async def remove_source(self, source_id: str) -> None:
        """Remove all files of a source."""
        folder = self._files.folder(source_id, "hours")
        await asyncio.to_thread(self._files.remove, [folder], recursive=True)
        await asyncio.to_thread(self._files.remove_if_empty, [folder])

    async def files(self, source_id: str, hour: int, label: str) -> list[str]:
        """Return the names of the files of an hour with a label, that of the highest generation last."""
        names = await asyncio.to_thread(self._files.names, self._hour(source_id, hour))
        return sorted(name for name in names if name.startswith(f"{label}-") and _NAME.fullmatch(name))

    @abstractmethod
    async def manifest(self, source_id: str, hour: int, file: str) -> HourManifest:
        """Return what a file says it is, without reading all of it. Raises HourFileDamaged and HourFileGone."""

    async def hours(self, source_id: str) -> list[int]:
        """Return the hours that have files."""
        names = await asyncio.to_thread(self._files.names, self._files.folder(source_id, "hours"))
        return sorted(int(name) for name in names if name.isdecimal())

    async def listing(self, source_id: str) -> dict[int, list[str]]:
        """Return the names of all files by hour, sorted."""
        paths = await asyncio.to_thread(self._files.tree, self._files.folder(source_id, "hours"))
        found: dict[int, list[str]] = {}
        for path in paths:
            hour, _, name = path.partition("/")
            if hour.isdecimal() and _NAME.fullmatch(name):
                found.setdefault(int(hour), []).append(name)
        return found

    def _remove(self, source_id: str, hour: int, files: Sequence[str]) -> None:
        folder = self._hour(source_id, hour)
        self._files.remove([f"{folder}/{file}" for file in files])
        self._files.remove_drafts(folder)
        self._files.remove_if_empty([folder, self._files.folder(source_id, "hours")])

    def _hour(self, source_id: str, hour: int) -> str:
        return f"{self._files.folder(source_id, 'hours')}/{hour}"

    def _write_checked(
        self,
        source_id: str,
        hour: int,
        label: str,
        generation: int,
        tensors: Tensors,
        facts: Mapping[str, str],
    ) -> tuple[str, Parsed]:
        """Write a file, wait until it is on disk, read it back and check it; return its name. HourFileDamaged."""
        metadata = {"source_id": source_id, "hour": str(hour), "generation": str(generation), **facts}
        file = f"{label}-{generation:06d}-{uuid4().hex[:12]}{_SUFFIX}"
        content, checksum = serialized(tensors, metadata)
        path = f"{self._hour(source_id, hour)}/{file}"
        self._files.remove_drafts(self._hour(source_id, hour))
        self._files.write({path: content}, synced=True)
        del content  # an hour of keyframes has 150 MB: not twice, while it is read back
        try:
            read = self._read_whole(source_id, hour, file)
            if read.metadata["checksum"] != checksum:
                raise HourFileDamaged(f"{file} is not what was written")
            return file, read
        except HourFileDamaged:
            self._files.remove([path])
            raise

    def _read_whole(self, source_id: str, hour: int, file: str) -> Parsed:
        """Read and check a file. Raises HourFileGone and HourFileDamaged."""
        [content] = self._files.read([f"{self._hour(source_id, hour)}/{file}"])
        if content is None:
            raise HourFileGone(file)
        read = parsed(content, file)
        _require(read.metadata, source_id, hour, file)
        return read

    def _read_head(self, source_id: str, hour: int, file: str) -> Parsed:
        """Read what a file says of itself and its slots alone, and see that it is as long as it says.

        Raises HourFileGone and HourFileDamaged.
        """
        prefix, last = bytearray(_LENGTH.size), bytearray(1)
        self._read_ranges(source_id, hour, file, [(0, memoryview(prefix))])
        (size,) = _LENGTH.unpack(prefix)
        if size > _MAX_HEADER_BYTES:
            raise HourFileDamaged(f"{file} is no segment: its header would be {size} bytes")
        head = bytearray(size)
        self._read_ranges(source_id, hour, file, [(_LENGTH.size, memoryview(head))])
        metadata, places = _header(bytes(head), file)
        _require(metadata, source_id, hour, file)
        if "slots" not in places:
            raise HourFileDamaged(f"{file} is no segment: it has no slots")
        end = max(stop for _, stop in places.values())
        slots = bytearray(max(places["slots"][1] - places["slots"][0], 0))
        self._read_ranges(source_id, hour, file, [(places["slots"][0], memoryview(slots)), (end - 1, memoryview(last))])
        return Parsed(metadata, {name: start for name, (start, _) in places.items()}, {"slots": memoryview(slots)}, end)

    def _read_ranges(self, source_id: str, hour: int, file: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each target from an offset of a file on. Raises HourFileGone and HourFileDamaged."""
        try:
            self._files.read_ranges(f"{self._hour(source_id, hour)}/{file}", ranges)
        except FileNotFoundError:
            raise HourFileGone(file) from None
        except EOFError:
            raise HourFileDamaged(f"{file} is cut off") from None


def label(name: str) -> str:
    """Return what the name of a file of an hour says of its kind."""
    return name.partition("-")[0]


def generation(name: str) -> int:
    """Return the generation that the name of a file of an hour tells."""
    return int(name.split("-")[1])


@lru_cache(_KNOWN_HOURS)
def _slots(bits: str, hour: int) -> NDArray[np.int64]:
    present = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(bits)), np.uint8))
    slots = np.flatnonzero(present).astype(np.int64) + hour * HOUR_SLOTS
    slots.setflags(write=False)  # all who ask share it
    return slots


def serialized(tensors: Tensors, metadata: Mapping[str, str]) -> tuple[bytes, str]:
    """Return the content of a file and its checksum."""
    arrays = {name: (dtype, np.ascontiguousarray(array)) for name, (dtype, array) in tensors.items()}
    checksum = _checksum(arrays[name][1].reshape(-1).view(np.uint8).data for name in sorted(arrays))
    specs: dict[str, safetensors.TensorSpec] = {
        name: safetensors.TensorSpec(
            dtype=dtype, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, (dtype, array) in arrays.items()
    }
    return safetensors.serialize(specs, {**metadata, "checksum": checksum}), checksum


def parsed(content: bytes, file: str) -> Parsed:
    """Take the content of a file apart. Raises HourFileDamaged."""
    try:
        (size,) = _LENGTH.unpack_from(content)
    except struct.error:
        raise HourFileDamaged(f"{file} is no segment: it is cut off") from None
    metadata, places = _header(content[_LENGTH.size : _LENGTH.size + size], file)
    whole = memoryview(content)
    tensors = {name: whole[start:end] for name, (start, end) in places.items()}
    if _checksum(tensors[name] for name in sorted(tensors)) != metadata["checksum"]:
        raise HourFileDamaged(f"{file} is not as it was written: its checksum differs")
    return Parsed(metadata, {name: start for name, (start, _) in places.items()}, tensors, len(content))


def _header(text: bytes, file: str) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Return a file's metadata, and where each tensor begins and ends in it. Raises HourFileDamaged."""
    try:
        header = json.loads(text)
        metadata = {str(name): str(value) for name, value in header.pop("__metadata__").items()}
        data_at = _LENGTH.size + len(text)
        places = {}
        for name, about in header.items():
            start, end = map(int, about["data_offsets"])
            if not 0 <= start <= end:
                raise HourFileDamaged(f"{file} is no segment: its {name} would lie outside of it")
            places[name] = data_at + start, data_at + end
        metadata["checksum"]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise HourFileDamaged(f"{file} is no segment: {type(error).__name__}") from None
    return metadata, places


def _require(metadata: Mapping[str, str], source_id: str, hour: int, file: str) -> None:
    """Raise HourFileDamaged if a file does not say that it is this hour of this source."""
    stated = metadata.get("source_id"), metadata.get("hour")
    if stated != (source_id, str(hour)):
        raise HourFileDamaged(f"{file} says it is hour {stated[1]} of {stated[0]}")


def _checksum(parts: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
