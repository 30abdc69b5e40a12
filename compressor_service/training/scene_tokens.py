"""What a frame token should say: the language model first learns to read these, then pictures learn to become them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor_service.training.examples import FLAGS, Facts
from compressor_service.training.scene import COLOURS, COLUMNS, KINDS, PLACES, SIZES


class Codes(NamedTuple):
    """Vectors to start from: of kinds (8, D), of colours (6, D), of the setting's flags (5, D), and of pairs."""

    kinds: Tensor
    colours: Tensor
    flags: Tensor
    colour_of_kind: Tensor  # (8, 6, D)
    place_of_kind: Tensor  # (8, 6, D)
    size_of_kind: Tensor  # (8, 2, D)
    place_of_colour: Tensor  # (6, 6, D)

    @classmethod
    def blank(cls, width: int) -> "Codes":
        kinds, colours, places, sizes = len(KINDS), len(COLOURS), len(PLACES), len(SIZES)
        shapes = (
            (kinds,), (colours,), (FLAGS,), (kinds, colours), (kinds, places), (kinds, sizes), (colours, places),
        )  # fmt: skip
        return cls(*(torch.zeros(*shape, width) for shape in shapes))


class SceneTokens(nn.Module):
    """Embeds the facts of a picture as one vector (D,): the sum of its things, and of its setting.

    A thing is the sum of what it is, and of what belongs together in it, two by two: the sum over several things
    would else not tell the red car and the blue dog from the blue car and the red dog. It exists in training alone.
    """

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.kinds = nn.Parameter(_with_none(codes.kinds))
        self.colours = nn.Parameter(_with_none(codes.colours))
        self.colour_of_kind = nn.Parameter(_with_none(_with_none(codes.colour_of_kind, dim=1)).flatten(0, 1))
        self.place_of_kind = nn.Parameter(_with_none(codes.place_of_kind).flatten(0, 1))
        self.size_of_kind = nn.Parameter(_with_none(codes.size_of_kind).flatten(0, 1))
        self.place_of_colour = nn.Parameter(_with_none(codes.place_of_colour).flatten(0, 1))
        self.flags = nn.Parameter(codes.flags.clone())

    def forward(self, facts: Facts) -> Tensor:
        """Return (B, T, D)."""
        columns = (facts.xs * len(COLUMNS)).long().clamp(0, len(COLUMNS) - 1)
        places = facts.lanes * len(COLUMNS) + columns
        kinds, colours = facts.kinds, facts.colours
        things = (
            self.kinds[kinds]
            + self.colours[colours]
            + self.colour_of_kind[kinds * (len(COLOURS) + 1) + colours]
            + self.place_of_kind[kinds * len(PLACES) + places]
            + self.size_of_kind[kinds * len(SIZES) + facts.sizes]
            + self.place_of_colour[colours * len(PLACES) + places]
        )
        there = (kinds > 0)[..., None]
        return (things * there).sum(dim=-2) + (facts.flags - 0.5) @ self.flags


def _with_none(vectors: Tensor, dim: int = 0) -> Tensor:
    """Put a vector of zeros first: that of nothing, or of no colour."""
    return torch.cat((torch.zeros_like(vectors.narrow(dim, 0, 1)), vectors), dim=dim)
