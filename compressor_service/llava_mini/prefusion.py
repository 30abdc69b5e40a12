"""The decoder layers before the language model, where frame and text first meet."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding


class PreFusion(nn.Module):
    """Llama layers over [patches ; compressed tokens ; text], causal: a frame token cannot depend on the text."""

    def __init__(self, config: LlamaConfig, *, layers: int, rotary: LlamaRotaryEmbedding) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(layers))
        self.rotary = rotary

    def forward(self, vision: Tensor, text: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """Fuse vision rows (F, S, D) and text rows (F, L, D) to rows (F, S + L, D); `visible` (F, L) is bool.

        A text row that is not visible takes no position and no other row reads it; what comes out of it has no
        meaning. Without `text` the vision rows alone pass.
        """
        if text is None or visible is None:
            rows, mask = vision, None
            positions = torch.arange(rows.shape[1], device=rows.device)[None]
        else:
            rows = torch.cat((vision, text), dim=1)
            seen = torch.cat((visible.new_ones(vision.shape[:2]), visible), dim=1)
            positions = (seen.long().cumsum(-1) - 1).masked_fill(~seen, 1)
            causal = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool, device=rows.device).tril()
            mask = causal & seen[:, None, None, :]  # (F, 1, S + L, S + L)
        turns = self.rotary(rows, position_ids=positions)
        for layer in self.layers:
            rows = layer(rows, attention_mask=mask, position_embeddings=turns)
        return rows
