"""Segments: the frame tokens of one source-hour in a file.

n present frames, C2 tokens a frame, D model width, P width of the search vector.

A segment holds only frames that are there: `tokens` (n, C2, D) in the model's dtype, `vectors` (n, P) float16, `times`
(n,) int64 milliseconds and `slots` (n,) int32 within the hour, ascending.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from store.format import HOUR_SLOTS, TIME_DTYPE, VECTOR_DTYPE, TokenFormat
from store.hour_files import SLOT_DTYPE, HourFileDamaged, HourFileGone, HourFiles, HourManifest, Parsed, Tensors, label
from store.packs import LABEL as KEYFRAMES

Part = Literal["tokens", "vectors", "times"]
READ_THROUGH_ROWS = 16  # rows that nobody asked for, between two that are wanted: to read them along is quicker


class Manifest(HourManifest):
    """What is known of a sealed hour."""


@dataclass(frozen=True, slots=True)
class Hour:
    """The frames of an hour, in rows: slots (n,) ascending, tokens (n, C2, D), vectors (n, P), times (n,) in ms."""

    slots: NDArray[np.int64]
    tokens: NDArray[np.generic]
    vectors: NDArray[np.float32]
    times: NDArray[np.int64]


class Segments(HourFiles):
    """The segments of all sources; the label of their files is the model's fingerprint."""

    async def write(self, source_id: str, format: TokenFormat, hour: int, generation: int, rows: Hour) -> Manifest:
        """Write a segment, wait until it is on disk, read it back and check it. Raises HourFileDamaged."""
        return await asyncio.to_thread(self._write, source_id, format, hour, generation, rows)

    async def read(
        self, source_id: str, manifest: Manifest, part: Part, slots: NDArray[np.int64], target: NDArray[np.uint8]
    ) -> None:
        """Fill `target` (T, bytes of a row) with one part of ascending slots that the segment has. HourFileGone."""
        await asyncio.to_thread(self._read, source_id, manifest, part, slots, target)

    async def check(self, source_id: str, hour: int, file: str) -> tuple[TokenFormat, Manifest]:
        """Read a whole segment and return what it is. Raises HourFileDamaged and HourFileGone."""
        return _described(file, await asyncio.to_thread(self._read_whole, source_id, hour, file))

    async def describe(self, source_id: str, hour: int, file: str) -> tuple[TokenFormat, Manifest]:
        """Return the format and the manifest of a segment, without reading its tokens.

        Raises HourFileDamaged and HourFileGone.
        """
        return _described(file, await asyncio.to_thread(self._read_head, source_id, hour, file))

    async def formats(self, source_id: str) -> dict[TokenFormat, list[int]]:
        """Return the formats of a source's segments, and the hours that have one; of whole ones, by a listing."""
        found: dict[str, dict[int, str]] = {}
        for hour, files in (await self.listing(source_id)).items():
            for file in files:
                if label(file) != KEYFRAMES:
                    found.setdefault(label(file), {})[hour] = file
        formats: dict[TokenFormat, list[int]] = {}
        for files_by_hour in found.values():
            for hour, file in files_by_hour.items():
                with suppress(HourFileGone, HourFileDamaged):
                    format, _ = await self.describe(source_id, hour, file)
                    formats[format] = sorted(files_by_hour)
                    break
        return formats

    async def manifest(self, source_id: str, hour: int, file: str) -> Manifest:
        """Return what a segment says it is, without reading its tokens. Raises HourFileDamaged and HourFileGone."""
        return (await self.describe(source_id, hour, file))[1]

    def _write(self, source_id: str, format: TokenFormat, hour: int, generation: int, rows: Hour) -> Manifest:
        facts = {"format": format.model_dump_json()}
        tensors = frame_tensors(format, hour, rows)
        written = self._write_checked(source_id, hour, format.fingerprint, generation, tensors, facts)
        return _described(*written)[1]

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
        self._read_ranges(source_id, manifest.hour, manifest.file, ranges)
        for place, taken, piece in along:
            target[place] = piece[taken]


def frame_tensors(format: TokenFormat, hour: int, rows: Hour) -> Tensors:
    """Return the frames of an hour as a segment holds them."""
    return {
        "tokens": (format.dtype, rows.tokens.astype(format.numpy_dtype, copy=False)),
        "vectors": ("float16", rows.vectors.astype(VECTOR_DTYPE)),
        "times": ("int64", rows.times.astype(TIME_DTYPE, copy=False)),
        "slots": ("int32", (rows.slots - hour * HOUR_SLOTS).astype(SLOT_DTYPE)),
    }


def _described(file: str, parsed: Parsed) -> tuple[TokenFormat, Manifest]:
    """Return the format and the manifest of a segment. Raises HourFileDamaged."""
    try:
        return TokenFormat.model_validate_json(parsed.metadata["format"]), Manifest(**parsed.facts(file))
    except (ValueError, KeyError, IndexError) as error:
        raise HourFileDamaged(f"{file} is no segment: {type(error).__name__}") from None
