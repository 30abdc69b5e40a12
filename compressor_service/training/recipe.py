"""The recipe: which stages, in which order, with which settings."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict

from compressor_service.training.alignment import AlignmentSettings, AlignmentStage
from compressor_service.training.language import LanguageSettings, LanguageStage
from compressor_service.training.progress import Progress
from compressor_service.training.run_folder import CannotTrain
from compressor_service.training.runner import StagePlan, run
from compressor_service.training.tower import TowerSettings, TowerStage
from compressor_service.training.tuning import TuningSettings, TuningStage

_SHORTEST = 2  # steps of a stage


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

    @classmethod
    def of(cls, *, seed: int, device: str, scale: float) -> Self:
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
            }
        )


def plans(recipe: Recipe) -> list[StagePlan]:
    """Return the stages in their order; weights are about the seconds of each on two cores."""
    return [
        StagePlan("tower", lambda folder: TowerStage(recipe.tower), weight=2400),
        StagePlan("language", lambda folder: LanguageStage(recipe.language, folder), weight=5400),
        StagePlan("alignment", lambda folder: AlignmentStage(recipe.alignment, folder), weight=2000),
        StagePlan("tuning", lambda folder: TuningStage(recipe.tuning, folder), weight=1500),
    ]


def train(
    folder: Path,
    *,
    seed: int,
    device: Literal["auto", "cpu", "cuda"],
    scale: float,
    workers: int,
    threads: int | None,
    on_progress: Callable[[Progress], None],
    on_note: Callable[[str], None],
) -> None:
    """Train a model in `folder`; its checkpoint is then in `folder`/checkpoint, and the recipe and curves beside it.

    Raises CannotTrain and Stopped.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise CannotTrain("torch sees no GPU here: give --device cpu or auto")
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe.of(seed=seed, device=chosen, scale=scale)
    run(
        plans(recipe),
        folder,
        recipe=recipe,
        seed=seed,
        workers=workers,
        on_progress=on_progress,
        on_note=on_note,
    )
    checkpoint = folder / "checkpoint"
    shutil.copy2(folder / "recipe.json", checkpoint)
    if (folder / "curves").exists():
        shutil.copytree(folder / "curves", checkpoint / "curves", dirs_exist_ok=True)
