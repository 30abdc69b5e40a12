"""The recipe: its settings, and what it refuses before anything is trained."""

from pathlib import Path

import pytest
import torch

from compressor_service.training.recipe import Recipe, train
from compressor_service.training.run_folder import CannotTrain


def test_a_scaled_recipe_keeps_everything_but_its_steps_and_never_less_than_two_of_them() -> None:
    whole, tiny = (Recipe.of(seed=3, device="cpu", scale=scale) for scale in (1, 1e-9))
    assert whole.language.steps > 1000
    assert tiny.language.steps == tiny.tower.steps == 2
    assert tiny.language.model_dump(exclude={"steps"}) == whole.language.model_dump(exclude={"steps"})
    assert {stage.seed for stage in (whole.tower, whole.language, whole.alignment, whole.tuning)} == {3}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="--device cpu"):
        train(
            tmp_path / "run",
            seed=0,
            device="cuda",
            scale=0.001,
            workers=0,
            threads=None,
            on_progress=lambda progress: None,
            on_note=lambda note: None,
        )
    assert not (tmp_path / "run").exists()
