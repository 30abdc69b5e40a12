"""Seeds that never meet: what is learned from, what is looked at on the way, and what a model is judged by at last."""

from typing import Literal

import numpy as np

Split = Literal["train", "validation", "test"]

# Words of a seed sequence's key. Sequences that are spawned without one count from 0, so none of those is met either.
_KEYS: dict[Split, int] = {"train": 0x7EA1_0001, "validation": 0x7EA1_0002, "test": 0x7EA1_0003}


def split_seed(split: Split, seed: int, *key: int) -> np.random.SeedSequence:
    """Return the seed of one split; `key` names a part of it, say a group and a scene's number.

    Every (split, seed, key) is a stream of its own: a scene is the same however many are drawn beside it.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}, not zero or more")
    return np.random.SeedSequence(seed, spawn_key=(_KEYS[split], *key))
