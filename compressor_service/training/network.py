"""The model that is trained here, in float32, of the very modules that the service runs."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from compressor_service.llava_mini.compressor import Compressor
from compressor_service.llava_mini.config import COMPRESSOR_HEADS, LlavaMiniConfig
from compressor_service.llava_mini.language import LanguageModel
from compressor_service.llava_mini.prefusion import PreFusion
from compressor_service.training.look_ups import make_look_ups
from compressor_service.training.packed import pass_packed
from compressor_service.training.scene_tokens import Codes

_WORD_STD = 0.03


class Shape(BaseModel):
    """Sizes of the language model and of the layers before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: PositiveInt = 256
    inner: PositiveInt = 512
    heads: PositiveInt = 8
    layers: PositiveInt = 6
    prefusion_layers: PositiveInt = 3
    context_rows: PositiveInt = 1024


def model_config(shape: Shape, vocabulary: int, vision_width: int, *, stop_id: int, begin_id: int) -> dict[str, Any]:
    """Return config.json in the published layout."""
    return {
        "model_type": "llava_mini_llama",
        "architectures": ["LlavaMiniLlamaForCausalLM"],
        "tokenline_world": "tokenline-yard",
        "vocab_size": vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": shape.context_rows,
        "tokenizer_model_max_length": shape.context_rows,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": begin_id,
        "eos_token_id": stop_id,
        "mm_vision_tower": "clip",
        "mm_hidden_size": vision_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "compressor_size": 1,
        "resolution_ratio": 1,
        "prefusion_layer_num": shape.prefusion_layers,
    }


class Rows(NamedTuple):
    """What stands behind a layer."""

    shared: Tensor  # (B, P, D), of the prompts
    own: Tensor  # (B, n, L, D), of the questions


class Read(NamedTuple):
    """What a language model made of prompts and questions."""

    states: Tensor  # (B, n, L, D), normed: of the questions' rows
    behind: tuple[Rows, ...]  # behind 0, 1, ... of its layers


class Network(nn.Module):
    """Compressor, projector, pre-fusion and language model; the tower's features come from outside."""

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__()
        llama = config.llama
        self.rotary = LlamaRotaryEmbedding(llama)
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.language = LanguageModel(llama, embed_tokens=self.embed, rotary=self.rotary)
        self.compressor = Compressor(size=config.compressor_size, width=config.vision_width, heads=COMPRESSOR_HEADS)
        self.projector = nn.Sequential(
            nn.Linear(config.vision_width, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )
        self.prefusion = PreFusion(llama, layers=config.prefusion_layers, rotary=self.rotary)

    def see(self, features: Tensor) -> Tensor:
        """Return what pre-fusion reads of frames' features (F, N, V): patches and compressed token, (F, N + 1, D)."""
        compressed, _ = self.compressor(features)
        return self.projector(torch.cat((features, compressed), dim=1))

    def fuse(self, seen: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pass seen rows (F, N + 1, D), text before (F, b, D) and n texts behind (F, n, L, D) through pre-fusion.

        Returns frame tokens (F, D) and both texts as the frames fuse them.
        """
        shared = torch.cat((seen, before), dim=1)
        shared, after = pass_packed(self.prefusion.layers, self.rotary, shared, after)
        first = seen.shape[1]
        return shared[:, first - 1], shared[:, first:], after

    def tokens(self, features: Tensor) -> Tensor:
        """Return the frame tokens (F, D) of frames' features (F, N, V)."""
        return self.prefusion.look(self.see(features), tokens=1)[0][:, 0]

    def read(self, shared: Tensor, own: Tensor) -> Read:
        """Pass prompts (B, P, D) and n questions with their answers (B, n, L, D) through the language model."""
        behind = [Rows(shared, own)]
        for layer in self.language.layers:
            behind.append(Rows(*pass_packed([layer], self.rotary, *behind[-1])))
        return Read(self.language.norm(behind[-1].own), tuple(behind))

    def parts(self) -> dict[str, nn.Module]:
        """The modules by the prefix of their published names."""
        return {
            "model.embed_tokens.": self.embed,
            "model.layers.": self.language.layers,
            "model.norm.": self.language.norm,
            "lm_head.": self.language.lm_head,
            "model.compressor.": self.compressor,
            "model.mm_projector.": self.projector,
            "model.prefusion_layers.": self.prefusion.layers,
        }

    def write(self, folder: Path, raw: dict[str, Any]) -> None:
        """Write config and weights in float16, in the published layout."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            prefix + name: tensor.detach().to("cpu", torch.float16).contiguous()
            for prefix, module in self.parts().items()
            for name, tensor in module.state_dict().items()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take the weights that `write` wrote."""
        stored = load_file(folder / "model.safetensors")
        for prefix, module in self.parts().items():
            module.load_state_dict({n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)})


def initialise(network: Network, tokenizer: PreTrainedTokenizerFast, random: torch.Generator) -> Codes:
    """Draw the weights; return the vectors that frame tokens are to be made of so that its look-ups read them."""
    with torch.no_grad():
        network.embed.weight.normal_(std=_WORD_STD, generator=random)
        network.language.lm_head.weight.normal_(std=0.01, generator=random)
        for layer in (*network.language.layers, *network.prefusion.layers):
            for name, parameter in layer.named_parameters():
                if parameter.ndim == 2:
                    out = "o_proj" in name or "down_proj" in name  # what a layer adds is small at first
                    parameter.normal_(std=0.004 if out else 0.4 / math.sqrt(parameter.shape[1]), generator=random)
        _initialise_eyes(network, random)
        layers = [cast(LlamaDecoderLayer, layer) for layer in network.language.layers]
        return make_look_ups(network.embed.weight, layers, network.language.lm_head, tokenizer, random)


def _initialise_eyes(network: Network, random: torch.Generator) -> None:
    compressor = network.compressor
    for parameter in compressor.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=1 / math.sqrt(parameter.shape[1]), generator=random)
    compressor.pos_embed.zero_()
    for linear in _linears(network.projector):
        linear.weight.normal_(std=1 / math.sqrt(linear.in_features), generator=random)
        linear.bias.zero_()


def fit_to_features(network: Network, features: Tensor) -> None:
    """Let compressor and projector begin as if features (n, V) had mean 0 and deviation 1: the tower's are far from it.

    What the compressor makes is brought to the features' own mean and deviation, for the projector reads both.
    """
    compressor, projector = network.compressor, _linears(network.projector)[0]
    mean, std = features.mean(dim=0), features.std(dim=0)
    normed = nn.functional.layer_norm(features, features.shape[-1:])
    with torch.no_grad():
        projector.weight.div_(std)
        projector.bias.copy_(-projector.weight @ mean)
        compressor.ln_kv.weight.copy_(1 / normed.std(dim=0))
        compressor.ln_kv.bias.copy_(-normed.mean(dim=0) / normed.std(dim=0))
        compressor.attn.in_proj_bias.zero_()
        compressor.attn.out_proj.weight.mul_(std[:, None])
        compressor.attn.out_proj.bias.copy_(mean)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [one for one in module.modules() if isinstance(one, nn.Linear)]
