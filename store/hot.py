"""The hot timeline: frame tokens of every source in slot order, in Redis.

T frames of a read, C2 tokens a frame, D model width, P width of the search vector.

Sixty slots share four strings: tokens (t), presence bits (p), capture times (m) and search vectors (v), each pre-sized
and written by offset. So a frame that is sent twice is kept once, absent slots are gaps and not shifts, and a range is
read in few large pieces. All keys of a source carry one hash tag: they lie in one slot of a Redis cluster.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from store.connection import StoreUnavailable
from store.format import BLOCK_SLOTS, BLOCKS_PER_HOUR, TIME_DTYPE, VECTOR_DTYPE, TokenFormat
from store.keys import EVEN_WHEN_FULL, NEW_MARK, TimelineKeys, formats_key
from store.leases import lease_key

EXTENT_TRIES = 100
BLOCKS_PER_READ = 8  # of full size; more at once makes Redis and the client hold more copies for no gain
KEYS_PER_COMMAND = 1000  # small values, or blocks of one erase script
_ALL_PRESENT = np.packbits(np.ones(BLOCK_SLOTS, np.bool_)).tobytes()


class FrameNotKept(LookupError):
    """A frame that was asked for is not in the store."""

    def __init__(self, source_id: str, slot: int) -> None:
        super().__init__(f"slot {slot} of {source_id} is not kept: never captured, erased, or past its retention")
        self.source_id = source_id
        self.slot = slot

    def __reduce__(self) -> tuple[type["FrameNotKept"], tuple[str, int]]:
        return type(self), (self.source_id, self.slot)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of one frame: tokens (C2, D) in the format's numpy dtype, a unit search vector (P,) float32."""

    slot: int
    time_ms: int
    tokens: NDArray[np.generic]
    vector: NDArray[np.float32]


# KEYS: lease, index of blocks, frame counter, formats, changes, then t, p, m, v of every block.
# ARGV: epoch, fingerprint, format as JSON, bytes of a token block, a time block and a vector block,
#       then block position (from 0), block number, slot in the block, tokens, time, vector of every entry.
_APPEND = f"""{NEW_MARK}
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return -1 end
redis.call('HSETNX', KEYS[4], ARGV[2], ARGV[3])
local function write(key, size, index, bytes)
  if #bytes == 0 then return end
  if redis.call('EXISTS', key) == 0 then redis.call('SETRANGE', key, size - 1, '\\0') end
  redis.call('SETRANGE', key, index * #bytes, bytes)
end
local new = 0
for i = 7, #ARGV, 6 do
  local first, index = 6 + 4 * ARGV[i], tonumber(ARGV[i + 2])
  write(KEYS[first], ARGV[4], index, ARGV[i + 3])
  write(KEYS[first + 2], ARGV[5], index, ARGV[i + 4])
  write(KEYS[first + 3], ARGV[6], index, ARGV[i + 5])
  if redis.call('SETBIT', KEYS[first + 1], index, 1) == 0 then new = new + 1 end
  redis.call('ZADD', KEYS[2], ARGV[i + 1], ARGV[i + 1])
  redis.call('HSET', KEYS[5], math.floor(ARGV[i + 1] / {BLOCKS_PER_HOUR}), mark, 'b' .. ARGV[i + 1], mark)
end
if new > 0 then redis.call('INCRBY', KEYS[3], new) end
return new
"""

# KEYS: changes, index of blocks, frame counter, formats, sealed hours, then t, p, m, v of every block.
# ARGV: bytes of a token, a time and a vector, fingerprint, then number, first and last slot (inclusive) of every block.
_ERASE = f"""{EVEN_WHEN_FULL}{NEW_MARK}
local erased = 0
for i = 5, #ARGV, 3 do
  local at = 6 + 4 * (i - 5) / 3
  redis.call('HSET', KEYS[1], math.floor(ARGV[i] / {BLOCKS_PER_HOUR}), mark, 'b' .. ARGV[i], mark)
  local tokens, presence, times, vectors = KEYS[at], KEYS[at + 1], KEYS[at + 2], KEYS[at + 3]
  local first, last = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  for index = first, last do
    if redis.call('SETBIT', presence, index, 0) == 1 then
      erased = erased + 1
      for part, key in ipairs({{tokens, times, vectors}}) do
        local size = tonumber(ARGV[part])
        if size > 0 and last - first < {BLOCK_SLOTS - 1} then
          redis.call('SETRANGE', key, index * size, string.rep('\\0', size))
        end
      end
    end
  end
  if redis.call('BITCOUNT', presence) == 0 then
    redis.call('UNLINK', tokens, presence, times, vectors)
    redis.call('ZREM', KEYS[2], ARGV[i])
    redis.call('HDEL', KEYS[1], 'b' .. ARGV[i])
    local hour = math.floor(ARGV[i] / {BLOCKS_PER_HOUR})
    local first = hour * {BLOCKS_PER_HOUR}
    if redis.call('ZCOUNT', KEYS[2], first, first + {BLOCKS_PER_HOUR - 1}) == 0 then
      redis.call('HDEL', KEYS[1], hour)
    end
  end
end
redis.call('DECRBY', KEYS[3], erased)
if redis.call('ZCARD', KEYS[2]) == 0 and redis.call('ZCARD', KEYS[5]) == 0 then
  redis.call('DEL', KEYS[3], KEYS[1])
  redis.call('HDEL', KEYS[4], ARGV[4])
end
return erased
"""


class HotTimeline:
    """What Redis holds of the timelines of all sources, for tokens of one format. Raises StoreUnavailable."""

    def __init__(self, redis: Redis, format: TokenFormat) -> None:
        self.format = format
        self._redis = redis
        self._append = redis.register_script(_APPEND)
        self._erase = redis.register_script(_ERASE)

    async def append_many(self, batches: Mapping[tuple[str, int], Sequence[Entry]]) -> frozenset[str]:
        """Keep the frames of each (source id, epoch); return the sources whose epoch was stale: they kept nothing.

        The frames of one source are kept all or none. ValueError for an entry that does not fit the format.
        """
        calls = {key: _append_call(self.format, key[0], key[1], entries) for key, entries in batches.items() if entries}
        async with self._redis.pipeline(transaction=False) as pipe:
            for keys, arguments in calls.values():
                await self._append(keys, arguments, client=pipe)
            kept = await pipe.execute()
        return frozenset(source_id for (source_id, _), new in zip(calls, kept, strict=True) if new < 0)

    async def slots(self, source_id: str, start: int, end: int) -> NDArray[np.int64]:
        """Return the present slots of [start, end), ascending. The range may be as wide as one likes."""
        if end <= start:
            return np.empty(0, np.int64)
        keys = TimelineKeys(source_id, self.format.fingerprint)
        blocks = await _blocks(self._redis, keys, start, end)
        found = [np.empty(0, np.int64)]
        for some in _chunks(blocks, KEYS_PER_COMMAND):
            bits: list[Any] = await self._redis.mget([keys.presence(block) for block in some])
            found += [_bit_positions(part) + block * BLOCK_SLOTS for block, part in zip(some, bits, strict=True)]
        present = np.concatenate(found)
        return present[(present >= start) & (present < end)]

    async def rows(self, source_id: str, slots: NDArray[np.int64], part: str, row_bytes: int) -> NDArray[np.uint8]:
        """Return one part (t, m or v) of the slots, in the order asked, as bytes (T, row_bytes).

        FrameNotKept names the first absent one.
        """
        slots = np.asarray(slots, np.int64)
        rows = np.empty((len(slots), row_bytes), np.uint8)
        if len(slots) == 0:
            return rows
        keys = TimelineKeys(source_id, self.format.fingerprint)
        ordered = bool(np.all(slots[1:] > slots[:-1]))
        wanted, places = (slots, None) if ordered else np.unique(slots, return_inverse=True)
        target = rows if ordered else np.empty((len(wanted), row_bytes), np.uint8)
        row = 0
        for pieces in _reads(wanted):
            present, data = await self._fetch(keys, part, row_bytes, pieces)
            for piece, raw in zip(pieces, data, strict=True):
                piece.require(source_id, present[piece.block])
                taken = len(piece.indices)
                target[row : row + taken] = piece.cut(np.frombuffer(raw, np.uint8).reshape(-1, row_bytes))
                row += taken
            # Dropped before the next reply comes, all but `raw`: while it lives the allocator does not give the pages
            # of this reply back, only to fault them in again (measured: half of the reading time).
            del data
        return target if places is None else target[places]

    async def extent(self, source_id: str) -> tuple[int, int] | None:
        """Return the first and the last present slot, None if nothing is kept."""
        keys = TimelineKeys(source_id, self.format.fingerprint)
        for _ in range(EXTENT_TRIES):
            async with self._redis.pipeline() as pipe:
                pipe.zrange(keys.blocks, 0, 0)
                pipe.zrange(keys.blocks, -1, -1)
                oldest, newest = await pipe.execute()
            if not oldest or not newest:
                return None
            ends = int(oldest[0]), int(newest[0])
            bits: list[Any] = await self._redis.mget([keys.presence(block) for block in ends])
            first, last = (_bit_positions(part) for part in bits)
            # An erasure may have come between the two trips: then look again.
            if len(first) and len(last):
                return ends[0] * BLOCK_SLOTS + int(first[0]), ends[1] * BLOCK_SLOTS + int(last[-1])
        raise StoreUnavailable(
            f"the timeline of {source_id} has lost blocks that its index names; "
            "check that Redis runs with maxmemory-policy noeviction"
        )

    async def marks(self, source_id: str, blocks: Sequence[int]) -> list[str]:
        """Return for each block a mark that differs after every write and erasure; '' if it holds nothing."""
        keys = TimelineKeys(source_id, self.format.fingerprint)
        marks: list[Any] = await self._redis.hmget(keys.changes, [f"b{block}" for block in blocks])
        return ["" if mark is None else mark.decode() for mark in marks]

    async def hours(self, source_id: str) -> list[int]:
        """Return the hours that hold frames, in order."""
        blocks = await _blocks(self._redis, TimelineKeys(source_id, self.format.fingerprint), None, None)
        return sorted({block // BLOCKS_PER_HOUR for block in blocks})

    async def count(self, source_id: str) -> int:
        """Return how many frames of the source are kept."""
        return int(await self._redis.get(TimelineKeys(source_id, self.format.fingerprint).frames) or 0)

    async def erase(self, source_id: str, start: int | None = None, end: int | None = None) -> int:
        """Erase the slots [start, end) for good and return how many frames that were; None leaves a side unbounded."""
        format, keys = self.format, TimelineKeys(source_id, self.format.fingerprint)
        named = [keys.changes, keys.blocks, keys.frames, formats_key(source_id), keys.hours]
        sizes: list[str | int] = [format.token_bytes, TIME_DTYPE.itemsize, format.vector_bytes, format.fingerprint]
        erased = 0
        for some in _chunks(await _blocks(self._redis, keys, start, end), KEYS_PER_COMMAND):
            arguments = list(sizes)
            for block in some:
                first = 0 if start is None else max(start - block * BLOCK_SLOTS, 0)
                last = BLOCK_SLOTS - 1 if end is None else min(end - 1 - block * BLOCK_SLOTS, BLOCK_SLOTS - 1)
                arguments += [block, first, last]
            erased += int(await self._erase([*named, *keys.of_blocks(some)], arguments))
        return erased

    async def _fetch(
        self, keys: TimelineKeys, part: str, row_bytes: int, pieces: Sequence["_Piece"]
    ) -> tuple[dict[int, Any], Sequence[Any]]:
        """Return presence by block and the bytes of each piece, of one moment: no erasure can come in between."""
        blocks = list(dict.fromkeys(piece.block for piece in pieces))
        presence = [keys.presence(block) for block in blocks]
        bits: Sequence[Any]
        data: Sequence[Any]
        if all(piece.whole for piece in pieces):  # one command, and the server's shortest way: 3 times as fast
            found: Sequence[Any] = await self._redis.mget([*presence, *(keys.part(part, block) for block in blocks)])
            bits, data = found[: len(blocks)], found[len(blocks) :]
        else:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.mget(presence)
                for piece in pieces:
                    low, high = piece.bounds
                    pipe.getrange(keys.part(part, piece.block), low * row_bytes, (high + 1) * row_bytes - 1)
                bits, *data = await pipe.execute()
        return dict(zip(blocks, bits, strict=True)), data


async def _blocks(redis: Redis, keys: TimelineKeys, start: int | None, end: int | None) -> list[int]:
    low = "-inf" if start is None else str(start // BLOCK_SLOTS)
    high = "+inf" if end is None else str((end - 1) // BLOCK_SLOTS)
    numbers: list[Any] = await redis.zrangebyscore(keys.blocks, low, high)
    return [int(number) for number in numbers]


async def formats_of(redis: Redis, source_id: str) -> list[TokenFormat]:
    """Return the formats in which tokens of the source are kept, one for each model that saw it."""
    return read_formats(await redis.hgetall(formats_key(source_id)))


def read_formats(raw: Mapping[Any, Any]) -> list[TokenFormat]:
    """Read the hash of a source's formats."""
    return [TokenFormat.model_validate_json(text) for text in raw.values()]


async def has_tokens(redis: Redis, source_id: str) -> bool:
    """Return whether any model's tokens of the source were ever kept and not wholly erased."""
    return bool(await redis.exists(formats_key(source_id)))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of one block that is read at once: all of it (`whole`) or from the first to the last of `indices`."""

    block: int
    indices: NDArray[np.int64]
    whole: bool = False

    @property
    def bounds(self) -> tuple[int, int]:
        """The first and the last slot of the block that are read."""
        return (0, BLOCK_SLOTS - 1) if self.whole else (int(self.indices[0]), int(self.indices[-1]))

    def cut(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the wanted ones of the rows that were read."""
        first = int(self.indices[0]) - self.bounds[0]
        count = int(self.indices[-1] - self.indices[0]) + 1
        run = rows[first : first + count]
        return run if count == len(self.indices) else run[self.indices - self.indices[0]]

    def require(self, source_id: str, bits: bytes | None) -> None:
        """Raise FrameNotKept for the first wanted slot that is absent."""
        if bits == _ALL_PRESENT:  # nearly always, and 180 times in a read of three hours
            return
        present = np.isin(self.indices, _bit_positions(bits))
        if not present.all():
            absent = int(self.indices[np.argmin(present)])
            raise FrameNotKept(source_id, self.block * BLOCK_SLOTS + absent)


def _reads(slots: NDArray[np.int64]) -> Iterator[list[_Piece]]:
    """Group ascending slots into requests of at most BLOCKS_PER_READ blocks' bytes.

    A block of which half is wanted is read whole; slots that lie close together are read as one run, holes included;
    a wide stride is read slot by slot.
    """
    bounds = np.flatnonzero(np.diff(slots // BLOCK_SLOTS)) + 1
    pieces: list[_Piece] = []
    size = 0
    for part in np.split(slots, bounds):
        block = int(part[0]) // BLOCK_SLOTS
        indices = part - block * BLOCK_SLOTS
        run = int(indices[-1] - indices[0]) + 1
        if 2 * len(indices) >= BLOCK_SLOTS:
            pieces.append(_Piece(block, indices, whole=True))
            size += BLOCK_SLOTS
        elif run <= 2 * len(indices):
            pieces.append(_Piece(block, indices))
            size += run
        else:
            pieces += [_Piece(block, index) for index in indices[:, None]]
            size += len(indices)
        if size >= BLOCKS_PER_READ * BLOCK_SLOTS:
            yield pieces
            pieces, size = [], 0
    if pieces:
        yield pieces


def _append_call(
    format: TokenFormat, source_id: str, epoch: int, entries: Sequence[Entry]
) -> tuple[list[str], list[str | int | bytes]]:
    keys = TimelineKeys(source_id, format.fingerprint)
    blocks = sorted({entry.slot // BLOCK_SLOTS for entry in entries})
    positions = {block: position for position, block in enumerate(blocks)}
    rows = format.token_bytes, TIME_DTYPE.itemsize, format.vector_bytes
    arguments: list[str | int | bytes] = [epoch, format.fingerprint, format.model_dump_json()]
    arguments += [BLOCK_SLOTS * row for row in rows]
    for entry in entries:
        _check(format, entry)
        block, index = divmod(int(entry.slot), BLOCK_SLOTS)
        arguments += [positions[block], block, index, entry.tokens.tobytes()]
        arguments += [np.array(entry.time_ms, TIME_DTYPE).tobytes(), entry.vector.astype(VECTOR_DTYPE).tobytes()]
    named = [lease_key(source_id), keys.blocks, keys.frames, formats_key(source_id), keys.changes]
    return [*named, *keys.of_blocks(blocks)], arguments


def _check(format: TokenFormat, entry: Entry) -> None:
    if entry.slot < 0:
        raise ValueError(f"slot {entry.slot} lies before the grid's start; slots count from 0")
    if entry.tokens.shape != format.token_shape or entry.tokens.dtype != format.numpy_dtype:
        raise ValueError(
            f"tokens are {entry.tokens.shape} {entry.tokens.dtype}, "
            f"the format wants {format.token_shape} {format.numpy_dtype}"
        )
    if entry.vector.shape != (format.vector_width,):
        raise ValueError(f"the search vector is {entry.vector.shape}, the format wants ({format.vector_width},)")


def _bit_positions(bits: bytes | None) -> NDArray[np.int64]:
    """Return which bits are set in a Redis bitmap, the first being the highest of the first byte."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits or b"", np.uint8))).astype(np.int64)


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
