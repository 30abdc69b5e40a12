"""Many questions about one picture or clip in one pass: each reads the shared rows and itself, none of the others.

The same numbers as one pass a question, for the price of the shared rows once.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb


def pass_packed(
    layers: Iterable[nn.Module], rotary: LlamaRotaryEmbedding, shared: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass shared rows (B, P, D), and n times own rows (B, n, L, D) behind them, through Llama layers, causally.

    Positions are counted from 0 on the shared rows and go on alike in each of the n. Returns both, in these shapes.
    """
    (batch, first, _), (count, length) = shared.shape, own.shape[1:3]
    rows, turns = _side_by_side(rotary, shared, own)
    for layer in cast(Iterable[LlamaDecoderLayer], layers):
        rows = rows + _attend(layer, layer.input_layernorm(rows), turns, first, count)
        rows = rows + layer.mlp(layer.post_attention_layernorm(rows))
    return rows[:, :first], rows[:, first:].view(batch, count, length, -1)


def look(layer: nn.Module, rotary: LlamaRotaryEmbedding, shared: Tensor, own: Tensor) -> Tensor:
    """Return where a layer's heads look from own rows (B, n, L, D): log weights (B, heads, n, L, P + L)."""
    layer = cast(LlamaDecoderLayer, layer)
    rows, turns = _side_by_side(rotary, shared, own)
    queries, keys = _turned(layer, layer.input_layernorm(rows), turns)
    scores = _own_scores(queries, keys, shared.shape[1], own.shape[1])
    return torch.unflatten(scores.float().log_softmax(dim=-1), 2, own.shape[1:3])


def _side_by_side(rotary: LlamaRotaryEmbedding, shared: Tensor, own: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return all rows (B, P + n * L, D), and how far rotary positions turn them."""
    first, (count, length) = shared.shape[1], own.shape[1:3]
    rows = torch.cat((shared, own.flatten(1, 2)), dim=1)
    once = torch.arange(first + length, device=rows.device)
    positions = torch.cat((once[:first], once[first:].repeat(count)))[None]
    return rows, rotary(rows, position_ids=positions)


def _attend(layer: LlamaDecoderLayer, rows: Tensor, turns: tuple[Tensor, Tensor], first: int, count: int) -> Tensor:
    attention = layer.self_attn
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))  # once, not for each of the three
    queries, keys = _turned(layer, rows, turns)
    values = _by_head(layer, attention.v_proj(rows)).to(rows.dtype)
    weights = _hide_later(queries[:, :, :first] @ keys[:, :, :first].mT, first).softmax(dim=-1)
    shared = weights @ values[:, :, :first]
    weights = _own_scores(queries, keys, first, count).softmax(dim=-1)
    read = weights[..., :first] @ values[:, :, :first]
    own = torch.unflatten(weights[..., first:], 2, (count, -1)) @ torch.unflatten(values[:, :, first:], 2, (count, -1))
    read = read + own.flatten(2, 3)
    return attention.o_proj(torch.cat((shared, read), dim=2).transpose(1, 2).flatten(2))


def _turned(layer: LlamaDecoderLayer, rows: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return queries, scaled, and keys (B, heads, rows, width)."""
    attention = layer.self_attn
    queries, keys = attention.q_proj(rows), _by_head(layer, attention.k_proj(rows))
    queries = torch.unflatten(queries, 2, (-1, attention.head_dim)).transpose(1, 2)
    queries, keys = apply_rotary_pos_emb(queries, keys, *turns)
    return (queries * attention.scaling).to(rows.dtype), keys.to(rows.dtype)


def _by_head(layer: LlamaDecoderLayer, projected: Tensor) -> Tensor:
    """Return keys or values (B, heads, rows, width), again for every query that shares them."""
    attention = layer.self_attn
    parts = torch.unflatten(projected, 2, (-1, attention.head_dim)).transpose(1, 2)
    groups = attention.num_key_value_groups
    return parts.repeat_interleave(groups, dim=1) if groups > 1 else parts


def _own_scores(queries: Tensor, keys: Tensor, first: int, count: int) -> Tensor:
    """Return how own rows score rows that they may see (B, heads, n * L, P + L): the shared, and theirs up to them."""
    to_shared = queries[:, :, first:] @ keys[:, :, :first].mT
    own_queries, own_keys = (torch.unflatten(part[:, :, first:], 2, (count, -1)) for part in (queries, keys))
    to_own = (own_queries @ own_keys.mT).flatten(2, 3)
    return _hide_later(torch.cat((to_shared, to_own), dim=-1), to_own.shape[-1])


def _hide_later(scores: Tensor, length: int) -> Tensor:
    """Hide from scores (B, heads, n * length, before + length) what comes later than oneself."""
    unseen = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    count = scores.shape[-2] // length
    hidden = torch.zeros(length, scores.shape[-1], dtype=scores.dtype, device=scores.device)
    hidden[:, -length:] = hidden[:, -length:].masked_fill(unseen, float("-inf"))
    return scores + hidden.repeat(count, 1)
