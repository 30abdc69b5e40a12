"""The language model: rows of text and frames to an answer, id by id."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from compressor_service.llava_mini.attention import causal_mask


class ContextTooLong(ValueError):
    """More rows than the model can read; nothing is cut silently."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next id is chosen: at temperature 0 the likeliest, else drawn from the likeliest `top_p` of the mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, not zero or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, not above 0 and at most 1")


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """What the language model keeps of a prompt's beginning: keys and values (layers, 2, B, heads, length, width).

    Nothing writes to it: any number of answers start from the same one, at the same time.
    """

    states: Tensor

    @property
    def length(self) -> int:
        return self.states.shape[-2]

    @property
    def nbytes(self) -> int:
        return self.states.nbytes


class KeyValueCache:
    """Keys and values of one generation, allocated once at their final length."""

    def __init__(self, states: Tensor, prefix: Prefix | None = None) -> None:
        """Take a buffer (layers, 2, B, heads, capacity, width), and copy the prefix to its beginning."""
        self._states = states
        self._used = self._written = 0
        if prefix is not None:
            self._states[..., : prefix.length, :] = prefix.states
            self._used = prefix.length

    @property
    def length(self) -> int:
        return self._used

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Put new rows (B, heads, S, width) behind the used ones; called by the library's attention."""
        end = self._used + keys.shape[-2]
        held = self._states[layer]
        held[0, ..., self._used : end, :] = keys
        held[1, ..., self._used : end, :] = values
        self._written = end
        return held[0, ..., :end, :], held[1, ..., :end, :]

    def commit(self) -> None:
        """Count the rows that every layer has put."""
        self._used = self._written

    def freeze(self) -> Prefix:
        return Prefix(self._states[..., : self._used, :])


class LanguageModel(nn.Module):
    """Llama: the embedding that it shares with pre-fusion, layers, final norm and head."""

    def __init__(self, config: LlamaConfig, *, embed_tokens: nn.Embedding, rotary: LlamaRotaryEmbedding) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = rotary
        self._heads = int(config.num_key_value_heads or config.num_attention_heads)
        self._head_width = int(config.head_dim or config.hidden_size // config.num_attention_heads)

    def forward(self, rows: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Read rows (B, S, D), behind those of the cache, and return their final states (B, S, D)."""
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + rows.shape[1], device=rows.device)[None]
        turns = self.rotary(rows, position_ids=positions)
        mask = causal_mask(past, rows)
        for layer in self.layers:
            rows = layer(rows, attention_mask=mask, position_embeddings=turns, past_key_values=cache)
        if cache is not None:
            cache.commit()
        return self.norm(rows)

    def logits(self, rows: Tensor) -> Tensor:
        """Return (B, S, vocabulary) for rows (B, S, D)."""
        return self.lm_head(self(rows))

    def prefill(self, rows: Tensor) -> Prefix:
        """Read the beginning of a prompt, rows (1, S, D), once for every answer that starts with it."""
        cache = self._cache(rows, capacity=rows.shape[1])
        self(rows, cache)
        return cache.freeze()

    def steps(
        self, rows: Tensor, *, max_new_tokens: int, sampling: Sampling, prefix: Prefix | None = None
    ) -> Iterator[Tensor]:
        """Yield the ids (B,) that follow rows (B, S, D), on the CPU, `max_new_tokens` times."""
        before = 0 if prefix is None else prefix.length
        cache = self._cache(rows, capacity=before + rows.shape[1] + max_new_tokens, prefix=prefix)
        random = torch.Generator()
        if sampling.seed is None:
            random.seed()
        else:
            random.manual_seed(sampling.seed)
        for _ in range(max_new_tokens):
            ids = choose(self._next_logits(rows, cache), sampling, random)
            yield ids
            rows = self.embed_tokens(ids.to(rows.device))[:, None]

    @torch.inference_mode()  # here and not around `steps`: a mode must not stay on while a generator waits
    def _next_logits(self, rows: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits (B, vocabulary) behind the last row, in float32."""
        return self.lm_head(self(rows, cache)[:, -1]).float()

    def _cache(self, rows: Tensor, *, capacity: int, prefix: Prefix | None = None) -> KeyValueCache:
        shape = (len(self.layers), 2, len(rows), self._heads, capacity, self._head_width)
        return KeyValueCache(rows.new_empty(shape), prefix)


def choose(logits: Tensor, sampling: Sampling, random: torch.Generator) -> Tensor:
    """Choose ids (B,) by logits (B, vocabulary); drawn on the CPU, so that a seed means the same on every device."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).cpu()
    chances = torch.softmax(logits.cpu() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ranked, order = chances.sort(dim=-1, descending=True)
        likelier = ranked.cumsum(dim=-1) - ranked  # the mass before each: the likeliest id always stays
        chances = chances.scatter(-1, order, ranked.masked_fill(likelier >= sampling.top_p, 0.0))
    return torch.multinomial(chances, 1, generator=random)[:, 0]
