"""The recipe: which stages, in which order, with which settings."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_model

from compressor_service.llava_mini.checkpoint import BadCheckpoint, open_checkpoint, read_json
from compressor_service.training.alignment import ALIGNED, AlignmentSettings, AlignmentStage
from compressor_service.training.language import LanguageSettings, LanguageStage, build_config
from compressor_service.training.network import Network
from compressor_service.training.progress import Progress
from compressor_service.training.run_folder import CannotTrain
from compressor_service.training.runner import StagePlan, run
from compressor_service.training.tower import TowerSettings, TowerStage
from compressor_service.training.tuning import TuningSettings, TuningStage

_SHORTEST = 2  # steps of a stage
_RECIPE = "recipe.json"


class Recipe(BaseModel):
    """Everything that a trained model depends on, beside the code.

    The tower and the language model take the place of the CLIP model and the Vicuna that the paper starts from;
    alignment and tuning are its two stages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tower: TowerSettings = TowerSettings()
    language: LanguageSettings = LanguageSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    tuning: TuningSettings = TuningSettings()
    start: dict[str, Any] | None = Field(
        default=None, description="The recipe of the checkpoint that is tuned further; None trains from nothing."
    )

    @classmethod
    def of(cls, *, seed: int, device: str, scale: float, start: dict[str, Any] | None = None) -> Self:
        """Return the recipe with `scale` times its steps."""
        whole = cls()

        def changed(settings: BaseModel, steps: int) -> dict[str, object]:
            return {
                **settings.model_dump(),
                "seed": seed,
                "device": device,
                "steps": max(_SHORTEST, round(steps * scale)),
            }

        return cls.model_validate(
            {
                "tower": changed(whole.tower, whole.tower.steps),
                "language": changed(whole.language, whole.language.steps),
                "alignment": changed(whole.alignment, whole.alignment.steps),
                "tuning": {
                    **changed(whole.tuning, whole.tuning.steps),
                    "clips": max(_SHORTEST, round(whole.tuning.clips * min(scale, 1))),
                    "long_clips": round(whole.tuning.long_clips * min(scale, 1)),
                },
                "start": start,
            }
        )


def plans(recipe: Recipe) -> list[StagePlan]:
    """Return the stages in their order; weights are about the seconds of each on two cores."""
    return [
        StagePlan("tower", lambda folder: TowerStage(recipe.tower), weight=2400),
        StagePlan("language", lambda folder: LanguageStage(recipe.language, folder), weight=4800),
        StagePlan("alignment", lambda folder: AlignmentStage(recipe.alignment, folder), weight=2700),
        StagePlan("tuning", lambda folder: TuningStage(recipe.tuning, folder), weight=2400),
    ]


def further_plans(recipe: Recipe, checkpoint: Path) -> list[StagePlan]:
    """Return what is left to a model that has been trained: its tuning."""

    def make(folder: Path) -> TuningStage:
        if not (folder / ALIGNED).exists():
            _take_up(checkpoint, folder, recipe)
        return TuningStage(recipe.tuning, folder)

    return [StagePlan("tuning", make)]


def _take_up(checkpoint: Path, folder: Path, recipe: Recipe) -> None:
    """Put a checkpoint where the stage before tuning would have written; CannotTrain if it is of another kind."""
    shutil.copytree(checkpoint / "clip", folder / "clip", dirs_exist_ok=True)
    ours, config = build_config(recipe.tuning.shape, folder)
    theirs = read_json(checkpoint, "config.json")
    differing = [
        f"{name} is {theirs.get(name)}, not {value}" for name, value in ours.items() if theirs.get(name) != value
    ]
    if differing:
        raise CannotTrain(f"{checkpoint} is no model of this recipe: {'; '.join(differing)}")
    network = Network(config)
    network.load(checkpoint)
    save_model(network, str(folder / ALIGNED))


def _recipe_of(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint was trained with. Raises CannotTrain if it was not trained by a recipe."""
    if not (checkpoint / _RECIPE).exists() or not (checkpoint / "clip").exists():
        raise CannotTrain(f"{checkpoint} was not made by `tokenline train`: there is no {_RECIPE} or no clip in it")
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

    From nothing, or only the last stage from the checkpoint `start`. Raises CannotTrain and Stopped.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise CannotTrain("torch sees no GPU here: give --device cpu or auto")
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe.of(seed=seed, device=chosen, scale=scale, start=None if start is None else _recipe_of(start))
    run(
        plans(recipe) if start is None else further_plans(recipe, start),
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
