"""Fixtures that more than one part's tests share."""

import faulthandler
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from store.connection import EmbeddedRedis, StoreRedis, connect
from tests.untrained import write_untrained_checkpoint

# A shell lets what it starts in the background ignore Ctrl-C, and so do all processes started from there.
signal.signal(signal.SIGINT, signal.default_int_handler)

EXIT_WITHIN_S = 120


def pytest_unconfigure() -> None:
    """A thread that a test left behind would keep the run from ending: show where all of them are, and fail."""
    faulthandler.dump_traceback_later(EXIT_WITHIN_S, exit=True, file=sys.__stderr__)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real server that lives as long as the test run."""
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[StoreRedis]:
    """A connection to an empty database."""
    async with connect(redis_url) as client:
        await client.flushdb()
        yield client


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small untrained checkpoint, written once."""
    return write_untrained_checkpoint(tmp_path_factory.mktemp("checkpoint"))
