"""LlavaMini: the parts composed, as the published code composes them."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from compressor_service.llava_mini.checkpoint import TORCH_DTYPES, Checkpoint, Dtype, fingerprint, open_checkpoint
from compressor_service.llava_mini.config import IMAGE_TOKEN_ID, LlavaMiniConfig
from compressor_service.llava_mini.frame_encoder import FrameEncoder
from compressor_service.llava_mini.language import ContextTooLong, LanguageModel, Prefix, Sampling
from compressor_service.llava_mini.quantized import quantize_linears

Part = Literal["all", "compressor", "llm"]
GREEDY = Sampling()


class NotLoaded(RuntimeError):
    """The model was loaded without the half that this needs."""


class Encoded(NamedTuple):
    """Frame tokens (F, C2, D) in the model's dtype, and search vectors (F, P) in float32, of unit length."""

    tokens: Tensor
    vectors: Tensor


class LlavaMini:
    """LLaVA-Mini, whole or one half of it: part "compressor" makes frame tokens, part "llm" reads them.

    Stateless after loading: any number of threads may call it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: Dtype,
        device: torch.device,
        part: Part,
        frames_per_pass: int,
        load_in_8bit: bool,
    ) -> None:
        self.config: LlavaMiniConfig = checkpoint.config
        self.fingerprint = fingerprint(checkpoint.folder, dtype)
        self.dtype, self.device = TORCH_DTYPES[dtype], device
        self._frames_per_pass = frames_per_pass
        rotary = LlamaRotaryEmbedding(self.config.llama).to(device)
        with torch.device("meta"):  # weights are assigned as they are read: memory holds them once
            self._embed = nn.Embedding(self.config.vocabulary, self.config.width)
            self._eyes = None if part == "llm" else FrameEncoder(checkpoint, rotary)
            self._language = (
                None
                if part == "compressor"
                else LanguageModel(self.config.llama, embed_tokens=self._embed, rotary=rotary)
            )
        checkpoint.weights.fill(self._embed, "model.embed_tokens.", dtype=self.dtype, device=device)
        if self._eyes is not None:
            self._eyes.load(checkpoint, dtype=self.dtype, device=device)
            self._eyes.eval()
        if self._language is not None:
            self._load_language(checkpoint, self._language, load_in_8bit=load_in_8bit)
            self._language.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_name: str | Path,
        dtype: Dtype = "float32",
        device: str = "cpu",
        part: Part = "all",
        *,
        frames_per_pass: int = 16,
        load_in_8bit: bool = False,
    ) -> "LlavaMini":
        """Load a checkpoint in the published layout; `device` is a torch device, or "auto" for cuda when there is one.

        `frames_per_pass` bounds the memory that frames take while they are looked at. `load_in_8bit` is for the
        language model's layers alone, so that frame tokens stay the same. Raises BadCheckpoint, and
        QuantizationUnavailable.
        """
        if dtype not in TORCH_DTYPES:
            raise ValueError(f"dtype is {dtype!r}, not one of {', '.join(TORCH_DTYPES)}")
        if part not in ("all", "compressor", "llm"):
            raise ValueError(f"part is {part!r}, not one of all, compressor, llm")
        if frames_per_pass < 1:
            raise ValueError(f"frames_per_pass is {frames_per_pass}, not a positive number")
        return cls(
            open_checkpoint(path_or_hub_name),
            dtype=dtype,
            device=_device(device),
            part=part,
            frames_per_pass=frames_per_pass,
            load_in_8bit=load_in_8bit,
        )

    def encode_frames(self, pixels: Tensor) -> Tensor:
        """Turn pixels (F, parts, 3, H, W) into frame tokens (F, C2, D)."""
        return self.encode(pixels).tokens

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Encoded:
        """Turn pixels (F, parts, 3, H, W) into frame tokens and search vectors, in one pass of the tower."""
        eyes = self._need_eyes()
        tokens, vectors = [], []
        for chunk in self._chunks(pixels):
            seen = eyes.look(chunk)
            tokens.append(seen.tokens)
            vectors.append(seen.vectors)
        return Encoded(torch.cat(tokens), torch.cat(vectors))

    @torch.inference_mode()
    def fuse_text(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        """Return the fused text (F, L, D) of prompt ids (L,) for every frame of pixels (F, parts, 3, H, W)."""
        return torch.cat([text for _, text in self._fused(input_ids, pixels)])

    @torch.inference_mode()
    def inputs_embeds(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        """Return what the language model reads, (B, L - 1 + T*C2, D).

        `input_ids` (B, L) holds the image placeholder once in every row; `pixels` is (B, T, parts, 3, H, W).
        """
        _check_ids(input_ids, rank=2)
        if not len(input_ids) or len(input_ids) != len(pixels):
            raise ValueError(f"there are {len(input_ids)} prompts and pixels for {len(pixels)}: each needs its own")
        return torch.stack([self._read(*one) for one in zip(input_ids, pixels, strict=True)])

    @torch.inference_mode()
    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Return the plain embeddings of ids (L,) as (L, D); a negative id, the placeholder's, has that of id 0."""
        _check_ids(input_ids, rank=1)
        if len(input_ids) and int(input_ids.max()) >= self.config.vocabulary:
            raise ValueError(f"id {int(input_ids.max())} is not in the vocabulary of {self.config.vocabulary}")
        return self._embed(input_ids.to(self.device).clamp(min=0))

    def place_frames(self, text: Tensor, input_ids: Tensor, frame_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Put frame tokens (T*C2, D) in the place of the placeholder's row of text (L, D), whose ids are (L,).

        Returns [text before ; frames], which does not depend on the question with plain embeddings, and [text after].
        """
        places = (input_ids == IMAGE_TOKEN_ID).nonzero().flatten().tolist()
        if len(places) != 1:
            raise ValueError(f"the prompt has {len(places)} image placeholders ({IMAGE_TOKEN_ID}), not one")
        return torch.cat((text[: places[0]], frame_tokens)), text[places[0] + 1 :]

    @torch.inference_mode()
    def logits(self, inputs_embeds: Tensor) -> Tensor:
        """Return the logits (B, S, vocabulary) on rows (B, S, D). Raises ContextTooLong."""
        rows = self._own(inputs_embeds, rank=3)
        self._check_length(rows.shape[1])
        return self._need_language().logits(rows)

    @torch.inference_mode()
    def prefill(self, embeds: Tensor) -> Prefix:
        """Read the beginning of a prompt (S, D) once, for any number of answers. Raises ContextTooLong."""
        rows = self._own(embeds, rank=2)
        self._check_length(len(rows))
        return self._need_language().prefill(rows[None])

    def stream(
        self,
        embeds: Tensor,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        prefix: Prefix | None = None,
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        """Yield the ids that follow rows (S, D), themselves behind `prefix`, as they are made.

        Ends before the first of `stop_ids` or after `max_new_tokens`; closing it ends the work. Raises ContextTooLong
        when called, not when iterated.
        """
        rows = self._own(embeds, rank=2)
        self._check_length(len(rows) + (0 if prefix is None else prefix.length), max_new_tokens)
        steps = self._need_language().steps(rows[None], max_new_tokens=max_new_tokens, sampling=sampling, prefix=prefix)
        return _until(steps, frozenset(stop_ids))

    def generate(
        self,
        inputs_embeds: Tensor,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] = (),
    ) -> Tensor:
        """Return the ids (B, n) that follow rows (B, S, D), greedily by default; n is at most `max_new_tokens`.

        A row that made one of `stop_ids` repeats it from there on, until every row has.
        Raises ContextTooLong.
        """
        rows = self._own(inputs_embeds, rank=3)
        self._check_length(rows.shape[1], max_new_tokens)
        steps = self._need_language().steps(rows, max_new_tokens=max_new_tokens, sampling=sampling)
        return _gather(steps, torch.tensor(sorted(stop_ids), dtype=torch.long), rows=len(rows))

    def _read(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        """Return the rows of one prompt (L,) about the frames of pixels (T, parts, 3, H, W)."""
        tokens = []
        total = torch.zeros(len(input_ids), self.config.width, device=self.device)  # float32, whatever the model's
        for frame_tokens, text in self._fused(input_ids, pixels):
            tokens.append(frame_tokens.flatten(0, 1))
            total += text.float().sum(dim=0)
        mean = (total / len(pixels)).to(self.dtype)
        return torch.cat(self.place_frames(mean, input_ids, torch.cat(tokens)))

    def _fused(self, input_ids: Tensor, pixels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield frame tokens (f, C2, D) and fused text (f, L, D) of pixels (F, parts, 3, H, W), pass by pass."""
        eyes = self._need_eyes()
        visible = (input_ids > 0).to(self.device)
        plain = self.embed_text(input_ids)
        for chunk in self._chunks(pixels):
            seen = eyes.look(chunk)
            yield seen.tokens, eyes.fuse_text(plain, visible, seen)

    def _chunks(self, pixels: Tensor) -> Iterator[Tensor]:
        size = self.config.image_size
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
            kind = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
            raise TypeError(f"pixels are {kind}, not a tensor of preprocessed floating point values")
        if pixels.ndim != 5 or pixels.shape[1:] != (self.config.parts, 3, size, size):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}, not (frames, {self.config.parts}, 3, {size}, {size})"
            )
        if not len(pixels):
            raise ValueError("there is no frame to look at")
        for chunk in torch.split(pixels, self._frames_per_pass):
            yield chunk.to(self.device, self.dtype)

    def _own(self, rows: Tensor, *, rank: int) -> Tensor:
        """Check rows (B, S, D), or (S, D) at rank 2, and bring them to the model's device and dtype."""
        if rows.ndim != rank or rows.shape[-1] != self.config.width:
            wanted = "(S, D)" if rank == 2 else "(B, S, D)"
            raise ValueError(f"rows have shape {tuple(rows.shape)}, not {wanted} with D = {self.config.width}")
        if not rows.numel():
            raise ValueError("there are no rows to read")
        return rows.to(self.device, self.dtype)

    def _check_length(self, rows: int, new: int = 0) -> None:
        if new < 0:
            raise ValueError(f"max_new_tokens is {new}, not zero or more")
        if rows > self.config.context_rows:
            raise ContextTooLong(f"the prompt has {rows} rows, the model reads {self.config.context_rows} at most")
        if rows + new > self.config.max_position_embeddings:
            raise ContextTooLong(
                f"{rows} rows and {new} new tokens: the model has {self.config.max_position_embeddings} positions"
            )

    def _need_eyes(self) -> FrameEncoder:
        if self._eyes is None:
            raise NotLoaded("loaded with part='llm', which sees no pictures: load part='compressor' or 'all'")
        return self._eyes

    def _need_language(self) -> LanguageModel:
        if self._language is None:
            raise NotLoaded("loaded with part='compressor', which writes no text: load part='llm' or 'all'")
        return self._language

    def _load_language(self, checkpoint: Checkpoint, language: LanguageModel, *, load_in_8bit: bool) -> None:
        fill = checkpoint.weights.fill
        for index, layer in enumerate(language.layers):
            fill(layer, f"model.layers.{index}.", dtype=self.dtype, device=self.device)
            if load_in_8bit:  # layer by layer: the 16-bit weights are never all in memory
                quantize_linears(layer, self.device)
        fill(language.norm, "model.norm.", dtype=self.dtype, device=self.device)
        if self.config.llama.tie_word_embeddings:
            language.lm_head.weight = self._embed.weight
        else:
            fill(language.lm_head, "lm_head.", dtype=self.dtype, device=self.device)


def _check_ids(input_ids: Tensor, *, rank: int) -> None:
    """Check ids (L,), or (B, L) at rank 2."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids are {kind}, not a tensor of whole numbers (torch.long)")
    if input_ids.ndim != rank:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}, not {'(L,)' if rank == 1 else '(B, L)'}")


def _until(steps: Iterator[Tensor], stop_ids: frozenset[int]) -> Iterator[int]:
    for ids in steps:
        if (one := int(ids)) in stop_ids:
            return
        yield one


def _gather(steps: Iterator[Tensor], stop_ids: Tensor, *, rows: int) -> Tensor:
    made: list[Tensor] = []
    ended = torch.zeros(rows, dtype=torch.bool)
    for ids in steps:
        made.append(torch.where(ended, made[-1], ids) if made else ids)
        ended |= torch.isin(made[-1], stop_ids)
        if ended.all():
            break
    return torch.stack(made, dim=1) if made else torch.empty(rows, 0, dtype=torch.long)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError('device is "cuda", but torch sees no such device here: use "cpu" or "auto"')
    return device
