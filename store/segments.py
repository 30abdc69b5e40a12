"""Segments: immutable safetensors files, each with the frame tokens of one source-hour.

n present frames, C2 tokens a frame, D model width, P width of the search vector.

A segment holds only frames that are there: `tokens` (n, C2, D) in the model's dtype, `vectors` (n, P) float16, `times`
(n,) int64 milliseconds and `slots` (n,) int32 within the hour, ascending. What its name does not tell stands in the
file's metadata, checksum included: a listing is enough to know everything again.
"""

import asyncio
import base64
import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args
from uuid import uuid4

import numpy as np
import safetensors
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from store.files import Files
from store.format import HOUR_SLOTS, TIME_DTYPE, VECTOR_DTYPE, TokenFormat

Part = Literal["tokens", "vectors", "times", "slots"]
PARTS: tuple[Part, ...] = get_args(Part)
READ_THROUGH_ROWS = 16  # rows that nobody asked for, between two that are wanted: to read them along is quicker

_SUFFIX = ".safetensors"
_LENGTH = struct.Struct("<Q")
_SLOT_DTYPE = np.dtype("<i4")


class SegmentGone(LookupError):
    """The file of a segment is not there: another one took its place, or the hour was erased."""


class SegmentDamaged(RuntimeError):
    """A file is no segment, or not the one it says it is."""


class Manifest(BaseModel):
    """What is known of a sealed hour without opening its file.

    Of several files of an hour the one of the highest `generation` counts. `bits` tells which slots of the hour have a
    frame, as base64 of zlib of a bitmap; the offsets are the places of the tensors in the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hour: int
    generation: int
    file: str
    frames: int
    size: int
    checksum: str
    bits: str
    offsets: Mapping[Part, int]

    @property
    def slots(self) -> NDArray[np.int64]:
        """The slots (n,) of the source that have a frame, ascending."""
        bits = np.frombuffer(zlib.decompress(base64.b64decode(self.bits)), np.uint8)
        return np.flatnonzero(np.unpackbits(bits)).astype(np.int64) + self.hour * HOUR_SLOTS


@dataclass(frozen=True, slots=True)
class Hour:
    """The frames of an hour, in rows: slots (n,) ascending, tokens (n, C2, D), vectors (n, P), times (n,) in ms."""

    slots: NDArray[np.int64]
    tokens: NDArray[np.generic]
    vectors: NDArray[np.float32]
    times: NDArray[np.int64]


class Segments:
    """Segments at `<root>/<source>/hours/<hour>/<fingerprint>-<generation>-<random>.safetensors`.

    No name is used twice.

    Raises StoreUnavailable when the folder or the object store cannot be read or written.
    """

    def __init__(self, root_url: str) -> None:
        self._files = Files(root_url)

    async def write(self, source_id: str, format: TokenFormat, hour: int, generation: int, rows: Hour) -> Manifest:
        """Write a segment, wait until it is on disk, read it back and check it. Raises SegmentDamaged."""
        return await asyncio.to_thread(self._write, source_id, format, hour, generation, rows)

    async def read(
        self, source_id: str, manifest: Manifest, part: Part, slots: NDArray[np.int64], target: NDArray[np.uint8]
    ) -> None:
        """Fill `target` (T, bytes of a row) with one part of ascending slots that the segment has. SegmentGone."""
        await asyncio.to_thread(self._read, source_id, manifest, part, slots, target)

    async def remove(self, source_id: str, hour: int, *files: str) -> None:
        """Remove files of an hour, those that are there."""
        folder = self._hour(source_id, hour)
        await asyncio.to_thread(self._files.remove, [f"{folder}/{file}" for file in files])
        await asyncio.to_thread(self._files.remove_if_empty, [folder, self._files.folder(source_id, "hours")])

    async def remove_source(self, source_id: str) -> None:
        """Remove all segments of a source."""
        folder = self._files.folder(source_id, "hours")
        await asyncio.to_thread(self._files.remove, [folder], recursive=True)
        await asyncio.to_thread(self._files.remove_if_empty, [folder])

    async def files(self, source_id: str, hour: int, fingerprint: str) -> list[str]:
        """Return the names of the segments of an hour by one model, that which counts last."""
        names = await asyncio.to_thread(self._files.names, self._hour(source_id, hour))
        return sorted(name for name in names if name.startswith(f"{fingerprint}-") and name.endswith(_SUFFIX))

    async def hours(self, source_id: str) -> list[int]:
        """Return the hours that have files."""
        names = await asyncio.to_thread(self._files.names, self._files.folder(source_id, "hours"))
        return sorted(int(name) for name in names if name.isdecimal())

    async def check(self, source_id: str, hour: int, file: str) -> tuple[TokenFormat, Manifest]:
        """Read a whole segment and return what it is. Raises SegmentDamaged and SegmentGone."""
        return await asyncio.to_thread(self._check, source_id, hour, file)

    def _hour(self, source_id: str, hour: int) -> str:
        return f"{self._files.folder(source_id, 'hours')}/{hour}"

    def _write(self, source_id: str, format: TokenFormat, hour: int, generation: int, rows: Hour) -> Manifest:
        content, checksum = _serialized(source_id, format, hour, generation, rows)
        file = f"{format.fingerprint}-{generation:06d}-{uuid4().hex[:12]}{_SUFFIX}"
        path = f"{self._hour(source_id, hour)}/{file}"
        self._files.write({path: content}, synced=True)
        try:
            _, manifest = self._check(source_id, hour, file)
            if manifest.checksum != checksum:
                raise SegmentDamaged(f"{file} is not what was written")
            return manifest
        except SegmentDamaged:
            self._files.remove([path])
            raise

    def _check(self, source_id: str, hour: int, file: str) -> tuple[TokenFormat, Manifest]:
        [content] = self._files.read([f"{self._hour(source_id, hour)}/{file}"])
        if content is None:
            raise SegmentGone(file)
        format, manifest, stated = _parsed(content, file)
        if stated != (source_id, hour):
            raise SegmentDamaged(f"{file} says it is hour {stated[1]} of {stated[0]}")
        return format, manifest

    def _read(
        self, source_id: str, manifest: Manifest, part: Part, slots: NDArray[np.int64], target: NDArray[np.uint8]
    ) -> None:
        rows = np.searchsorted(manifest.slots, slots)
        width = target.shape[1]
        ranges, along = [], []
        bounds = np.flatnonzero(np.diff(rows) > READ_THROUGH_ROWS) + 1
        for run, place in zip(np.split(rows, bounds), np.split(np.arange(len(rows)), bounds), strict=True):
            first, count = int(run[0]), int(run[-1] - run[0]) + 1
            piece = target[place[0] : place[-1] + 1]
            if count > len(run):
                piece = np.empty((count, width), np.uint8)
                along.append((place, run - first, piece))
            ranges.append((manifest.offsets[part] + first * width, piece.data.cast("B")))
        try:
            self._files.read_ranges(f"{self._hour(source_id, manifest.hour)}/{manifest.file}", ranges)
        except FileNotFoundError:
            raise SegmentGone(manifest.file) from None
        except EOFError:
            raise SegmentDamaged(f"{manifest.file} is cut off") from None
        for place, taken, piece in along:
            target[place] = piece[taken]


def _serialized(source_id: str, format: TokenFormat, hour: int, generation: int, rows: Hour) -> tuple[bytes, str]:
    """Return the content of a segment and its checksum."""
    tensors: dict[Part, tuple[str, NDArray[Any]]] = {
        "tokens": (format.dtype, rows.tokens.astype(format.numpy_dtype, copy=False)),
        "vectors": ("float16", rows.vectors.astype(VECTOR_DTYPE)),
        "times": ("int64", rows.times.astype(TIME_DTYPE, copy=False)),
        "slots": ("int32", (rows.slots - hour * HOUR_SLOTS).astype(_SLOT_DTYPE)),
    }
    arrays = {part: (dtype, np.ascontiguousarray(array)) for part, (dtype, array) in tensors.items()}
    checksum = _checksum(array.tobytes() for _, array in arrays.values())
    specs: dict[str, safetensors.TensorSpec] = {
        part: safetensors.TensorSpec(
            dtype=dtype, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for part, (dtype, array) in arrays.items()
    }
    metadata = {
        "source_id": source_id,
        "hour": str(hour),
        "generation": str(generation),
        "format": format.model_dump_json(),
        "checksum": checksum,
    }
    return safetensors.serialize(specs, metadata), checksum


def _parsed(content: bytes, file: str) -> tuple[TokenFormat, Manifest, tuple[str, int]]:
    """Take a segment apart; return its format, its manifest, and the source and hour it says it is of."""
    try:
        (size,) = _LENGTH.unpack_from(content)
        header = json.loads(content[_LENGTH.size : _LENGTH.size + size])
        metadata = header["__metadata__"]
        data_at = _LENGTH.size + size
        places = {part: [data_at + offset for offset in header[part]["data_offsets"]] for part in PARTS}
        format = TokenFormat.model_validate_json(metadata["format"])
        hour, generation = int(metadata["hour"]), int(metadata["generation"])
        slots = np.frombuffer(content[slice(*places["slots"])], _SLOT_DTYPE)
        bits = np.zeros(HOUR_SLOTS, np.uint8)
        bits[slots] = 1
        stated = metadata["source_id"], hour
        manifest = Manifest(
            hour=hour,
            generation=generation,
            file=file,
            frames=len(slots),
            size=len(content),
            checksum=metadata["checksum"],
            bits=base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode(),
            offsets={part: start for part, (start, _) in places.items()},
        )
    except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise SegmentDamaged(f"{file} is no segment: {type(error).__name__}") from None
    if _checksum(memoryview(content)[slice(*places[part])] for part in PARTS) != manifest.checksum:
        raise SegmentDamaged(f"{file} is not as it was written: its checksum differs")
    return format, manifest, stated


def _checksum(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
