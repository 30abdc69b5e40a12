"""What a checkpoint's config.json says about the network, parsed once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, LlamaConfig

IMAGE_TOKEN_ID = -200  # stands in a prompt where the frame tokens go; no vocabulary has it
COMPRESSOR_HEADS = 8  # fixed in the published code, not in its config


class BadConfig(ValueError):
    """The config describes a network that this code does not build."""


@dataclass(frozen=True, slots=True)
class LlavaMiniConfig:
    """Sizes and choices of one checkpoint.

    `llama` and `vision` are the library's own descriptions of the language model and of the vision tower;
    `context_rows` is how many rows of text and frames the language model was published to read at once, and
    `max_position_embeddings` bounds these and the answer together. `world` names the drawn world that all of its
    training came from; a model of photographs and films has none.
    """

    llama: LlamaConfig = field(repr=False)
    vision: CLIPVisionConfig = field(repr=False)
    image_size: int  # side of what the tower reads, in pixels
    patch_size: int
    compressor_size: int
    resolution_ratio: int
    prefusion_layers: int
    vision_select_layer: int
    image_aspect_ratio: str
    tokenizer_model_max_length: int
    untrained: bool
    world: str | None

    @classmethod
    def parse(cls, raw: Mapping[str, Any], vision: CLIPVisionConfig) -> "LlavaMiniConfig":
        """Read config.json's content. Raises BadConfig, which names the entry."""
        if raw.get("model_type") != "llava_mini_llama":
            raise BadConfig(f"model_type is {raw.get('model_type')!r}, not 'llava_mini_llama'")
        _require(raw, "mm_projector_type", "mlp2x_gelu")
        _require(raw, "mm_vision_select_feature", "patch")
        if raw.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
            raise BadConfig(f"mm_hidden_size is {raw['mm_hidden_size']}, the vision tower's width {vision.hidden_size}")
        kept = {name: value for name, value in raw.items() if name not in _NOT_LLAMA}
        try:
            llama = LlamaConfig(**kept)
        except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
            raise BadConfig(str(error)) from error
        llama._attn_implementation = "sdpa"  # a layer built alone would fall back to the slow, unmasked one
        select_layer = _integer(raw, "mm_vision_select_layer", -2)
        states = vision.num_hidden_layers + 1
        if not -states <= select_layer < states:
            raise BadConfig(f"mm_vision_select_layer is {select_layer}, but the vision tower has {states} states")
        return cls(
            llama=llama,
            vision=vision,
            image_size=_side(vision.image_size),
            patch_size=_side(vision.patch_size),
            compressor_size=_positive(raw, "compressor_size", 2),
            resolution_ratio=_positive(raw, "resolution_ratio", 1),
            prefusion_layers=_positive(raw, "prefusion_layer_num", 4),
            vision_select_layer=select_layer % states,
            image_aspect_ratio=str(raw.get("image_aspect_ratio", "pad")),
            tokenizer_model_max_length=_positive(raw, "tokenizer_model_max_length", llama.max_position_embeddings),
            untrained=bool(raw.get("tokenline_untrained", False)),
            world=str(raw["tokenline_world"]) if "tokenline_world" in raw else None,
        )

    @property
    def width(self) -> int:
        """D."""
        return int(self.llama.hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(self.llama.vocab_size)

    @property
    def vision_width(self) -> int:
        """V."""
        return int(self.vision.hidden_size)

    @property
    def tokens_per_frame(self) -> int:
        """C2."""
        return self.compressor_size**2

    @property
    def parts(self) -> int:
        """Pictures that the tower reads of one frame: the whole, and before it the crops if there are any."""
        return 1 if self.resolution_ratio == 1 else self.resolution_ratio**2 + 1

    @property
    def input_size_px(self) -> int:
        """Side of the square keyframe."""
        return self.image_size * self.resolution_ratio

    @property
    def grid(self) -> int:
        """Patches along a side of one part."""
        return self.image_size // self.patch_size

    @property
    def max_position_embeddings(self) -> int:
        return int(self.llama.max_position_embeddings)

    @property
    def context_rows(self) -> int:
        return min(self.tokenizer_model_max_length, self.max_position_embeddings)

    def token_facts(self) -> dict[str, object]:
        """Every choice beside the weights that a frame token or a search vector depends on."""
        return {
            "compressor_size": self.compressor_size,
            "resolution_ratio": self.resolution_ratio,
            "vision_select_layer": self.vision_select_layer,
            "width": self.width,
            "heads": [self.llama.num_attention_heads, self.llama.num_key_value_heads],
            "rms_norm_eps": self.llama.rms_norm_eps,
            "hidden_act": self.llama.hidden_act,
            "rope": self.llama.rope_parameters,
            "vision": [self.image_size, self.patch_size, self.vision.num_attention_heads],
            "vision_act": [self.vision.hidden_act, self.vision.layer_norm_eps],
        }


# They name the multimodal class, which must not steer how the library builds its plain Llama layers.
_NOT_LLAMA = frozenset({"model_type", "architectures", "torch_dtype", "dtype", "quantization_config", "auto_map"})


def _side(size: object) -> int:
    if not isinstance(size, int):
        raise BadConfig(f"the vision tower reads {size!r}, only squares of one size are supported")
    return size


def _require(raw: Mapping[str, Any], name: str, only: str) -> None:
    if raw.get(name, only) != only:
        raise BadConfig(f"{name} {raw[name]!r} is not supported, only {only!r}")


def _integer(raw: Mapping[str, Any], name: str, default: int) -> int:
    value = raw.get(name, default)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)  # lengths are stored as floats by some tokenizers' exporters
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadConfig(f"{name} is {value!r}, not a whole number")
    return value


def _positive(raw: Mapping[str, Any], name: str, default: int) -> int:
    value = _integer(raw, name, default)
    if value < 1:
        raise BadConfig(f"{name} is {value}, not a positive number")
    return value
