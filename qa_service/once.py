"""Requests that create something, and may be repeated."""

import hashlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel

from qa_service.errors import ValidationFailed
from qa_service.keys import Caller
from store.idempotency import Idempotency

MAX_KEY_CHARS = 255

Made = TypeVar("Made", bound=BaseModel)


class Once:
    """Creates something, or returns what the first request with the same Idempotency-Key created."""

    def __init__(self, idempotency: Idempotency) -> None:
        self._idempotency = idempotency

    async def __call__(
        self,
        caller: Caller,
        route: str,
        key: str | None,
        request: str,
        response: type[Made],
        create: Callable[[], Awaitable[Made]],
    ) -> Made:
        """Raises ValidationFailed for a key that is none, IdempotencyConflict, and what `create` raises."""
        if key is None:
            return await create()
        if not 0 < len(key) <= MAX_KEY_CHARS:
            raise ValidationFailed(f"An Idempotency-Key has 1 to {MAX_KEY_CHARS} characters.", param="Idempotency-Key")
        scope, digest = f"{caller.name}:{route}", hashlib.sha256(request.encode()).hexdigest()
        known = await self._idempotency.remember(scope, key, digest)
        if known is not None:
            return response.model_validate_json(known)
        try:
            made = await create()
        except BaseException:
            await self._idempotency.forget(scope, key)
            raise
        await self._idempotency.complete(scope, key, digest, made.model_dump_json())
        return made
