"""Checkpoints in the published layout: loaded from every place their parts may be, refused by name when broken."""

import json
import pickle
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel

from compressor_service.llava_mini import BadCheckpoint, LlavaMini
from compressor_service.llava_mini.checkpoint import describe, open_checkpoint
from compressor_service.llava_mini.quantized import QuantizationUnavailable
from tests.reference import make_checkpoint
from tests.untrained import write_untrained_checkpoint

HAS_8BIT = find_spec("bitsandbytes") is not None


@pytest.fixture
def folder(tmp_path):
    return make_checkpoint.write(tmp_path / "model", 1, 1)


@pytest.fixture
def expected(folder):
    return LlavaMini.from_pretrained(folder).encode_frames(pictures())


def pictures():
    return torch.randn(2, 1, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder, **tensors):
    """Replace tensors of the main file; None takes one away. Dots are written as __."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, value in tensors.items():
        weights.pop(name.replace("__", "."))
        if value is not None:
            weights[name.replace("__", ".")] = value
    save_file(weights, path)


def shard(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    halves = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    where = {name: sorted(halves)[index % 2] for index, name in enumerate(weights)}
    for name, tensor in weights.items():
        halves[where[name]][name] = tensor
    for name, half in halves.items():
        save_file(half, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    path.unlink()


def test_shards_are_read_as_one(folder, expected):
    before = describe(folder, "float32").fingerprint
    shard(folder)
    assert torch.equal(LlavaMini.from_pretrained(folder).encode_frames(pictures()), expected)
    assert open_checkpoint(folder).fingerprint("float32") == before


def test_the_tower_may_lie_inside_the_checkpoint(folder, expected):
    before = describe(folder, "float32").fingerprint
    inside(folder)
    assert torch.equal(LlavaMini.from_pretrained(folder).encode_frames(pictures()), expected)
    assert open_checkpoint(folder).fingerprint("float32") == before


def test_the_tower_may_be_named_relative_to_the_checkpoint(folder, expected):
    configure(folder, mm_vision_tower="clip")
    assert torch.equal(LlavaMini.from_pretrained(folder).encode_frames(pictures()), expected)


PUBLISHED_CONFIG = {
    "architectures": ["LlavaMiniLlamaForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "pretraining_tp": 1,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": True,
    "use_cache": True,
    "use_mm_proj": True,
    "some_key_of_a_later_version": {"any": "thing"},
}
"""As a training run of the published code leaves it, beside the sizes of the small checkpoint."""


def inside(folder):
    """Move the tower into the checkpoint, as training it leaves it; its folder keeps its config alone."""
    tower = load_file(folder / "clip" / "model.safetensors")
    moved = {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    save_file(load_file(folder / "model.safetensors") | moved, folder / "model.safetensors")
    (folder / "clip" / "model.safetensors").unlink()


def test_a_checkpoint_as_training_leaves_it_needs_no_hub(folder, expected):
    inside(folder)
    shard(folder)
    configure(folder, **PUBLISHED_CONFIG)
    model = LlavaMini.from_pretrained(str(folder))
    assert model.config.llama.rope_parameters["rope_type"] == "llama3"
    assert model.config.image_aspect_ratio == "pad"
    tokens = model.encode_frames(pictures())
    assert tokens.shape == expected.shape
    assert not torch.equal(tokens, expected)  # the other rope scaling is heeded
    assert LlavaMini.from_pretrained(folder, dtype="bfloat16").encode_frames(pictures()).dtype == torch.bfloat16


def test_a_folder_beside_the_weights_stands_in_for_a_tower_on_a_hub(folder, expected):
    configure(folder, mm_vision_tower="nobody/nothing")
    assert torch.equal(LlavaMini.from_pretrained(folder).encode_frames(pictures()), expected)


def test_a_tower_on_a_hub_that_cannot_be_had_says_where_to_put_it(folder):
    inside(folder)
    configure(folder, mm_vision_tower="nobody/nothing")
    (folder / "clip" / "config.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"'nobody/nothing', and no such .* a folder 'clip' in the"):
        LlavaMini.from_pretrained(folder)


def test_a_tower_without_safetensors_says_where_to_put_them(folder):
    (folder / "clip" / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"vision tower of mm_vision_tower: clip has no weights.* a folder 'clip'"):
        LlavaMini.from_pretrained(folder)


def test_folders_of_a_hub_s_cache_go_by_the_name_that_was_asked_for(tmp_path):
    folder = tmp_path / "models--someone--llava-mini" / "snapshots" / "0123456789abcdef"
    folder.mkdir(parents=True)
    with pytest.raises(BadCheckpoint, match=r"^someone/llava-mini has no config\.json"):
        LlavaMini.from_pretrained(folder)


def test_the_readme_s_conversion_of_a_pickled_clip_gives_the_search_for_text(tmp_path):
    """The one tower of the published checkpoint is on the hub as pickles: converted once by its user, it is whole."""
    folder = write_untrained_checkpoint(tmp_path / "model")
    before = describe(folder, "float32")
    pickled = folder / "clip"
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="only as pickles"):
        describe(folder, "float32")
    converted = pickled.rename(tmp_path / "pickled")
    CLIPModel.from_pretrained(converted).save_pretrained(folder / "clip")
    AutoTokenizer.from_pretrained(converted).save_pretrained(folder / "clip")
    configure(folder, mm_vision_tower="openai/clip-vit-large-patch14-336")
    after = open_checkpoint(folder)
    assert after.clip is not None
    assert after.clip.reads_text
    assert after.fingerprint("float32") == before.fingerprint


PUBLISHED_CLIP = {
    "_name_or_path": "openai/clip-vit-large-patch14-336",
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {
        "_name_or_path": "",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "projection_dim": 768,
        "torch_dtype": None,
        "torchscript": False,
    },
    "torch_dtype": "float32",
    "transformers_version": None,
    "vision_config": {
        "_name_or_path": "",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "torch_dtype": None,
        "torchscript": False,
    },
}


def test_the_config_of_the_published_tower_is_read(folder):
    inside(folder)
    (folder / "clip" / "config.json").write_text(json.dumps(PUBLISHED_CLIP))
    config = open_checkpoint(folder).config
    assert (config.vision_width, config.image_size, config.patch_size, config.grid) == (1024, 336, 14, 24)
    assert (config.vision.num_hidden_layers, config.vision_select_layer, config.vision.hidden_act) == (
        24,
        23,
        "quick_gelu",
    )


def test_a_tower_saved_without_its_outer_name_is_read(folder, expected):
    path = folder / "clip" / "model.safetensors"
    save_file({name.removeprefix("vision_model."): one for name, one in load_file(path).items()}, path)
    assert torch.equal(LlavaMini.from_pretrained(folder).encode_frames(pictures()), expected)


def test_tensors_that_nothing_needs_are_not_missed(folder, expected):
    change(folder, model__norm__weight=None)
    assert torch.equal(LlavaMini.from_pretrained(folder, part="compressor").encode_frames(pictures()), expected)


def test_the_fingerprint_follows_what_tokens_depend_on_and_nothing_else(folder):
    def fingerprint(dtype="float32"):
        return open_checkpoint(folder).fingerprint(dtype)

    before = fingerprint()
    assert len(before) == 16
    assert fingerprint("bfloat16") != before
    change(folder, lm_head__weight=torch.zeros(512, 128))
    assert fingerprint() == before
    change(folder, model__mm_projector__0__bias=torch.zeros(128))
    changed = fingerprint()
    assert changed != before
    configure(folder, mm_vision_select_layer=-1)
    assert fingerprint() not in (before, changed)


def test_a_checkpoint_is_described_without_loading_it(folder):
    facts = describe(folder, "float32")
    assert (facts.name, facts.vector_width, facts.searches_text) == ("model", 1024, False)
    assert facts.fingerprint == LlavaMini.from_pretrained(folder, part="llm").fingerprint
    config = facts.config
    assert (config.width, config.tokens_per_frame, config.input_size_px, config.parts) == (128, 1, 56, 1)
    assert (config.context_rows, config.max_position_embeddings, config.untrained) == (4096, 4096, False)


def test_high_resolution_asks_for_larger_keyframes(tmp_path):
    config = describe(make_checkpoint.write(tmp_path, 2, 3), "float32").config
    assert (config.input_size_px, config.parts, config.tokens_per_frame) == (168, 10, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "there is no folder 'all'"),
        ("./missing", "there is no folder 'missing'"),
        ("just-a-name", "no hub name of the form owner/name"),
        ("two/many/slashes", "no hub name of the form owner/name"),
        ("bad owner/bad name?", "it is no valid hub name"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name, message):
    with pytest.raises(BadCheckpoint, match=message):
        LlavaMini.from_pretrained(name)


def test_a_name_that_the_hub_does_not_answer_is_refused():
    with pytest.raises(BadCheckpoint, match=r"no folder 'nobody/nothing', and no such checkpoint could be had"):
        LlavaMini.from_pretrained("nobody/nothing")


def test_a_file_instead_of_its_folder_is_refused(folder):
    with pytest.raises(BadCheckpoint, match=r"config\.json is a file: give the folder"):
        LlavaMini.from_pretrained(folder / "config.json")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"has no config\.json"):
        LlavaMini.from_pretrained(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[1]", "no JSON object")])
def test_a_broken_config_is_refused(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(BadCheckpoint, match=message):
        LlavaMini.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', not 'llava_mini_llama'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear' is not supported"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch' is not supported"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer is -9"),
        ({"mm_hidden_size": 64}, "mm_hidden_size is 64"),
        ({"compressor_size": 0}, "compressor_size is 0"),
        ({"compressor_size": "two"}, "compressor_size is 'two'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"mm_vision_tower": None}, "the vision tower of mm_vision_tower: config.json names none"),
        ({"mm_vision_tower": "/nowhere/clip"}, "vision tower of mm_vision_tower: there is no folder 'clip'"),
    ],
    ids=str,
)
def test_a_config_of_another_network_is_refused(folder, changes, message):
    configure(folder, **changes)
    with pytest.raises(BadCheckpoint, match=message):
        LlavaMini.from_pretrained(folder)


def test_a_tower_that_is_not_clip_is_refused(folder):
    configure(folder / "clip", model_type="siglip_vision_model")
    with pytest.raises(BadCheckpoint, match="is a 'siglip_vision_model', not a CLIP model"):
        LlavaMini.from_pretrained(folder)


def test_pickles_are_refused_with_the_reason_and_never_opened(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(tmp_path / "it-ran")))
    with pytest.raises(BadCheckpoint, match=r"only as pickles; pickles \(\.bin\) can run code"):
        LlavaMini.from_pretrained(folder)
    assert not (tmp_path / "it-ran").exists()


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="has no weights"):
        LlavaMini.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["model.prefusion_layers.3.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(folder, name):
    change(folder, **{name: None})
    with pytest.raises(BadCheckpoint, match=f"tensor {name} is missing"):
        LlavaMini.from_pretrained(folder)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(folder):
    configure(folder, vocab_size=500)
    with pytest.raises(
        BadCheckpoint,
        match=r"tensor model.embed_tokens.weight has shape \(512, 128\), the config asks for \(500, 128\)",
    ):
        LlavaMini.from_pretrained(folder)


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"shard model-00002-of-00002\.safetensors of the index is missing"):
        LlavaMini.from_pretrained(folder)


def test_an_index_that_leaves_the_folder_is_refused(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    with pytest.raises(BadCheckpoint, match="not a safetensors file beside it"):
        LlavaMini.from_pretrained(folder)


def test_an_index_that_promises_too_much_is_refused(folder):
    shard(folder)
    path = folder / "model.safetensors.index.json"
    where = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": dict.fromkeys(where, "model-00001-of-00002.safetensors")}))
    with pytest.raises(BadCheckpoint, match="is not where the index says"):
        LlavaMini.from_pretrained(folder)


def test_a_damaged_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors is damaged"):
        LlavaMini.from_pretrained(folder)


@pytest.mark.skipif(HAS_8BIT, reason="bitsandbytes is installed here")
def test_eight_bits_without_their_library_say_what_to_install(folder):
    with pytest.raises(QuantizationUnavailable, match=r"pip install 'tokenline\[quantized\]'"):
        LlavaMini.from_pretrained(folder, part="llm", load_in_8bit=True)


@pytest.mark.skipif(not HAS_8BIT, reason="needs bitsandbytes, the extra 'quantized'")
def test_eight_bits_stay_close_and_leave_frame_tokens_alone(folder, expected):
    exact, small = LlavaMini.from_pretrained(folder), LlavaMini.from_pretrained(folder, load_in_8bit=True)
    rows = torch.randn(1, 20, 128, generator=torch.Generator().manual_seed(0))
    likeness = torch.nn.functional.cosine_similarity(small.logits(rows), exact.logits(rows), dim=-1)
    assert likeness.min() > 0.99
    assert torch.equal(small.encode_frames(pictures()), expected)
    assert small.fingerprint == exact.fingerprint


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device here")
def test_cuda_without_a_device_is_refused_and_auto_falls_back(folder):
    with pytest.raises(ValueError, match='use "cpu" or "auto"'):
        LlavaMini.from_pretrained(folder, device="cuda")
    assert LlavaMini.from_pretrained(folder, device="auto").device == torch.device("cpu")


def test_untrained_checkpoints_of_one_seed_are_the_same_to_the_byte(tmp_path):
    first, second = (write_untrained_checkpoint(tmp_path / name, seed=3) for name in ("first", "second"))
    other = write_untrained_checkpoint(tmp_path / "other", seed=4)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    assert describe(first, "float32").fingerprint != describe(other, "float32").fingerprint
    assert sum((first / name).stat().st_size for name in files) < 8_000_000


def test_an_untrained_checkpoint_says_so_and_has_everything(tmp_path):
    facts = describe(write_untrained_checkpoint(tmp_path / "small"), "bfloat16")
    assert facts.config.untrained
    assert facts.searches_text
    assert facts.config.llama.rope_parameters["rope_type"] == "llama3"
