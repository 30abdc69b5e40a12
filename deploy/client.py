"""A typed client of the REST API: what the CLI, the demo and any Python program speak to the service with.

It reads leniently: fields that a newer server adds are kept and passed on, never refused.
"""

import io
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import SecretStr, ValidationError

from deploy.bodies import (
    Answer,
    AnswerEvent,
    CameraAddress,
    Cited,
    Completed,
    Created,
    Deleted,
    Delta,
    Event,
    Health,
    HourPart,
    Imported,
    Model,
    Moments,
    NewStream,
    Question,
    Range,
    Receipt,
    Recomputation,
    Stream,
    StreamHealth,
    StreamProbe,
    TimelineExport,
    Video,
    json_time,
    without_none,
)

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 60.0  # an answer's stream is never silent longer than its 15 s pings
_PASSING = frozenset({429, 503})  # errors that may be gone in a moment
AWAY_POLL_S = 5.0  # while a service that is waited for does not answer
MAX_AWAY_S = 600.0
WAITING_POLL_S = 10.0  # while an hour is still recorded
UPLOAD_TIMEOUT_S = 600.0  # the server answers an upload only when all of it is on its disk


class ApiError(RuntimeError):
    """The service refused a request: `code` and `status` as the REST API documents them."""

    def __init__(self, message: str, *, code: str, status: int | None = None, request_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.request_id = request_id


class Unreachable(ConnectionError):
    """No service answers at the URL, or the connection was cut while it did."""


def passes(error: ApiError | Unreachable) -> bool:
    """Return whether the same request may be answered in a moment: the service is away, or cannot answer now."""
    return isinstance(error, Unreachable) or error.status in _PASSING


class RecomputationFailed(RuntimeError):
    """A recomputation ended before all was done."""


class VideoFailed(RuntimeError):
    """The service could not read a video to its end."""


_EVENTS: Mapping[str, type[Created | Delta | Cited | Completed]] = {
    "answer.created": Created,
    "answer.delta": Delta,
    "answer.citations": Cited,
    "answer.completed": Completed,
}


def _query(wanted: Range) -> dict[str, str]:
    """Return the times of a range as addresses hold them."""
    times = {"start": wanted.start, "end": wanted.end}
    return {name: str(json_time(at)) for name, at in times.items() if at is not None}


class Client:
    """One connection to a service. A context manager: leaving it closes the connection."""

    def __init__(self, url: str = DEFAULT_URL, api_key: SecretStr | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key.get_secret_value()}"} if api_key else {}
        # A proxy of the environment cannot reach this machine's own service.
        direct = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self.url = url.rstrip("/")
        with _reaching(self.url):
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, mounts=direct)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def create_stream(self, stream: NewStream, *, wait_s: float = 0) -> Stream:
        """Register a camera; with `wait_s` the service answers when the first frame is there, or after that time."""
        query = {"wait": wait_s} if wait_s else {}
        timeout = httpx.Timeout(READ_TIMEOUT_S + wait_s, connect=CONNECT_TIMEOUT_S)
        body = stream.body()
        return Stream.model_validate(self._create("/v1/streams", params=query, json=body, timeout=timeout))

    def probe_stream(self, camera: CameraAddress) -> StreamProbe:
        """Look at a camera without registering it."""
        return StreamProbe.model_validate(self._json("POST", "/v1/streams/probe", json=camera.body()))

    def list_streams(self, *, state: str | None = None, label: str | None = None) -> Iterator[Stream]:
        """Yield every stream that this key may see."""
        query = {name: value for name, value in (("state", state), ("label", label)) if value is not None}
        return (Stream.model_validate(one) for one in self._pages("/v1/streams", query))

    def get_stream(self, stream_id: str) -> Stream:
        """Return one stream."""
        return Stream.model_validate(self._json("GET", f"/v1/streams/{stream_id}"))

    def stream_health(self, stream_id: str) -> StreamHealth:
        """Return how one stream is doing."""
        return StreamHealth.model_validate(self._json("GET", f"/v1/streams/{stream_id}/health"))

    def delete_stream(self, stream_id: str, *, purge: bool = False) -> Deleted:
        """Stop a stream for good; `purge` erases its memory now instead of at the end of its retention."""
        query = {"purge": "true" if purge else "false"}
        return Deleted.model_validate(self._json("DELETE", f"/v1/streams/{stream_id}", params=query))

    def upload_video(
        self,
        path: Path,
        *,
        name: str | None = None,
        fps: float = 1.0,
        recorded_at: datetime | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Video:
        """Upload a file; `on_progress` is told the bytes sent and the bytes there are."""
        form = without_none({"name": name, "fps": str(fps), "recorded_at": _text(recorded_at)})
        timeout = httpx.Timeout(UPLOAD_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        with _Counted(path, on_progress) as file:
            parts = {"file": (path.name, file, "application/octet-stream")}
            return Video.model_validate(self._create("/v1/videos", files=parts, data=form, timeout=timeout))

    def add_video(
        self, url: str, *, name: str | None = None, fps: float = 1.0, recorded_at: datetime | None = None
    ) -> Video:
        """Let the service download a video from an http or https address; without `name` it is called as its file."""
        name = name or url.partition("?")[0].rstrip("/").rpartition("/")[2]
        body = without_none({"url": url, "name": name, "fps": fps, "recorded_at": _text(recorded_at)})
        return Video.model_validate(self._create("/v1/videos", json=body))

    def list_videos(self) -> Iterator[Video]:
        """Yield every video that this key may see."""
        return (Video.model_validate(one) for one in self._pages("/v1/videos", {}))

    def get_video(self, video_id: str) -> Video:
        """Return one video."""
        return Video.model_validate(self._json("GET", f"/v1/videos/{video_id}"))

    def delete_video(self, video_id: str) -> Deleted:
        """Delete a video and what is remembered of it."""
        return Deleted.model_validate(self._json("DELETE", f"/v1/videos/{video_id}"))

    def wait_video(
        self, video_id: str, *, on_progress: Callable[[Video], None] | None = None, poll_s: float = 0.5
    ) -> Video:
        """Return the video once it is in memory; VideoFailed, with the reason, if it cannot be read."""
        while True:
            video = self.get_video(video_id)
            if on_progress:
                on_progress(video)
            if video.status == "ready":
                return video
            if video.status == "failed":
                raise VideoFailed(f"video {video.id} could not be read: {video.reason}")
            time.sleep(poll_s)

    def events(self, *, types: Sequence[str] = (), after: str | None = None) -> Iterator[Event]:
        """Yield what changes, from now on or from the event of an id on, until the connection ends: go on from there.

        Raises Unreachable when it is lost.
        """
        query = {"types": ",".join(types)} if types else {}
        headers = {"Last-Event-ID": after} if after else {}
        with _reaching(self.url), self._http.stream("GET", "/v1/events", params=query, headers=headers) as response:
            if response.is_error:
                response.read()
            _check(response)
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield Event.model_validate_json(line.removeprefix("data: "))

    def ask(self, question: Question) -> Iterator[AnswerEvent]:
        """Yield the answer's events as they come; leaving the iterator early cancels the answer."""
        body = question.body() | {"stream": True}
        with _reaching(self.url), self._http.stream("POST", "/v1/questions", json=body) as response:
            if response.is_error:
                response.read()
            _check(response)
            yield from _answer_events(response.iter_lines())

    def answer(self, question: Question) -> Answer:
        """Return the whole answer at once."""
        timeout = httpx.Timeout(UPLOAD_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)  # all of it is made before any is sent
        return Answer.model_validate(self._json("POST", "/v1/questions", json=question.body(), timeout=timeout))

    def search(
        self, query: str, sources: Iterable[Range], *, top_k: int = 10, min_score: float | None = None
    ) -> Moments:
        """Return the moments nearest to a text, best first."""
        body: dict[str, Any] = {"query": query, "sources": [source.body() for source in sources], "top_k": top_k}
        if min_score is not None:
            body["min_score"] = min_score
        return Moments.model_validate(self._json("POST", "/v1/search", json=body))

    def erase(self, wanted: Range) -> Receipt:
        """Erase what is remembered of a range for good, and return the receipt."""
        path = f"/v1/sources/{wanted.source_id}/memory"
        return Receipt.model_validate(self._json("DELETE", path, params=_query(wanted)))

    def describe_export(self, wanted: Range) -> TimelineExport:
        """Return what can be exported of a range."""
        return TimelineExport.model_validate(
            self._json("GET", f"/v1/sources/{wanted.source_id}/export", params=_query(wanted))
        )

    def export_hour(self, source_id: str, part: HourPart, hour: int, described: TimelineExport) -> bytes | None:
        """Return the frames or the keyframes of an hour as a safetensors file, None if none are kept (any more)."""
        query = {"start_slot": described.start_slot, "end_slot": described.end_slot}
        timeout = httpx.Timeout(UPLOAD_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)  # an hour is read before any of it is sent
        with _reaching(self.url):
            response = self._http.get(f"/v1/sources/{source_id}/export/{part}/{hour}", params=query, timeout=timeout)
        try:
            _check(response)
        except ApiError as error:
            if error.code == "empty_range":
                return None
            raise
        return response.content

    def begin_import(self, described: Mapping[str, Any]) -> str:
        """Begin to import what an export told, and return the id of the import."""
        return str(self._create("/v1/imports", json=described)["id"])

    def import_hour(self, import_id: str, part: HourPart, hour: int, content: bytes) -> int:
        """Send the frames or the keyframes of an hour, and return how many these were. Sent twice they count once."""
        timeout = httpx.Timeout(UPLOAD_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        path = f"/v1/imports/{import_id}/{part}/{hour}"
        return int(self._json("PUT", path, content=content, timeout=timeout)["frames"])

    def complete_import(self, import_id: str, frames: int) -> Imported:
        """Let everyone see an import of which so many frames were sent."""
        body = {"frames": frames}
        return Imported.model_validate(self._json("POST", f"/v1/imports/{import_id}/complete", json=body))

    def abandon_import(self, import_id: str) -> None:
        """Give an import up."""
        self._json("DELETE", f"/v1/imports/{import_id}")

    def recompute(self, sources: Sequence[Range] | None, *, drop_old: bool = False) -> Recomputation:
        """Let the running model look at kept pictures of ranges, or of all sources, that only another model saw."""
        body: dict[str, Any] = {"drop_old": drop_old}
        if sources is not None:
            body["sources"] = [source.body() for source in sources]
        return Recomputation.model_validate(self._create("/v1/recomputations", json=body))

    def list_recomputations(self) -> Iterator[Recomputation]:
        """Yield recomputations, the newest first."""
        return (Recomputation.model_validate(one) for one in self._pages("/v1/recomputations", {}))

    def get_recomputation(self, recomputation_id: str) -> Recomputation:
        """Return one recomputation."""
        return Recomputation.model_validate(self._json("GET", f"/v1/recomputations/{recomputation_id}"))

    def cancel_recomputation(self, recomputation_id: str) -> Recomputation:
        """End a recomputation; what it has made stays."""
        return Recomputation.model_validate(self._json("DELETE", f"/v1/recomputations/{recomputation_id}"))

    def wait_recomputation(
        self, recomputation_id: str, *, on_progress: Callable[[Recomputation], None] | None = None, poll_s: float = 1.0
    ) -> Recomputation:
        """Return the recomputation once all is done; RecomputationFailed, with the reason, if it ends before."""
        away_s = 0.0
        while True:
            try:
                job = self.get_recomputation(recomputation_id)
            except (Unreachable, ApiError) as error:
                # It goes on without us, and outlives a service that is started again.
                away_s += AWAY_POLL_S
                if away_s > MAX_AWAY_S or not passes(error):
                    raise
                time.sleep(AWAY_POLL_S)
                continue
            away_s = 0.0
            if on_progress:
                on_progress(job)
            if job.status == "done":
                return job
            if job.status in ("failed", "cancelled"):
                raise RecomputationFailed(f"recomputation {job.id} {job.status}: {job.reason or 'it was ended'}")
            time.sleep(poll_s if job.waiting_until is None else max(poll_s, WAITING_POLL_S))

    def frames_kept(self, stream_id: str, since: datetime) -> int:
        """Return how many frames of a stream are in memory from `since` to now."""
        query = {"start": since.isoformat(), "end": datetime.now(UTC).isoformat()}
        timeline = self._json("GET", f"/v1/sources/{stream_id}/timeline", params=query)
        return sum(bucket["frames"] for bucket in timeline["buckets"])

    def model(self) -> Model:
        """Return the model that answers."""
        return Model.model_validate(self._json("GET", "/v1/models")["data"][0])

    def health(self) -> Health:
        """Return the state of the service's parts; a part that is down is no error here."""
        with _reaching(self.url):
            response = self._http.get("/v1/health/ready")
        if response.status_code not in (200, 503):
            _check(response)
        body = _object(response)
        return Health(ready=response.status_code == 200, parts=body.get("parts", body), advice=body.get("advice", {}))

    def _create(self, path: str, **request: Any) -> dict[str, Any]:
        return self._json("POST", path, headers={"Idempotency-Key": uuid.uuid4().hex}, **request)

    def _pages(self, path: str, query: dict[str, str]) -> Iterator[dict[str, Any]]:
        while True:
            page = self._json("GET", path, params=query)
            yield from page["data"]
            if not page.get("has_more"):
                return
            query = query | {"cursor": page["next_cursor"]}

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        with _reaching(self.url):
            response = self._http.request(method, path, **request)
        _check(response)
        return _object(response)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Name the service in connection errors."""
    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise Unreachable(f"{url} is no address of a service; it should look like {DEFAULT_URL}") from error
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unreachable(f"no service answers at {url}; start one with `tokenline run`") from error
    except httpx.TimeoutException as error:
        raise Unreachable(f"the service at {url} did not answer in time") from error
    except httpx.TransportError as error:
        raise Unreachable(f"the connection to {url} was lost") from error


class _Counted(io.FileIO):
    """A file that tells how much of it has been read."""

    def __init__(self, path: Path, on_progress: Callable[[int, int], None] | None) -> None:
        super().__init__(path, "rb")
        self._total = path.stat().st_size
        self._on_progress = on_progress

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        if self._on_progress:
            self._on_progress(self.tell(), self._total)
        return data


def _text(at: datetime | None) -> str | None:
    return at.isoformat() if at else None


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ApiError(
            f"{response.url.copy_with(query=None)} does not answer like a Tokenline service",
            code="unexpected_response",
            status=response.status_code,
        )
    return body


def _check(response: httpx.Response) -> None:
    """Raise ApiError if `response` is not a success."""
    if response.is_success:
        return
    request_id = response.headers.get("X-Request-Id")
    try:
        error = _object(response).get("error")
    except ApiError:
        error = None
    if not isinstance(error, dict):
        error = {"message": f"the service answered {response.status_code}", "code": "unexpected_response"}
    raise _api_error(error, status=response.status_code, request_id=request_id)


def _api_error(error: Mapping[str, Any], *, status: int | None, request_id: str | None) -> ApiError:
    return ApiError(
        str(error.get("message", "the service gave no reason")),
        code=str(error.get("code", "unexpected_response")),
        status=status,
        request_id=error.get("request_id") or request_id,
    )


def _answer_events(lines: Iterable[str]) -> Iterator[AnswerEvent]:
    """Parse the server-sent events of an answer; unknown kinds are skipped, a cut stream is an error."""
    for kind, data in _server_sent(lines):
        if data == "[DONE]":
            return
        try:
            if kind == "error":
                body = json.loads(data)
                raise _api_error(body.get("error", body), status=None, request_id=None)
            if kind in _EVENTS:
                yield _EVENTS[kind].model_validate_json(data)
        except (ValidationError, ValueError) as error:
            raise ApiError(
                f"the service sent an event {kind} that cannot be read", code="unexpected_response"
            ) from error
    raise Unreachable("the answer was cut off: the connection ended before it was complete")


def _server_sent(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (event, data) of a text/event-stream; comments are the server's sign of life and dropped."""
    kind, data = "message", list[str]()
    for line in lines:
        if not line:
            if data:
                yield kind, "\n".join(data)
            kind, data = "message", []
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                kind = value
            elif field == "data":
                data.append(value)
