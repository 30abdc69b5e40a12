"""The decoder layers before the language model, where frame and text first meet."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb

from compressor_service.llava_mini.attention import causal_mask


class LayerStates:
    """What each layer keeps of the rows it has read, for those behind them: keys and values (F, heads, S, width)."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """S."""
        return self._layers[0][0].shape[2]

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Put new rows behind the layer's kept ones and return all; called by the library's attention."""
        if layer in self._layers:
            held_keys, held_values = self._layers[layer]
            keys, values = torch.cat((held_keys, keys), dim=2), torch.cat((held_values, values), dim=2)
        self._layers[layer] = keys, values
        return keys, values


class PreFusion(nn.Module):
    """Llama layers over [patches ; compressed tokens ; text], causal.

    A frame's rows cannot see the text behind them. So they pass first and alone, with a text or without, and the text
    then reads what the layers kept of them: a frame token is the same to the bit whatever is asked about it.
    """

    def __init__(self, config: LlamaConfig, *, layers: int, rotary: LlamaRotaryEmbedding) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(layers))
        self.rotary = rotary

    def look(self, rows: Tensor, *, tokens: int) -> tuple[Tensor, LayerStates]:
        """Pass rows (F, S, D) of frames, and return their last `tokens` ones (F, C2, D) with what the layers kept."""
        states = LayerStates()
        rows = self._pass(self.layers[:-1], rows, states, past=0)
        # Nothing reads the patches behind the last layer: it owes them no more than their keys and values.
        patches, compressed = rows[:, :-tokens], rows[:, -tokens:]
        self._keep(cast(LlamaDecoderLayer, self.layers[-1]), patches, states)
        return self._pass(self.layers[-1:], compressed, states, past=patches.shape[1]), states

    def read(self, text: Tensor, states: LayerStates) -> Tensor:
        """Pass rows of text (F, L, D) behind their frames; `states` then holds the text too. Returns (F, L, D)."""
        return self._pass(self.layers, text, states, past=states.length)

    def _pass(self, layers: Iterable[nn.Module], rows: Tensor, states: LayerStates, *, past: int) -> Tensor:
        mask, turns = causal_mask(past, rows), self._turns(rows, first=past)
        for layer in layers:
            rows = layer(rows, attention_mask=mask, position_embeddings=turns, past_key_values=states)
        return rows

    def _keep(self, layer: LlamaDecoderLayer, rows: Tensor, states: LayerStates) -> None:
        """Do the part of a layer that later rows need of the first rows (F, S, D)."""
        attention = layer.self_attn
        normed = layer.input_layernorm(rows)
        split = (*rows.shape[:2], -1, attention.head_dim)
        keys = attention.k_proj(normed).view(split).transpose(1, 2)
        values = attention.v_proj(normed).view(split).transpose(1, 2)
        _, keys = apply_rotary_pos_emb(keys, keys, *self._turns(rows, first=0))
        states.update(keys, values, attention.layer_idx)

    def _turns(self, rows: Tensor, *, first: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(first, first + rows.shape[1], device=rows.device)[None]
        cosines, sines = self.rotary(rows, position_ids=positions)
        return cosines, sines
