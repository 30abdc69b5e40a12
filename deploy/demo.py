"""The whole way of a picture, from a camera and from a file to an answer, and then everything is stopped again."""

import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.progress import Progress

from deploy.client import ApiError, Client, Completed, Delta, NewStream, Question, Range, VideoFailed
from deploy.display import VideoProgress, print_basis, print_delta, print_error, video_progress
from deploy.local import serving
from deploy.sample_clip import write_sample_clip
from deploy.settings import Settings

LIVE_FRAMES = 12  # enough of the camera to ask about: seconds, at 1 fps
PATIENCE_S = 120


class DemoFailed(RuntimeError):
    """The demo did not get to its answers; the message says where it stopped."""


def main(settings: Settings) -> None:
    """Show the service at work on this machine. Exits with a status other than 0 when an answer does not come."""
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

    clip = folder / "street.mp4"
    write_sample_clip(clip)
    print("starting the service (Redis, Ray Serve, the model) ...", flush=True)
    with SampleCamera(clip) as camera, serving(settings) as url, Client(url) as client:
        print(f"the service is up at {url}, a sample camera at {camera.url}")
        model = client.model()
        if model.untrained:
            print(f"NOTE: the model {model.id} has seeded, untrained weights: its answers carry NO meaning.")
            print("      Everything else is real. The README tells how to use the published 8B checkpoint.")
        started = datetime.now(UTC)
        stream = client.create_stream(NewStream(name="street", url=camera.url), wait_s=10)
        with video_progress() as progress:
            video_id = _remember_clip(client, clip, progress)
            _wait_for_camera(client, stream.id, started, progress)
        live = Range(source_id=stream.id, start=started, end=started + timedelta(seconds=PATIENCE_S))
        recorded = Range(source_id=video_id, start=0.0, end=20.0)
        _ask(client, "What happens in front of the camera?", live, "the camera, since it was registered")
        _ask(client, "What drives by, and what colour is it?", recorded, "the uploaded clip, seconds 0 to 20")
        print("stopping the service ...", flush=True)
    print("done.")


def _remember_clip(client: Client, clip: Path, progress: Progress) -> str:
    bars = VideoProgress(progress)
    video = client.upload_video(clip, name="street clip", on_progress=bars.sent)
    return client.wait_video(video.id, on_progress=bars.read).id


def _wait_for_camera(client: Client, stream_id: str, started: datetime, progress: Progress) -> None:
    task = progress.add_task("camera", total=LIVE_FRAMES)
    deadline = time.monotonic() + PATIENCE_S
    while (kept := client.frames_kept(stream_id, started)) < LIVE_FRAMES:
        progress.update(task, completed=kept)
        if time.monotonic() > deadline:
            health = client.stream_health(stream_id)
            raise DemoFailed(f"the camera gave {kept} of {LIVE_FRAMES} frames; it is {health.state}: {health.reason}")
        time.sleep(0.5)
    progress.update(task, completed=LIVE_FRAMES)


def _ask(client: Client, question: str, source: Range, about: str) -> None:
    print(f"\nQ ({about}): {question}\nA: ", end="", flush=True)
    answered = None
    for event in client.ask(Question(question=question, sources=(source,), max_output_tokens=48)):
        if isinstance(event, Delta):
            print_delta(event.delta)
        elif isinstance(event, Completed):
            answered = event
    print()
    if answered is None or not answered.coverage.frames_used:
        raise DemoFailed("the answer ended early")
    print_basis(answered)
