"""What can go wrong, and the one table of how it is told over HTTP.

Messages are written for the caller: they say what to do, and hold no password, host path or traceback.
An exception that is not in the table becomes `internal_error`; its details stand in the log alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from store.connection import StoreFull, StoreUnavailable
from store.events import BadEventId
from store.hot import FrameNotKept
from store.idempotency import IdempotencyConflict
from store.imports import ImportNotFound
from store.pages import BadCursor
from store.recomputations import RecomputationEnded, RecomputationNotFound
from store.source import SourceNotFound, StreamNotFound, VideoNotFound
from store.source import StateConflict as SourceStateConflict

RETRY_AFTER_S = 2


class ServiceError(Exception):
    """Something that the caller is told as it is.

    `param` is the path of the field at fault, `details` are facts for programs, `retry_after_s` a time to wait.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = details
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors of a replica cross a process border, and pickle knows nothing of keyword arguments.
        state = {"param": self.param, "details": self.details, "retry_after_s": self.retry_after_s}
        return (type(self), (self.message,), state)


class InvalidJson(ServiceError, ValueError):
    """The body is not JSON, or not the multipart form that was announced."""


class ValidationFailed(ServiceError, ValueError):
    """A field holds what it must not."""


class BadTimeRange(ServiceError, ValueError):
    """The range is inverted, has no length, or is told in the wrong clock."""


class BadUrl(ServiceError, ValueError):
    """The address may not be opened from here."""


class EmptyRange(ServiceError, ValueError):
    """Nothing is remembered of the range; details tell the nearest frames and the reasons."""


class FrameMissing(ServiceError, LookupError):
    """No frame is kept of the slot; details tell the nearest ones."""


class KeyframesNotKept(ServiceError, ValueError):
    """Exact text fusion needs the pictures of all frames, and some of them are gone; details tell how many."""


class RangeTooLong(ServiceError, ValueError):
    """The range has more frames than the model can read at once, or more gaps than an export can tell."""


class FileTooLarge(ServiceError, ValueError):
    """The body is larger than this server takes."""


class UnsupportedMedia(ServiceError, ValueError):
    """The file is no video that can be decoded."""


class MissingKey(ServiceError, PermissionError):
    """No API key came with the request."""


class BadKey(ServiceError, PermissionError):
    """The API key is not known here."""


class ScopeMissing(ServiceError, PermissionError):
    """The API key may not do this."""


class SourceForbidden(ServiceError, PermissionError):
    """The API key may not see this source."""


class DamagedExport(ServiceError, ValueError):
    """An hour to be imported is not what an export wrote."""


class StreamTaken(ServiceError, ValueError):
    """Another stream has the same name or address."""


class StateConflict(ServiceError, RuntimeError):
    """The request does not fit the state that things are in."""


class ModelMismatch(ServiceError, RuntimeError):
    """Tokens of another model than the one that runs here."""


class SearchUnavailable(ServiceError, RuntimeError):
    """The model's checkpoint cannot be searched in this way."""


class RateLimited(ServiceError, RuntimeError):
    """The key has made its requests of this minute."""


class QueueFull(ServiceError, RuntimeError):
    """More requests are waiting than can be served in time."""


class ModelLoading(ServiceError, RuntimeError):
    """The model is not in memory yet."""


class ScalingUp(ServiceError, RuntimeError):
    """No replica is there to do this; one is being started."""


class StorageFull(ServiceError, OSError):
    """There is no room for the upload."""


class RtspUnreachable(ServiceError, ConnectionError):
    """Nothing answers at the camera's address."""


class RtspAuthFailed(ServiceError, PermissionError):
    """The camera refuses the user name or password."""


class RtspTimeout(ServiceError, TimeoutError):
    """The camera answers too slowly."""


class EmptyAnswer(ServiceError, RuntimeError):
    """The model ended its answer before the first word."""


class AnswerTimeout(ServiceError, TimeoutError):
    """The answer took longer than the server allows."""


def inverted(param: str) -> BadTimeRange:
    """Return the error of a range that ends before it begins."""
    return BadTimeRange(
        "The range ends before it begins, or has no length; ranges are half-open: [start, end).", param=param
    )


@dataclass(frozen=True, slots=True)
class Reply:
    """How an error is told. `message` replaces that of an exception which was not written for callers."""

    status: int
    code: str
    message: str | None = None


_STORE_AWAY = "The store cannot be reached now; ask again in a moment."
_STORE_FULL = "The disk of the store is full: nothing new is kept until the operator makes room, what is kept is read."

TABLE: Mapping[type[Exception], Reply] = {
    InvalidJson: Reply(400, "invalid_json"),
    ValidationFailed: Reply(422, "validation_failed"),
    BadTimeRange: Reply(422, "bad_time_range"),
    BadUrl: Reply(422, "bad_url"),
    EmptyRange: Reply(422, "empty_range"),
    MissingKey: Reply(401, "missing_key"),
    BadKey: Reply(401, "bad_key"),
    ScopeMissing: Reply(403, "scope_missing"),
    SourceForbidden: Reply(403, "source_forbidden"),
    StreamNotFound: Reply(404, "stream_not_found", "There is no such stream; GET /v1/streams lists them."),
    VideoNotFound: Reply(404, "video_not_found", "There is no such video; GET /v1/videos lists them."),
    SourceNotFound: Reply(
        404, "source_not_found", "There is no such source; GET /v1/streams and /v1/videos list them."
    ),
    ImportNotFound: Reply(404, "import_not_found", "There is no such import, or it has ended: begin a new one."),
    RecomputationNotFound: Reply(
        404,
        "recomputation_not_found",
        "There is no such recomputation, or it ended long ago; GET /v1/recomputations lists them.",
    ),
    FrameMissing: Reply(404, "frame_not_kept"),
    FrameNotKept: Reply(404, "frame_not_kept", "The frame of this time is not kept."),
    KeyframesNotKept: Reply(422, "keyframes_not_kept"),
    BadCursor: Reply(422, "validation_failed"),
    BadEventId: Reply(422, "validation_failed"),
    DamagedExport: Reply(422, "damaged_export"),
    StreamTaken: Reply(409, "stream_exists"),
    SourceStateConflict: Reply(409, "state_conflict"),
    RecomputationEnded: Reply(409, "state_conflict"),
    IdempotencyConflict: Reply(409, "state_conflict"),
    StateConflict: Reply(409, "state_conflict"),
    SearchUnavailable: Reply(409, "state_conflict"),
    ModelMismatch: Reply(409, "model_mismatch"),
    RangeTooLong: Reply(413, "range_too_long"),
    FileTooLarge: Reply(413, "file_too_large"),
    UnsupportedMedia: Reply(415, "unsupported_media"),
    RateLimited: Reply(429, "rate_limited"),
    QueueFull: Reply(429, "queue_full"),
    ModelLoading: Reply(503, "model_loading"),
    ScalingUp: Reply(503, "scaling_up"),
    StoreFull: Reply(503, "store_unavailable", _STORE_FULL),
    StoreUnavailable: Reply(503, "store_unavailable", _STORE_AWAY),
    RedisConnectionError: Reply(503, "store_unavailable", _STORE_AWAY),
    RedisTimeoutError: Reply(503, "store_unavailable", _STORE_AWAY),
    StorageFull: Reply(503, "store_unavailable"),
    RtspUnreachable: Reply(502, "rtsp_unreachable"),
    RtspAuthFailed: Reply(502, "rtsp_auth_failed"),
    EmptyAnswer: Reply(502, "empty_answer"),
    RtspTimeout: Reply(504, "rtsp_timeout"),
    AnswerTimeout: Reply(504, "answer_timeout"),
}

_INTERNAL = Reply(500, "internal_error", "Something went wrong here; tell the operator the request_id.")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True, slots=True)
class Told:
    """An error as the caller gets it: status, headers and body."""

    status: int
    headers: Mapping[str, str]
    body: Mapping[str, Any]


def is_known(error: Exception) -> bool:
    """Whether the table says how to tell `error`."""
    return any(kind in TABLE for kind in type(error).__mro__)


def tell(error: Exception, request_id: str) -> Told:
    """Return how `error` is told to the caller of `request_id`."""
    reply = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), _INTERNAL)
    if isinstance(error, ServiceError):
        return tell_as(
            Reply(reply.status, reply.code, error.message),
            request_id,
            param=error.param,
            details=error.details,
            retry_after_s=error.retry_after_s,
        )
    return tell_as(Reply(reply.status, reply.code, reply.message or str(error)), request_id)


def tell_as(
    reply: Reply,
    request_id: str,
    *,
    param: str | None = None,
    details: Mapping[str, Any] | None = None,
    retry_after_s: int | None = None,
) -> Told:
    """Put together status, headers and body of one reply."""
    error: dict[str, Any] = {
        "type": _type_of(reply.status),
        "code": reply.code,
        "message": reply.message or "",
        "param": param,
        "details": dict(details or {}),
        "request_id": request_id,
    }
    headers = {}
    if reply.status in (429, 503):
        headers["Retry-After"] = str(retry_after_s or RETRY_AFTER_S)
    if reply.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Told(reply.status, headers, {"error": error})


def _type_of(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
