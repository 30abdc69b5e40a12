"""The border between numpy and torch: keyframes in, frame tokens, fused text and search vectors out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor_service import preprocess
from compressor_service.facts import ModelFacts, SearchUnavailable
from compressor_service.llava_mini.checkpoint import Checkpoint, Dtype, open_checkpoint
from compressor_service.llava_mini.model import LlavaMini
from compressor_service.llava_mini.search_text import SearchText
from compressor_service.settings import CompressorSettings
from store.format import TokenFormat


class Encoder:
    """Looks at keyframes with one model. Only `decode` may run in several threads: a pass uses the whole device."""

    def __init__(self, model: LlavaMini, *, name: str, format: TokenFormat, text: SearchText | None) -> None:
        self.format = format
        self._model = model
        self._name = name
        self._text = text

    @classmethod
    def load(cls, path_or_hub_name: str | Path, dtype: Dtype, settings: CompressorSettings) -> "Encoder":
        """Load the looking half of a checkpoint. Raises BadCheckpoint."""
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        model = LlavaMini.from_pretrained(
            path_or_hub_name,
            dtype=dtype,
            device=settings.device,
            part="compressor",
            frames_per_pass=settings.max_batch_frames,
        )
        checkpoint = open_checkpoint(path_or_hub_name)
        text = None
        if checkpoint.clip is not None and checkpoint.clip.reads_text:
            text = SearchText(checkpoint.clip, dtype=model.dtype, device=model.device)
        return cls(model, name=checkpoint.name, format=_format(model, checkpoint, dtype), text=text)

    @property
    def input_size_px(self) -> int:
        """Side of the square keyframe that the model reads."""
        return self._model.config.input_size_px

    def describe(self) -> ModelFacts:
        return ModelFacts(
            name=self._name,
            format=self.format,
            input_size_px=self.input_size_px,
            device=str(self._model.device),
            searches_text=self._text is not None,
            untrained=self._model.config.untrained,
            world=self._model.config.world,
        )

    def decode(self, keyframe: bytes) -> Tensor:
        """Return the pixels (parts, 3, H, W) of a JPEG, PNG or WebP of any size, such as a keyframe. BadPicture."""
        config = self._model.config
        return preprocess.pixels(keyframe, image_size=config.image_size, ratio=config.resolution_ratio)

    def encode(self, pictures: Sequence[Tensor]) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
        """Return frame tokens (F, C2, D) in `format.numpy_dtype` and search vectors (F, P) of decoded pictures."""
        encoded = self._model.encode(torch.stack(list(pictures)))
        return _to_numpy(encoded.tokens), encoded.vectors.cpu().numpy()

    def fuse_text(self, input_ids: Sequence[int], pictures: Sequence[Tensor]) -> NDArray[np.float32]:
        """Return the SUM over the frames of the fused text (L, D), to be divided by their number."""
        fused = self._model.fuse_text(torch.tensor(list(input_ids), dtype=torch.long), torch.stack(list(pictures)))
        total: NDArray[np.float32] = fused.float().sum(dim=0).cpu().numpy()
        return total

    def embed_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors (n, P). Raises SearchUnavailable."""
        if self._text is None:
            raise SearchUnavailable(
                f"{self._name} brings a vision tower without CLIP's text half: put the whole CLIP model (safetensors) "
                "and its tokenizer into a folder 'clip' in the checkpoint's own"
            )
        if not texts:
            return np.empty((0, self.format.vector_width), np.float32)
        vectors: NDArray[np.float32] = self._text.embed(texts).numpy()
        return vectors

    def embed_image(self, pictures: Sequence[Tensor]) -> NDArray[np.float32]:
        """Return unit vectors (n, P) of decoded pictures."""
        if not pictures:
            return np.empty((0, self.format.vector_width), np.float32)
        return self.encode(pictures)[1]


def _format(model: LlavaMini, checkpoint: Checkpoint, dtype: Dtype) -> TokenFormat:
    return TokenFormat(
        fingerprint=model.fingerprint,
        dtype=dtype,
        tokens_per_frame=model.config.tokens_per_frame,
        width=model.config.width,
        vector_width=checkpoint.vector_width,
    )


def _to_numpy(tokens: Tensor) -> NDArray[np.generic]:
    """Take bits as they are: numpy has no bfloat16, so those travel as uint16."""
    tokens = tokens.cpu()
    if tokens.dtype == torch.bfloat16:
        return tokens.view(torch.int16).numpy().view(np.uint16)
    plain: NDArray[np.generic] = tokens.numpy()
    return plain
