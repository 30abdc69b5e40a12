"""What a frame token should say: the language model first learns to read these, then pictures learn to become them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor_service.training.examples import FLAGS, Facts
from compressor_service.training.scene import COLOURS, COLUMNS, KINDS, LANES, SIZES

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": COLOURS,
    "size": SIZES,
    "lane": LANES,
    "column": COLUMNS,
}
NAMED = ("kind", "colour", "lane", "column")  # attributes that stand in a frame token alone, too
PAIRS = tuple((one, other) for one in ("kind", "colour") for other in ATTRIBUTES if other not in ("kind", one))


class Codes(NamedTuple):
    """Vectors to start from: of the values of named attributes (n, D), of pairs (n, m, D), of the setting's flags."""

    values: dict[str, Tensor]
    pairs: dict[tuple[str, str], Tensor]
    flags: Tensor  # (5, D)
    frame: Tensor  # (D,), of every picture

    @classmethod
    def blank(cls, width: int) -> "Codes":
        sizes = {name: len(words) for name, words in ATTRIBUTES.items()}
        return cls(
            {name: torch.zeros(sizes[name], width) for name in NAMED},
            {(one, other): torch.zeros(sizes[one], sizes[other], width) for one, other in PAIRS},
            torch.zeros(FLAGS, width),
            torch.zeros(width),
        )


class SceneTokens(nn.Module):
    """Embeds the facts of a picture as one vector (D,): the sum of its things, and of its setting.

    A thing is the sum of its kind, its colour, and what belongs together in it, two by two: the sum over several things
    would else not tell the red car and the blue dog from the blue car and the red dog. It exists in training alone.
    """

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.values = nn.ParameterDict({name: _with_none(codes.values[name]) for name in NAMED})
        self.pairs = nn.ParameterDict(
            {
                f"{one}_{other}": _with_none(_with_none(codes.pairs[one, other], dim=1)).flatten(0, 1)
                for one, other in PAIRS
            }
        )
        self.flags = nn.Parameter(codes.flags.clone())
        self.frame = nn.Parameter(codes.frame.clone())

    def forward(self, facts: Facts) -> Tensor:
        """Return (B, T, D)."""
        columns = (facts.xs * len(COLUMNS)).long().clamp(0, len(COLUMNS) - 1)
        numbers = {
            "kind": facts.kinds,
            "colour": facts.colours,
            "size": facts.sizes + 1,
            "lane": facts.lanes + 1,
            "column": columns + 1,
        }
        parts = [self.values[name][numbers[name]] for name in NAMED]
        for one, other in PAIRS:
            pair = numbers[one] * (len(ATTRIBUTES[other]) + 1) + numbers[other]
            parts.append(self.pairs[f"{one}_{other}"][pair])
        there = (facts.kinds > 0)[..., None]
        return (sum(parts) * there).sum(dim=-2) + (facts.flags - 0.5) @ self.flags + self.frame


def _with_none(vectors: Tensor, dim: int = 0) -> Tensor:
    """Put a vector of zeros first: that of nothing, or of no colour."""
    return torch.cat((torch.zeros_like(vectors.narrow(dim, 0, 1)), vectors), dim=dim)
