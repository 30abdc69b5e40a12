"""A first look at media that nobody vouches for, in a child process that ends with the look.

`python -m ingest.sandbox` is that process.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ingest.address import BadUrl
from ingest.archive import ArchiveFacts, ArchiveLimits, UnsupportedMedia, probe
from ingest.assignment import Camera
from ingest.camera import (
    CameraAuthFailed,
    CameraEnded,
    CameraFacts,
    CameraFault,
    CameraPathNotFound,
    CameraRedirects,
    CameraTimeout,
    CameraUnreachable,
    NoVideo,
    look_at_camera,
)
from ingest.child import START_S, Child, ChildDied, become_child
from ingest.settings import IngestSettings

_FAULTS: Mapping[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        BadUrl,
        CameraAuthFailed,
        CameraEnded,
        CameraFault,
        CameraPathNotFound,
        CameraRedirects,
        CameraTimeout,
        CameraUnreachable,
        NoVideo,
        UnsupportedMedia,
    )
}


class Sandbox:
    """Looks at files and cameras, each in a process that ends with the look. Blocks: call it in a thread."""

    def __init__(self, settings: IngestSettings) -> None:
        self._settings = settings

    def archive(self, path: Path) -> ArchiveFacts:
        """Read the head of a file until its first picture. Raises UnsupportedMedia."""
        patience_s = self._settings.look_timeout_s
        try:
            facts, _ = self._look("archive", {"path": str(path)}, patience_s)
            return ArchiveFacts(**facts)
        except TimeoutError:
            raise UnsupportedMedia(f"the file shows no picture within {patience_s:g} s of decoding") from None
        except ChildDied:
            raise UnsupportedMedia("the file cannot be decoded: it is damaged, or asks for too much memory") from None

    def camera(self, camera: Camera) -> CameraFacts:
        """Open a camera, watch it for a second and close it. Raises CameraFault and BadUrl."""
        patience_s = 2 * self._settings.open_timeout_s + 2 * self._settings.read_timeout_s
        fault: CameraFault
        try:
            facts, snapshot = self._look("camera", {"camera": asdict(camera)}, patience_s)
            return CameraFacts(**facts, snapshot=snapshot)
        except TimeoutError:
            fault = CameraTimeout("the camera sent no picture for too long")
        except ChildDied:
            fault = CameraUnreachable(
                "what the camera sends cannot be decoded: it is damaged or asks for too much memory"
            )
        raise fault  # outside of the handler: what is chained may hold the request, and so the password

    def _look(self, what: str, request: Mapping[str, Any], patience_s: float) -> tuple[dict[str, Any], bytes]:
        """Let a process look. Raises what it raised, TimeoutError after `patience_s`, and ChildDied."""
        patience_s += START_S
        told = json.dumps({**request, "settings": self._settings.model_dump(mode="json")}).encode()
        limits = str(self._settings.max_decoder_bytes), str(math.ceil(patience_s))
        with Child("ingest.sandbox", what, *limits) as child:
            words, snapshot = child.ask(told, patience_s)
        try:
            said = json.loads(words)
        except ValueError:
            raise ChildDied("said what cannot be understood") from None
        if "fault" in said:
            raise _FAULTS.get(said["fault"], ChildDied)(said["message"])
        return said["facts"], snapshot


def _look_at_archive(request: Mapping[str, Any], settings: IngestSettings) -> tuple[dict[str, Any], bytes]:
    return asdict(probe(Path(request["path"]), ArchiveLimits.of(settings))), b""


def _look_at_camera(request: Mapping[str, Any], settings: IngestSettings) -> tuple[dict[str, Any], bytes]:
    facts = asdict(look_at_camera(Camera(**request["camera"]), settings))
    return facts, facts.pop("snapshot")


_LOOKS: Mapping[str, Callable[[Mapping[str, Any], IngestSettings], tuple[dict[str, Any], bytes]]] = {
    "archive": _look_at_archive,
    "camera": _look_at_camera,
}


def main() -> None:
    what, memory_bytes, cpu_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    line = become_child(memory_bytes, cpu_s)  # the time also ends it when whoever started it is gone
    message = line.receive()
    if message is None:
        return
    request = json.loads(message[0])
    settings = IngestSettings.model_validate(request.pop("settings"))
    said: dict[str, Any]
    bulk = b""
    try:
        facts, bulk = _LOOKS[what](request, settings)
        said = {"facts": facts}
    except tuple(_FAULTS.values()) as error:
        said = {"fault": type(error).__name__, "message": str(error)}
    line.send(json.dumps(said).encode(), bulk)


if __name__ == "__main__":
    main()
