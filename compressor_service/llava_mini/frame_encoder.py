"""The half of the model that looks: pixels to frame tokens, and text through the same layers."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from compressor_service.llava_mini.checkpoint import Checkpoint
from compressor_service.llava_mini.compressor import Compressor
from compressor_service.llava_mini.config import COMPRESSOR_HEADS
from compressor_service.llava_mini.prefusion import LayerStates, PreFusion
from compressor_service.llava_mini.vision import VisionTower


class Looked(NamedTuple):
    """One look at frames: their tokens (F, C2, D), search vectors (F, P), and what a text behind them needs."""

    tokens: Tensor
    vectors: Tensor
    states: LayerStates


class FrameEncoder(nn.Module):
    """The half that looks: tower, compressor, projector and pre-fusion layers."""

    def __init__(self, checkpoint: Checkpoint, rotary: LlamaRotaryEmbedding) -> None:
        super().__init__()
        config = checkpoint.config
        self.tower = VisionTower(
            config.vision,
            select_layer=config.vision_select_layer,
            projection_width=None if checkpoint.clip is None else checkpoint.clip.width,
        )
        self.compressor = Compressor(size=config.compressor_size, width=config.vision_width, heads=COMPRESSOR_HEADS)
        self.projector = nn.Sequential(
            nn.Linear(config.vision_width, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )
        self.prefusion = PreFusion(config.llama, layers=config.prefusion_layers, rotary=rotary)
        self._config = config

    def load(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        checkpoint.tower.fill(self.tower.tower, checkpoint.tower_prefix, dtype=dtype, device=device)
        self.tower.restore_positions(device)
        if self.tower.projection is not None and checkpoint.clip is not None:
            checkpoint.clip.weights.fill(self.tower.projection, "visual_projection.", dtype=dtype, device=device)
        for module, prefix in (
            (self.compressor, "model.compressor."),
            (self.projector, "model.mm_projector."),
            (self.prefusion.layers, "model.prefusion_layers."),
        ):
            checkpoint.weights.fill(module, prefix, dtype=dtype, device=device)

    def look(self, pixels: Tensor) -> Looked:
        """Look at pixels (F, parts, 3, H, W): the one pass behind every frame token, stored or not."""
        frames, parts = pixels.shape[:2]
        patches, vectors = self.tower(pixels.flatten(0, 1))
        patches = patches.reshape(frames, parts, *patches.shape[1:])  # (F, parts, N, V)
        whole, vectors = patches[:, -1], vectors.reshape(frames, parts, -1)[:, -1]
        detail = whole if parts == 1 else self._one_map(patches[:, :-1])
        compressed, _ = self.compressor(detail)
        seen = (whole, compressed) if parts == 1 else (detail, whole, compressed)
        rows = torch.cat([self.projector(part) for part in seen], dim=1)
        tokens, states = self.prefusion.look(rows, tokens=self._config.tokens_per_frame)
        return Looked(tokens, vectors, states)

    def fuse_text(self, plain: Tensor, visible: Tensor, seen: Looked) -> Tensor:
        """Return the embeddings of a text (L, D) as every frame fuses them: (F, L, D).

        Rows that are not `visible` (L,) stay plain: they take no position and no other row reads them, so they are
        left out of the pass.
        """
        fused = plain.repeat(len(seen.tokens), 1, 1)
        if visible.any():
            fused[:, visible] = self.prefusion.read(fused[:, visible], seen.states)
        return fused

    def _one_map(self, crops: Tensor) -> Tensor:
        """Lay the patches of R*R crops (F, R*R, N, V) out as one map of the picture (F, R*R*N, V), row by row."""
        ratio, grid = self._config.resolution_ratio, self._config.grid
        tiles = crops.reshape(len(crops), ratio, ratio, grid, grid, -1)
        return tiles.transpose(2, 3).flatten(1, 4)
