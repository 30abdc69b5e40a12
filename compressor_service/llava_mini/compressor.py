"""Query-based compression: hundreds of patch features in, a few vision tokens out."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Compressor(nn.Module):
    """Learned queries read one frame's patches with a single cross-attention.

    Parameter names are those of the published weights.
    """

    def __init__(self, *, size: int, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(size**2, width))
        self.pos_embed = nn.Parameter(torch.empty(size**2, width))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q = nn.LayerNorm(width)
        self.ln_kv = nn.LayerNorm(width)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Compress a square map of patches (F, N, V) to tokens (F, C2, V).

        Also returns the attention they rest on, (F, C2, N), its mean over the heads.
        """
        values = self.ln_kv(patches)
        keys = values + self._position_code(patches.shape[1])
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(patches), -1, -1)
        tokens, attention = self.attn(queries, keys, values)
        return tokens, attention

    def _position_code(self, patches: int) -> Tensor:
        """Stretch the code of the query grid (C2, V) over the patch grid (N, V).

        The weights were trained with this stretch and not with a code of the finer grid: one query gives
        every patch the same code.
        """
        source, target = math.isqrt(len(self.pos_embed)), math.isqrt(patches)
        if source == target:
            return self.pos_embed
        grid = self.pos_embed.float().reshape(1, source, source, -1).permute(0, 3, 1, 2)
        stretched = functional.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
        return stretched.permute(0, 2, 3, 1).flatten(0, 2).to(self.pos_embed.dtype)
