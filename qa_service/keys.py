"""API keys: who asks, what they may do, which sources they may see and how often they may ask."""

import hashlib
import hmac
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import Redis

from qa_service.errors import BadKey, MissingKey, RateLimited, ScopeMissing, SourceForbidden
from qa_service.settings import ApiKey, Scope
from store.connection import StoreFull, named_failures


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request. `sources` are the only ones they may see; None stands for all."""

    name: str
    scopes: frozenset[Scope]
    sources: frozenset[str] | None = None

    def require_any(self, *scopes: Scope) -> None:
        """Raise ScopeMissing unless the caller has one of `scopes` or is admin."""
        if "admin" not in self.scopes and self.scopes.isdisjoint(scopes):
            needed = " or ".join(f"`{scope}`" for scope in scopes)
            raise ScopeMissing(f"This API key lacks the scope {needed}.", details={"any_of": list(scopes)})

    def may_see(self, source_id: str) -> bool:
        """Whether the caller may see the source."""
        return self.sources is None or source_id in self.sources

    def require_source(self, source_id: str, param: str | None = None) -> None:
        """Raise SourceForbidden unless the caller may see the source, be it there or not."""
        if not self.may_see(source_id):
            raise SourceForbidden("This API key may not see this source.", param=param)

    def require_new_sources(self) -> None:
        """Raise SourceForbidden for a caller limited to sources: it could not see what it registers."""
        if self.sources is not None:
            raise SourceForbidden("This API key is limited to certain sources and may not register new ones.")


ANYONE = Caller(name="anyone", scopes=frozenset({"admin"}))


class Keyring:
    """The keys of the settings. Without any, everyone on this machine may do everything, and nobody else anything."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    def identify(self, authorization: str | None, host: str | None) -> Caller:
        """Return who sends the header `Authorization: Bearer <key>` from `host`. Raises MissingKey or BadKey."""
        if not self._keys:
            if not _is_this_machine(host):
                raise MissingKey("No API key is configured here (TOKENLINE_API__KEYS), so only this machine is served.")
            return ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise MissingKey("Send your API key in the header `Authorization: Bearer <key>`.")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        # Every key is compared, in constant time: neither the place of a key nor a common prefix shows.
        known = [one for one in self._keys if hmac.compare_digest(one.sha256, digest)]
        if not known:
            raise BadKey("This API key is not known here.")
        return Caller(known[0].name, known[0].scopes, known[0].sources)


def _is_this_machine(host: str | None) -> bool:
    if host is None:  # a unix socket
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class RateLimit:
    """A moving window of a minute for every caller, shared by all replicas through Redis."""

    def __init__(self, redis: Redis, requests_per_minute: int) -> None:
        # The client's own pool: one place says how Redis is reached.
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            connection_pool=redis.connection_pool,  # type: ignore[arg-type]  # documented, but not in its types
        )
        self._window = MovingWindowRateLimiter(storage)
        self._item = RateLimitItemPerMinute(requests_per_minute)

    async def count(self, caller: Caller) -> None:
        """Count one request. Raises RateLimited with the time to wait."""
        try:
            with named_failures():
                is_free = await self._window.hit(self._item, "key", caller.name)
        except StoreFull:  # questions go on while nothing can be written, and so nothing counted
            return
        if is_free:
            return
        stats = await self._window.get_window_stats(self._item, "key", caller.name)
        wait_s = max(1, math.ceil(stats.reset_time - time.time()))
        raise RateLimited(
            f"This API key has made its {self._item.amount} requests of this minute; wait {wait_s} s.",
            details={"requests_per_minute": self._item.amount},
            retry_after_s=wait_s,
        )
