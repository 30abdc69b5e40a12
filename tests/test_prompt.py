"""Questions to ids and ids to text, with a real tokenizer and chat template."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig

from compressor_service.llava_mini import BadCheckpoint
from compressor_service.llava_mini.prompt import SYSTEM_TEXT, ControlTokenInQuestion, Prompt
from tests.untrained import write_untrained_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_untrained_checkpoint(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def prompt(folder):
    return Prompt.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, config=LlamaConfig())


def spelt(tokenizer, ids):
    return tokenizer.decode([one for one in ids if one >= 0])


def test_the_placeholder_stands_once_where_the_template_puts_the_picture(prompt, tokenizer):
    ids = prompt.build("Who is at the door?")
    place = ids.index(-200)
    assert ids.count(-200) == 1
    assert spelt(tokenizer, ids[:place]) == (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM_TEXT}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
    )
    assert spelt(tokenizer, ids[place + 1 :]) == (
        "\nWho is at the door?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_what_stands_before_the_frames_does_not_depend_on_the_question(prompt):
    first, second = prompt.build("Who?"), prompt.build("How many cars were there, and when?")
    assert first[: first.index(-200)] == second[: second.index(-200)]


def test_the_generation_prompt_and_the_system_text_can_be_chosen(folder, tokenizer):
    ids = Prompt.from_pretrained(folder, system="Be brief.", add_generation_prompt=False).build("Who?")
    assert spelt(tokenizer, ids).endswith("\nWho?<|eot_id|>")
    assert "Be brief." in spelt(tokenizer, ids)
    assert "assistant" not in spelt(tokenizer, ids)


@pytest.mark.parametrize("control", ["<image>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>"])
def test_a_question_cannot_write_control_tokens(prompt, control):
    with pytest.raises(ControlTokenInQuestion, match="is reserved") as caught:
        prompt.build(f"ignore this {control} and that")
    assert repr(control) in str(caught.value)


def test_nor_can_a_system_text(folder):
    with pytest.raises(ControlTokenInQuestion):
        Prompt.from_pretrained(folder, system="see <image>")


@pytest.mark.parametrize("question", ["", " ", "<img>", "image", "< image >", "a" * 2000, "Was ist\n\tdas? 多少人 🚗"])
def test_any_other_question_is_put(prompt, tokenizer, question):
    ids = prompt.build(question)
    assert ids.count(-200) == 1
    assert question.strip() in spelt(tokenizer, ids)


def test_stop_ids_come_from_config_generation_config_and_tokenizer(prompt, tokenizer):
    ends = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
    assert prompt.stop_ids == set(tokenizer.convert_tokens_to_ids(ends))


def test_a_single_stop_id_without_generation_config_is_enough(tmp_path):
    folder = write_untrained_checkpoint(tmp_path)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    assert 7 in Prompt.from_pretrained(folder).stop_ids


def test_control_tokens_are_no_part_of_an_answer(prompt, tokenizer):
    ids = [*tokenizer.encode("a red car", add_special_tokens=False), *prompt.stop_ids]
    assert prompt.decode(ids) == "a red car"


def test_a_character_of_several_ids_comes_once_it_is_whole(prompt, tokenizer):
    ids = tokenizer.encode("é🚗!", add_special_tokens=False)
    decoder = prompt.stream_decoder()
    pieces = [decoder.feed(one) for one in ids]
    assert len(ids) == 7
    assert pieces == ["", "é", "", "", "", "🚗", "!"]
    assert decoder.finish() == ""


def test_a_character_that_stays_broken_is_shown_at_the_end(prompt, tokenizer):
    ids = tokenizer.encode("car 🚗", add_special_tokens=False)[:-1]
    decoder = prompt.stream_decoder()
    streamed = "".join(decoder.feed(one) for one in ids)
    assert streamed == "car "
    assert streamed + decoder.finish() == prompt.decode(ids)


@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_streamed_text_is_the_whole_text(prompt, tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoder = prompt.stream_decoder()
    assert "".join(decoder.feed(one) for one in ids) + decoder.finish() == prompt.decode(ids)


@given(ids=st.lists(st.integers(0, 1150), max_size=40))
@settings(max_examples=60, deadline=None)
def test_streamed_text_of_any_ids_is_the_whole_text(prompt, ids):
    decoder = prompt.stream_decoder()
    assert "".join(decoder.feed(one) for one in ids) + decoder.finish() == prompt.decode(ids)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path):
    folder = write_untrained_checkpoint(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(BadCheckpoint, match="has no tokenizer that can be loaded"):
        Prompt.from_pretrained(folder)


def test_a_checkpoint_without_chat_template_is_refused(tmp_path):
    folder = write_untrained_checkpoint(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(BadCheckpoint, match="has no chat template"):
        Prompt.from_pretrained(folder)


def test_a_template_that_loses_the_question_is_refused(tmp_path):
    folder = write_untrained_checkpoint(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}nothing")
    with pytest.raises(BadCheckpoint, match="0 times, not once"):
        Prompt.from_pretrained(folder).build("Who?")
