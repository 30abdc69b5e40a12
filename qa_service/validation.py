"""What pydantic found wrong with a request, told without repeating what was sent."""

from collections.abc import Mapping, Sequence
from typing import Any

from qa_service.errors import BadTimeRange, InvalidJson, ServiceError, ValidationFailed
from qa_service.schemas import BAD_TIME_RANGE, PATH_TAGS

MAX_ERRORS = 20
MAX_PATH_CHARS = 200  # names of unknown fields come from the caller
_NO_OBJECT = frozenset({"missing", "model_type", "model_attributes_type"})
_PLACES = frozenset({"body", "query", "path", "header"})


def refusal(errors: Sequence[Mapping[str, Any]]) -> ServiceError:
    """Return the error to raise for pydantic's list: of it only paths and messages are used, never the input."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return InvalidJson("The body is not valid JSON.")
    if first["type"] == BAD_TIME_RANGE:
        return BadTimeRange(first["msg"], param=_path(first["loc"]))
    if _path(first["loc"]) is None and first["type"] in _NO_OBJECT:
        return ValidationFailed("Send a JSON object, with the header `Content-Type: application/json`.")
    told = [{"param": _path(error["loc"]), "message": error["msg"]} for error in errors[:MAX_ERRORS]]
    param = told[0]["param"]
    return ValidationFailed(f"{param or 'The body'}: {told[0]['message']}", param=param, details={"errors": told})


def _path(places: Sequence[str | int]) -> str | None:
    """Write a path as a caller would: sources[0].end."""
    inside = places[1:] if places and places[0] in _PLACES else places
    written = ""
    for place in inside:
        if isinstance(place, int):
            written += f"[{place}]"
        elif place not in PATH_TAGS:
            written += f".{place}"
    return written.removeprefix(".")[:MAX_PATH_CHARS] or None
