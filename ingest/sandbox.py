"""A first look at media that nobody vouches for, in a process of its own.

What hangs, crashes or eats memory there harms nobody else. Requests go in by standard input, for a command line, which
may not hold a password, can be read by every user of the machine; replies come out as JSON, for a process that a file
has taken over must have no means but words. `python -m ingest.sandbox` is that process.
"""

import json
import math
import os
import resource
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ingest.address import BadUrl
from ingest.archive import ArchiveFacts, UnsupportedMedia, probe
from ingest.assignment import Camera
from ingest.camera import (
    CameraAuthFailed,
    CameraEnded,
    CameraFacts,
    CameraFault,
    CameraPathNotFound,
    CameraTimeout,
    CameraUnreachable,
    NoVideo,
    look_at_camera,
)
from ingest.settings import IngestSettings

START_S = 15.0  # for Python and its imports on a busy machine
_FAULTS: Mapping[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        BadUrl,
        CameraAuthFailed,
        CameraEnded,
        CameraFault,
        CameraPathNotFound,
        CameraTimeout,
        CameraUnreachable,
        NoVideo,
        UnsupportedMedia,
    )
}


class _Died(RuntimeError):
    """The process ended without a reply."""


class Sandbox:
    """Looks at files and cameras, each in a process that ends with the look. Blocks: call it in a thread."""

    def __init__(self, settings: IngestSettings) -> None:
        self._settings = settings

    def archive(self, path: Path) -> ArchiveFacts:
        """Read the head of a file until its first picture. Raises UnsupportedMedia."""
        patience_s = self._settings.look_timeout_s
        try:
            return ArchiveFacts(**self._look("archive", {"path": str(path)}, patience_s))
        except TimeoutError:
            raise UnsupportedMedia(f"the file shows no picture within {patience_s:g} s of decoding") from None
        except _Died:
            raise UnsupportedMedia("the file cannot be decoded: it is damaged, or asks for too much memory") from None

    def camera(self, camera: Camera) -> CameraFacts:
        """Open a camera, watch it for a second and close it. Raises CameraFault and BadUrl."""
        patience_s = 2 * self._settings.open_timeout_s + 2 * self._settings.read_timeout_s
        fault: CameraFault
        try:
            facts = self._look("camera", {"camera": asdict(camera)}, patience_s)
            return CameraFacts(**{**facts, "snapshot": b64decode(facts["snapshot"])})
        except TimeoutError:
            fault = CameraTimeout("the camera sent no picture for too long")
        except _Died:
            fault = CameraUnreachable(
                "what the camera sends cannot be decoded: it is damaged or asks for too much memory"
            )
        raise fault  # outside of the handler: what is chained may hold the request, and so the password

    def _look(self, what: str, request: Mapping[str, Any], patience_s: float) -> dict[str, Any]:
        """Let a process look. Raises what it raised, TimeoutError after `patience_s`, and _Died."""
        memory_bytes, cpu_s = self._settings.max_decoder_bytes, math.ceil(patience_s + START_S)
        command = [sys.executable, "-m", "ingest.sandbox", what, str(memory_bytes), str(cpu_s)]
        told = json.dumps({**request, "settings": self._settings.model_dump(mode="json")})
        here = str(Path(__file__).parent.parent)  # Python finds the package as we did, installed or not
        paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        timed_out = False
        reply = b""
        try:
            done = subprocess.run(
                command,
                input=told.encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # FFmpeg may tell it the address with the password
                env={**os.environ, "PYTHONPATH": paths},
                timeout=patience_s + START_S,
                check=False,
            )
            reply = done.stdout
        except subprocess.TimeoutExpired:
            timed_out = True
        if timed_out:
            raise TimeoutError
        return _facts(reply)


def _facts(reply: bytes) -> dict[str, Any]:
    try:
        said = json.loads(reply)
    except ValueError:
        raise _Died from None
    if "fault" in said:
        raise _FAULTS.get(said["fault"], _Died)(said["message"])
    facts: dict[str, Any] = said["facts"]
    return facts


def _look_at_archive(request: Mapping[str, Any], settings: IngestSettings) -> dict[str, Any]:
    return asdict(probe(Path(request["path"]), max_pixels=settings.max_pixels))


def _look_at_camera(request: Mapping[str, Any], settings: IngestSettings) -> dict[str, Any]:
    facts = look_at_camera(Camera(**request["camera"]), settings)
    return {**asdict(facts), "snapshot": b64encode(facts.snapshot).decode()}


_LOOKS: Mapping[str, Callable[[Mapping[str, Any], IngestSettings], dict[str, Any]]] = {
    "archive": _look_at_archive,
    "camera": _look_at_camera,
}


def main() -> None:
    what, memory_bytes, cpu_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))  # also ends it when whoever started it is gone
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the password
    request = json.load(sys.stdin)
    settings = IngestSettings.model_validate(request.pop("settings"))
    said: dict[str, Any]
    try:
        said = {"facts": _LOOKS[what](request, settings)}
    except tuple(_FAULTS.values()) as error:
        said = {"fault": type(error).__name__, "message": str(error)}
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
