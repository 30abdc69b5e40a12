"""What commands that speak to a running service have in common: where it is, and which times are meant."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    SettingsConfigDict,
)

from deploy.bodies import Range, Time
from deploy.client import DEFAULT_URL, Client
from deploy.settings import PREFIX
from deploy.times import parse_duration, parse_moment, parse_position


class UsageError(ValueError):
    """The command line asks for what cannot be done."""


class Connection(BaseSettings):
    """Where the service is and who asks: TOKENLINE_URL and TOKENLINE_API_KEY.

    The key has no flag: the command line of a process can be read by every user of the machine.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    url: str = DEFAULT_URL
    api_key: SecretStr | None = None


class Remote(BaseModel):
    """A command that speaks to a running service."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(default=None, description=f"Address of the service; TOKENLINE_URL, else {DEFAULT_URL}.")
    json_: bool = Field(default=False, alias="json", description="Print JSON.")

    def connect(self) -> Client:
        """Return a client of the service that flags and environment name."""
        connection = Connection()
        return Client(self.url or connection.url, connection.api_key)


class Ranged(Remote):
    """A command about time ranges of streams and videos."""

    stream: list[str] = Field(default=[], description="A stream, ID or ID@START..END; may be repeated.")
    video: list[str] = Field(default=[], description="A video, ID or ID@START..END; may be repeated.")
    last: str | None = Field(default=None, description="The last while of the streams, for example 10m.")
    start: str | None = Field(default=None, description="Stream: 2h (ago) or a date with zone. Video: 90 or 1:30.")
    end: str | None = Field(default=None, description="Likewise; without it: now, or the end of the video.")

    def ranges(self, now: datetime, *, open_ended: bool = False) -> tuple[Range, ...]:
        """Return the ranges that the flags name; UsageError for a stream without times, unless `open_ended`."""
        if not self.stream and not self.video:
            raise UsageError("name at least one --stream ID or --video ID")
        if self.last and (self.start or self.end):
            raise UsageError("--last and --start/--end exclude each other")
        if self.stream and self.video and (self.start or self.end):
            raise UsageError("--start and --end differ for streams and videos: write the range as ID@START..END")
        streams = [self._stream(named, now, open_ended) for named in self.stream]
        return (*streams, *(self._video(named) for named in self.video))

    def _stream(self, named: str, now: datetime, open_ended: bool) -> Range:
        source_id, start, end = split_range(named, self.start, self.end)
        if self.last and "@" not in named:
            return Range(source_id=source_id, start=now - parse_duration(self.last), end=now)
        if not start and open_ended:
            return Range(source_id=source_id, end=parse_moment(end, now) if end else None)
        if not start:
            raise UsageError(f"say which time of {source_id} is meant: --last 10m, or --start and --end")
        return Range(source_id=source_id, start=parse_moment(start, now), end=parse_moment(end or "now", now))

    def _video(self, named: str) -> Range:
        source_id, start, end = split_range(named, self.start, self.end)
        ends: list[Time | None] = [parse_position(at) if at else None for at in (start, end)]
        return Range(source_id=source_id, start=ends[0], end=ends[1])


def split_range(named: str, start: str | None, end: str | None) -> tuple[str, str | None, str | None]:
    """Split `ID@START..END`; without a range of its own a source has `start` and `end`."""
    source_id, at, own = named.partition("@")
    if not at:
        return source_id, start, end
    own_start, dots, own_end = own.partition("..")
    if not dots:
        raise UsageError(f"{named!r}: write the range as ID@START..END")
    return source_id, own_start or None, own_end or None


def range_of(source_id: str, start: str | None, end: str | None, now: datetime) -> Range:
    """Return the range of a source, whose ends are written as its kind has them; None: an open end."""
    ends: list[Time | None] = [
        None if not at else parse_position(at) if source_id.startswith("vid_") else parse_moment(at, now)
        for at in (start, end)
    ]
    return Range(source_id=source_id, start=ends[0], end=ends[1])
