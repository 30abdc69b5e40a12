"""Times as a person types them: how long, how long ago, a date, a position in a video."""

import re
from datetime import datetime, timedelta

_UNITS = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{2}(?:\.\d+)?)")


class BadTime(ValueError):
    """A time that cannot be understood; the message shows forms that can."""


def parse_duration(text: str) -> timedelta:
    """Read a duration such as `90s`, `10m`, `2h30m` or `1d12h`."""
    match = _DURATION.fullmatch(text.strip())
    if not match or not any(match.groups()):
        raise BadTime(f"{text!r} is no duration; write for example 90s, 10m, 2h30m or 1d")
    numbers = zip(_UNITS.values(), match.groups(), strict=True)
    try:
        return timedelta(**{unit: float(number) for unit, number in numbers if number})
    except OverflowError:
        raise BadTime(f"{text!r} is too long a duration") from None


def parse_moment(text: str, now: datetime) -> datetime:
    """Read a moment of a live stream: `now`, a duration before now, or a date with zone (RFC 3339)."""
    if text.strip() == "now":
        return now
    if _DURATION.fullmatch(text.strip()) and text.strip():
        return _before(now, text)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadTime(f"{text!r} is no time; write now, 10m (ago), or 2026-07-01T06:00:00Z") from None
    if moment.tzinfo is None:
        raise BadTime(
            f"{text!r} has no time zone; write for example {moment.isoformat()}Z or {moment.isoformat()}+02:00"
        )
    return moment


def parse_position(text: str) -> float:
    """Read a position in a video in seconds: `90`, `90.5`, `1:30`, `1:02:03` or `10m`."""
    if match := _CLOCK.fullmatch(text.strip()):
        hours, minutes, seconds = match.groups()
        return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
    if re.fullmatch(r"\d+(\.\d+)?", text.strip()):
        return float(text)
    try:
        return parse_duration(text).total_seconds()
    except BadTime:
        raise BadTime(f"{text!r} is no position in a video; write for example 90, 1:30, 1:02:03 or 10m") from None


def show_position(seconds: float) -> str:
    """Write a position in a video as `1:02:03`, with a fraction where there is one."""
    minutes, rest = divmod(round(seconds, 3), 60)
    hours, minutes = divmod(int(minutes), 60)
    shown = f"{rest:02.0f}" if rest == int(rest) else f"{rest:06.3f}".rstrip("0")
    return f"{hours}:{minutes:02d}:{shown}" if hours else f"{minutes}:{shown}"


def _before(now: datetime, text: str) -> datetime:
    try:
        return now - parse_duration(text)
    except OverflowError:
        raise BadTime(f"{text!r} ago is before all dates") from None
