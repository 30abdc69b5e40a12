"""The whole way of a picture, from a camera and from a file to right answers, and then everything is stopped again.

With the embedded model every answer is compared with the right one: the demo fails if one is wrong.
"""

import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.progress import Progress

from compressor_service.training.score import same
from deploy.bodies import Completed, Delta, NewStream, Question, Range
from deploy.client import ApiError, Client, VideoFailed
from deploy.display import VideoProgress, print_basis, print_delta, print_error, print_moments, video_progress
from deploy.local import serving
from deploy.sample_clip import LIVE, LIVE_SECONDS, RECORDED, SEEN_FROM_S, SOUGHT, Asked, write_sample_clip
from deploy.settings import Settings

PATIENCE_S = 120


class DemoFailed(RuntimeError):
    """The demo did not get to its answers, or one was wrong; the message says which."""


def main(settings: Settings) -> None:
    """Show the service at work on this machine. Exits with a status other than 0 when an answer is wrong or missing."""
    with tempfile.TemporaryDirectory(prefix="tokenline-demo-") as folder:
        try:
            _show(_alone(settings, Path(folder)), Path(folder))
        except (ApiError, VideoFailed, DemoFailed, ConnectionError) as error:
            print_error(str(error))
            sys.exit(1)


def _alone(settings: Settings, folder: Path) -> Settings:
    """Keep the demo away from the memory and the port of a service that people use."""
    return settings.model_copy(
        update={
            "store": settings.store.model_copy(update={"data_dir": folder / "data", "redis_url": None}),
            "serve": settings.serve.model_copy(update={"host": "127.0.0.1", "port": 0}),
            "ingest": settings.ingest.model_copy(update={"allowed_networks": ("127.0.0.0/8",)}),
        }
    )


def _show(settings: Settings, folder: Path) -> None:
    from ingest.sample_camera import SampleCamera

    clip = folder / "yard.mp4"
    write_sample_clip(clip)
    print("starting the service (Redis, Ray Serve, the model) ...", flush=True)
    with SampleCamera(clip) as camera, serving(settings) as url, Client(url) as client:
        print(f"the service is up at {url}, a sample camera at {camera.url}")
        model = client.model()
        if model.note:
            print(f"NOTE: {model.note}")
        judged = settings.model.checkpoint is None  # another model sees a drawn yard, and may call it what it likes
        started = datetime.now(UTC)
        stream = client.create_stream(NewStream(name="yard", url=camera.url), wait_s=10)
        seen_until = datetime.now(UTC) + timedelta(seconds=LIVE_SECONDS)  # whatever else takes its time
        with video_progress() as progress:
            video_id = _remember_clip(client, clip, progress)
            _wait_for_camera(client, stream.id, started, progress)
        wrong = [
            asked.question
            for asked, source, about in (
                *_of_the_camera(stream.id, started, seen_until),
                *_of_the_file(video_id),
            )
            if not _answer(client, asked, source, about, judged)
        ]
        wrong += _search(client, video_id, judged)
        print("stopping the service ...", flush=True)
    if wrong:
        raise DemoFailed(f"{len(wrong)} of {len(LIVE) + len(RECORDED) + 1} answers are wrong: {'; '.join(wrong)}")
    print("done: every answer was right." if judged else "done.")


def _of_the_camera(stream_id: str, start: datetime, end: datetime) -> Iterable[tuple[Asked, Range, str]]:
    source = Range(source_id=stream_id, start=start, end=end)
    return ((asked, source, "the camera, its first seconds") for asked in LIVE)


def _of_the_file(video_id: str) -> Iterable[tuple[Asked, Range, str]]:
    for asked in RECORDED:
        source = Range(source_id=video_id, start=asked.start, end=asked.end)
        yield asked, source, f"the uploaded film, seconds {asked.start:.0f} to {asked.end:.0f}"


def _remember_clip(client: Client, clip: Path, progress: Progress) -> str:
    bars = VideoProgress(progress)
    video = client.upload_video(clip, name="yard", on_progress=bars.sent)
    return client.wait_video(video.id, on_progress=bars.read).id


def _wait_for_camera(client: Client, stream_id: str, started: datetime, progress: Progress) -> None:
    task = progress.add_task("camera", total=LIVE_SECONDS)
    deadline = time.monotonic() + PATIENCE_S
    while (kept := client.frames_kept(stream_id, started)) < LIVE_SECONDS:
        progress.update(task, completed=kept)
        if time.monotonic() > deadline:
            health = client.stream_health(stream_id)
            raise DemoFailed(f"the camera gave {kept} of {LIVE_SECONDS} frames; it is {health.state}: {health.reason}")
        time.sleep(0.5)
    progress.update(task, completed=LIVE_SECONDS)


def _answer(client: Client, asked: Asked, source: Range, about: str, judged: bool) -> bool:
    """Ask, show the answer and what it rests on, and tell whether it is right; not judged it is taken as right."""
    print(f"\nQ ({about}): {asked.question}\nA: ", end="", flush=True)
    said, answered = "", None
    for event in client.ask(Question(question=asked.question, sources=(source,), max_output_tokens=64)):
        if isinstance(event, Delta):
            print_delta(event.delta)
            said += event.delta
        elif isinstance(event, Completed):
            answered = event
    right = not judged or same(said, asked.right)
    print("" if right else f"   WRONG, it is: {asked.right}")
    if answered is None or not answered.coverage.frames_used:
        raise DemoFailed("the answer ended early")
    print_basis(answered)
    return right


def _search(client: Client, video_id: str, judged: bool) -> list[str]:
    """Search the film for moments, and return what was sought if the best of them does not show it."""
    print(f"\nmoments of the uploaded film that show {SOUGHT!r}:")
    found = client.search(SOUGHT, (Range(source_id=video_id),), top_k=3)
    print_moments(found)
    best = found.data[0].start if found.data else None
    right = isinstance(best, float) and best >= SEEN_FROM_S
    return [] if right or not judged else [f"the search for {SOUGHT}"]
