"""Export into a file and import from one: hour by hour, each asked for again when the service was away a moment."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from deploy.bodies import HourPart, Imported, Range, TimelineExport
from deploy.client import ApiError, Client, Unreachable, passes
from deploy.portable import PortableReader, PortableWriter

PAUSES_S = (0.5, 2.0, 5.0, 15.0, 60.0)  # before the next try; a key's requests are counted by the minute
Told = Callable[[int, int], None]
"""Is told how many hours are done, and how many there are."""

T = TypeVar("T")
P = ParamSpec("P")


def export_timeline(
    client: Client, wanted: Range, path: Path, *, pictures: bool = True, on_progress: Told | None = None
) -> TimelineExport:
    """Write what is remembered of a range into a portable file, and return what it holds.

    Each hour is of the moment at which it was read. What came to it later is a gap with the reason that it was absent
    for; what was erased later is one too, and is not imported, though the file holds it.
    """
    described = client.describe_export(wanted)
    parts: tuple[HourPart, ...] = ("frames", "keyframes") if pictures else ("frames",)
    written = []
    with PortableWriter(path) as file:
        for done, hour in enumerate(described.hours):
            for part in parts:
                content = _patiently(client.export_hour, wanted.source_id, part, hour, described)
                if content is None:  # erased meanwhile, or no picture of the hour is kept
                    break
                file.add_hour(hour, part, content)
                if part == "frames":
                    written.append(hour)
            if on_progress:
                on_progress(done + 1, len(described.hours))
        now = _patiently(client.describe_export, described.range(wanted.source_id))
        gaps = {tuple(gap.items()): gap for gap in (*described.gaps, *now.gaps)}  # most of them are told both times
        held = described.model_copy(update={"hours": tuple(written), "gaps": tuple(gaps.values())})
        file.finish(held.model_dump(mode="json"))
    return held


def import_timeline(
    client: Client, path: Path, *, name: str | None = None, on_progress: Told | None = None
) -> Imported:
    """Import a portable file as a new source, under its own name or another. Nobody sees it before it is whole."""
    with PortableReader(path) as file:
        described = file.contents if name is None else file.contents | {"name": name}
        import_id = client.begin_import(described)
        try:
            frames = 0
            for done, hour in enumerate(file.hours):
                frames += _send(client, import_id, file, "frames", hour)
                _send(client, import_id, file, "keyframes", hour)
                if on_progress:
                    on_progress(done + 1, len(file.hours))
        except BaseException:
            with suppress(ApiError, ConnectionError):  # the service gives it up by itself, only later
                client.abandon_import(import_id)
            raise
        # From here on nothing is given up: all of it is there, and it may be seen already.
        return _patiently(client.complete_import, import_id, frames)


def _send(client: Client, import_id: str, file: PortableReader, part: HourPart, hour: int) -> int:
    content = file.read_hour(hour, part)
    if content is None:
        return 0
    return _patiently(client.import_hour, import_id, part, hour, content)


def _patiently(ask: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Ask again after what passes by itself: nothing asked here counts twice."""
    for pause_s in PAUSES_S:
        try:
            return ask(*arguments, **named)
        except (ApiError, Unreachable) as error:
            if not passes(error):
                raise
        time.sleep(pause_s)
    return ask(*arguments, **named)
