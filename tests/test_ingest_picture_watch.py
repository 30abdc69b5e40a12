"""Frozen and black pictures are told from live ones, real and drawn."""

import av
import numpy as np

from ingest.keyframe import KeyframeMaker
from ingest.picture_watch import PictureWatch
from tests.ingest_parts import real_clip

random = np.random.default_rng(4)
STREET = random.integers(40, 200, (336, 336, 3)).astype(np.uint8)
FROZEN_S = 10.0


def noisy(picture: np.ndarray, deviation: float) -> np.ndarray:
    return np.clip(picture + random.normal(0, deviation, picture.shape), 0, 255).astype(np.uint8)


def test_a_picture_that_stays_counts_as_frozen_only_after_a_while():
    watch = PictureWatch(FROZEN_S)
    told = [watch.see(noisy(STREET, 1.0), float(second)) for second in range(20)]
    assert told[:10] == [None] * 10
    assert all("frozen" in (one or "") for one in told[10:])


def test_the_noise_of_a_sensor_and_a_small_thing_that_moves_are_live():
    for changed in (lambda second: noisy(STREET, 5.0), with_something_at):
        watch = PictureWatch(FROZEN_S)
        assert {watch.see(changed(second), float(second)) for second in range(30)} == {None}


def with_something_at(second: int) -> np.ndarray:
    picture = STREET.copy()
    picture[100:110, 8 * second : 8 * second + 10] = 255
    return picture


def test_a_real_film_is_live():
    watch = PictureWatch(0.5)
    maker = KeyframeMaker(336)
    with av.open(str(real_clip("bikes"))) as container:
        for image in container.decode(video=0):
            assert watch.see(maker.pixels(image), image.time) is None


def test_black_is_told_at_once_and_a_dark_night_with_a_lamp_is_not_black():
    black = np.full((336, 336, 3), 16, np.uint8)
    assert PictureWatch(FROZEN_S).see(noisy(black, 2.0), 0.0) == "the picture is black"
    night = black.copy()
    night[10:24, 10:24] = 120
    assert PictureWatch(FROZEN_S).see(night, 0.0) is None


def test_a_new_size_begins_anew():
    watch = PictureWatch(FROZEN_S)
    watch.see(STREET, 0.0)
    assert watch.see(STREET[:168, :168], 20.0) is None
