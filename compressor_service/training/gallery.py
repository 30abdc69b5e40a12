"""Clips looked at once: their patch features, kept in a file, for as many questions as one likes."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compressor_service.training.draw import Camera, draw, jpeg_round
from compressor_service.training.eyes import Eyes
from compressor_service.training.film import film_keyframes
from compressor_service.training.questions import Story
from compressor_service.training.scene import Clip, draw_clip

_LENGTHS = (4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
_LONG_LENGTHS = (96, 128, 192, 256, 320)


class Gallery:
    """`count` clips of several lengths: as many of each, and a few that last minutes."""

    def __init__(self, path: Path, eyes: Eyes, *, seed: int, count: int, long_count: int, film_share: float) -> None:
        """Look at all clips and keep them at `path`, or take up where that was interrupted."""
        lengths = [_LENGTHS[number % len(_LENGTHS)] for number in range(count)]
        lengths += [_LONG_LENGTHS[number % len(_LONG_LENGTHS)] for number in range(long_count)]
        self._clips = [draw_clip(_random(seed, number), slots=slots) for number, slots in enumerate(lengths)]
        self._starts = np.cumsum([0, *lengths])
        self._film_share, self._seed = film_share, seed
        self.lengths = np.array(lengths)
        self.events = np.array([len(clip.events) for clip in self._clips])  # how many happen in each
        self._features = self._look(path, eyes)

    def __len__(self) -> int:
        return len(self._clips)

    def story(self, number: int) -> Story:
        return Story.of(self._clips[number])

    def features(self, numbers: Sequence[int]) -> NDArray[np.float16]:
        """Return the features (B, T, N, V) of clips of one length."""
        return np.stack([self._features[self._starts[one] : self._starts[one + 1]] for one in numbers])

    def of_length(self, slots: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.lengths == slots)

    def _look(self, path: Path, eyes: Eyes) -> NDArray[np.float16]:
        done_path = path.with_suffix(".json")
        facts = {"seed": self._seed, "clips": len(self), "frames": int(self._starts[-1]), "films": self._film_share}
        state = json.loads(done_path.read_text()) if done_path.exists() else {}
        done = state["done"] if {**state, "done": None} == {**facts, "done": None} and path.exists() else 0
        shape = eyes.features(np.zeros((1, 112, 112, 3), np.uint8)).shape[1:]
        kept = np.lib.format.open_memmap(
            path, mode="r+" if done else "w+", dtype=np.float16, shape=(int(self._starts[-1]), *shape)
        )
        for number in range(done, len(self)):
            clip, random = self._clips[number], _random(self._seed, number, 1)
            kept[self._starts[number] : self._starts[number + 1]] = (
                eyes.features(self._take(clip, random)).cpu().numpy().astype(np.float16)
            )
            if number % 50 == 49 or number + 1 == len(self):
                kept.flush()
                unfinished = done_path.with_suffix(".part")
                unfinished.write_text(json.dumps({**facts, "done": number + 1}))
                unfinished.replace(done_path)
        return kept

    def _take(self, clip: Clip, random: np.random.Generator) -> NDArray[np.uint8]:
        """Return the keyframes (T, H, W, 3) of a clip; a part of the clips goes through a real film for them."""
        if random.random() < self._film_share:
            return np.stack(film_keyframes(clip, fps=4, seed=int(random.integers(2**31))))
        camera = Camera.draw(random)
        return np.stack(
            [jpeg_round(camera.take(draw(view, moment=4 * slot), random)) for slot, view in enumerate(clip.views())]
        )


def _random(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)
