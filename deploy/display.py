"""How the `tokenline` command shows things: tables and answers for people, JSON for scripts.

Names and answers come from cameras, users and a model: control characters never reach the terminal.
"""

import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from deploy.bodies import (
    Answer,
    Citation,
    Coverage,
    Event,
    Health,
    Moments,
    Receipt,
    Recomputation,
    Stream,
    StreamHealth,
    StreamProbe,
    TimelineExport,
    Video,
)
from deploy.times import show_position

PIPE_WIDTH = 200  # columns where nobody's terminal sets them: identifiers must not be cut


def console() -> Console:
    """Return standard output as rich sees it now."""
    return Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)


def printable(text: str) -> str:
    """Drop what would steer a terminal: every control and format character but line ends and tabs."""
    return "".join(one for one in text if one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cf"))


def print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """Print one object, or an array of them, as the service sent it."""
    plain = (
        value.model_dump(mode="json")
        if isinstance(value, BaseModel)
        else [one.model_dump(mode="json") for one in value]
    )
    print(json.dumps(plain, indent=2, ensure_ascii=False))


def print_streams(streams: Iterable[Stream]) -> None:
    """Print one line a stream."""
    rows = [
        (one.id, one.name, _state(one.state, one.reason), f"{one.fps:g}", one.url or "", _labels(one.labels))
        for one in streams
    ]
    _print_table(("id", "name", "state", "fps", "url", "labels"), rows, none="no streams")


def print_stream(stream: Stream, health: StreamHealth) -> None:
    """Print all that is known of one stream."""
    _print_facts(stream.model_dump(mode="json") | health.model_dump(mode="json"))


def print_probe(seen: StreamProbe) -> None:
    """Print what a camera sends."""
    fps = "at an unknown rate" if seen.fps is None else f"at {seen.fps:g} frames a second"
    print(f"{printable(seen.codec)}, {seen.width}x{seen.height} {fps}; first picture after {seen.first_frame_ms} ms")


def print_videos(videos: Iterable[Video]) -> None:
    """Print one line a video."""
    rows = [
        (
            one.id,
            one.name or "",
            _state(one.status, one.reason),
            f"{one.progress:.0%}",
            "" if one.duration_s is None else show_position(one.duration_s),
        )
        for one in videos
    ]
    _print_table(("id", "name", "status", "progress", "length"), rows, none="no videos")


def print_video(video: Video) -> None:
    """Print all that is known of one video."""
    _print_facts(video.model_dump(mode="json"))


def print_moments(found: Moments) -> None:
    """Print one line a moment, best first, and what was left out."""
    rows = [
        (one.source_id, _time(one.start), _time(one.end), f"{one.score:.3f}", one.frame_url or "") for one in found.data
    ]
    _print_table(("source", "from", "to", "score", "keyframe"), rows, none="nothing found")
    if found.coverage.partial:
        searched, kept = found.coverage.frames_searched, found.coverage.frames_kept
        print(f"partial: {searched} of {kept} frames were searched; the others are being loaded, search again later")


def print_receipts(receipts: Iterable[Receipt]) -> None:
    """Print one line an erasure."""
    columns = ("redis_frames", "sealed_frames", "keyframes")
    rows = [
        (
            one.id,
            one.source_id,
            _end(one.start, "all"),
            _end(one.end, "all"),
            *(str(one.erased.get(name, 0)) for name in columns),
        )
        for one in receipts
    ]
    _print_table(("receipt", "source", "from", "to", "in Redis", "sealed", "keyframes"), rows, none="nothing erased")


def print_export(held: TimelineExport, path: Path) -> None:
    """Print what was written into a file."""
    frames = f"{len(held.hours)} hours" if len(held.hours) != 1 else "1 hour"
    print(f"{path}: {printable(held.name)}, {frames}, {path.stat().st_size} bytes")


def print_recomputations(jobs: Iterable[Recomputation]) -> None:
    """Print one line a recomputation."""
    rows = [
        (
            one.id,
            _state(one.status, one.reason or (f"waits until {one.waiting_until}" if one.waiting_until else None)),
            f"{one.progress:.0%}",
            str(one.frames),
            str(one.done),
            str(one.unreadable),
            "" if one.eta_s is None else show_position(math.ceil(one.eta_s)),
        )
        for one in jobs
    ]
    columns = ("recomputation", "status", "progress", "frames", "done", "unreadable", "left")
    _print_table(columns, rows, none="no recomputations")


def print_recomputation(job: Recomputation) -> None:
    """Print all that is known of one recomputation."""
    _print_facts(job.model_dump(mode="json"))


def print_event(event: Event) -> None:
    """Print one line an event."""
    told = event.state or event.status or ""
    why = event.reason or event.error
    words = (event.created_at or "", event.source_id or "", event.type, told + (f": {why}" if why else ""))
    print(printable("  ".join(word for word in words if word)))


def print_health(health: Health) -> None:
    """Print the state of every part of the service."""
    rows = [(name, part if isinstance(part, str) else json.dumps(part)) for name, part in health.parts.items()]
    _print_table(("part", "state"), rows, none="")
    for name, advice in health.advice.items():
        print(f"{name}: {printable(advice)}")
    print("ready" if health.ready else "not ready")


def print_delta(text: str) -> None:
    """Print the next piece of an answer, at once and on the same line."""
    print(printable(text), end="", flush=True)


def print_basis(answer: Answer) -> None:
    """Print what an answer rests on: citations, coverage and timing."""
    if answer.citations:
        print_citations(answer.citations)
    print(_coverage(answer.coverage))
    for gap in answer.coverage.gaps:
        print(f"  gap {gap.source_id} {_time(gap.start)} to {_time(gap.end)}: {printable(gap.reason)}")
    print("timing: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in answer.timing_ms.items()))


def print_citations(citations: Iterable[Citation]) -> None:
    """Print one line a citation."""
    rows = [
        (one.source_id, _time(one.time), f"{one.score:.3f}", one.method or "", one.frame_url or "") for one in citations
    ]
    _print_table(("citation", "time", "score", "method", "keyframe"), rows, none="")


def print_error(message: str, *, code: str | None = None, request_id: str | None = None) -> None:
    """Print an error to standard error: `error: message (code)` and the request that a log can be searched for."""
    print(f"error: {printable(message)}" + (f" ({code})" if code else ""), file=sys.stderr)
    if request_id:
        print(f"request: {printable(request_id)}", file=sys.stderr)


class _TimeLeft(ProgressColumn):
    """The time left: the service's own estimate where it gives one, else by the speed so far."""

    def render(self, task: Task) -> Text:
        left_s = task.fields.get("eta_s", task.time_remaining)
        return Text("" if left_s is None or task.finished else f"{show_position(math.ceil(left_s))} left")


class HourProgress:
    """A progress bar of hours that are exported or imported."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Show how many of the hours are done."""
        self._progress.update(self._task, completed=done, total=total)


class VideoProgress:
    """Progress bars of a video on its way: its bytes to the service, then its frames into the memory."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._sending = progress.add_task("sending", total=None, visible=False)
        self._reading = progress.add_task("reading", total=1.0, visible=False)

    def sent(self, done_bytes: int, total_bytes: int) -> None:
        """Show how much of the file has been sent."""
        self._progress.update(self._sending, completed=done_bytes, total=total_bytes, visible=True)

    def read(self, video: Video) -> None:
        """Show how much of the video is in memory."""
        self._progress.update(self._reading, completed=video.progress, eta_s=video.eta_s, visible=True)


class RecomputationProgress:
    """A progress bar of a recomputation, called with what the service tells of it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar = progress.add_task("recomputing", total=1.0)

    def __call__(self, job: Recomputation) -> None:
        waits = f"waiting until {job.waiting_until}" if job.waiting_until else None
        told = printable(job.reason or waits or "recomputing")
        self._progress.update(self._bar, description=escape(told), completed=job.progress, eta_s=job.eta_s)


@contextmanager
def video_progress() -> Iterator[Progress]:
    """Show progress bars on standard error, which leaves standard output to the result."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _TimeLeft())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, none: str) -> None:
    if not rows:
        print(none)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)


def _print_facts(facts: Mapping[str, Any]) -> None:
    rows = [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in facts.items()
        if value is not None
    ]
    _print_table(("field", "value"), rows, none="")


def _coverage(coverage: Coverage) -> str:
    fused = f" from {coverage.fusion_frames} frames" if coverage.fusion_frames else ""
    return (
        f"coverage: {coverage.frames_used} of {coverage.slots_expected} slots, stride {coverage.stride}, "
        f"text fusion {printable(coverage.text_fusion)}{fused}"
        + (", citations from a part of the frames" if coverage.partial else "")
    )


def _state(state: str, reason: str | None) -> str:
    return f"{state}: {reason}" if reason else state


def _labels(labels: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in labels.items())


def _end(at: str | float | None, unbounded: str) -> str:
    return unbounded if at is None else _time(at)


def _time(at: str | float) -> str:
    """Show a time of a stream as the service wrote it, and one of a video as a position."""
    return at if isinstance(at, str) else show_position(at)
