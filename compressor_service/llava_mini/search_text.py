"""Text to the image-text space of CLIP, where frames are searched."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase

from compressor_service.llava_mini.checkpoint import BadCheckpoint, Clip, name_of


class SearchText:
    """The text half of a CLIP model, with its tokenizer."""

    def __init__(self, clip: Clip, *, dtype: torch.dtype, device: torch.device) -> None:
        """Raises BadCheckpoint."""
        self._tokenizer = _tokenizer(clip)
        self._device = device
        self._positions = int(clip.text.max_position_embeddings)
        with torch.device("meta"):
            self._model = CLIPTextModel(clip.text)
            self._projection = nn.Linear(clip.text.hidden_size, clip.width, bias=False)
        clip.weights.fill(self._model, "text_model.", dtype=dtype, device=device)
        clip.weights.fill(self._projection, "text_projection.", dtype=dtype, device=device)
        positions = torch.arange(self._positions, device=device).expand(1, -1)
        self._model.embeddings.register_buffer("position_ids", positions, persistent=False)
        self._model.train(False)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (n, P) in float32, on the CPU."""
        return torch.stack([self._embed(text) for text in texts])

    def _embed(self, text: str) -> Tensor:
        """A text beyond the model's context is the mean of its pieces: none of it is cut off."""
        vectors = [self._project(piece) for piece in self._pieces(text)]
        return functional.normalize(torch.stack(vectors).mean(dim=0), dim=-1).cpu()

    def _project(self, ids: list[int]) -> Tensor:
        states = self._model(input_ids=torch.tensor([ids], device=self._device))
        return functional.normalize(self._projection(states.pooler_output[0]).float(), dim=-1)

    def _pieces(self, text: str) -> Iterator[list[int]]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        room = self._positions - 2  # beside the marks of beginning and end
        pieces = max(1, math.ceil(len(ids) / room))
        size = math.ceil(len(ids) / pieces)  # equal pieces: a short rest would weigh as much as a full one
        for start in range(pieces):
            yield [self._begin, *ids[start * size : (start + 1) * size], self._end]

    @property
    def _begin(self) -> int:
        return int(self._tokenizer.bos_token_id)

    @property
    def _end(self) -> int:
        return int(self._tokenizer.eos_token_id)


def _tokenizer(clip: Clip) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(clip.folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BadCheckpoint(f"{name_of(clip.folder)} has no CLIP tokenizer that can be loaded: {error}") from error
    return tokenizer
