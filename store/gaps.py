"""Why slots are absent: runs of slots with a reason, kept merged."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from redis.asyncio import Redis

from store.keys import EVEN_WHEN_FULL
from store.leases import lease_key

GapReason = Literal[
    "stream_down", "decode_error", "shed", "store_full", "not_registered", "erased", "expired", "other_model"
]
# Where records overlap the first of these speaks: what is gone is gone whatever was wrong with it before.
PRECEDENCE: tuple[GapReason, ...] = (
    "erased",
    "expired",
    "not_registered",
    "stream_down",
    "decode_error",
    "store_full",
    "shed",
    "other_model",
)
_LASTING: frozenset[GapReason] = frozenset({"erased", "expired"})


class Gap(BaseModel):
    """Absent slots [start_slot, end_slot) and the reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_slot: int = Field(ge=0)
    end_slot: int
    reason: GapReason

    @model_validator(mode="after")
    def _not_empty(self) -> "Gap":
        if self.end_slot <= self.start_slot:
            raise ValueError(f"a gap ends after it starts, not [{self.start_slot}, {self.end_slot})")
        return self


# Every reason has its own sorted set of disjoint runs: score = start, member = "start:end".
# KEYS: lease, then the sorted set of every gap. ARGV: epoch or '', then start and end of every gap.
_ADD = f"""{EVEN_WHEN_FULL}
if ARGV[1] ~= '' and redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 0 end
for i = 2, #KEYS do
  local key, start, stop = KEYS[i], ARGV[2 * i - 2], ARGV[2 * i - 1]
  local touched = redis.call('ZRANGEBYSCORE', key, start, stop)
  local before = redis.call('ZREVRANGEBYSCORE', key, '(' .. start, '-inf', 'LIMIT', 0, 1)
  if before[1] and tonumber(string.match(before[1], ':(%d+)$')) >= tonumber(start) then
    table.insert(touched, before[1])
  end
  for _, member in ipairs(touched) do
    local from, to = string.match(member, '^(%d+):(%d+)$')
    if tonumber(from) < tonumber(start) then start = from end
    if tonumber(to) > tonumber(stop) then stop = to end
    redis.call('ZREM', key, member)
  end
  redis.call('ZADD', key, start, start .. ':' .. stop)
end
return 1
"""


class Gaps:
    """The gap records of all sources. Raises StoreUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._add = redis.register_script(_ADD)

    async def add(self, source_id: str, epoch: int | None, gaps: Iterable[Gap]) -> bool:
        """Record gaps, joined with those they touch; False if the epoch is stale. None: not as an owner."""
        keys = [lease_key(source_id)]
        arguments: list[str | int] = ["" if epoch is None else epoch]
        for gap in gaps:
            keys.append(_key(source_id, gap.reason))
            arguments += [gap.start_slot, gap.end_slot]
        return bool(await self._add(keys, arguments))

    async def read(self, source_id: str, start: int, end: int, *, registered: int = 0) -> list[Gap]:
        """Return the gaps of slots [start, end): disjoint, sorted, cut to the range.

        Slots before `registered` are `not_registered`, recorded or not.
        """
        if end <= start:
            return []
        async with self._redis.pipeline(transaction=False) as pipe:
            for reason in PRECEDENCE:
                pipe.zrevrangebyscore(_key(source_id, reason), f"({start}", "-inf", start=0, num=1)
                pipe.zrangebyscore(_key(source_id, reason), start, f"({end}")
            replies = await pipe.execute()
        runs: dict[GapReason, list[tuple[int, int]]] = {
            reason: [_run(member) for member in (*before, *within)]
            for reason, before, within in zip(PRECEDENCE, replies[::2], replies[1::2], strict=True)
        }
        runs["not_registered"] = [*runs["not_registered"], (0, registered)]
        gaps: list[Gap] = []
        taken: list[tuple[int, int]] = []
        for reason in PRECEDENCE:
            mine = _joined((max(low, start), min(high, end)) for low, high in runs[reason])
            gaps += [Gap(start_slot=low, end_slot=high, reason=reason) for low, high in _without(mine, taken)]
            taken = _joined([*taken, *mine])
        return sorted(gaps, key=lambda gap: gap.start_slot)

    async def expire(self, source_id: str, start: int, before: int) -> None:
        """Record that what was kept of slots [start, before) is gone; what else is recorded before a slot goes too.

        What was erased stays recorded: it did not go by itself.
        """
        if start < before:
            await self.add(source_id, None, [Gap(start_slot=start, end_slot=before, reason="expired")])
        reasons = [reason for reason in PRECEDENCE if reason not in _LASTING]
        async with self._redis.pipeline(transaction=False) as pipe:
            for reason in reasons:
                pipe.zrangebyscore(_key(source_id, reason), "-inf", f"({before}")
            found: list[list[Any]] = await pipe.execute()
        for reason, members in zip(reasons, found, strict=True):
            if past := [member for member in members if _run(member)[1] <= before]:
                await self._redis.zrem(_key(source_id, reason), *past)

    async def drop(self, source_id: str) -> None:
        """Drop all records of a source."""
        await self._redis.delete(*(_key(source_id, reason) for reason in get_args(GapReason)))


def _key(source_id: str, reason: str) -> str:
    return f"gaps:{{{source_id}}}:{reason}"


def _run(member: bytes) -> tuple[int, int]:
    low, _, high = member.partition(b":")
    return int(low), int(high)


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort runs and join those that touch; empty ones vanish."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(run for run in runs if run[0] < run[1]):
        if joined and low <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], high)
        else:
            joined.append((low, high))
    return joined


def _without(runs: Sequence[tuple[int, int]], taken: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what is left of runs outside the `taken` ones; both are sorted and disjoint."""
    at = 0
    for low, high in runs:
        while at < len(taken) and taken[at][1] <= low:
            at += 1
        here = at
        while low < high:
            first, last = taken[here] if here < len(taken) else (high, high)
            if low < min(first, high):
                yield low, min(first, high)
            low, here = max(low, last), here + 1
