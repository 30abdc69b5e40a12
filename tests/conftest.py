"""Fixtures that more than one part's tests share."""

import faulthandler
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from moto.server import ThreadedMotoServer

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
def s3_root() -> Iterator[str]:
    """The address of an empty bucket of a server that speaks S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    access = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**access, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("tokenline")
        yield "s3://tokenline/site"
    server.stop()


@pytest.fixture(params=["folder", "memory", "s3"])
def segments_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty root for files of the store: a folder, an object store in this process, a server that speaks S3."""
    if request.param == "folder":
        return str(tmp_path / "segments")
    if request.param == "memory":
        return f"memory://{uuid4().hex}"
    return f"{request.getfixturevalue('s3_root')}/{uuid4().hex}"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small untrained checkpoint, written once."""
    return write_untrained_checkpoint(tmp_path_factory.mktemp("checkpoint"))
