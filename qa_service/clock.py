"""Times of sources: the slot grid in seconds, and how seconds are written for streams and videos."""

import math
import re
from datetime import UTC, datetime, timedelta

# Microseconds, as they are written, round a slot's begin by at most 3e-5 slots at 30 fps: this absorbs it.
_SLACK_SLOTS = 1e-4
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# The calendar's end, for videos too: every time that is taken can be written, and counted in slots of 64 bits.
_MAX_S = (datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC) - _EPOCH).total_seconds()
_SPACE_FOR_PLUS = re.compile(r" (\d\d:\d\d)$")
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")

STREAM_TIME_ADVICE = "Times of a stream are RFC 3339 with a zone, for example 2026-07-01T06:00:00Z."
VIDEO_TIME_ADVICE = "Times of a video are seconds since its start, for example 12.5."


def parse_stream_time(text: str) -> float:
    """Return the Unix seconds of an RFC 3339 time; in UTC it lies in the years 1 to 9999. Raises ValueError."""
    if not _RFC3339.fullmatch(text):
        raise ValueError(STREAM_TIME_ADVICE)
    try:
        seconds = (datetime.fromisoformat(text.upper()).astimezone(UTC) - _EPOCH).total_seconds()
    except (ValueError, OverflowError):
        raise ValueError(STREAM_TIME_ADVICE) from None
    if seconds > _MAX_S:
        raise ValueError(STREAM_TIME_ADVICE)
    return seconds


def parse_video_time(text: str) -> float:
    """Return the seconds that `text` says. Raises ValueError."""
    try:
        return check_video_time(float(text))
    except ValueError:
        raise ValueError(VIDEO_TIME_ADVICE) from None


def check_video_time(seconds: float) -> float:
    """Return seconds since a video's start as they are, if they can be that. Raises ValueError."""
    if not 0 <= seconds <= _MAX_S:
        raise ValueError(VIDEO_TIME_ADVICE)
    return float(seconds)


def parse_query_time(text: str, *, live: bool) -> float:
    """Return the seconds of a time in an address, where the plus of a zone may have become a blank. ValueError."""
    return parse_stream_time(_SPACE_FOR_PLUS.sub(r"+\1", text)) if live else parse_video_time(text)


def write_stream_time(seconds: float) -> str:
    """Write Unix seconds as RFC 3339 in UTC, with microseconds only where they are not zero."""
    written = (_EPOCH + timedelta(microseconds=round(seconds * 1e6))).replace(tzinfo=None).isoformat()
    return f"{written.rstrip('0') if '.' in written else written}Z"


def slots_between(start_s: float, end_s: float, fps: float) -> tuple[int, int]:
    """Return the slots [first, end) that begin in the seconds [start_s, end_s); the grid begins at slot 0."""
    return first_slot(start_s, fps), first_slot(end_s, fps)


def first_slot(seconds: float, fps: float) -> int:
    """Return the first slot that begins at a time or after it; the grid begins at slot 0."""
    return max(0, math.ceil(seconds * fps - _SLACK_SLOTS))


def slot_at(seconds: float, fps: float) -> int:
    """Return the slot that covers a time."""
    return math.floor(seconds * fps + _SLACK_SLOTS)
