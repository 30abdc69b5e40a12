"""A video file played as a live RTSP camera, for demonstrations and tests. Needs the extra `demo`.

The camera runs in a process of its own and plays the file in a loop, with time stamps that go on from round to round.
Sound is left out. Run as a program it plays a file until it is ended: `python -m ingest.sample_camera FILE`.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self


class SampleCameraFailed(RuntimeError):
    """The camera did not start; the message says why."""


class SampleCamera:
    """Plays an H.264 or HEVC file in MP4 or Matroska at `url`, over TCP, on this machine only.

        with SampleCamera(Path("clip.mp4")) as camera:
            print(camera.url)

    Raises SampleCameraFailed when the server cannot start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._process: subprocess.Popen[str] | None = None
        self._url: str | None = None

    @property
    def url(self) -> str:
        """The RTSP address; known once the camera has started."""
        if self._url is None:
            raise SampleCameraFailed("the camera has not been started")
        return self._url

    def start(self) -> Self:
        """Start the process and wait until it listens."""
        if find_spec("aio_rtsp_toolkit") is None:
            raise SampleCameraFailed("the sample camera needs the extra `demo`: pip install 'tokenline[demo]'")
        if not self._path.is_file() or self._path.suffix.lower() not in (".mp4", ".mkv"):
            raise SampleCameraFailed(f"{self._path.name} is no .mp4 or .mkv file that is there")
        command = [sys.executable, "-m", "ingest.sample_camera", str(self._path)]
        root = Path(__file__).parent.parent  # runs from a bare checkout as well
        self._process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line.startswith("rtsp://"):
            self.stop()
            raise SampleCameraFailed(f"the camera could not play {self._path.name}")
        self._url = line
        return self

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()  # tells it to clear up and go
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


async def _play(path: Path) -> None:
    """Serve the file until standard input ends, so that the camera does not outlive who started it."""
    from aio_rtsp_toolkit import server

    # The library logs to standard output, and would serve every file of a folder: give it one with a single file.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        clip = shutil.copyfile(path, Path(folder) / f"camera{path.suffix.lower()}")
        port = _free_port()
        ended = asyncio.Event()
        Thread(target=_wait_for_end, args=(asyncio.get_running_loop(), ended), daemon=True).start()
        rtsp = await server.RtspServer(folder, "127.0.0.1", port).start()
        print(f"rtsp://127.0.0.1:{port}/{clip.name}/play_count_0", file=sys.__stdout__, flush=True)
        await ended.wait()
        await rtsp.close()


def _wait_for_end(loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    loop.call_soon_threadsafe(ended.set)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m ingest.sample_camera FILE")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_play(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
