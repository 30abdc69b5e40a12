"""The same exam through the whole service: films uploaded as videos and played as cameras, asked over REST.

Clips whose clock starts with their film are uploaded: the service looks at the very seconds that were looked at
offline. A camera's slots are seconds of the clock on the wall, which begin at any part of a second of the film. Its
clips are drawn so that no answer depends on that part, and an even grey slate, which the keyframes show, tells where a
pass of the clip begins and ends. So no family has to be left out; pictures, which are no films, are.
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal, Self

import av
import httpx
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict
from rich.progress import Progress

from compressor_service.training.evaluate import (
    ANSWER_TOKENS,
    SEARCH_HITS,
    Evaluation,
    Examined,
    SearchScore,
    score_search,
    search_offline,
)
from compressor_service.training.film import FILM_PX, film_frames, write_film
from compressor_service.training.scene import Clip, View
from compressor_service.training.score import Score, same
from deploy.bodies import NewStream, Question, Range
from deploy.client import ApiError, Client
from deploy.local import serving
from deploy.settings import Settings
from qa_service.settings import ApiSettings, QASettings

CAMERAS = 4  # played at the same time
SLATE_S, FPS = 3, 8
MAX_SEARCHED = 64  # sources in one search
_GREY, _EVEN = (
    128,
    3.5,
)  # of the slate, and how little its levels spread once coded; those of scenes spread by 7 and more
_LAG_S = 5.0  # before a camera's second is looked for
_PASSES = 4  # in which a camera must have shown a clip without a hole
_PATIENCE_S = 120.0  # beyond the passes, for the first picture

Shown = Literal["slate", "clip", "missing"]


class CameraFailed(RuntimeError):
    """A camera did not give a whole pass of its clip."""


class Compared(BaseModel):
    """The same questions offline and through the service; `same_answers` were answered in the same words."""

    model_config = ConfigDict(frozen=True)

    offline: Score
    service: Score
    difference: float
    same_answers: int


class SearchCompared(BaseModel):
    """The same searches over the same seconds."""

    model_config = ConfigDict(frozen=True)

    offline: SearchScore
    service: SearchScore
    difference: float


class ServiceReport(BaseModel):
    """What the service said, beside what was said offline; `sources` are videos and cameras."""

    model_config = ConfigDict(frozen=True)

    sources: dict[str, Compared]
    search: SearchCompared | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Placed:
    """An examined scene, and the range of the service in which it is seen."""

    examined: Examined
    range: Range


class Served:
    """A service with the model to be evaluated, on free ports of this machine, with a memory of its own."""

    def __init__(self, client: Client, folder: Path) -> None:
        self._client = client
        self._folder = folder

    @classmethod
    @contextmanager
    def start(cls, checkpoint: str, *, dtype: str, device: str) -> Iterator[Self]:
        """Run a service until the block ends. Raises CannotServe."""
        with tempfile.TemporaryDirectory(prefix="tokenline-evaluate-") as name:
            folder = Path(name)
            with serving(_settings(folder, checkpoint, dtype, device)) as url, Client(url) as client:
                yield cls(client, folder)

    def evaluate(self, evaluation: Evaluation, progress: Progress) -> ServiceReport:
        """Ask what was asked offline. Raises ApiError, VideoFailed and CameraFailed."""
        clips = [*evaluation.examined["clips"], *evaluation.examined["long"]]
        task = progress.add_task("cameras, offline", total=CAMERAS)
        evaluation.examine("cameras", CAMERAS, partial(progress.advance, task))
        with self._cameras(evaluation.examined["cameras"]) as cameras:
            files = [one for one in clips if one.scene.starts_as_a_file]
            task = progress.add_task("videos", total=len(files))
            videos = [self._upload(one, partial(progress.advance, task)) for one in files]
            task = progress.add_task("cameras", total=len(cameras))
            filmed = [camera.wait(partial(progress.advance, task)) for camera in cameras]
        sources = {}
        for name, placed in (("videos", videos), ("cameras", filmed)):
            if placed:
                task = progress.add_task(f"{name}, asked", total=len(placed))
                sources[name] = self._compare(placed, partial(progress.advance, task))
        searched = videos[:MAX_SEARCHED]
        notes = ["pictures are not asked about through the service: they are no films"]
        if len(searched) < len(videos):
            notes.append(f"the first {len(searched)} videos are searched: one search names no more sources")
        return ServiceReport(sources=sources, search=self._search(evaluation, searched), notes=tuple(notes))

    def _upload(self, examined: Examined, on_done: Callable[[], None]) -> Placed:
        scene = examined.scene
        path = self._folder / f"{scene.name.replace('/', '-')}.mp4"
        assert isinstance(scene.shown, Clip)
        write_film(scene.shown, path, seed=scene.seed)
        video = self._client.wait_video(self._client.upload_video(path, name=scene.name).id)
        path.unlink()
        on_done()
        return Placed(examined, Range(source_id=video.id, start=0.0, end=float(scene.shown.slots)))

    @contextmanager
    def _cameras(self, examined: Sequence[Examined]) -> Iterator[list["_Camera"]]:
        from ingest.sample_camera import SampleCamera

        with ExitStack() as stack:
            cameras = []
            http = stack.enter_context(httpx.Client(base_url=self._client.url, trust_env=False, timeout=60))
            for one in examined:
                path = self._folder / f"{one.scene.name.replace('/', '-')}.mp4"
                write_camera_film(one, path)
                played = stack.enter_context(SampleCamera(path))
                began = int(time.time())
                stream = self._client.create_stream(NewStream(name=one.scene.name, url=played.url))
                stack.callback(self._client.delete_stream, stream.id)
                cameras.append(_Camera(http, stream.id, one, began))
            yield cameras

    def _compare(self, placed: Sequence[Placed], on_done: Callable[[], None]) -> Compared:
        offline, service, alike = [], [], 0
        for one in placed:
            name = one.examined.scene.name
            for asked, before in zip(one.examined.scene.asked, one.examined.said, strict=True):
                said = self._ask(asked.question, one.range)
                offline.append((name, same(before, asked.answer)))
                service.append((name, same(said, asked.answer)))
                alike += same(said, before)
            on_done()
        scores = Score.of(offline), Score.of(service)
        difference = scores[1].accuracy - scores[0].accuracy
        return Compared(offline=scores[0], service=scores[1], difference=difference, same_answers=alike)

    def _ask(self, question: str, where: Range) -> str:
        asked = Question(question=question, sources=(where,), max_output_tokens=ANSWER_TOKENS)
        try:
            return self._client.answer(asked).answer
        except ApiError as error:
            if error.code == "empty_answer":  # offline that is an answer without words
                return ""
            raise

    def _search(self, evaluation: Evaluation, searched: Sequence[Placed]) -> SearchCompared | None:
        """Search all videos at once, and the same clips offline."""
        offline = search_offline(evaluation.reader, [one.examined for one in searched])
        if offline is None:
            return None
        clips = {one.range.source_id: one.examined.scene.views for one in searched}
        ranges = [one.range for one in searched]

        def find(text: str) -> list[View]:
            found = self._client.search(text, ranges, top_k=SEARCH_HITS)
            return [clips[one.source_id][int(float(one.time))] for one in found.data]

        service = score_search([view for views in clips.values() for view in views], find)
        assert service is not None
        difference = service.recall.accuracy - offline.recall.accuracy
        return SearchCompared(offline=offline, service=service, difference=difference)


class _Camera:
    """A clip that is being played, and what its keyframes showed so far."""

    def __init__(self, http: httpx.Client, stream_id: str, examined: Examined, began: int) -> None:
        self._http, self._stream_id, self._examined, self._began = http, stream_id, examined, began
        self._slots = len(examined.scene.views)
        self._shown: dict[int, Shown] = {}

    def wait(self, on_done: Callable[[], None]) -> Placed:
        """Wait until one pass of the clip is remembered without a hole. Raises CameraFailed."""
        deadline = time.monotonic() + _PATIENCE_S + _PASSES * (self._slots + SLATE_S)
        while (first := whole_pass(self._shown, self._slots)) is None:
            if time.monotonic() > deadline:
                raise CameraFailed(f"the camera {self._examined.scene.name} did not show its clip without a hole")
            time.sleep(1)
            for slot in range(self._began + len(self._shown), int(time.time() - _LAG_S)):
                self._shown[slot] = self._look(slot)
        on_done()
        start, end = (datetime.fromtimestamp(slot, UTC) for slot in (first, first + self._slots))
        return Placed(self._examined, Range(source_id=self._stream_id, start=start, end=end))

    def _look(self, slot: int) -> Shown:
        moment = datetime.fromtimestamp(slot, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            response = self._http.get(f"/v1/sources/{self._stream_id}/frames/{moment}")
        except httpx.TransportError:
            return "missing"
        if response.status_code != httpx.codes.OK:
            return "missing"
        with Image.open(io.BytesIO(response.content)) as picture:
            return "slate" if float(np.asarray(picture.convert("L")).std()) < _EVEN else "clip"


def whole_pass(shown: Mapping[int, Shown], slots: int) -> int | None:
    """Return the first slot of a pass of a clip of so many slots, with a slate right before and behind it."""
    for slot, what in sorted(shown.items()):
        inside = range(slot + 1, slot + 1 + slots)
        if what == "slate" and shown.get(inside.stop) == "slate" and all(shown.get(one) == "clip" for one in inside):
            return inside.start
    return None


def write_camera_film(examined: Examined, path: Path) -> None:
    """Write what a camera shows in a loop: the slate, and the clip from its beginning for as long as it has slots."""
    clip = examined.scene.shown
    assert isinstance(clip, Clip)
    slate = np.full((FILM_PX[1], FILM_PX[0], 3), _GREY, np.uint8)
    pictures = film_frames(replace(clip, slots=clip.slots + 1, phase_s=0.0), fps=FPS, seed=examined.scene.seed)
    with av.open(str(path), "w") as container:
        options = {"crf": "26", "preset": "veryfast", "g": str(FPS), "bf": "0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = *FILM_PX, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range((SLATE_S + clip.slots) * FPS):  # the last look of the longer clip begins the next slate
            picture = slate if number < SLATE_S * FPS else next(pictures)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _settings(folder: Path, checkpoint: str, dtype: str, device: str) -> Settings:
    """Keep away from the memory, the port and the keys of a service that people use; answer as offline."""
    usual = Settings()
    updates: dict[str, dict[str, object]] = {
        "store": {"data_dir": folder / "data", "redis_url": None, "segments_url": None},
        "model": {"checkpoint": checkpoint, "dtype": dtype},
        "compressor": {"device": device},
        "serve": {"host": "127.0.0.1", "port": 0},
        "ingest": {"allowed_networks": ("127.0.0.0/8",)},
    }
    parts: dict[str, object] = {name: getattr(usual, name).model_copy(update=some) for name, some in updates.items()}
    return usual.model_copy(update={**parts, "qa": QASettings(device=device), "api": ApiSettings()})
