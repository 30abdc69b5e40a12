"""Repeated POSTs: one Idempotency-Key creates one thing."""

from hashlib import sha256
from typing import Any

from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis

KEPT_S = 24 * 3600
RUNNING_S = 600  # a first request that died without an answer blocks its key for so long


class IdempotencyConflict(RuntimeError):
    """The key was used for another body, or its first request is still running."""


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    body_hash: str
    response: str | None = None


class Idempotency:
    """What was answered to requests that carried an Idempotency-Key, for a day. Raises StoreUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def remember(self, scope: str, key: str, body_hash: str) -> str | None:
        """Return None the first time a key is seen in its scope (API key and route), later the stored response.

        After None the caller must `complete` or `forget` the key. IdempotencyConflict if the body differs from the
        first one, or if the first request has not ended.
        """
        fresh = _Request(body_hash=body_hash).model_dump_json()
        while True:
            if await self._redis.set(_name(scope, key), fresh, nx=True, ex=RUNNING_S):
                return None
            known: Any = await self._redis.get(_name(scope, key))
            if known is not None:  # else it expired between the two commands
                break
        request = _Request.model_validate_json(known)
        if request.body_hash != body_hash:
            raise IdempotencyConflict("this Idempotency-Key was used with another body; choose a new key")
        if request.response is None:
            raise IdempotencyConflict("the first request with this Idempotency-Key is still running; try again later")
        return request.response

    async def complete(self, scope: str, key: str, body_hash: str, response: str) -> None:
        """Store the response that repetitions get."""
        request = _Request(body_hash=body_hash, response=response)
        await self._redis.set(_name(scope, key), request.model_dump_json(), ex=KEPT_S)

    async def forget(self, scope: str, key: str) -> None:
        """Free the key: the request failed, and may be repeated as if it were new."""
        await self._redis.delete(_name(scope, key))


def _name(scope: str, key: str) -> str:
    return f"idempotency:{sha256(f'{len(scope)}:{scope}{key}'.encode()).hexdigest()}"  # keys come from users
