"""A small checkpoint in the published layout with seeded, untrained weights: to run everything without a download.

Its answers are words in an order without meaning; its config says so, and the service repeats it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from compressor_service.llava_mini.prompt import SYSTEM_TEXT

Arrays = dict[str, NDArray[np.float32]]

_CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_WORDS = """
a about after again all an and another any are area around as at away back bag ball be before behind beside between
big bike bird black blue boat box bridge bright brown building bus by camera can car cat chair child city clear clock
close cloud coat corner count cross dark day did dog door down drive during each early empty enter entrance evening
every far fast fence few field fire first five floor four from front garden gate glass go gone grass green grey group
had hall
happened has hat have he her here high him his hold hour house how in inside into is it its just kitchen large last late
leave left light line little long look lot man many middle minute moment more morning most move near never new next
night no not nothing now number of off office old on once one only open or orange other out outside over parked part
pass past path people person picture place plane platform quick rain red ride right river road roof room round run same
second see seen seems she shelf shop short show side sign sit sky slow small snow some someone something square stand
start station step still stone stop street sun table tall than that the their them then there they thing this three
through time to today together top towards tower train tree truck turn two under until up very video wait walk wall was
watch water way we were what when where which while white who wide will wind window with without woman wood yard yellow
yes you your
"""
_END_OF_WORD = "</w>"
_IMAGE, _PATCH = 112, 16
_CLIP_WIDTH, _SPACE, _WIDTH = 64, 48, 128
_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": _CLIP_WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": _IMAGE,
    "patch_size": _PATCH,
    "projection_dim": _SPACE,
}
_TEXT = {
    "model_type": "clip_text_model",
    "hidden_size": _CLIP_WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": _SPACE,
}
_LLAMA = {
    "model_type": "llava_mini_llama",
    "architectures": ["LlavaMiniLlamaForCausalLM"],
    "tokenline_untrained": True,
    "hidden_size": _WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tokenizer_model_max_length": 32768,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "mm_vision_tower": "clip",
    "mm_hidden_size": _CLIP_WIDTH,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "compressor_size": 1,
    "resolution_ratio": 1,
    "prefusion_layer_num": 2,
}


def write_untrained_checkpoint(folder: str | Path, seed: int = 0) -> Path:
    """Write config, weights in two shards, tokenizer, chat template and a whole CLIP model in `folder`/clip.

    The same seed writes the same bytes.
    """
    folder = Path(folder)
    random = np.random.default_rng(seed)
    (folder / "clip").mkdir(parents=True, exist_ok=True)
    tokenizer = _write_tokenizer(folder)
    clip_tokens = _write_clip_tokenizer(folder / "clip")
    _write_clip(folder / "clip", random, clip_tokens)
    _write_model(folder, random, tokenizer)
    return folder


def _write_model(folder: Path, random: np.random.Generator, tokenizer: Tokenizer) -> None:
    vocabulary, stop = tokenizer.get_vocab_size(), tokenizer.token_to_id("<|eot_id|>")
    config = _LLAMA | {
        "vocab_size": vocabulary,
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": stop,
    }
    ends = [tokenizer.token_to_id(token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": config["bos_token_id"], "eos_token_id": ends})
    eyes = _draw(random, _eyes_shapes())
    language = _draw(random, _language_shapes(vocabulary))
    words = {f" {word}" for word in _WORDS.split()}
    speakable = np.array([tokenizer.decode([one]).lower() in words for one in range(vocabulary)])
    speakable[stop] = True
    language["lm_head.weight"] *= speakable[:, None] * np.float32(4)  # a row of zeros is never the likeliest
    _write_shards(folder, {"model-00001-of-00002.safetensors": eyes, "model-00002-of-00002.safetensors": language})


def _write_shards(folder: Path, shards: Mapping[str, Arrays]) -> None:
    for name, arrays in shards.items():
        save_file(arrays, folder / name, {"format": "pt"})
    where = {tensor: name for name, arrays in shards.items() for tensor in arrays}
    size = sum(array.nbytes for arrays in shards.values() for array in arrays.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def _write_clip(folder: Path, random: np.random.Generator, tokens: CLIPTokenizer) -> None:
    text = _TEXT | {
        "vocab_size": len(tokens),
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": _SPACE}
    _write_json(folder / "config.json", config | {"vision_config": _VISION, "text_config": text})
    shapes = {
        "logit_scale": (),
        "visual_projection.weight": (_SPACE, _CLIP_WIDTH),
        "text_projection.weight": (_SPACE, _CLIP_WIDTH),
        "vision_model.embeddings.class_embedding": (_CLIP_WIDTH,),
        "vision_model.embeddings.patch_embedding.weight": (_CLIP_WIDTH, 3, _PATCH, _PATCH),
        "vision_model.embeddings.position_embedding.weight": ((_IMAGE // _PATCH) ** 2 + 1, _CLIP_WIDTH),
        "text_model.embeddings.token_embedding.weight": (len(tokens), _CLIP_WIDTH),
        "text_model.embeddings.position_embedding.weight": (77, _CLIP_WIDTH),
        **_norm("vision_model.pre_layrnorm.", _CLIP_WIDTH),
        **_norm("vision_model.post_layernorm.", _CLIP_WIDTH),
        **_norm("text_model.final_layer_norm.", _CLIP_WIDTH),
    }
    for half, layers in (("vision_model", 3), ("text_model", 2)):
        for layer in range(layers):
            shapes |= _clip_layer(f"{half}.encoder.layers.{layer}.")
    save_file(_draw(random, shapes), folder / "model.safetensors", {"format": "pt"})


def _eyes_shapes() -> dict[str, tuple[int, ...]]:
    queries = (1, _CLIP_WIDTH)
    shapes: dict[str, tuple[int, ...]] = {
        "model.compressor.query": queries,
        "model.compressor.pos_embed": queries,
        "model.compressor.attn.in_proj_weight": (3 * _CLIP_WIDTH, _CLIP_WIDTH),
        "model.compressor.attn.in_proj_bias": (3 * _CLIP_WIDTH,),
        **_linear("model.compressor.attn.out_proj.", _CLIP_WIDTH, _CLIP_WIDTH),
        **_norm("model.compressor.ln_q.", _CLIP_WIDTH),
        **_norm("model.compressor.ln_kv.", _CLIP_WIDTH),
        **_linear("model.mm_projector.0.", _WIDTH, _CLIP_WIDTH),
        **_linear("model.mm_projector.2.", _WIDTH, _WIDTH),
    }
    for layer in range(2):
        shapes |= _llama_layer(f"model.prefusion_layers.{layer}.")
    return shapes


def _language_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, _WIDTH),
        "model.norm.weight": (_WIDTH,),
        "lm_head.weight": (vocabulary, _WIDTH),
    }
    for layer in range(3):
        shapes |= _llama_layer(f"model.layers.{layer}.")
    return shapes


def _llama_layer(prefix: str) -> dict[str, tuple[int, ...]]:
    inner, keys = 256, _WIDTH // 8 * 2
    shapes = {"self_attn.q_proj": (_WIDTH, _WIDTH), "self_attn.k_proj": (keys, _WIDTH)}
    shapes |= {"self_attn.v_proj": (keys, _WIDTH), "self_attn.o_proj": (_WIDTH, _WIDTH)}
    shapes |= {"mlp.gate_proj": (inner, _WIDTH), "mlp.up_proj": (inner, _WIDTH), "mlp.down_proj": (_WIDTH, inner)}
    norms = {"input_layernorm": (_WIDTH,), "post_attention_layernorm": (_WIDTH,)}
    return {f"{prefix}{name}.weight": shape for name, shape in (shapes | norms).items()}


def _clip_layer(prefix: str) -> dict[str, tuple[int, ...]]:
    shapes = _linear(f"{prefix}mlp.fc1.", 128, _CLIP_WIDTH) | _linear(f"{prefix}mlp.fc2.", _CLIP_WIDTH, 128)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= _linear(f"{prefix}self_attn.{name}.", _CLIP_WIDTH, _CLIP_WIDTH)
    for name in ("layer_norm1", "layer_norm2"):
        shapes |= _norm(f"{prefix}{name}.", _CLIP_WIDTH)
    return shapes


def _linear(prefix: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}weight": (out, into), f"{prefix}bias": (out,)}


def _norm(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}weight": (width,), f"{prefix}bias": (width,)}


def _draw(random: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Draw matrices that keep the size of what they multiply, norms near one and biases near zero."""
    arrays: Arrays = {}
    for name, shape in shapes.items():
        near_one = len(shape) == 1 and name.endswith("weight")
        bound = math.sqrt(3 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
        drawn = random.uniform(-bound, bound, shape) + near_one
        arrays[name] = np.asarray(drawn, dtype=np.float32)
    return arrays


def _write_tokenizer(folder: Path) -> Tokenizer:
    """Write a byte-level tokenizer with the control tokens of Llama 3, and return it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _training_text(),
        trainers.BpeTrainer(
            vocab_size=1200,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _CONTROL_TOKENS])
    whole = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    whole.save_pretrained(folder)
    return tokenizer


def _write_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write CLIP's kind of tokenizer; its merges spell the words out, for training orders ties by chance."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS.split():
        for end in range(1, len(word)):
            merges[word[:end], word[end] + (_END_OF_WORD if end + 1 == len(word) else "")] = None
    whole = dict.fromkeys(left + right for left, right in merges)
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters), *whole, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=list(merges),  # type: ignore[arg-type]
        model_max_length=_TEXT["max_position_embeddings"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _training_text() -> Iterable[str]:
    yield SYSTEM_TEXT
    yield _WORDS
    yield _WORDS.title()


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
