"""The recipe: which stages, in which order, with which settings."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import save_model

from compressor_service.llava_mini.checkpoint import BadCheckpoint, open_checkpoint, read_json
from compressor_service.training.alignment import AlignmentSettings, AlignmentStage
from compressor_service.training.descent import Rates
from compressor_service.training.language import (
    SCENES,
    SCHOOLED,
    TRAINED,
    LanguageSettings,
    LanguageStage,
    build_config,
    load_scenes,
)
from compressor_service.training.network import Network, Shape
from compressor_service.training.progress import Progress
from compressor_service.training.run_folder import CannotTrain
from compressor_service.training.runner import StagePlan, run
from compressor_service.training.tower import TowerSettings, TowerStage
from compressor_service.training.tuning import TuningSettings, TuningStage

_SHORTEST = 2  # steps of a stage
_RECIPE = "recipe.json"


class Recipe(BaseModel):
    """Everything that a model depends on, beside the code.

    The tower and the language model take the place of the CLIP model and the Vicuna that the paper starts from;
    alignment and tuning are its two stages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tower: TowerSettings = TowerSettings()
    language: LanguageSettings = LanguageSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    tuning: TuningSettings = TuningSettings()

    def scaled(self, *, seed: int, device: str, scale: float) -> Self:
        """Return this recipe with `scale` times its steps."""
        return type(self)(
            tower=_scaled(self.tower, seed, device, scale),
            language=_scaled(self.language, seed, device, scale),
            alignment=_scaled(self.alignment, seed, device, scale),
            tuning=_scaled(self.tuning, seed, device, scale),
        )

    def plans(self) -> list[StagePlan]:
        """Return the stages in their order; weights are about the seconds of each on two cores."""
        return [
            StagePlan("tower", lambda folder: TowerStage(self.tower), weight=2400),
            StagePlan("language", lambda folder: LanguageStage(self.language, folder), weight=7200),
            StagePlan("alignment", lambda folder: AlignmentStage(self.alignment, folder), weight=2700),
            StagePlan("tuning", lambda folder: TuningStage(self.tuning, folder), weight=2400),
        ]


class Further(BaseModel):
    """How a trained model goes on: its language model learns more, and then all but the tower from fresh scenes.

    Pictures already make the frame tokens that facts would, so there is nothing to align.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    language: LanguageSettings = LanguageSettings(
        steps=3600, clip_share=0.85, noise=(0.2, 0.2), rates=Rates(matrices=0.0025, others=4e-4, made=2.5e-4)
    )
    tuning: TuningSettings = TuningSettings()
    start: dict[str, Any] = Field(description="The recipe of the model that goes on.")

    def scaled(self, *, seed: int, device: str, scale: float) -> Self:
        """Return this recipe with `scale` times its steps."""
        return type(self)(
            language=_scaled(self.language, seed, device, scale),
            tuning=_scaled(self.tuning, seed, device, scale),
            start=self.start,
        )

    def plans(self, checkpoint: Path) -> list[StagePlan]:
        """Return the stages in their order; weights are about the seconds of each on two cores."""

        def make_language(folder: Path) -> LanguageStage:
            if not (folder / TRAINED).exists():
                _take_up(checkpoint, folder, self.language.shape)
            return LanguageStage(self.language, folder, further=True)

        return [
            StagePlan("language", make_language, weight=2400),
            StagePlan("tuning", lambda folder: TuningStage(self.tuning, folder, start=SCHOOLED), weight=2400),
        ]


SettingsT = TypeVar("SettingsT", TowerSettings, LanguageSettings, AlignmentSettings, TuningSettings)


def _scaled(settings: SettingsT, seed: int, device: str, scale: float) -> SettingsT:
    changed: dict[str, Any] = {"seed": seed, "device": device, "steps": max(_SHORTEST, round(settings.steps * scale))}
    if isinstance(settings, TuningSettings):
        changed["clips"] = max(_SHORTEST, round(settings.clips * min(scale, 1)))
        changed["long_clips"] = round(settings.long_clips * min(scale, 1))
    return settings.model_copy(update=changed)


def _take_up(checkpoint: Path, folder: Path, shape: Shape) -> None:
    """Put a checkpoint where stages look for what those before have written; CannotTrain if it is of another kind."""
    shutil.copytree(checkpoint / "clip", folder / "clip", dirs_exist_ok=True)
    shutil.copy2(checkpoint / SCENES, folder)
    ours, config = build_config(shape, folder)
    theirs = read_json(checkpoint, "config.json")
    differing = [
        f"{name} is {theirs.get(name)}, not {value}" for name, value in ours.items() if theirs.get(name) != value
    ]
    if differing:
        raise CannotTrain(f"{checkpoint} is no model of this recipe: {'; '.join(differing)}")
    try:
        load_scenes(shape, folder)
    except (SafetensorError, RuntimeError) as error:
        raise CannotTrain(f"{checkpoint / SCENES} is damaged: {error}") from error
    network = Network(config)
    network.load(checkpoint)
    unfinished = folder / f"{TRAINED}.new"
    save_model(network, str(unfinished))
    unfinished.replace(folder / TRAINED)


def _recipe_of(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint was trained with. Raises CannotTrain if it was not trained by a recipe."""
    missing = [name for name in (_RECIPE, SCENES, "clip") if not (checkpoint / name).exists()]
    if missing:
        raise CannotTrain(
            f"{checkpoint} was not made by `tokenline train`: there is no {' and no '.join(missing)} in it"
        )
    try:
        open_checkpoint(checkpoint)
        return read_json(checkpoint, _RECIPE)
    except BadCheckpoint as error:
        raise CannotTrain(str(error)) from error


def train(
    folder: Path,
    *,
    seed: int,
    device: Literal["auto", "cpu", "cuda"],
    scale: float,
    workers: int,
    threads: int | None,
    start: Path | None = None,
    on_progress: Callable[[Progress], None],
    on_note: Callable[[str], None],
) -> None:
    """Train a model in `folder`; its checkpoint is then in `folder`/checkpoint, and the recipe and curves beside it.

    From nothing, or further from the checkpoint `start`. Raises CannotTrain and Stopped.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise CannotTrain("torch sees no GPU here: give --device cpu or auto")
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    recipe: Recipe | Further
    if start is None:
        recipe = Recipe().scaled(seed=seed, device=chosen, scale=scale)
        plans = recipe.plans()
    else:
        recipe = Further(start=_recipe_of(start)).scaled(seed=seed, device=chosen, scale=scale)
        plans = recipe.plans(start)
    run(
        plans,
        folder,
        recipe=recipe,
        seed=seed,
        workers=workers,
        on_progress=on_progress,
        on_note=on_note,
    )
    checkpoint = folder / "checkpoint"
    shutil.copy2(folder / _RECIPE, checkpoint)
    if (folder / "curves").exists():
        shutil.copytree(folder / "curves", checkpoint / "curves", dirs_exist_ok=True)
    if start is not None and (start / "curves").exists():
        shutil.copytree(start / "curves", checkpoint / "curves" / "before", dirs_exist_ok=True)
