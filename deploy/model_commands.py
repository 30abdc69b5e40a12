"""The commands about the small model itself, which need no service: `tokenline train` and `tokenline evaluate`.

What they need is imported when they run: the other commands start without torch.
"""

import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic_settings import CliPositionalArg

from deploy import display
from deploy.local import EMBEDDED_MODEL


class Train(BaseModel):
    """Train the small model; the same command goes on with a training that was stopped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: CliPositionalArg[Path] = Field(description="Where the model goes, and all that is kept on the way to it.")
    seed: NonNegativeInt = Field(default=0, description="Another one trains another model.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one.")
    scale: PositiveFloat = Field(default=1.0, description="Steps as a part of the recipe's; 0.001 is a quick try.")
    workers: NonNegativeInt = Field(default=1, description="Processes that draw batches ahead.")
    threads: PositiveInt | None = Field(default=None, description="CPU cores to learn with; else all.")
    start: Path | None = Field(
        default=None, description="A checkpoint that was trained so, to go on from; else from nothing."
    )

    def cli_cmd(self) -> None:
        from compressor_service.training.progress import Display
        from compressor_service.training.recipe import train
        from compressor_service.training.run_folder import CannotTrain
        from compressor_service.training.runner import Stopped

        try:
            with Display() as shown:
                train(
                    self.folder,
                    seed=self.seed,
                    device=self.device,
                    scale=self.scale,
                    workers=self.workers,
                    threads=self.threads,
                    start=self.start,
                    on_progress=shown.progress,
                    on_note=shown.note,
                )
        except CannotTrain as error:
            display.print_error(str(error))
            raise SystemExit(1) from error
        except Stopped as stop:
            print(stop, file=sys.stderr)
            raise SystemExit(130) from stop


class Evaluate(BaseModel):
    """Tell how well a model answers and finds, in pictures and clips that nothing was learned from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str | None = Field(
        default=None, description="Local folder or hub name of the model; else the embedded one."
    )
    seed: NonNegativeInt = Field(default=0, description="Another one asks about other scenes.")
    scenes: PositiveInt = Field(default=200, description="Pictures, and as many clips.")
    long: bool = Field(default=False, description="Ask about clips of 2 to 5 minutes, too.")
    through_service: bool = Field(default=False, description="Ask again through a whole service, cameras included.")
    search_seconds: NonNegativeInt = Field(default=600, description="Seconds of film that are searched; 0: none.")
    show_wrong: NonNegativeInt = Field(default=0, description="Wrong answers to show.")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="What it computes in.")
    json_: bool = Field(default=False, alias="json", description="Print JSON.")

    def cli_cmd(self) -> None:
        from compressor_service.llava_mini.checkpoint import BadCheckpoint
        from deploy.evaluation import Wanted, evaluate, print_report
        from deploy.served_evaluation import CameraFailed
        from ingest.sample_camera import SampleCameraFailed

        try:
            asked = self.model_dump(exclude={"json_", "checkpoint"})
            report = evaluate(Wanted(checkpoint=self.checkpoint or str(EMBEDDED_MODEL), **asked))
        except (BadCheckpoint, CameraFailed, SampleCameraFailed) as error:
            display.print_error(str(error))
            raise SystemExit(1) from error
        display.print_json(report) if self.json_ else print_report(report)
