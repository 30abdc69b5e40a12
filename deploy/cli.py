"""The `tokenline` command: a command is a model, a field is a flag.

Exit codes: 0 done, 1 an error of the service, 2 a wrong command line, 130 interrupted.
"""

import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    CliSubCommand,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from yaml import YAMLError

from deploy import display
from deploy.bodies import CameraAddress, Completed, Delta, NewStream, Question, Video
from deploy.client import ApiError, Client, RecomputationFailed, VideoFailed
from deploy.commands import Ranged, Remote, UsageError
from deploy.local import CannotServe, run
from deploy.memory_commands import Erase, Export, Import, Recomputations, Recompute
from deploy.model_commands import Evaluate, Train
from deploy.portable import BadPortable
from deploy.settings import Settings
from deploy.times import BadTime, parse_moment

Gib = Annotated[float, Field(ge=2**-30, le=2**30, allow_inf_nan=False)]


class Run(Settings):
    """Run every part of the service on this machine until interrupted."""

    def cli_cmd(self) -> None:
        run(self)


class Demo(Settings):
    """Show the whole way from a camera and a file to an answer, then stop."""

    def cli_cmd(self) -> None:
        from deploy.demo import main as demo

        demo(self)


class Opening(Remote):
    """A command that opens a camera."""

    username: str | None = Field(default=None, description="User name at the camera.")
    password_stdin: bool = Field(default=False, description="Read the password from the first line of standard input.")
    password_env: str | None = Field(default=None, description="Take the password from this environment variable.")
    transport: Literal["tcp", "udp"] = Field(default="tcp", description="How the camera sends.")

    def password(self) -> SecretStr | None:
        """Return the password that the flags lead to. Raises UsageError."""
        if self.password_stdin and self.password_env:
            raise UsageError("--password-stdin and --password-env exclude each other")
        if self.password_stdin:
            return SecretStr(sys.stdin.readline().rstrip("\r\n"))
        if self.password_env is None:
            return None
        if self.password_env not in os.environ:
            raise UsageError(f"--password-env: there is no environment variable {self.password_env}")
        return SecretStr(os.environ[self.password_env])


class ProbeStream(Opening):
    """Look at a camera without registering it."""

    camera: CliPositionalArg[str] = Field(description="rtsp://host/path, without user name and password.")
    snapshot: Path | None = Field(default=None, description="Write its first picture into this file, as JPEG.")

    def cli_cmd(self) -> None:
        address = CameraAddress(
            url=self.camera, username=self.username, password=self.password(), transport=self.transport
        )
        with self.connect() as client:
            seen = client.probe_stream(address)
        if self.snapshot is not None:
            self.snapshot.write_bytes(seen.snapshot_jpeg)
        display.print_json(seen) if self.json_ else display.print_probe(seen)


class AddStream(Opening):
    """Register a camera."""

    name: CliPositionalArg[str] = Field(description="A name of your choice.")
    camera: CliPositionalArg[str] = Field(description="rtsp://host/path, without user name and password.")
    fps: float = Field(default=1.0, description="Frames remembered a second.")
    label: list[str] = Field(default=[], description="NAME=VALUE; may be repeated.")
    retention_hours: float | None = Field(default=None, description="How long its memory is kept; else 168 hours.")
    max_gib: Gib | None = Field(default=None, description="How much of its memory is kept, without pictures.")
    keyframe_hours: float | None = Field(
        default=None, description="How long its pictures are kept; else as its memory."
    )
    keyframe_max_gib: Gib | None = Field(default=None, description="How much of its pictures is kept.")
    wait: float = Field(default=0, description="Wait for the first frame, at most these seconds.")

    def cli_cmd(self) -> None:
        stream = NewStream(
            name=self.name,
            url=self.camera,
            username=self.username,
            password=self.password(),
            transport=self.transport,
            fps=self.fps,
            labels=parse_labels(self.label),
            retention_hours=self.retention_hours,
            retention_bytes=_bytes(self.max_gib),
            keyframe_hours=self.keyframe_hours,
            keyframe_bytes=_bytes(self.keyframe_max_gib),
        )
        with self.connect() as client:
            created = client.create_stream(stream, wait_s=self.wait)
        display.print_json(created) if self.json_ else display.print_streams([created])


class ListStreams(Remote):
    """List the cameras."""

    state: str | None = Field(default=None, description="Only those in this state, for example reconnecting.")
    label: str | None = Field(default=None, description="Only those with this label, NAME=VALUE.")

    def cli_cmd(self) -> None:
        with self.connect() as client:
            streams = list(client.list_streams(state=self.state, label=self.label))
        display.print_json(streams) if self.json_ else display.print_streams(streams)


class ShowStream(Remote):
    """Show one camera and how it is doing."""

    id: CliPositionalArg[str]

    def cli_cmd(self) -> None:
        with self.connect() as client:
            stream, health = client.get_stream(self.id), client.stream_health(self.id)
        if self.json_:
            display.print_json(stream.model_copy(update={"health": health}))
        else:
            display.print_stream(stream, health)


class RemoveStream(Remote):
    """Unregister a camera; its memory stays until its retention ends."""

    id: CliPositionalArg[str]
    purge: bool = Field(default=False, description="Erase its memory now.")

    def cli_cmd(self) -> None:
        with self.connect() as client:
            deleted = client.delete_stream(self.id, purge=self.purge)
        display.print_json(deleted) if self.json_ else print(
            f"{deleted.id} deleted, {deleted.purged_frames} frames erased"
        )


class Streams(BaseModel):
    """Live cameras."""

    add: CliSubCommand[AddStream]
    probe: CliSubCommand[ProbeStream]
    list_: CliSubCommand[ListStreams] = Field(alias="list")
    show: CliSubCommand[ShowStream]
    rm: CliSubCommand[RemoveStream]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


class AddVideo(Remote):
    """Upload a video file, or let the service download one."""

    file: CliPositionalArg[str] = Field(description="A file, or an http(s) address.")
    name: str | None = Field(default=None, description="A name of your choice; else the file's.")
    fps: float = Field(default=1.0, description="Frames remembered a second.")
    recorded_at: str | None = Field(default=None, description="When the recording began, with zone.")
    wait: bool = Field(default=False, description="Wait until all of it is in memory.")

    def cli_cmd(self) -> None:
        with self.connect() as client, display.video_progress() as progress:
            bars = display.VideoProgress(progress)
            video = self._add(client, bars.sent)
            if self.wait:
                video = client.wait_video(video.id, on_progress=bars.read)
        display.print_json(video) if self.json_ else display.print_videos([video])

    def _add(self, client: Client, on_progress: Callable[[int, int], None]) -> Video:
        recorded_at = None if self.recorded_at is None else parse_moment(self.recorded_at, datetime.now(UTC))
        if self.file.startswith(("http://", "https://")):
            return client.add_video(self.file, name=self.name, fps=self.fps, recorded_at=recorded_at)
        path = Path(self.file)
        if not path.is_file():
            raise UsageError(f"{self.file} is neither a file nor an http(s) address")
        return client.upload_video(path, name=self.name, fps=self.fps, recorded_at=recorded_at, on_progress=on_progress)


class ListVideos(Remote):
    """List the videos."""

    def cli_cmd(self) -> None:
        with self.connect() as client:
            videos = list(client.list_videos())
        display.print_json(videos) if self.json_ else display.print_videos(videos)


class ShowVideo(Remote):
    """Show one video."""

    id: CliPositionalArg[str]

    def cli_cmd(self) -> None:
        with self.connect() as client:
            video = client.get_video(self.id)
        display.print_json(video) if self.json_ else display.print_video(video)


class RemoveVideo(Remote):
    """Delete a video and what is remembered of it."""

    id: CliPositionalArg[str]

    def cli_cmd(self) -> None:
        with self.connect() as client:
            deleted = client.delete_video(self.id)
        display.print_json(deleted) if self.json_ else print(
            f"{deleted.id} deleted, {deleted.purged_frames} frames erased"
        )


class Videos(BaseModel):
    """Archived videos."""

    add: CliSubCommand[AddVideo]
    list_: CliSubCommand[ListVideos] = Field(alias="list")
    show: CliSubCommand[ShowVideo]
    rm: CliSubCommand[RemoveVideo]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else round(gib * 2**30)


def parse_labels(labels: list[str]) -> dict[str, str]:
    """Read NAME=VALUE pairs."""
    pairs = [label.partition("=") for label in labels]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise UsageError(f"--label {wrong[0]}: write NAME=VALUE")
    return {name: value for name, _, value in pairs}


class Ask(Ranged):
    """Ask a question about time ranges of streams and videos."""

    question: CliPositionalArg[str]
    text_fusion: Literal["auto", "exact", "sampled", "none"] = Field(
        default="auto", description="How the question meets the frames; exact is the model as published."
    )
    stride: str = Field(default="1", description="Use every n-th frame; auto: the fewest left out that fit.")
    max_output_tokens: int = Field(default=256, description="Longest answer.")
    temperature: float = Field(default=0.0, description="0 always takes the likeliest word.")
    seed: int | None = Field(default=None, description="Makes a temperature above 0 repeatable.")

    def cli_cmd(self) -> None:
        question = Question(
            question=self.question,
            sources=self.ranges(datetime.now(UTC)),
            text_fusion=self.text_fusion,
            stride=self._stride(),
            max_output_tokens=self.max_output_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )
        with self.connect() as client:
            if self.json_:
                display.print_json(client.answer(question))
            else:
                show_answer(client, question)

    def _stride(self) -> int | Literal["auto"]:
        if self.stride == "auto":
            return "auto"
        if not self.stride.isdecimal() or int(self.stride) < 1:
            raise UsageError(f"--stride {self.stride}: write a whole number from 1, or auto")
        return int(self.stride)


def show_answer(client: Client, question: Question) -> None:
    """Print an answer as it is made, then what it rests on."""
    for event in client.ask(question):
        match event:
            case Delta():
                display.print_delta(event.delta)
            case Completed():
                display.print_delta("\n")
                display.print_basis(event)


class Search(Ranged):
    """Find moments that resemble a text."""

    query: CliPositionalArg[str]
    top_k: int = Field(default=10, description="Moments at most.")
    min_score: float | None = Field(default=None, description="Leave out what resembles the text less.")

    def cli_cmd(self) -> None:
        with self.connect() as client:
            found = client.search(
                self.query, self.ranges(datetime.now(UTC), open_ended=True), top_k=self.top_k, min_score=self.min_score
            )
        display.print_json(found) if self.json_ else display.print_moments(found)


class Follow(Remote):
    """Print what changes of cameras and videos, line by line, until interrupted."""

    type: list[Literal["stream.state", "video.status"]] = Field(default=[], description="Only these; may be repeated.")
    after: str | None = Field(default=None, description="Begin behind the event of this id; else with the next.")

    def cli_cmd(self) -> None:
        with self.connect() as client:
            for event in client.events(types=self.type, after=self.after):
                print(event.model_dump_json()) if self.json_ else display.print_event(event)
                sys.stdout.flush()


class ShowHealth(Remote):
    """Show whether the service can take questions; exit code 1 if it cannot."""

    def cli_cmd(self) -> None:
        with self.connect() as client:
            health = client.health()
        display.print_json(health) if self.json_ else display.print_health(health)
        if not health.ready:
            raise SystemExit(1)


class Command(BaseSettings):
    """Answers questions about live cameras and archived video."""

    model_config = SettingsConfigDict(
        cli_prog_name="tokenline",
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_implicit_flags="toggle",
        cli_hide_none_type=True,
        cli_enforce_required=True,
        cli_use_class_docs_for_groups=True,
    )

    run: CliSubCommand[Run]
    demo: CliSubCommand[Demo]
    streams: CliSubCommand[Streams]
    videos: CliSubCommand[Videos]
    ask: CliSubCommand[Ask]
    search: CliSubCommand[Search]
    erase: CliSubCommand[Erase]
    export: CliSubCommand[Export]
    import_: CliSubCommand[Import] = Field(alias="import")
    recompute: CliSubCommand[Recompute]
    recomputations: CliSubCommand[Recomputations]
    events: CliSubCommand[Follow]
    health: CliSubCommand[ShowHealth]
    train: CliSubCommand[Train]
    evaluate: CliSubCommand[Evaluate]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # A variable called `run` or `search` in somebody's environment is no command.
        return (init_settings,)

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


def run_command(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        CliApp.run(Command, arguments)
    except ValidationError as error:
        for fault in error.errors(include_input=False, include_url=False, include_context=False):
            display.print_error(f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}")
        return 2
    except (UsageError, BadTime, SettingsError, YAMLError) as error:
        display.print_error(str(error))
        return 2
    except ApiError as error:
        display.print_error(str(error), code=error.code, request_id=error.request_id)
        return 1
    except BrokenPipeError:  # whoever read the output has gone; nothing may be flushed into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (VideoFailed, RecomputationFailed, CannotServe, BadPortable) as error:
        display.print_error(str(error))
        return 1
    except OSError as error:
        display.print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 1
    except SystemExit as stop:
        if isinstance(stop.code, str):  # usage that names the commands there are, where none was given
            print(stop.code, file=sys.stderr)
            return 2
        return stop.code or 0
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> None:
    """The entry point of the `tokenline` command."""
    sys.exit(run_command(sys.argv[1:]))
