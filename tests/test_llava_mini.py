"""The network against the published code's arrays, against a plain rewrite, and against itself in other pieces."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor_service.llava_mini import ContextTooLong, LlavaMini, NotLoaded, Sampling
from compressor_service.llava_mini.checkpoint import open_checkpoint
from compressor_service.llava_mini.compressor import Compressor
from compressor_service.llava_mini.vision import VisionTower
from tests.plain_llava_mini import PlainLlavaMini
from tests.reference import make_checkpoint

REFERENCE = Path(__file__).parent / "reference"
LLAMA_31 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with 4 tokens a frame."""
    return make_checkpoint.write(tmp_path_factory.mktemp("c2"), 2, 1)


@pytest.fixture(scope="module")
def model(folder):
    return LlavaMini.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows(model):
    """What the language model reads of three frames and a question: (1, S, D)."""
    return model.inputs_embeds(ids(5, -200, 9, 10, 11)[None], pixels(3)[None])


def ids(*values):
    return torch.tensor(values)


def pixels(frames, parts=1, seed=0):
    return torch.randn(frames, parts, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", make_checkpoint.CASES)
def test_the_published_arrays_are_reproduced(case, tmp_path):
    size, ratio, _ = make_checkpoint.CASES[case]
    model = LlavaMini.from_pretrained(make_checkpoint.write(tmp_path, size, ratio))
    expected = np.load(REFERENCE / f"{case}.npz")
    prompt, pictures = torch.from_numpy(expected["input_ids"]), torch.from_numpy(make_checkpoint.pixels(case))
    embeds = model.inputs_embeds(prompt, pictures)
    made = {
        "frame_tokens": model.encode_frames(pictures[0])[None],
        "frame_text": model.fuse_text(prompt[0], pictures[0])[None],
        "inputs_embeds": embeds,
        "logits": model.logits(embeds),
    }
    for name, array in made.items():
        np.testing.assert_allclose(array.numpy(), expected[name], **CLOSE, err_msg=name)
    assert model.generate(embeds, max_new_tokens=24).tolist() == expected["generated"].tolist()


@pytest.mark.parametrize("case", make_checkpoint.CASES)
def test_tower_and_compressor_alone_are_those_of_the_published_code(case, tmp_path):
    size, ratio, _ = make_checkpoint.CASES[case]
    checkpoint = open_checkpoint(make_checkpoint.write(tmp_path, size, ratio))
    tower = VisionTower(checkpoint.config.vision, select_layer=2, projection_width=None)
    compressor = Compressor(size=size, width=1024, heads=8)
    cpu = {"dtype": torch.float32, "device": torch.device("cpu")}
    checkpoint.tower.fill(tower.tower, checkpoint.tower_prefix, **cpu)
    checkpoint.weights.fill(compressor, "model.compressor.", **cpu)
    expected = np.load(REFERENCE / f"{case}.npz")
    seen = tower.eval()(torch.from_numpy(make_checkpoint.pixels(case))[0, 0, :1])
    np.testing.assert_allclose(seen.patches.numpy(), expected["vision_features"], **CLOSE)
    _, attention = compressor(seen.patches)
    np.testing.assert_allclose(attention.numpy(), expected["compression_attention"], **CLOSE)


@pytest.mark.parametrize(
    ("size", "ratio", "frames", "overrides"),
    [(1, 1, 2, LLAMA_31), (2, 2, 3, {}), (3, 1, 2, {}), (2, 3, 2, LLAMA_31)],
    ids=["llama 3.1", "high resolution frames", "nine tokens", "both"],
)
def test_batches_with_padding_and_other_sizes_equal_a_plain_rewrite(size, ratio, frames, overrides, tmp_path):
    folder = make_checkpoint.write(tmp_path, size, ratio, **overrides)
    prompts = torch.tensor([[1, 7, -200, 9, 0, 11, 12], [-200, 3, 4, 5, 6, 0, 0], [0, 0, 5, 6, 7, 8, -200]])
    parts = 1 if ratio == 1 else ratio**2 + 1
    pictures = pixels(3 * frames, parts).unflatten(0, (3, frames))
    model, plain = LlavaMini.from_pretrained(folder, frames_per_pass=4), PlainLlavaMini(folder)
    embeds = model.inputs_embeds(prompts, pictures)
    assert embeds.shape == (3, 7 - 1 + frames * size**2, 128)
    torch.testing.assert_close(embeds, plain.inputs_embeds(prompts, pictures), **CLOSE)
    torch.testing.assert_close(model.logits(embeds), plain.logits(embeds), **CLOSE)


def test_a_frame_does_not_depend_on_its_batch_mates(model):
    pictures = pixels(5)
    alone = torch.cat([model.encode_frames(one[None]) for one in pictures])
    torch.testing.assert_close(model.encode_frames(pictures), alone, atol=1e-5, rtol=0)


def test_frames_in_small_passes_equal_frames_in_one(folder, model):
    small = LlavaMini.from_pretrained(folder, part="compressor", frames_per_pass=2)
    prompt = ids(5, -200, 9, 10)
    torch.testing.assert_close(small.encode_frames(pixels(5)), model.encode_frames(pixels(5)), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        small.fuse_text(prompt, pixels(5)), model.fuse_text(prompt, pixels(5)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("size", "ratio"), [(1, 1), (2, 1), (3, 2)])
def test_frame_tokens_are_the_same_to_the_bit_whatever_the_question(dtype, size, ratio, tmp_path):
    model = LlavaMini.from_pretrained(make_checkpoint.write(tmp_path, size, ratio), dtype=dtype, frames_per_pass=2)
    pictures = pixels(3, model.config.parts)
    tokens = model.encode_frames(pictures).flatten(0, 1)
    for prompt in (ids(-200, 3), ids(-200, 400, 17, 0, 99, 250), ids(-200, 0, 0), ids(-200)):
        inside = model.inputs_embeds(prompt[None], pictures[None])[0, : len(tokens)]
        assert torch.equal(inside, tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kept_tokens_and_averaged_text_are_what_one_forward_gives(dtype, folder):
    model = LlavaMini.from_pretrained(folder, dtype=dtype)
    prompt, pictures = ids(5, 6, -200, 9, 10, 11), pixels(4)
    kept = model.encode_frames(pictures).flatten(0, 1)
    text = (model.fuse_text(prompt, pictures).float().sum(dim=0) / 4).to(model.dtype)
    placed = torch.cat(model.place_frames(text, prompt, kept))
    assert torch.equal(placed, model.inputs_embeds(prompt[None], pictures[None])[0])


def test_hidden_rows_keep_their_plain_embedding_and_change_no_other(model):
    padded, bare = ids(0, 5, -200, 9, 0, -7, 10), ids(5, 9, 10)
    fused = model.fuse_text(padded, pixels(1))[0]
    torch.testing.assert_close(fused[[1, 3, 6]], model.fuse_text(bare, pixels(1))[0], atol=1e-5, rtol=0)
    assert torch.equal(fused[[0, 2, 4, 5]], model.embed_text(ids(0, 0, 0, 0)))


def test_either_half_alone_does_what_the_whole_does(folder, model, rows):
    eyes = LlavaMini.from_pretrained(folder, part="compressor")
    mouth = LlavaMini.from_pretrained(folder, part="llm")
    assert torch.equal(eyes.encode_frames(pixels(2)), model.encode_frames(pixels(2)))
    assert torch.equal(mouth.generate(rows, 8), model.generate(rows, 8))
    assert eyes.fingerprint == mouth.fingerprint == model.fingerprint


def test_a_half_that_is_not_there_is_named(folder, rows):
    with pytest.raises(NotLoaded, match="part='compressor' or 'all'"):
        LlavaMini.from_pretrained(folder, part="llm").encode_frames(pixels(1))
    with pytest.raises(NotLoaded, match="part='llm' or 'all'"):
        LlavaMini.from_pretrained(folder, part="compressor").generate(rows, 1)


def test_the_looking_half_needs_no_language_weights(tmp_path, model):
    folder = make_checkpoint.write(tmp_path, 2, 1)
    kept = {name: one for name, one in load_file(folder / "model.safetensors").items() if ".layers." not in name}
    kept.pop("lm_head.weight"), kept.pop("model.norm.weight")
    save_file(kept, folder / "model.safetensors")
    eyes = LlavaMini.from_pretrained(folder, part="compressor")
    assert torch.equal(eyes.encode_frames(pixels(1)), model.encode_frames(pixels(1)))


def test_answers_from_a_shared_prefix_equal_answers_from_the_whole_prompt(model, rows):
    whole = list(model.stream(rows[0], max_new_tokens=12))
    for cut in (1, 7, rows.shape[1] - 1):
        prefix = model.prefill(rows[0, :cut])
        assert (prefix.length, prefix.nbytes) == (cut, cut * 3 * 2 * 2 * 16 * 4)
        assert list(model.stream(rows[0, cut:], max_new_tokens=12, prefix=prefix)) == whole


def test_answers_at_the_same_time_do_not_disturb_their_prefix(model, rows):
    prefix = model.prefill(rows[0, :9])
    before = prefix.states.clone()
    other = torch.flip(rows[0, 9:], dims=(0,))
    alone = [list(model.stream(rest, max_new_tokens=6, prefix=prefix)) for rest in (rows[0, 9:], other)]
    pair = [model.stream(rest, max_new_tokens=6, prefix=prefix) for rest in (rows[0, 9:], other)]
    woven = list(zip(*pair, strict=True))
    assert [list(one) for one in zip(*woven, strict=True)] == alone
    assert torch.equal(prefix.states, before)


def test_a_batch_of_prompts_is_answered_as_each_alone(model, rows):
    batch = torch.cat((rows, torch.flip(rows, dims=(1,))))
    together = model.generate(batch, max_new_tokens=10)
    assert together.shape == (2, 10)
    assert together.tolist() == [list(model.stream(one, max_new_tokens=10)) for one in batch]


def test_an_answer_ends_before_a_stop_id(model, rows):
    whole = list(model.stream(rows[0], max_new_tokens=12))
    stop = whole[5]
    first = whole.index(stop)
    assert list(model.stream(rows[0], max_new_tokens=12, stop_ids={stop})) == whole[:first]
    assert model.generate(rows, 12, stop_ids={stop}).tolist() == [whole[: first + 1]]
    assert list(model.stream(rows[0], max_new_tokens=0)) == []
    assert model.generate(rows, 0).shape == (1, 0)


def test_a_row_that_ended_repeats_its_stop_id_until_all_have(model, rows):
    batch = torch.cat((rows, torch.flip(rows, dims=(1,))))
    left, right = model.generate(batch, 10).tolist()
    stop = next(one for one in left if one not in right)
    ended = model.generate(batch, 10, stop_ids={stop}).tolist()
    end = left.index(stop)
    assert ended == [left[:end] + [stop] * (10 - end), right]


def test_ids_come_as_they_are_made_and_work_ends_when_the_stream_is_closed(model, rows):
    stream = model.stream(rows[0], max_new_tokens=4000)
    assert len(list(itertools.islice(stream, 3))) == 3
    stream.close()
    assert list(stream) == []


def test_a_seed_repeats_a_sampled_answer(model, rows):
    def answer(seed):
        return list(model.stream(rows[0], max_new_tokens=16, sampling=Sampling(temperature=2.0, seed=seed)))

    assert answer(7) == answer(7)
    assert len({tuple(answer(seed)) for seed in range(4)}) > 1


def test_a_narrow_nucleus_is_greedy(model, rows):
    narrow = Sampling(temperature=1.5, top_p=1e-6, seed=3)
    assert list(model.stream(rows[0], max_new_tokens=8, sampling=narrow)) == model.generate(rows, 8)[0].tolist()


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str
)
def test_sampling_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close_and_keeps_its_dtype(dtype, folder, model):
    half = LlavaMini.from_pretrained(folder, dtype=dtype)
    tokens, exact = half.encode_frames(pixels(2)), model.encode_frames(pixels(2))
    assert tokens.dtype == getattr(torch, dtype)
    assert torch.nn.functional.cosine_similarity(tokens.float(), exact, dim=-1).min() > 0.99
    embeds = half.inputs_embeds(ids(5, -200, 9)[None], pixels(2)[None])
    assert embeds.dtype == tokens.dtype
    assert torch.isfinite(half.logits(embeds)).all()
    assert half.generate(embeds, 4).shape == (1, 4)


def test_tied_embeddings_are_the_head(tmp_path, rows):
    folder = make_checkpoint.write(tmp_path, 2, 1, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    tied = LlavaMini.from_pretrained(folder, part="llm")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert torch.equal(tied.logits(rows), LlavaMini.from_pretrained(folder, part="llm").logits(rows))


def test_search_vectors_have_unit_length_and_follow_the_whole_picture(tmp_path):
    model = LlavaMini.from_pretrained(make_checkpoint.write(tmp_path, 1, 2), part="compressor")
    pictures = pixels(2, parts=5)
    swapped = pictures.clone()
    swapped[:, :4] = pixels(2, parts=4, seed=1)
    vectors = model.encode(pictures).vectors
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(model.encode(swapped).vectors, vectors)


def test_a_context_beyond_the_model_is_refused_and_never_cut(tmp_path):
    folder = make_checkpoint.write(tmp_path, 1, 1, tokenizer_model_max_length=20, max_position_embeddings=30)
    model = LlavaMini.from_pretrained(folder, part="llm")
    with pytest.raises(ContextTooLong, match="21 rows, the model reads 20"):
        model.prefill(torch.zeros(21, 128))
    with pytest.raises(ContextTooLong, match="20 rows and 11 new tokens"):
        model.stream(torch.zeros(20, 128), max_new_tokens=11)
    with pytest.raises(ContextTooLong):
        model.stream(torch.zeros(3, 128), max_new_tokens=1, prefix=model.prefill(torch.zeros(18, 128)))
    with pytest.raises(ContextTooLong):
        model.logits(torch.zeros(1, 21, 128))
    assert model.generate(torch.zeros(1, 20, 128), 10).shape == (1, 10)


@pytest.mark.parametrize("prompt", [[1, 2, 3], [-200, 5, -200]])
def test_a_prompt_needs_exactly_one_placeholder(model, prompt):
    with pytest.raises(ValueError, match="image placeholders"):
        model.inputs_embeds(torch.tensor([prompt]), pixels(1)[None])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 56, 56), "not \\(frames, 1, 3, 56, 56\\)"),
        ((1, 5, 3, 56, 56), "have shape"),
        ((0, 1, 3, 56, 56), "no frame"),
    ],
)
def test_pixels_of_another_shape_are_refused(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model.encode_frames(torch.zeros(shape))


@pytest.mark.parametrize(
    "pictures", [np.zeros((1, 1, 3, 56, 56), np.float32), torch.zeros(1, 1, 3, 56, 56, dtype=torch.uint8)], ids=type
)
def test_pixels_that_were_not_preprocessed_to_a_tensor_are_refused(model, pictures):
    with pytest.raises(TypeError, match="not a tensor of preprocessed floating point values"):
        model.encode_frames(pictures)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (torch.tensor([5, -200, 9]), ValueError, r"shape \(3,\), not \(B, L\)"),
        (torch.tensor([[5.0, -200.0]]), TypeError, "torch.float32, not a tensor of whole numbers"),
        ([[5, -200]], TypeError, "list, not a tensor of whole numbers"),
        (torch.tensor([[5, -200], [5, -200]]), ValueError, "2 prompts and pixels for 1"),
        (torch.empty(0, 3, dtype=torch.long), ValueError, "0 prompts"),
    ],
)
def test_prompts_of_another_kind_are_refused(model, prompt, error, message):
    with pytest.raises(error, match=message):
        model.inputs_embeds(prompt, pixels(1)[None])


def test_text_is_fused_with_one_prompt_at_a_time(model):
    with pytest.raises(ValueError, match=r"shape \(1, 3\), not \(L,\)"):
        model.fuse_text(ids(5, -200, 9)[None], pixels(1))


def test_rows_of_another_shape_are_refused(model, rows):
    for call in (model.logits, lambda one: model.generate(one, 3)):
        with pytest.raises(ValueError, match=r"not \(B, S, D\) with D = 128"):
            call(rows[0])
        with pytest.raises(ValueError, match="no rows"):
            call(rows[:, :0])
    with pytest.raises(ValueError, match=r"not \(S, D\) with D = 128"):
        model.prefill(rows)
    with pytest.raises(ValueError, match=r"not \(S, D\) with D = 128"):
        model.stream(rows[0, :, :64], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        model.generate(rows, -1)


def test_an_id_outside_the_vocabulary_is_refused(model):
    with pytest.raises(ValueError, match="id 512 is not in the vocabulary of 512"):
        model.embed_text(ids(1, 512))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"part": "vision"}, "part is 'vision'"),
        ({"frames_per_pass": 0}, "frames_per_pass is 0"),
    ],
)
def test_options_that_do_not_exist_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        LlavaMini.from_pretrained(folder, **options)
