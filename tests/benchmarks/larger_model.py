"""A seeded model with the published picture size, for what the small one of the tests is too small to show."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from tests.untrained import write_untrained_checkpoint

_LARGER_LLAMA = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "prefusion_layer_num": 2,
    "mm_hidden_size": 256,
}
_LARGER_VISION = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 336,
    "patch_size": 14,
}


def write_larger_checkpoint(folder: Path) -> Path:
    """Write a seeded, untrained checkpoint with the published picture size: 336 px, 576 patches a frame."""
    write_untrained_checkpoint(folder)
    raw = json.loads((folder / "config.json").read_text()) | _LARGER_LLAMA
    (folder / "config.json").write_text(json.dumps(raw))
    clip_config = json.loads((folder / "clip" / "config.json").read_text())
    clip_config["vision_config"] |= _LARGER_VISION
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(**clip_config)).save_pretrained(folder / "clip")
    for old in folder.glob("model*"):
        old.unlink()
    save_file(_larger_weights(raw), folder / "model.safetensors", {"format": "pt"})
    return folder


def _larger_weights(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    layers, looking = _LARGER_LLAMA["num_hidden_layers"], _LARGER_LLAMA["prefusion_layer_num"]
    plain = {key: value for key, value in raw.items() if key not in {"model_type", "architectures"}}
    both = LlamaForCausalLM(LlamaConfig(**plain | {"num_hidden_layers": layers + looking}))
    weights = {}
    for name, value in both.state_dict().items():
        for index in range(looking):
            name = name.replace(f"model.layers.{layers + index}.", f"model.prefusion_layers.{index}.")
        weights[name] = value.contiguous()
    vision, width = _LARGER_VISION["hidden_size"], _LARGER_LLAMA["hidden_size"]
    for prefix, part in (
        ("model.compressor.attn.", nn.MultiheadAttention(vision, 8, batch_first=True)),
        ("model.compressor.ln_q.", nn.LayerNorm(vision)),
        ("model.compressor.ln_kv.", nn.LayerNorm(vision)),
        ("model.mm_projector.0.", nn.Linear(vision, width)),
        ("model.mm_projector.2.", nn.Linear(width, width)),
    ):
        weights |= {prefix + name: value for name, value in part.state_dict().items()}
    return weights | {f"model.compressor.{name}": torch.randn(1, vision) for name in ("query", "pos_embed")}
