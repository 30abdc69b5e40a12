"""Recomputations: what is to be looked at again with another model, how far each of them is, and what is left to do."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis

from store.connection import StoreUnavailable
from store.leases import Leases

Status = Literal["queued", "running", "done", "failed", "cancelled"]
KEPT_ENDED = 100
NAMED_UNREADABLE = 20
_TRIES = 20  # of a change that meets others
_PLAN_CHUNK = 1000

# One hash tag, so that a recomputation changes together with what is left of it.
_JOBS = "rec:{recomputations}:jobs"
_ORDER = "rec:{recomputations}:order"

# Replaces a recomputation if it is still the one that was read, and an hour that is left by what is left of it then.
# KEYS: jobs, active ones of its model, hours that are left. ARGV: id, old, new, '1' if it has ended,
#       hour or '', that hour afterwards or '', the time at which it has its turn or '' for that which it had.
_REPLACE = """
local id, hour, after = ARGV[1], ARGV[5], ARGV[6]
if redis.call('HGET', KEYS[1], id) ~= ARGV[2] then return 'changed' end
if hour ~= '' then
  local turn = redis.call('ZSCORE', KEYS[3], hour)
  if not turn then return 'not left' end
  redis.call('ZREM', KEYS[3], hour)
  if after ~= '' then redis.call('ZADD', KEYS[3], ARGV[7] ~= '' and ARGV[7] or turn, after) end
end
redis.call('HSET', KEYS[1], id, ARGV[3])
if ARGV[4] == '1' then
  redis.call('ZREM', KEYS[2], id)
  redis.call('DEL', KEYS[3])
end
return 'done'
"""


class RecomputationNotFound(LookupError):
    """No such recomputation, or it ended long ago."""

    def __str__(self) -> str:
        return f"there is no recomputation {self.args[0]}"


class RecomputationEnded(RuntimeError):
    """The recomputation is done or has failed: there is nothing to cancel."""

    def __str__(self) -> str:
        return f"recomputation {self.args[0]} has ended already"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Wanted(_Frozen):
    """Slots [start, end) of a source; None: to its last one."""

    source_id: str
    start: int = 0
    end: int | None = None


class Progress(_Frozen):
    """How far one source is: of `slots` that lacked a token so many are `done` or have an `unreadable` keyframe.

    A slot whose keyframe is gone meanwhile counts as done: it needs nothing more. `dropped` tokens are of other models.
    """

    slots: int = 0
    done: int = 0
    unreadable: int = 0
    dropped: int = 0


class UnreadableKeyframe(_Frozen):
    source_id: str
    slot: int


class Recomputation(_Frozen):
    """A wish for tokens of one model, and what has become of it; times in seconds since the Unix epoch.

    `resumes_at`: what is left now is not over yet, or cannot be done, until then; `reason` tells why it cannot.
    """

    id: str
    model: str
    fingerprint: str
    wanted: tuple[Wanted, ...]
    drop_old: bool = False
    status: Status = "queued"
    created_at: float
    ended_at: float | None = None
    progress: Mapping[str, Progress] = Field(default_factory=dict)
    unreadable: tuple[UnreadableKeyframe, ...] = ()  # the first of them
    frames_per_s: float | None = None
    resumes_at: float | None = None
    reason: str | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("done", "failed", "cancelled")

    @property
    def total(self) -> Progress:
        """The progress of all sources together."""
        each = self.progress.values()
        return Progress(
            slots=sum(one.slots for one in each),
            done=sum(one.done for one in each),
            unreadable=sum(one.unreadable for one in each),
            dropped=sum(one.dropped for one in each),
        )

    def advanced(
        self, hour: "HourLeft", after: "HourLeft | None", *, unreadable: int = 0, dropped: int = 0
    ) -> "Recomputation":
        """Return what it is when only `after` is left of an hour."""
        old = self.progress[hour.source_id]
        gone = hour.slots - (0 if after is None else after.slots)
        new = Progress(
            slots=old.slots,
            done=old.done + gone - unreadable,
            unreadable=old.unreadable + unreadable,
            dropped=old.dropped + dropped,
        )
        return self.model_copy(update={"progress": {**self.progress, hour.source_id: new}})


@dataclass(frozen=True, slots=True)
class HourLeft:
    """An hour of a source in which so many `slots` are still to be done."""

    source_id: str
    hour: int
    slots: int

    def __str__(self) -> str:
        return f"{self.source_id}:{self.hour}:{self.slots}"

    @classmethod
    def read(cls, text: str) -> "HourLeft":
        source_id, hour, slots = text.rsplit(":", 2)
        return cls(source_id, int(hour), int(slots))


Change = Callable[[Recomputation], Recomputation]


def facts(**changed: object) -> Change:
    """Return the change that sets fields."""
    return lambda job: job.model_copy(update=changed)


def ended(status: Status, reason: str | None = None) -> Change:
    """Return the change that ends a recomputation now."""
    return facts(status=status, ended_at=time.time(), resumes_at=None, reason=reason)


class Recomputations:
    """All recomputations of an installation, in Redis. Raises StoreUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._leases = Leases(redis)
        self._replace = redis.register_script(_REPLACE)

    async def create(
        self, model: str, fingerprint: str, wanted: Iterable[Wanted], *, drop_old: bool = False
    ) -> Recomputation:
        """Ask for tokens of a model; whoever runs it begins soon."""
        job = Recomputation(
            id=f"rec_{uuid4().hex[:12]}",
            model=model,
            fingerprint=fingerprint,
            wanted=(every := tuple(wanted)),
            progress={one.source_id: Progress() for one in every},
            drop_old=drop_old,
            created_at=time.time(),
        )
        await self._forget_old()
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(_JOBS, job.id, job.model_dump_json())
            pipe.zadd(_ORDER, {job.id: job.created_at})
            pipe.zadd(_active_key(fingerprint), {job.id: job.created_at})
            await pipe.execute()
        return job

    async def get(self, job_id: str) -> Recomputation:
        """Return a recomputation; RecomputationNotFound."""
        return Recomputation.model_validate_json(await self._raw(job_id))

    async def everything(self) -> list[Recomputation]:
        """Return all recomputations that are known, the newest first."""
        return await self._many(await self._redis.zrevrange(_ORDER, 0, -1))

    async def cancel(self, job_id: str) -> Recomputation:
        """End a recomputation; what it has made stays. RecomputationNotFound; RecomputationEnded."""
        job = await self.update(job_id, ended("cancelled"))
        if job is not None:
            return job
        job = await self.get(job_id)
        if job.status != "cancelled":
            raise RecomputationEnded(job_id)
        return job

    async def has_worker(self, fingerprint: str) -> bool:
        """Return whether a service that runs the model works at its recomputations."""
        return await self._leases.owner(worker_lease(fingerprint)) is not None

    # for who does the work

    async def active(self, fingerprint: str) -> list[Recomputation]:
        """Return those for one model that have not ended, the oldest first."""
        return await self._many(await self._redis.zrange(_active_key(fingerprint), 0, -1))

    async def is_active(self, job: Recomputation) -> bool:
        """Return whether a recomputation has not ended."""
        return await self._redis.zscore(_active_key(job.fingerprint), job.id) is not None

    async def plan(self, job_id: str, hours: Mapping[HourLeft, float]) -> bool:
        """Write down what is to be done, each hour with the time of its turn, and begin; False if it has ended."""
        key, turns = _left_key(job_id), [(str(hour), at) for hour, at in hours.items()]
        await self._redis.delete(key)  # a plan that was cut short
        for start in range(0, len(turns), _PLAN_CHUNK):
            await self._redis.zadd(key, dict(turns[start : start + _PLAN_CHUNK]))
        slots: dict[str, int] = {}
        for hour in hours:
            slots[hour.source_id] = slots.get(hour.source_id, 0) + hour.slots

        def begin(job: Recomputation) -> Recomputation:
            progress = {one.source_id: Progress(slots=slots.get(one.source_id, 0)) for one in job.wanted}
            return job.model_copy(update={"status": "running", "progress": progress, "reason": None})

        if await self.update(job_id, begin) is not None:
            return True
        await self._redis.delete(key)
        return False

    async def due(self, job_id: str, now: float) -> HourLeft | None:
        """Return the newest hour that has its turn, None if none of what is left has."""
        found: Any = await self._redis.zrevrangebyscore(_left_key(job_id), now, "-inf", start=0, num=1)
        return HourLeft.read(found[0].decode()) if found else None

    async def next_at(self, job_id: str) -> float | None:
        """Return when the next of what is left has its turn, None if nothing is left."""
        found: Any = await self._redis.zrange(_left_key(job_id), 0, 0, withscores=True)
        return float(found[0][1]) if found else None

    async def update(
        self,
        job_id: str,
        change: Change,
        *,
        hour: HourLeft | None = None,
        after: HourLeft | None = None,
        at: float | None = None,
    ) -> Recomputation | None:
        """Change a recomputation, and let `after` or nothing take the place of an `hour` that is left.

        `after` has its turn at `at`, None: when the hour had it. Return the recomputation as it is then; None, and
        nothing is changed, if it has ended or the hour is not left any more.
        """
        for _ in range(_TRIES):
            old = await self._raw(job_id)
            job = Recomputation.model_validate_json(old)
            if job.ended:
                return None
            new = change(job)
            keys = [_JOBS, _active_key(job.fingerprint), _left_key(job_id)]
            about: list[str | float | bytes] = [job_id, old, new.model_dump_json(), "1" if new.ended else ""]
            about += [_text(hour), _text(after), "" if at is None else at]
            outcome = await self._replace(keys, about)
            if outcome == b"not left":
                return None
            if outcome == b"done":
                return new
        raise StoreUnavailable(f"recomputation {job_id} changes all the time; try again")

    async def _raw(self, job_id: str) -> bytes:
        raw: Any = await self._redis.hget(_JOBS, job_id)
        if raw is None:
            raise RecomputationNotFound(job_id)
        return bytes(raw)

    async def _many(self, ids: Any) -> list[Recomputation]:
        found: list[Any] = await self._redis.hmget(_JOBS, ids) if ids else []
        return [Recomputation.model_validate_json(raw) for raw in found if raw is not None]

    async def _forget_old(self) -> None:
        """Forget the oldest of those that have ended."""
        ended = [job.id for job in await self.everything() if job.ended]
        if old := ended[KEPT_ENDED - 1 :]:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hdel(_JOBS, *old)
                pipe.zrem(_ORDER, *old)
                await pipe.execute()


def worker_lease(fingerprint: str) -> str:
    """The lease under which one of several services of a model works."""
    return f"recomputer-{fingerprint}"


def _active_key(fingerprint: str) -> str:
    return f"rec:{{recomputations}}:active:{fingerprint}"


def _left_key(job_id: str) -> str:
    return f"rec:{{recomputations}}:left:{job_id}"


def _text(hour: HourLeft | None) -> str:
    return "" if hour is None else str(hour)
