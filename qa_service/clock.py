"""Times of sources: the slot grid in seconds, and how seconds are written for streams and videos."""

import math
import re
from datetime import UTC, datetime, timedelta

# Microseconds, as they are written, round a slot's begin by at most 3e-5 slots at 30 fps: this absorbs it.
_SLACK_SLOTS = 1e-4
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")

STREAM_TIME_ADVICE = "Times of a stream are RFC 3339 with a zone, for example 2026-07-01T06:00:00Z."
VIDEO_TIME_ADVICE = "Times of a video are seconds since its start, for example 12.5."


def parse_stream_time(text: str) -> float:
    """Return the Unix seconds of an RFC 3339 time. Raises ValueError."""
    if not _RFC3339.fullmatch(text):
        raise ValueError(STREAM_TIME_ADVICE)
    try:
        return (datetime.fromisoformat(text.upper()) - _EPOCH).total_seconds()
    except (ValueError, OverflowError):
        raise ValueError(STREAM_TIME_ADVICE) from None


def parse_video_time(text: str) -> float:
    """Return the seconds that `text` says. Raises ValueError."""
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(VIDEO_TIME_ADVICE) from None
    if not 0 <= seconds < math.inf:
        raise ValueError(VIDEO_TIME_ADVICE)
    return seconds


def write_stream_time(seconds: float) -> str:
    """Write Unix seconds as RFC 3339 in UTC, with microseconds only where they are not zero."""
    written = (_EPOCH + timedelta(microseconds=round(seconds * 1e6))).replace(tzinfo=None).isoformat()
    return f"{written.rstrip('0') if '.' in written else written}Z"


def slots_between(start_s: float, end_s: float, fps: float) -> tuple[int, int]:
    """Return the slots [first, end) that begin in the seconds [start_s, end_s); the grid begins at slot 0."""
    return max(0, math.ceil(start_s * fps - _SLACK_SLOTS)), max(0, math.ceil(end_s * fps - _SLACK_SLOTS))


def slot_at(seconds: float, fps: float) -> int:
    """Return the slot that covers a time."""
    return math.floor(seconds * fps + _SLACK_SLOTS)
