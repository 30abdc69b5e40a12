"""The commands about what is remembered: erase, export, import, and look again with another model."""

from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, Field
from pydantic_settings import (
    CliApp,
    CliPositionalArg,
    CliSubCommand,
)

from deploy import display
from deploy.bodies import Range
from deploy.commands import Ranged, Remote, UsageError, range_of, split_range


class Erase(Ranged):
    """Erase what is remembered of time ranges for good, and print the receipts."""

    everything: bool = Field(default=False, description="Sources that are named without times: all of their memory.")

    def cli_cmd(self) -> None:
        wanted = self.ranges(datetime.now(UTC), open_ended=self.everything)
        if not self.everything and (unbounded := [one.source_id for one in wanted if one.start is one.end is None]):
            raise UsageError(f"say which time of {', '.join(unbounded)} is to be erased, or --everything")
        with self.connect() as client:
            receipts = [client.erase(one) for one in wanted]
        display.print_json(receipts) if self.json_ else display.print_receipts(receipts)


class Export(Remote):
    """Write what is remembered of a source, or of a time of it, into a file that another service can import."""

    source: CliPositionalArg[str] = Field(description="The ID of a stream or a video.")
    file: CliPositionalArg[Path] = Field(description="Where to write: a tar of JSON and safetensors.")
    from_: str | None = Field(default=None, alias="from", description="Stream: 2h (ago) or a date. Video: 1:30.")
    to: str | None = Field(default=None, description="Likewise; without them: all there is.")
    pictures: bool = Field(default=True, description="With the pictures; --no-pictures leaves them out.")

    def cli_cmd(self) -> None:
        from deploy.transfer import export_timeline

        with self.connect() as client, display.video_progress() as progress:
            told = display.HourProgress(progress, "exporting")
            held = export_timeline(client, self._range(), self.file, pictures=self.pictures, on_progress=told)
        display.print_json(held) if self.json_ else display.print_export(held, self.file)

    def _range(self) -> Range:
        return range_of(self.source, self.from_, self.to, datetime.now(UTC))


class Import(Remote):
    """Import a file that `tokenline export` wrote, as a new source."""

    file: CliPositionalArg[Path]
    name: str | None = Field(default=None, description="A name of your choice; else the one it was exported with.")

    def cli_cmd(self) -> None:
        from deploy.transfer import import_timeline

        with self.connect() as client, display.video_progress() as progress:
            told = display.HourProgress(progress, "importing")
            imported = import_timeline(client, self.file, name=self.name, on_progress=told)
        display.print_json(imported) if self.json_ else print(f"{imported.id} imported, {imported.frames} frames")


class Recompute(Remote):
    """Let the running model look at kept pictures that only another model saw, in the background of the service."""

    source: CliPositionalArg[list[str]] = Field(
        default=[], description="A stream or video, ID or ID@START..END; without any all of them."
    )
    from_: str | None = Field(
        default=None, alias="from", description="Stream: 2d (ago) or a date with zone. Video: 90 or 1:30."
    )
    to: str | None = Field(default=None, description="Likewise; without it: up to the last picture.")
    drop_old: bool = Field(
        default=False, description="Erase what other models made of an hour once all of it is made anew."
    )
    wait: bool = Field(default=False, description="Wait until all is done, also the hour that is still recorded.")

    def cli_cmd(self) -> None:
        ranges = self._ranges(datetime.now(UTC))
        with self.connect() as client:
            job = client.recompute(ranges, drop_old=self.drop_old)
            if self.wait:
                with display.video_progress() as progress:
                    job = client.wait_recomputation(job.id, on_progress=display.RecomputationProgress(progress))
        display.print_json(job) if self.json_ else display.print_recomputations([job])

    def _ranges(self, now: datetime) -> tuple[Range, ...] | None:
        if not self.source:
            if self.from_ or self.to:
                raise UsageError("name the streams or videos that --from and --to are meant for")
            return None
        kinds = {named.startswith("vid_") for named in self.source if "@" not in named}
        if len(kinds) > 1 and (self.from_ or self.to):
            raise UsageError("--from and --to differ for streams and videos: write the range as ID@START..END")
        return tuple(self._range(named, now) for named in self.source)

    def _range(self, named: str, now: datetime) -> Range:
        return range_of(*split_range(named, self.from_, self.to), now)


class ListRecomputations(Remote):
    """List recomputations, the newest first."""

    def cli_cmd(self) -> None:
        with self.connect() as client:
            jobs = list(client.list_recomputations())
        display.print_json(jobs) if self.json_ else display.print_recomputations(jobs)


class ShowRecomputation(Remote):
    """Show how far one recomputation is."""

    id: CliPositionalArg[str]

    def cli_cmd(self) -> None:
        with self.connect() as client:
            job = client.get_recomputation(self.id)
        display.print_json(job) if self.json_ else display.print_recomputation(job)


class CancelRecomputation(Remote):
    """End a recomputation; what it has made stays."""

    id: CliPositionalArg[str]

    def cli_cmd(self) -> None:
        with self.connect() as client:
            job = client.cancel_recomputation(self.id)
        display.print_json(job) if self.json_ else display.print_recomputations([job])


class Recomputations(BaseModel):
    """What was asked for with `tokenline recompute`."""

    list_: CliSubCommand[ListRecomputations] = Field(alias="list")
    show: CliSubCommand[ShowRecomputation]
    cancel: CliSubCommand[CancelRecomputation]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)
