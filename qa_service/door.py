"""What every request passes, whatever it asks for: an id, the body's limit, the key, the rate, and the last net."""

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qa_service.errors import FileTooLarge, Told, is_known, tell
from qa_service.keys import Keyring, RateLimit

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN = ("/v1/health/", "/docs", "/redoc", "/openapi.json")


def respond(told: Told) -> JSONResponse:
    """Write an error as a response."""
    return JSONResponse(told.body, told.status, headers=dict(told.headers))


class Door:
    """ASGI middleware. Leaves `request_id` and `caller` in the request's state.

    It stands outside of the routes, so that nobody without a key has a body read or a path told apart.
    """

    def __init__(
        self, app: ASGIApp, keyring: Keyring, rate: RateLimit | None, max_body_bytes: int, *, behind_ray: bool
    ) -> None:
        self._app = app
        self._behind_ray = behind_ray
        self._keyring = keyring
        self._rate = rate
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = self._request_id(headers.get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not self._behind_ray:
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            if not scope["path"].startswith(_OPEN):
                caller = self._keyring.identify(headers.get("authorization"), (scope.get("client") or (None,))[0])
                scope["state"]["caller"] = caller
                if self._rate is not None:
                    await self._rate.count(caller)
            limited = receive if _is_counted_elsewhere(scope, headers) else self._limited(receive)
            await self._app(scope, limited, send_with_id)
        except ClientDisconnect:
            logger.info("%s: the client went away in the middle of its request", request_id)
        except Exception as error:  # the last net: nobody is told a traceback, nothing goes unlogged
            if not is_known(error):
                logger.exception("%s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:
                raise
            await respond(tell(error, request_id))(scope, receive, send_with_id)

    def _request_id(self, given: str) -> str:
        # Ray Serve's proxy names every request, and puts the name that it or the caller chose on the response itself.
        if _SANE_ID.fullmatch(given) or (self._behind_ray and given):
            return given
        return f"req_{uuid.uuid4().hex[:16]}"

    def _limited(self, receive: Receive) -> Receive:
        """Count what is read of a body."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body_bytes:
                raise FileTooLarge(
                    f"The body has more than {self._max_body_bytes} bytes.", details={"max_bytes": self._max_body_bytes}
                )
            return message

        return counted


def _is_counted_elsewhere(scope: Scope, headers: Headers) -> bool:
    """Whether a body is counted where it is written: uploads, and hours that are imported."""
    match scope["method"], scope["path"]:
        case "PUT", path:
            return str(path).startswith("/v1/imports/")
        case "POST", "/v1/videos":
            return headers.get("content-type", "").startswith("multipart/form-data")
    return False
