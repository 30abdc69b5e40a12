"""The recipe: its settings, what it refuses before anything is trained, and how a trained model goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model

from compressor_service.training.language import SCENES, SCHOOLED, LanguageSettings, build_config, load_network
from compressor_service.training.network import Network, Shape, initialise
from compressor_service.training.recipe import Further, Recipe, train
from compressor_service.training.run_folder import CannotTrain
from compressor_service.training.runner import run
from compressor_service.training.scene_tokens import SceneTokens
from compressor_service.training.tokenizer import write_tokenizer
from compressor_service.training.tower import TowerSettings, TowerStage
from compressor_service.training.tuning import TuningSettings
from deploy.local import EMBEDDED_MODEL

SHAPE = Shape(width=64, inner=96, heads=8, layers=2, prefusion_layers=2, context_rows=512)
TOWER = TowerSettings(
    steps=1, pictures=8, captions=8, films=0, width=64, layers=2, heads=4, inner=64, space=16, text_width=32,
    text_layers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of untaught weights, as a training leaves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    TowerStage(TOWER).finish(folder)
    raw, config = build_config(SHAPE, folder)
    network = Network(config)
    codes = initialise(network, write_tokenizer(folder), torch.Generator().manual_seed(4))
    network.write(folder, raw)
    save_model(SceneTokens(codes), str(folder / SCENES))
    (folder / "recipe.json").write_text(json.dumps({"seed": 7}))
    return folder


def settings(**changed: Any) -> dict[str, Any]:
    """Keyword arguments of train() for a training that is over at once."""
    silent: dict[str, Any] = {"on_progress": lambda progress: None, "on_note": lambda note: None}
    return {"seed": 0, "device": "cpu", "scale": 1e-9, "workers": 0, "threads": None, **silent, **changed}


def test_a_scaled_recipe_keeps_everything_but_its_steps_and_never_less_than_two_of_them() -> None:
    whole, tiny = (Recipe().scaled(seed=3, device="cpu", scale=scale) for scale in (1, 1e-9))
    assert whole.language.steps > 1000
    assert tiny.language.steps == tiny.tower.steps == 2
    assert tiny.language.model_dump(exclude={"steps"}) == whole.language.model_dump(exclude={"steps"})
    assert {stage.seed for stage in (whole.tower, whole.language, whole.alignment, whole.tuning)} == {3}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="--device cpu"):
        train(tmp_path / "run", **settings(device="cuda"))
    assert not (tmp_path / "run").exists()


def test_a_trained_model_goes_on_from_its_own_weights_and_its_recipe_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    recipe = Further(
        language=LanguageSettings(steps=2, rows=64, longest=32, shape=SHAPE),
        tuning=TuningSettings(steps=2, pictures=2, questions=1, clip_share=0, clips=2, long_clips=0, shape=SHAPE),
        start={"seed": 7},
    )
    run(recipe.plans(checkpoint), tmp_path / "run", recipe=recipe, seed=0)
    before, after = (load_file(one / "model.safetensors") for one in (checkpoint, tmp_path / "run" / "checkpoint"))
    assert before.keys() == after.keys()
    moved = [(after[name].float() - before[name].float()).abs().max() for name in before]
    assert 0 < max(moved) < 0.1  # four steps away, and no further
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["start"] == {"seed": 7}
    assert (tmp_path / "run" / "checkpoint" / SCENES).read_bytes() == (checkpoint / SCENES).read_bytes()


def test_words_and_what_frame_tokens_are_made_of_stay_when_a_language_model_goes_on(
    checkpoint: Path, tmp_path: Path
) -> None:
    settings = LanguageSettings(steps=3, rows=64, longest=32, shape=SHAPE)
    recipe = Further(language=settings, start={})
    [language, _] = recipe.plans(checkpoint)
    run([language], tmp_path / "run", recipe=recipe, seed=0)
    network = load_network(SHAPE, tmp_path / "run", SCHOOLED)
    stored = load_file(checkpoint / "model.safetensors")
    assert torch.equal(network.embed.weight, stored["model.embed_tokens.weight"].float())
    assert torch.equal(network.projector[0].weight, stored["model.mm_projector.0.weight"].float())
    assert not torch.equal(network.language.lm_head.weight, stored["lm_head.weight"].float())


def test_the_embedded_model_goes_on_and_what_it_was_trained_with_is_kept_beside_it(tmp_path: Path) -> None:
    train(tmp_path / "run", **settings(start=EMBEDDED_MODEL))
    checkpoint = tmp_path / "run" / "checkpoint"
    before = json.loads((EMBEDDED_MODEL / "recipe.json").read_text())
    assert json.loads((checkpoint / "recipe.json").read_text())["recipe"]["start"] == before
    curves = {path.name for path in (EMBEDDED_MODEL / "curves").glob("*.png")}
    assert {path.name for path in (checkpoint / "curves" / "before").glob("*.png")} == curves
    assert curves


def test_a_model_of_another_shape_does_not_go_on_and_the_difference_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="hidden_size is 64, not 256"):
        train(tmp_path / "run", **settings(start=checkpoint))


@pytest.mark.parametrize("missing", ["recipe.json", "config.json", "scenes.safetensors", "clip"])
def test_what_no_training_made_does_not_go_on(checkpoint: Path, tmp_path: Path, missing: str) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    shutil.rmtree(broken / missing) if missing == "clip" else (broken / missing).unlink()
    with pytest.raises(CannotTrain, match=missing):
        train(tmp_path / "run", **settings(start=broken))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", [b"junk", b""])
def test_damaged_scene_tokens_are_named(tmp_path: Path, damage: bytes) -> None:
    broken = shutil.copytree(EMBEDDED_MODEL, tmp_path / "broken")
    (broken / SCENES).write_bytes(damage)
    with pytest.raises(CannotTrain, match=f"{SCENES} is damaged"):
        train(tmp_path / "run", **settings(start=broken))


def test_scene_tokens_of_another_width_are_named(checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(EMBEDDED_MODEL, tmp_path / "broken")
    shutil.copy2(checkpoint / SCENES, broken)
    with pytest.raises(CannotTrain, match=f"{SCENES} is damaged"):
        train(tmp_path / "run", **settings(start=broken))
