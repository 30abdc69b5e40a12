"""The library's own Llama layers, one row behind the other: what faster ways through them are held against."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def pass_alone(layers: Iterable[nn.Module], rotary: LlamaRotaryEmbedding, rows: Tensor) -> Tensor:
    """Pass rows (B, P, D) through Llama layers, causally."""
    turns = rotary(rows, position_ids=torch.arange(rows.shape[1], device=rows.device)[None])
    for layer in layers:
        rows = layer(rows, position_embeddings=turns)
    return rows
