import pickle

import numpy as np
import pytest
import torch

from compressor_service.llava_mini.checkpoint import open_checkpoint
from compressor_service.llava_mini.search_text import SearchText
from compressor_service.llava_mini.vision import VisionTower
from compressor_service.training.tower import (
    TowerSettings,
    TowerStage,
    measure,
    search_quality,
    token_ids,
)
from tests.untrained import write_untrained_checkpoint

_TINY = TowerSettings(
    steps=12, pictures=8, captions=8, warm_up=2, width=32, layers=2, heads=2, inner=64, space=16, text_width=32,
    text_layers=1,
)  # fmt: skip


def _train(stage, start, stop):
    return [stage.step(number, stage.batch(number))["loss"] for number in range(start, stop)]


def test_a_batch_is_the_same_wherever_it_is_made():
    make = TowerStage(_TINY).batch
    one, other = make(3), pickle.loads(pickle.dumps(make))(3)
    assert one.pictures.shape == (8, 112, 112, 3)
    assert one.patches.shape[:2] == (8, 49)
    assert one.truth.shape == (8, 8)
    assert all((left == right).all() for left, right in zip(one, other, strict=True))
    assert not (one.pictures == make(4).pictures).all()


def test_training_learns():
    settings = _TINY.model_copy(update={"steps": 40, "films": 0})
    losses = _train(TowerStage(settings), 0, 40)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) * 0.85


def test_training_goes_on_bit_by_bit_as_if_it_had_not_stopped(tmp_path):
    whole = TowerStage(_TINY)
    _train(whole, 0, 3)
    torch.save(whole.state(), tmp_path / "state.pt")
    resumed = TowerStage(_TINY)
    resumed.restore(torch.load(tmp_path / "state.pt"))
    assert _train(whole, 3, 6) == _train(resumed, 3, 6)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_quality_is_measured_in_parts():
    stage = TowerStage(_TINY)
    scores = measure(stage, seed=5, batches=1) | search_quality(stage, seed=6, minutes=1)
    assert {"kind", "colour", "size", "place", "pair", "whole_flags", "found_5"} <= set(scores)
    assert all(0 <= score <= 1 for score in scores.values())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A checkpoint whose tower was trained a little."""
    folder = write_untrained_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    # The language side is not looked at here, so only the tower's width has to be its own.
    stage = TowerStage(_TINY.model_copy(update={"width": 64, "layers": 3}))
    _train(stage, 0, 2)
    stage.finish(folder)
    return folder, stage


def test_the_service_reads_the_tower_as_it_was_trained(finished):
    folder, stage = finished
    checkpoint = open_checkpoint(folder)
    assert checkpoint.vector_width == 16
    config = stage.model.config.vision_config
    tower = VisionTower(config, select_layer=2, projection_width=16)
    checkpoint.tower.fill(tower.tower, checkpoint.tower_prefix, dtype=torch.float32, device=torch.device("cpu"))
    checkpoint.clip.weights.fill(
        tower.projection, "visual_projection.", dtype=torch.float32, device=torch.device("cpu")
    )
    pictures = stage.batch(0).pictures
    with torch.inference_mode():
        seen = tower(stage.normalised(pictures))
        assert torch.allclose(seen.vectors, stage.read(pictures).vectors, atol=3e-2)


def test_the_service_reads_text_as_it_was_trained(finished):
    folder, stage = finished
    texts = ["a red car", "is the gate open?", "a zebra"]
    found = SearchText(open_checkpoint(folder).clip, dtype=torch.float32, device=torch.device("cpu")).embed(texts)
    with torch.inference_mode():
        assert torch.allclose(found, stage.embed(token_ids(texts)), atol=3e-2)
