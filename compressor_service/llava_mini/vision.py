"""The CLIP tower: pixels to patch features, and to the picture's place in the image-text space."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel


class Seen(NamedTuple):
    """One pass of the tower: `patches` (F, N, V) for the model, `vectors` (F, P) of unit length for search."""

    patches: Tensor
    vectors: Tensor


class VisionTower(nn.Module):
    """A CLIP vision model read at two depths at once.

    The language side was trained on the states of `select_layer`, search needs the last ones, pooled. Without a
    `projection` into the image-text space the pooled vector itself is the search vector.
    """

    def __init__(self, config: CLIPVisionConfig, *, select_layer: int, projection_width: int | None) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(config)
        self.projection = (
            None if projection_width is None else nn.Linear(config.hidden_size, projection_width, bias=False)
        )
        self._select_layer = select_layer

    def restore_positions(self, device: torch.device) -> None:
        """Refill the one buffer that no checkpoint stores, after building on the meta device."""
        embeddings = self.tower.embeddings
        positions = torch.arange(embeddings.num_positions, device=device).expand(1, -1)
        embeddings.register_buffer("position_ids", positions, persistent=False)

    def forward(self, pixels: Tensor) -> Seen:
        """Read preprocessed pictures (F, 3, H, W)."""
        states = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        patches = states
        for depth, layer in enumerate(self.tower.encoder.layers, start=1):
            states = layer(states, None)
            if depth == self._select_layer:
                patches = states
        pooled = self.tower.post_layernorm(states[:, 0])
        if self.projection is not None:
            pooled = self.projection(pooled)
        return Seen(patches[:, 1:], functional.normalize(pooled.float(), dim=-1))
