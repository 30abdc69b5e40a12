"""LLaVA-Mini once more, frame by frame and without any care for speed: what the real one is compared with.

It is put together from the library's own whole models and from torch, and shares no code with the real one.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM


class PlainLlavaMini:
    def __init__(self, folder):
        raw = json.loads((Path(folder) / "config.json").read_text())
        self.ratio, self.queries = raw["resolution_ratio"], raw["compressor_size"] ** 2
        self.weights = load_file(Path(folder) / "model.safetensors")
        self.tower = CLIPVisionModel.from_pretrained(raw["mm_vision_tower"])
        base = {name: value for name, value in raw.items() if name not in ("model_type", "architectures")}
        self.llm = self._llama(base, "model.layers.")
        self.prefusion = self._llama(
            base | {"num_hidden_layers": raw["prefusion_layer_num"]}, "model.prefusion_layers."
        )
        self.prefusion.model.norm = nn.Identity()

    def _llama(self, raw, prefix):
        config = LlamaConfig(**raw)
        config._attn_implementation = "eager"
        llama = LlamaForCausalLM(config)
        own = {
            name: self.weights[prefix + name.removeprefix("model.layers.") if ".layers." in name else name]
            for name in llama.state_dict()
        }
        llama.load_state_dict(own)
        return llama.eval()

    def of(self, prefix):
        return {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}

    def project(self, rows):
        w = self.of("model.mm_projector.")
        hidden = functional.gelu(functional.linear(rows, w["0.weight"], w["0.bias"]))
        return functional.linear(hidden, w["2.weight"], w["2.bias"])

    def compress(self, patches):
        w, width = self.of("model.compressor."), patches.shape[-1]
        attention = nn.MultiheadAttention(width, 8, batch_first=True)
        attention.load_state_dict({n.removeprefix("attn."): v for n, v in w.items() if n.startswith("attn.")})
        values = functional.layer_norm(patches, (width,), w["ln_kv.weight"], w["ln_kv.bias"])
        queries = functional.layer_norm(w["query"], (width,), w["ln_q.weight"], w["ln_q.bias"])
        old, new = math.isqrt(self.queries), math.isqrt(len(patches))
        code = w["pos_embed"].T.reshape(1, width, old, old)
        code = functional.interpolate(code, (new, new), mode="bicubic").reshape(width, -1).T
        return attention((queries + w["pos_embed"])[None], (values + code)[None], values[None])[0][0]

    def frame(self, ids, pictures):
        """One frame (parts, 3, H, W) and ids (L,): frame tokens (C2, D) and fused text (L, D)."""
        states = self.tower(pictures, output_hidden_states=True).hidden_states[-2][:, 1:]
        whole, detail = states[-1], states[-1]
        if self.ratio > 1:
            grid = math.isqrt(len(whole))
            rows = []
            for y in range(self.ratio * grid):  # the map of the whole picture, patch row by patch row
                for x in range(self.ratio * grid):
                    crop = y // grid * self.ratio + x // grid
                    rows.append(states[crop, y % grid * grid + x % grid])
            detail = torch.stack(rows)
        compressed = self.compress(detail)
        vision = [whole, compressed] if self.ratio == 1 else [detail, whole, compressed]
        vision = torch.cat([self.project(part) for part in vision])
        plain = self.weights["model.embed_tokens.weight"][ids.clamp(min=0)]
        seen = torch.cat((torch.ones(len(vision), dtype=torch.bool), ids > 0))
        positions = torch.where(seen, seen.long().cumsum(0) - 1, 1)
        fused = self.prefusion.model(
            inputs_embeds=torch.cat((vision, plain))[None],
            attention_mask=seen.long()[None],
            position_ids=positions[None],
        ).last_hidden_state[0]
        text = torch.where((ids > 0)[:, None], fused[len(vision) :], plain)
        return fused[len(vision) - self.queries : len(vision)], text

    @torch.no_grad()
    def inputs_embeds(self, input_ids, pixels):
        rows = []
        for ids, frames in zip(input_ids, pixels, strict=True):
            seen = [self.frame(ids, pictures) for pictures in frames]
            text = torch.stack([one for _, one in seen]).mean(dim=0)
            place = ids.tolist().index(-200)
            rows.append(torch.cat((text[:place], *(tokens for tokens, _ in seen), text[place + 1 :])))
        return torch.stack(rows)

    @torch.no_grad()
    def logits(self, inputs_embeds):
        return self.llm(inputs_embeds=inputs_embeds).logits
