"""Imports on a real server: each ends once, and none that was begun stays for ever."""

from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

import store.connection
from store.cipher import Cipher
from store.connection import StoreUnavailable
from store.imports import ImportedTooMuch, ImportNotFound, Imports, NewImport
from store.sources import Sources

VIDEO = NewImport(kind="video", name="yard", fps=1, start_slot=0, end_slot=9, duration_s=9)


@pytest.fixture
def imports(redis, tmp_path) -> Imports:
    return Imports(redis, Sources(redis, Cipher.open(None, tmp_path)))


async def test_an_import_goes_on_until_it_has_more_than_it_may(imports):
    source_id = await imports.begin(VIDEO, [])
    assert await imports.go_on(source_id, 60, 100) == VIDEO
    assert await imports.go_on(source_id, 40, 100) == VIDEO
    with pytest.raises(ImportedTooMuch):
        await imports.go_on(source_id, 1, 100)
    with pytest.raises(ImportNotFound):
        await imports.go_on("vid_nobody")


Trips = Callable[[int, Callable[[], Coroutine[Any, Any, Any]]], None]


@pytest.fixture
def before_trip(monkeypatch) -> Trips:
    """Let something happen before one of the next trips to the server: 0 is the first."""
    plan: list[Callable[[], Coroutine[Any, Any, Any]] | None] = []

    async def awaited(call: Coroutine[Any, Any, Any]) -> Any:
        if plan and (happens := plan.pop(0)):
            try:
                await happens()
            except BaseException:
                call.close()
                raise
        return await real(call)

    def before(trip: int, happens: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        plan[:] = [*[None] * trip, happens]

    real = store.connection._awaited
    monkeypatch.setattr(store.connection, "_awaited", awaited)
    return before


@pytest.mark.parametrize("trip", range(2))
async def test_an_import_that_is_completed_meanwhile_does_not_come_back(imports, before_trip, trip):
    source_id = await imports.begin(VIDEO, [])
    before_trip(trip, lambda: imports.complete(source_id, 9))
    with suppress(ImportNotFound):
        await imports.go_on(source_id, 1)
    completed = await imports.completed(source_id)
    assert completed is None or not await imports.is_alive(source_id)


@pytest.mark.parametrize("trip", range(3))
async def test_whoever_dies_while_an_import_is_begun_leaves_none_that_never_ends(redis, imports, before_trip, trip):
    async def die() -> None:
        raise StoreUnavailable

    before_trip(trip, die)
    with suppress(StoreUnavailable):
        await imports.begin(VIDEO, [])
    begun = [key async for key in redis.scan_iter("import:*")]
    assert trip == 0 or begun
    assert all([await redis.ttl(key) > 0 for key in begun])
