"""Many questions about one picture or clip in one pass: each reads the shared rows and itself, none of the others.

The same numbers as one pass a question, for the price of the shared rows once.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb


def pass_alone(layers: Iterable[nn.Module], rotary: LlamaRotaryEmbedding, rows: Tensor) -> Tensor:
    """Pass rows (B, P, D) through Llama layers, causally, with nothing behind them."""
    turns = rotary(rows, position_ids=torch.arange(rows.shape[1], device=rows.device)[None])
    for layer in cast(Iterable[LlamaDecoderLayer], layers):
        rows = rows + _attend(layer, layer.input_layernorm(rows), turns, rows.shape[1], 0)
        rows = rows + layer.mlp(layer.post_attention_layernorm(rows))
    return rows


def pass_packed(
    layers: Iterable[nn.Module], rotary: LlamaRotaryEmbedding, shared: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Pass shared rows (B, P, D), and n times own rows (B, n, L, D) behind them, through Llama layers, causally.

    Positions are counted from 0 on the shared rows and go on alike in each of the n. Returns both, in these shapes.
    """
    (batch, first, _), (count, length) = shared.shape, own.shape[1:3]
    rows = torch.cat((shared, own.flatten(1, 2)), dim=1)
    once = torch.arange(first + length, device=rows.device)
    positions = torch.cat((once[:first], once[first:].repeat(count)))[None]
    turns = rotary(rows, position_ids=positions)
    for layer in cast(Iterable[LlamaDecoderLayer], layers):
        rows = rows + _attend(layer, layer.input_layernorm(rows), turns, first, count)
        rows = rows + layer.mlp(layer.post_attention_layernorm(rows))
    return rows[:, :first], rows[:, first:].view(batch, count, length, -1)


def _attend(layer: LlamaDecoderLayer, rows: Tensor, turns: tuple[Tensor, Tensor], first: int, count: int) -> Tensor:
    attention = layer.self_attn
    split = (*rows.shape[:2], -1, attention.head_dim)
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))  # once, not for each of the three
    queries = attention.q_proj(rows).view(split).transpose(1, 2)
    keys = attention.k_proj(rows).view(split).transpose(1, 2)
    values = attention.v_proj(rows).view(split).transpose(1, 2)
    queries, keys = apply_rotary_pos_emb(queries, keys, *turns)
    queries = queries * attention.scaling
    keys, values = keys.to(rows.dtype), values.to(rows.dtype)
    queries = queries.to(rows.dtype)
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    shared = _softmax(queries[:, :, :first] @ keys[:, :, :first].mT, first) @ values[:, :, :first]
    if not count:
        return attention.o_proj(shared.transpose(1, 2).flatten(2))
    batch, heads, _, width = queries.shape
    own_queries, own_keys, own_values = (
        part[:, :, first:].reshape(batch, heads, count, -1, width) for part in (queries, keys, values)
    )
    length = own_queries.shape[3]
    to_shared = queries[:, :, first:] @ keys[:, :, :first].mT  # (B, heads, n*L, P)
    to_own = (own_queries @ own_keys.mT).view(batch, heads, count * length, length)
    weights = _softmax(torch.cat((to_shared, to_own), dim=-1), length)
    read = weights[..., :first] @ values[:, :, :first]
    own = weights[..., first:].reshape(batch, heads, count, length, length) @ own_values
    read = read + own.reshape(read.shape)
    return attention.o_proj(torch.cat((shared, read), dim=2).transpose(1, 2).flatten(2))


def _softmax(scores: Tensor, length: int) -> Tensor:
    """Softmax scores (B, heads, n * length, before + length): all rows before, and one's own up to oneself."""
    unseen = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    count = scores.shape[-2] // length
    hidden = torch.zeros(length, scores.shape[-1], dtype=scores.dtype, device=scores.device)
    hidden[:, -length:] = hidden[:, -length:].masked_fill(unseen, float("-inf"))
    return (scores + hidden.repeat(count, 1)).softmax(dim=-1)
