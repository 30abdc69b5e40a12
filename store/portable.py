"""Hours that travel: the frames, or the keyframes, of one source-hour as the bytes of a file that anyone may have made.

They are laid out like segments and packs, without the name of a source: safetensors with a checksum. What is read is
checked to the last number, so that nothing in it can harm who asks later.

n frames of an hour, C2 tokens a frame, D model width, P width of the search vector.
"""

import json
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from store.format import HOUR_SLOTS, TIME_DTYPE, VECTOR_DTYPE, TokenFormat
from store.hour_files import SLOT_DTYPE, HourFileDamaged, Parsed, Tensors, parsed, serialized
from store.packs import END_DTYPE, keyframe_tensors
from store.segments import Hour, frame_tensors

MAX_HEADER_BYTES = 1 << 16  # an own header has less than 1 KB; every name in it may claim all of the file
MAX_TIME_MS = 253_402_300_799_000  # the last second of the year 9999: what comes later cannot be written
UNIT_WITHIN = 0.05  # vectors are rounded to half precision
_FRAMES, _KEYFRAMES = frozenset({"tokens", "vectors", "times", "slots"}), frozenset({"jpegs", "ends", "slots"})
_LENGTH = struct.Struct("<Q")
_EXPONENT = 0x7F80  # of a bfloat16: all ones stand for infinity and for what is no number


class DamagedHour(ValueError):
    """What should be an hour is none, is cut off, was changed, or holds what no hour holds."""


def max_frames_bytes(format: TokenFormat) -> int:
    """Return how many bytes the frames of a full hour have at most."""
    row = format.token_bytes + format.vector_bytes + TIME_DTYPE.itemsize + SLOT_DTYPE.itemsize
    return _LENGTH.size + MAX_HEADER_BYTES + HOUR_SLOTS * row


def write_frames(format: TokenFormat, hour: int, rows: Hour) -> bytes:
    """Return the frames of an hour as bytes."""
    return _written(hour, frame_tensors(format, hour, rows), {"format": format.model_dump_json()})


def write_keyframes(hour: int, jpegs: Mapping[int, bytes]) -> bytes:
    """Return keyframes of an hour, by slot, as bytes."""
    return _written(hour, keyframe_tensors(hour, jpegs), {})


def read_frames(content: bytes, format: TokenFormat, hour: int) -> Hour:
    """Return the frames that `write_frames` wrote. Raises DamagedHour."""
    found = _read(content, hour, _FRAMES)
    if found.metadata.get("format") != format.model_dump_json():
        raise DamagedHour("its tokens have another format than the timeline says")
    try:
        slots = _slots(found, hour)
        tokens = np.frombuffer(found.tensors["tokens"], format.numpy_dtype).reshape(len(slots), *format.token_shape)
        halves = np.frombuffer(found.tensors["vectors"], VECTOR_DTYPE).reshape(len(slots), format.vector_width)
        times = np.frombuffer(found.tensors["times"], TIME_DTYPE).reshape(len(slots))
    except ValueError:
        raise DamagedHour("its tensors do not fit the format") from None
    _require(_finite(tokens, format), slots, "tokens that are no numbers")
    vectors = halves.astype(np.float32)
    if format.vector_width:
        off = np.abs(np.linalg.norm(vectors, axis=1) - 1)
        _require(off < UNIT_WITHIN, slots, "a search vector that is not of unit length")  # nor is one without numbers
    _require((times >= 0) & (times <= MAX_TIME_MS), slots, "a capture time that no clock shows")
    return Hour(slots, tokens, vectors, times)


def read_keyframes(content: bytes, hour: int) -> dict[int, bytes]:
    """Return the keyframes, by slot, that `write_keyframes` wrote; they need not be pictures. Raises DamagedHour."""
    found = _read(content, hour, _KEYFRAMES)
    slots, jpegs = _slots(found, hour), found.tensors["jpegs"]
    try:
        ends = np.frombuffer(found.tensors["ends"], END_DTYPE).reshape(len(slots))
    except ValueError:
        raise DamagedHour("its tensors do not fit each other") from None
    starts = np.concatenate(([0], ends[:-1]))
    if ends[-1] != len(jpegs) or (ends <= starts).any():
        raise DamagedHour("its keyframes do not lie one behind the other")
    places = zip(slots.tolist(), starts.tolist(), ends.tolist(), strict=True)
    return {slot: bytes(jpegs[start:end]) for slot, start, end in places}


def _written(hour: int, tensors: Tensors, facts: Mapping[str, str]) -> bytes:
    return serialized(tensors, {"hour": str(hour), **facts})[0]


def _read(content: bytes, hour: int, names: frozenset[str]) -> Parsed:
    """Take an hour apart once its header is known to be harmless."""
    try:
        (size,) = _LENGTH.unpack_from(content)
        if size > MAX_HEADER_BYTES:
            raise DamagedHour("its header is longer than one has to be")
        header = json.loads(content[_LENGTH.size : _LENGTH.size + size])
        if header.keys() - {"__metadata__"} != names:
            raise DamagedHour(f"it should hold {', '.join(sorted(names))} and nothing else")
        found = parsed(content, "it")
    except DamagedHour:
        raise
    except HourFileDamaged as error:
        raise DamagedHour(str(error)) from None
    except (struct.error, AttributeError, ValueError, RecursionError):  # a plain one of a number with 5,000 digits
        raise DamagedHour("it is no safetensors file") from None
    if found.metadata.get("hour") != str(hour):
        raise DamagedHour(f"it is not hour {hour}, as its name says")
    return found


def _slots(found: Parsed, hour: int) -> NDArray[np.int64]:
    """Return the slots (n,) of the source."""
    raw = found.tensors["slots"]
    if not len(raw) or len(raw) % SLOT_DTYPE.itemsize:
        raise DamagedHour("it has no slots")
    slots = np.frombuffer(raw, SLOT_DTYPE).astype(np.int64)
    if slots[0] < 0 or slots[-1] >= HOUR_SLOTS or (np.diff(slots) <= 0).any():
        raise DamagedHour("its slots do not ascend, or lie outside of the hour")
    return slots + hour * HOUR_SLOTS


def _finite(tokens: NDArray[np.generic], format: TokenFormat) -> NDArray[np.bool_]:
    """Return for each frame (n,) whether all of its tokens (n, C2, D) are numbers."""
    rows = tokens.reshape(len(tokens), -1)
    if format.dtype == "bfloat16":  # numpy holds its bits
        return np.array([((row.view(np.uint16) & _EXPONENT) != _EXPONENT).all() for row in rows])
    return np.array([np.isfinite(row.astype(np.float32)).all() for row in rows])


def _require(sound: NDArray[np.bool_], slots: NDArray[np.int64], fault: str) -> None:
    """Raise DamagedHour for the first slot that is not sound."""
    if not sound.all():
        raise DamagedHour(f"slot {slots[np.argmin(sound)]} has {fault}")
