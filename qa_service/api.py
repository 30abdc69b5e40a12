"""The REST surface: every route, one call each."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from qa_service.control import SourceControl
from qa_service.door import Door, respond
from qa_service.erasure import Erasure
from qa_service.errors import TABLE, Reply, ServiceError, ValidationFailed, tell, tell_as
from qa_service.exports import Exports
from qa_service.feed import Feed
from qa_service.finder import Finder
from qa_service.health import Readiness
from qa_service.imports import Importer
from qa_service.keys import Caller, Keyring, RateLimit
from qa_service.memory_schemas import (
    ErasureReceipt,
    ImportAbandoned,
    ImportBody,
    ImportCompletion,
    ImportDone,
    ImportedHour,
    RecomputationBody,
    RecomputationList,
    RecomputationRequest,
    TimelineBody,
    TimelineExport,
)
from qa_service.metrics import Metrics
from qa_service.recomputing import Recomputing
from qa_service.schemas import (
    MAX_SLOT,
    Answer,
    AnswerEvent,
    ErrorBody,
    EventBody,
    Health,
    ModelList,
    MomentList,
    Question,
    SearchRequest,
    Slot,
    StreamBody,
    StreamDeleted,
    StreamHealth,
    StreamList,
    StreamPatch,
    StreamProbe,
    StreamProbeRequest,
    StreamRange,
    StreamRequest,
    StreamState,
    VideoBody,
    VideoDeleted,
    VideoForm,
    VideoList,
    VideoRange,
    VideoRequest,
)
from qa_service.seams import Describe, Questions
from qa_service.settings import ApiSettings, Scope
from qa_service.sse import EventStream, write_events
from qa_service.validation import refusal
from qa_service.viewer import Viewer
from store.counters import Counters
from store.events import EventType

SAFETENSORS = "application/vnd.safetensors"
CLIENT_GONE = 499  # nobody reads it; it stands in access logs
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes speak to."""

    control: SourceControl
    viewer: Viewer
    erasure: Erasure
    exports: Exports
    importer: Importer
    recomputing: Recomputing
    finder: Finder
    questions: Questions
    describe: Describe
    feed: Feed
    readiness: Readiness
    metrics: Metrics
    counters: Counters
    rate: RateLimit | None = None


def build_api(services: Services, settings: ApiSettings, *, behind_ray: bool = False) -> FastAPI:
    """Put the routes on an application. /docs loads its page's scripts from a CDN; /openapi.json needs nothing.

    `behind_ray`: Ray Serve's proxy stands in front and writes X-Request-Id; it would stand there twice otherwise.
    """
    api = FastAPI(
        title="Tokenline",
        version="1",
        summary="Questions about live cameras and archived video.",
        description="Times of streams are RFC 3339 with a zone, times of videos are seconds since their start; "
        "ranges are half-open `[start, end)`. Every response carries `X-Request-Id`.",
        dependencies=[Depends(HTTPBearer(auto_error=False, description="An API key, where any is configured."))],
    )
    _add_streams(api, services, settings)
    _add_videos(api, services)
    _add_sources(api, services)
    _add_transfer(api, services)
    _add_recomputations(api, services)
    _add_events(api, services)
    _add_questions(api, services, settings)
    _add_service(api, services)
    _add_errors(api)
    api.add_middleware(
        Door,
        keyring=Keyring(settings.keys),
        rate=services.rate,
        max_body_bytes=settings.max_body_bytes,
        behind_ray=behind_ray,
    )
    return api


def allow(*scopes: Scope) -> Callable[[Request], Caller]:
    """Return a dependency that lets callers with any of `scopes` in."""

    def caller(request: Request) -> Caller:
        known: Caller = request.state.caller
        known.require_any(*scopes)
        return known

    return caller


Reader = Annotated[Caller, Depends(allow("streams:read"))]
Writer = Annotated[Caller, Depends(allow("streams:write"))]
Asker = Annotated[Caller, Depends(allow("ask"))]
Operator = Annotated[Caller, Depends(allow("admin"))]
Looker = Annotated[Caller, Depends(allow("streams:read", "ask"))]  # a citation's frame belongs to its answer
Limit = Annotated[int, Query(ge=1, le=1000, description="Items on a page.")]
Cursor = Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")]
IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", description="Repeating a request with its key changes nothing and tells the same."),
]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document error responses by status, with the codes they may have."""
    codes = {status: sorted({reply.code for reply in TABLE.values() if reply.status == status}) for status in statuses}
    return {
        status: {"model": ErrorBody, "description": ", ".join(f"`{code}`" for code in codes[status])}
        for status in statuses
    }


def _add_streams(api: FastAPI, services: Services, settings: ApiSettings) -> None:
    control = services.control

    @api.post(
        "/v1/streams",
        status_code=201,
        tags=["streams"],
        summary="Register a camera",
        responses=_errors(400, 401, 403, 409, 422, 429, 503),
    )
    async def create_stream(
        request: StreamRequest,
        caller: Writer,
        wait: Annotated[
            float, Query(ge=0, le=settings.max_wait_s, description="Seconds to wait for the first frame.")
        ] = 0,
        key: IdempotencyKey = None,
    ) -> StreamBody:
        return await control.create_stream(caller, request, wait_s=wait, key=key)

    @api.post(
        "/v1/streams/probe",
        tags=["streams"],
        summary="Look at a camera without registering it",
        responses=_errors(400, 401, 403, 422, 429, 502, 503, 504),
    )
    async def probe_stream(wanted: StreamProbeRequest, caller: Writer) -> StreamProbe:
        return await control.probe_stream(caller, wanted)

    @api.get("/v1/streams", tags=["streams"], summary="List cameras", responses=_errors(401, 403, 422, 429, 503))
    async def list_streams(
        caller: Reader,
        state: StreamState | None = None,
        label: Annotated[str | None, Query(max_length=300, description="`key` or `key=value`.")] = None,
        cursor: Cursor = None,
        limit: Limit = 100,
    ) -> StreamList:
        return await control.list_streams(caller, state=state, label=label, cursor=cursor, limit=limit)

    @api.get(
        "/v1/streams/{stream_id}", tags=["streams"], summary="Show a camera", responses=_errors(401, 403, 404, 429, 503)
    )
    async def get_stream(stream_id: str, caller: Reader) -> StreamBody:
        return await control.get_stream(caller, stream_id)

    @api.patch(
        "/v1/streams/{stream_id}",
        tags=["streams"],
        summary="Change a camera, stop it or start it again",
        responses=_errors(400, 401, 403, 404, 409, 422, 429, 503),
    )
    async def update_stream(stream_id: str, patch: StreamPatch, caller: Writer) -> StreamBody:
        return await control.update_stream(caller, stream_id, patch)

    @api.delete(
        "/v1/streams/{stream_id}",
        tags=["streams"],
        summary="Delete a camera, with or without its memory",
        responses=_errors(401, 403, 404, 429, 503),
    )
    async def delete_stream(
        stream_id: str,
        caller: Writer,
        purge: Annotated[bool, Query(description="Erase its memory now, instead of at the end of retention.")] = False,
    ) -> StreamDeleted:
        return await control.delete_stream(caller, stream_id, purge=purge)

    @api.get(
        "/v1/streams/{stream_id}/health",
        tags=["streams"],
        summary="Tell how a camera is doing",
        responses=_errors(401, 403, 404, 429, 503),
    )
    async def stream_health(stream_id: str, caller: Reader) -> StreamHealth:
        return await control.stream_health(caller, stream_id)


_VIDEO_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        **VideoForm.model_json_schema()["properties"],
                    },
                }
            },
            "application/json": {"schema": VideoRequest.model_json_schema()},
        },
    }
}


def _add_videos(api: FastAPI, services: Services) -> None:
    control = services.control

    @api.post(
        "/v1/videos",
        status_code=202,
        tags=["videos"],
        summary="Upload a video, or name the address of one",
        openapi_extra=_VIDEO_BODY,
        responses=_errors(400, 401, 403, 409, 413, 415, 422, 429, 503),
    )
    async def create_video(request: Request, caller: Writer, key: IdempotencyKey = None) -> VideoBody:
        content_type = request.headers.get("content-type", "")
        if content_type.startswith("multipart/form-data"):
            return await control.upload_video(caller, content_type, request.stream(), key=key)
        try:
            wanted = VideoRequest.model_validate_json(await request.body())
        except ValidationError as error:
            raise refusal(error.errors(include_url=False, include_context=False, include_input=False)) from None
        return await control.add_video(caller, wanted, key=key)

    @api.get("/v1/videos", tags=["videos"], summary="List videos", responses=_errors(401, 403, 422, 429, 503))
    async def list_videos(caller: Reader, cursor: Cursor = None, limit: Limit = 100) -> VideoList:
        return await control.list_videos(caller, cursor=cursor, limit=limit)

    @api.get(
        "/v1/videos/{video_id}",
        tags=["videos"],
        summary="Show a video and how far it is remembered",
        responses=_errors(401, 403, 404, 429, 503),
    )
    async def get_video(video_id: str, caller: Reader) -> VideoBody:
        return await control.get_video(caller, video_id)

    @api.delete(
        "/v1/videos/{video_id}",
        tags=["videos"],
        summary="Delete a video, its file and its memory",
        responses=_errors(401, 403, 404, 429, 503),
    )
    async def delete_video(video_id: str, caller: Writer) -> VideoDeleted:
        return await control.delete_video(caller, video_id)


def _add_sources(api: FastAPI, services: Services) -> None:
    viewer = services.viewer

    @api.get(
        "/v1/sources/{source_id}/timeline",
        tags=["sources"],
        summary="Tell what is kept of a source, and why the rest is missing",
        responses=_errors(401, 403, 404, 422, 429, 503),
    )
    async def timeline(
        source_id: str,
        caller: Reader,
        start: Annotated[str | None, Query(max_length=64, description="Left out: the first kept frame.")] = None,
        end: Annotated[str | None, Query(max_length=64, description="Left out: the last kept frame.")] = None,
        resolution_s: Annotated[float, Query(ge=0.01, le=1e9, description="Length of a bucket in seconds.")] = 60,
    ) -> TimelineBody:
        caller.require_source(source_id)
        return await viewer.timeline(source_id, start, end, resolution_s)

    @api.delete(
        "/v1/sources/{source_id}/memory",
        tags=["sources"],
        summary="Erase what is remembered of a source, or of a time of it, for good",
        responses=_errors(401, 403, 404, 409, 422, 429, 503),
    )
    async def erase_memory(
        source_id: str,
        caller: Writer,
        start: Annotated[str | None, Query(max_length=64, description="Left out: from the first frame.")] = None,
        end: Annotated[str | None, Query(max_length=64, description="Left out: to the last frame.")] = None,
    ) -> ErasureReceipt:
        return await services.erasure.erase(caller, source_id, start, end)

    @api.get(
        "/v1/sources/{source_id}/frames/{time}",
        tags=["sources"],
        summary="Show the frame of a time, as the model saw it",
        response_class=Response,
        responses={
            200: {"content": {"image/jpeg": {}}, "headers": {"X-Frame-Time": {"schema": {"type": "string"}}}},
            **_errors(401, 403, 404, 422, 429, 503),
        },
    )
    async def frame(source_id: str, time: str, caller: Looker) -> Response:
        caller.require_source(source_id)
        picture = await viewer.picture(source_id, time)
        return Response(picture.jpeg, media_type="image/jpeg", headers={"X-Frame-Time": str(picture.time)})


_HOUR: dict[str, Any] = {"content": {SAFETENSORS: {"schema": {"type": "string", "format": "binary"}}}}


def _add_transfer(api: FastAPI, services: Services) -> None:
    exports, importer = services.exports, services.importer

    @api.get(
        "/v1/sources/{source_id}/export",
        tags=["export"],
        summary="Tell what of a source can be exported",
        responses=_errors(401, 403, 404, 409, 413, 422, 429, 503),
    )
    async def export(
        source_id: str,
        caller: Reader,
        start: Annotated[str | None, Query(max_length=64, description="Left out: from the first frame.")] = None,
        end: Annotated[str | None, Query(max_length=64, description="Left out: to the last frame.")] = None,
    ) -> TimelineExport:
        return await exports.describe(caller, source_id, start, end)

    @api.get(
        "/v1/sources/{source_id}/export/{part}/{hour}",
        tags=["export"],
        summary="Export the frames or the keyframes of an hour, as safetensors",
        response_class=Response,
        responses={200: _HOUR, **_errors(401, 403, 404, 422, 429, 503)},
    )
    async def export_hour(
        source_id: str,
        part: Literal["frames", "keyframes"],
        hour: Annotated[Slot, Path(description="Slots from hour * 3,600 on.")],
        caller: Reader,
        start_slot: Slot = 0,
        end_slot: Slot = MAX_SLOT,
    ) -> Response:
        read = exports.frames if part == "frames" else exports.keyframes
        outgoing = await read(caller, source_id, hour, start_slot, end_slot)
        return StreamingResponse(
            outgoing, media_type=SAFETENSORS, headers={"Content-Length": str(len(outgoing.content))}
        )

    @api.post(
        "/v1/imports",
        status_code=201,
        tags=["import"],
        summary="Begin to import what an export told",
        responses=_errors(400, 401, 403, 409, 413, 422, 429, 503),
    )
    async def begin_import(described: TimelineExport, caller: Writer, key: IdempotencyKey = None) -> ImportBody:
        return await importer.begin(caller, described, key=key)

    @api.put(
        "/v1/imports/{source_id}/{part}/{hour}",
        tags=["import"],
        summary="Import the frames of an hour, and then its keyframes, as they were exported",
        openapi_extra={"requestBody": {"required": True, **_HOUR}},
        responses=_errors(401, 403, 404, 413, 422, 429, 503),
    )
    async def import_hour(
        source_id: str, part: Literal["frames", "keyframes"], hour: Slot, request: Request, caller: Writer
    ) -> ImportedHour:
        take = importer.frames if part == "frames" else importer.keyframes
        return await take(caller, source_id, hour, request.stream())

    @api.post(
        "/v1/imports/{source_id}/complete",
        tags=["import"],
        summary="Let everyone see what was imported",
        responses=_errors(400, 401, 403, 404, 409, 422, 429, 503),
    )
    async def complete_import(source_id: str, sent: ImportCompletion, caller: Writer) -> ImportDone:
        return await importer.complete(caller, source_id, sent)

    @api.delete(
        "/v1/imports/{source_id}",
        tags=["import"],
        summary="Give an import up; what came of it is erased",
        responses=_errors(401, 403, 404, 429, 503),
    )
    async def abandon_import(source_id: str, caller: Writer) -> ImportAbandoned:
        return await importer.abandon(caller, source_id)


def _add_recomputations(api: FastAPI, services: Services) -> None:
    recomputing = services.recomputing

    @api.post(
        "/v1/recomputations",
        status_code=202,
        tags=["recomputations"],
        summary="Let the running model look at kept pictures that only another model saw",
        responses=_errors(400, 401, 403, 404, 409, 422, 429, 503),
    )
    async def create_recomputation(
        wanted: RecomputationRequest, caller: Operator, key: IdempotencyKey = None
    ) -> RecomputationBody:
        return await recomputing.create(caller, wanted, key=key)

    @api.get(
        "/v1/recomputations",
        tags=["recomputations"],
        summary="List recomputations, the newest first",
        responses=_errors(401, 403, 429, 503),
    )
    async def list_recomputations(caller: Operator) -> RecomputationList:
        return await recomputing.everything(caller)

    @api.get(
        "/v1/recomputations/{recomputation_id}",
        tags=["recomputations"],
        summary="Show a recomputation and how far it is",
        responses=_errors(401, 403, 404, 429, 503),
    )
    async def get_recomputation(recomputation_id: str, caller: Operator) -> RecomputationBody:
        return await recomputing.get(caller, recomputation_id)

    @api.delete(
        "/v1/recomputations/{recomputation_id}",
        tags=["recomputations"],
        summary="Cancel a recomputation; the tokens that it has made stay",
        responses=_errors(401, 403, 404, 409, 429, 503),
    )
    async def cancel_recomputation(recomputation_id: str, caller: Operator) -> RecomputationBody:
        return await recomputing.cancel(caller, recomputation_id)


def _add_events(api: FastAPI, services: Services) -> None:
    @api.get(
        "/v1/events",
        tags=["events"],
        summary="Follow what changes, as server-sent events",
        response_class=Response,
        responses={
            200: {"content": {"text/event-stream": {"schema": EventBody.model_json_schema()}}},
            **_errors(401, 403, 422, 429, 503),
        },
    )
    async def events(
        caller: Reader,
        types: Annotated[str, Query(max_length=200, description="Which ones, with commas.")] = ",".join(EVENT_TYPES),
        last_id: Annotated[
            str | None, Header(alias="Last-Event-ID", description="Begin behind this one; else with the next.")
        ] = None,
    ) -> Response:
        wanted = frozenset(one for one in EVENT_TYPES if one in types.split(","))
        if unknown := set(types.split(",")) - wanted:
            raise ValidationFailed(
                f"There is no type of event {sorted(unknown)[0]!r}; there are {', '.join(EVENT_TYPES)}.", param="types"
            )
        return EventStream(await services.feed.follow(caller, wanted, last_id))


def _add_questions(api: FastAPI, services: Services, settings: ApiSettings) -> None:
    @api.post(
        "/v1/questions",
        tags=["questions"],
        summary="Ask about time ranges of sources",
        response_model=Answer,
        responses={
            200: {"content": {"text/event-stream": {}}, "description": "The answer, or its events with `stream`."},
            **_errors(400, 401, 403, 404, 413, 422, 429, 502, 503, 504),
        },
    )
    async def ask(question: Question, request: Request, caller: Asker) -> Any:
        for place, wanted in enumerate(question.sources):
            _require(caller, wanted, f"sources[{place}]")
        await services.counters.bump("questions")
        events = services.questions.ask(question)
        try:
            first = await _unless_gone(request, anext(events))
        except BaseException:
            await events.aclose()
            raise
        if first is None:
            return Response(status_code=CLIENT_GONE)
        if question.stream:
            written = write_events(first, events, request_id=request.state.request_id, ping_s=settings.sse_ping_s)
            return EventStream(written)
        try:
            return await _unless_gone(request, _last(events)) or Response(status_code=CLIENT_GONE)
        finally:
            await events.aclose()

    @api.post(
        "/v1/search",
        tags=["questions"],
        summary="Find moments that look like a text or a picture",
        responses=_errors(400, 401, 403, 404, 409, 413, 415, 422, 429, 503),
    )
    async def search(wanted: SearchRequest, caller: Asker) -> MomentList:
        for place, one in enumerate(wanted.sources):
            _require(caller, one, f"sources[{place}]")
        await services.counters.bump("searches")
        return await services.finder.find(wanted)


def _add_service(api: FastAPI, services: Services) -> None:
    @api.get("/v1/models", tags=["service"], summary="Tell which model answers", responses=_errors(401, 429, 503))
    async def models() -> ModelList:
        return ModelList(data=[await services.describe()])

    @api.get("/v1/health/live", tags=["service"], summary="Tell that this process lives")
    async def live() -> Health:
        return Health(status="ok")

    @api.get(
        "/v1/health/ready",
        tags=["service"],
        summary="Tell whether every part is ready",
        responses={503: {"model": Health, "description": "A part is not ready; `parts` says which."}},
    )
    async def ready(response: Response) -> Health:
        health = await services.readiness.check()
        if health.status != "ok":
            response.status_code = 503
        return health

    @api.get(
        "/metrics",
        tags=["service"],
        summary="Metrics in Prometheus' text format",
        response_class=Response,
        responses=_errors(401, 403, 429, 503),
    )
    async def metrics(caller: Reader) -> Response:
        return Response(await services.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(tell(refusal(error.errors()), request.state.request_id))

    @api.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, ServiceError):  # raised while FastAPI read the body
            return respond(tell(error.__cause__, request.state.request_id))
        response = respond(tell_as(_not_served(error.status_code), request.state.request_id))
        response.headers.update(error.headers or {})
        return response


def _not_served(status: int) -> Reply:
    if status == 400:
        return Reply(400, "invalid_json", "The body cannot be read as JSON.")
    if status == 404:
        return Reply(404, "not_found", "There is nothing at this path; /docs lists what there is.")
    if status == 405:
        return Reply(405, "method_not_allowed", "This path does not take this method; /docs lists what it takes.")
    return Reply(status, "invalid_request", "The request cannot be read.")


def _require(caller: Caller, wanted: StreamRange | VideoRange | str, param: str) -> None:
    if isinstance(wanted, str):
        caller.require_source(wanted, param)
    elif isinstance(wanted, StreamRange):
        caller.require_source(wanted.stream_id, f"{param}.stream_id")
    else:
        caller.require_source(wanted.video_id, f"{param}.video_id")


async def _last(events: AsyncGenerator[AnswerEvent, None]) -> Answer | None:
    """Return what the events end in."""
    answer = None
    async for event in events:
        answer = event if isinstance(event, Answer) else answer
    return answer


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """Return what `work` returns; if the client goes away first, cancel it and return None."""

    async def doing() -> T:
        return await work

    tasks: tuple[asyncio.Task[T], asyncio.Task[None]] = (
        asyncio.create_task(doing()),
        asyncio.create_task(_gone(request)),
    )
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
