"""Ownership of sources on a real server."""

import asyncio

import pytest

from store.connection import StoreRedis
from store.leases import Leases


@pytest.fixture
def leases(redis: StoreRedis) -> Leases:
    return Leases(redis)


async def expired(leases: Leases, source_id: str) -> None:
    async with asyncio.timeout(5):
        while await leases.owner(source_id) is not None:  # noqa: ASYNC110 - the server's clock sends no event
            await asyncio.sleep(0.002)


async def test_a_held_source_is_not_given_away(leases):
    epoch = await leases.acquire("str_a", "one", 60)
    assert epoch is not None
    assert await leases.acquire("str_a", "two", 60) is None
    assert await leases.acquire("str_a", "one", 60) is None
    assert await leases.owner("str_a") == "one"
    assert await leases.owner("str_unknown") is None


async def test_a_silent_owner_is_replaced_with_a_higher_epoch(leases):
    first = await leases.acquire("str_a", "one", 0.01)
    await expired(leases, "str_a")
    second = await leases.acquire("str_a", "two", 60)
    assert second > first
    assert await leases.renew("one", {"str_a": first}, 60) == {"str_a"}
    assert await leases.renew("two", {"str_a": second}, 60) == frozenset()


async def test_an_expired_lease_that_nobody_took_can_be_renewed(leases):
    epoch = await leases.acquire("str_a", "one", 0.01)
    await expired(leases, "str_a")
    assert await leases.renew("one", {"str_a": epoch}, 60) == frozenset()
    assert await leases.owner("str_a") == "one"


async def test_a_released_source_is_free_at_once(leases):
    epoch = await leases.acquire("str_a", "one", 60)
    await leases.release("two", {"str_a": epoch})
    await leases.release("one", {"str_a": epoch - 1})
    assert await leases.owner("str_a") == "one"
    await leases.release("one", {"str_a": epoch})
    assert await leases.acquire("str_a", "two", 60) > epoch


async def test_a_revoked_owner_has_lost_and_the_next_epoch_is_higher(leases):
    epoch = await leases.acquire("str_a", "one", 60)
    await leases.revoke("str_a")
    assert await leases.renew("one", {"str_a": epoch}, 60) == {"str_a"}
    assert await leases.acquire("str_a", "two", 60) > epoch + 1
    await leases.revoke("str_never_held")


async def test_epochs_stay_unique_when_the_server_forgets_everything(leases, redis):
    """A server that lost its last second must not give an epoch out twice."""
    first = await leases.acquire("str_a", "one", 60)
    await redis.flushdb()
    await asyncio.sleep(0.002)  # epochs have milliseconds, and a restart takes longer than one
    assert await leases.acquire("str_a", "two", 60) > first


async def test_of_many_racing_owners_one_wins(leases):
    epochs = await asyncio.gather(*(leases.acquire("str_a", f"owner-{n}", 60) for n in range(50)))
    assert sum(epoch is not None for epoch in epochs) == 1


async def test_a_thousand_sources_are_claimed_up_to_the_limit_in_order(leases):
    ids = [f"str_{n:04}" for n in range(1000)]
    taken = await leases.acquire("str_0003", "other", 60)
    assert taken is not None
    claimed = await leases.acquire_many(ids, "one", 60, limit=10)
    assert list(claimed) == [f"str_{n:04}" for n in range(11) if n != 3]
    assert len(await leases.unowned(ids)) == 989
    assert await leases.acquire_many(ids, "two", 60, limit=0) == {}
    assert await leases.renew("one", claimed, 60) == frozenset()
    assert await leases.renew("one", {}, 60) == frozenset()
