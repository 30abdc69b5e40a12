"""What callers see of the compressor. Imports no torch: most processes of the service never run a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.format import TokenFormat


class BadPicture(ValueError):
    """The bytes are not a picture that can be read."""


class SearchUnavailable(RuntimeError):
    """The checkpoint brings no text half of CLIP, so text cannot be searched for."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the service says about its model.

    `untrained` means that its answers carry no meaning, `world` that it knows nothing but a drawn world of this name.
    """

    name: str
    format: TokenFormat
    input_size_px: int
    device: str
    searches_text: bool
    untrained: bool
    world: str | None


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a model made of n pictures: of the r that are `readable` (n,), tokens (r, C2, D) and vectors (r, P).

    `fingerprint` is that of the model: who keeps the tokens must not take them for another one's.
    """

    fingerprint: str
    readable: NDArray[np.bool_]
    tokens: NDArray[np.generic]
    vectors: NDArray[np.float32]

    @classmethod
    def join(cls, parts: Sequence["Encoded"]) -> "Encoded":
        """Put at least one part behind the other. ValueError for parts of several models."""
        [fingerprint] = {part.fingerprint for part in parts}
        return cls(
            fingerprint,
            np.concatenate([part.readable for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.vectors for part in parts]),
        )
