"""Look-ups that training starts from: words find in frame tokens what belongs to them. All of it is free to change.

A kind or a colour that is named in a question finds, one layer after the other:

1. Half of the heads of the first layer match the word's query with the key of its name in a frame token, and bring what
   the frame token holds to the word's row. What belongs together is held there as products of signs.
2. Pairs of hidden units of the same layer multiply it by the word's own signs, for silu(x) - silu(-x) = x: the signs of
   what belongs to the word are left, and those of other things are noise.
3. Half of the heads of the second layer bring that to the row that opens the answer, whose word is likeliest where the
   signs agree.

And of the other heads of the first layer two tell each frame how late it is, and two take from it what the frame before
shows as well, so that events and their order can be told.

From random weights such look-ups are found late, in sudden steps, and from some seeds never. The idea of initial
weights that imitate trained ones is that of Trockman and Kolter (arXiv 2305.09828), binding by products of signs is
that of Gayler's vector symbolic architectures (arXiv cs/0412059).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from compressor_service.training.examples import FLAGS
from compressor_service.training.scene_tokens import ATTRIBUTES, NAMED, PAIRS, Codes
from compressor_service.training.tokenizer import ASSISTANT, BEGIN, token_id
from compressor_service.training.words import PLURALS

MADE = ("layers.0.", "layers.1.")  # of the language model's parameters
_FEWEST_HEADS = 8  # half of them look, two are clocks, two see what is new
_LOOKING_LAYERS = 3
_LOOKING_GAIN = 0.08
_FETCHING_GAIN = 0.1
_SIGN_GAIN = 0.08  # brings the signs to about 2, where silu bends
_FREEING_GAIN = 0.1
_ANSWERING_GAIN = 1.5
_SAYING_GAIN = 0.05
_NAME_GAIN = 24.0  # how much louder a kind or a colour is in a frame token than in a word
_CODE_STD = 0.8
_FRAME_GAIN = 40.0  # loud, that all frames are about as long: the keys below are to be alike
_FRAME_SHARE = 12.0  # of that in a normed frame token, about
_TEXT_SHARE = 8.0
_CLOCKS = (3.0, 7.0)  # for a minute, and for some
_CLOCK_GAIN = 3.0
_BEFORE_SHARPNESS = 14.0
_BEFORE_GAIN = 3.3  # the deviation of a frame token, about: what it has in common with the one before is gone then


class _Space(NamedTuple):
    """The width D in orthonormal parts: what is held together (D, D / 2), what is named, and single directions (D,)."""

    held: Tensor
    named: Tensor
    mark: Tensor  # of the words that look up
    text: Tensor  # of all text
    frame: Tensor  # of frame tokens
    origin: Tensor  # of the first row of all
    clock: Tensor  # (D, 2)

    @classmethod
    def draw(cls, width: int, random: torch.Generator) -> "_Space":
        basis, _ = torch.linalg.qr(torch.randn(width, width, generator=random))
        held, named, single = basis.split((width // 2, width // 2 - 6, 6), dim=1)
        mark, text, frame, origin = single[:, :4].unbind(dim=1)
        return cls(held, named, mark, text, frame, origin, single[:, 4:])


def make_look_ups(
    embedding: Tensor,
    layers: list[LlamaDecoderLayer],
    head: nn.Linear,
    tokenizer: PreTrainedTokenizerFast,
    random: torch.Generator,
) -> Codes:
    """Change drawn weights so that they look up; return the vectors that frame tokens are to be made of for that.

    Raises ValueError for layers of fewer heads than there are things to do.
    """
    if embedding.shape[1] // layers[0].self_attn.head_dim < _FEWEST_HEADS:
        raise ValueError(f"look-ups need {_FEWEST_HEADS} heads")
    width, half = embedding.shape[1], embedding.shape[1] // 2
    space = _Space.draw(width, random)
    words = _prepare_words(embedding, tokenizer, space)
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=random))
    to_name = math.sqrt(2) * turn[:half]  # of a word's vector: other directions, or words would match each other
    for direction in (space.mark, space.text, space.origin):
        to_name = to_name - (to_name @ direction)[:, None] * direction
    into_named = torch.nn.functional.pad(space.named, (0, half - space.named.shape[1]))
    for layer in layers[:_LOOKING_LAYERS]:
        attention = layer.self_attn
        gains = _LOOKING_GAIN * torch.randn(half, half, generator=random) * _slow(half, attention.head_dim)[:, None]
        attention.q_proj.weight[:half] = gains @ to_name
        attention.k_proj.weight[:half] = math.sqrt(2) * gains @ into_named.T
    signs = {
        name: torch.randint(0, 2, (len(values), half), generator=random).float() * 2 - 1
        for name, values in ATTRIBUTES.items()
    }
    _fetch(layers[0], space)
    _free(layers[0], words, torch.cat([signs[name] for name in NAMED]), space)
    _tick(layers[0], space)
    _differ(layers[0], space)
    _answer(layers[1], embedding[token_id(tokenizer, ASSISTANT)], space)
    for name, values in ATTRIBUTES.items():
        for value, vector in zip(values, signs[name] @ space.held.T, strict=True):
            for row in _spellings(tokenizer, value.split()):
                head.weight[row] += _SAYING_GAIN * vector
    names = (_NAME_GAIN * words @ to_name.T @ into_named.T).split([len(ATTRIBUTES[name]) for name in NAMED])
    return Codes(
        dict(zip(NAMED, names, strict=True)),
        {(one, other): _CODE_STD * (signs[one][:, None] * signs[other]) @ space.held.T for one, other in PAIRS},
        _CODE_STD * torch.randn(FLAGS, half, generator=random) @ into_named.T,
        _FRAME_GAIN * space.frame,
    )


def _prepare_words(embedding: Tensor, tokenizer: PreTrainedTokenizerFast, space: _Space) -> Tensor:
    """Clear the embedding of what frames hold and of the mark, and mark kinds and colours; return these, unmarked.

    A word is the same behind a blank and without one, and a plural nearly its singular.
    """
    for word in _names():
        first, *others = _spellings(tokenizer, [word])
        for row in others:
            embedding[row] = embedding[first]
        if word in PLURALS:
            for row in _spellings(tokenizer, [PLURALS[word]]):
                embedding[row] = embedding[first] + 0.3 * embedding[row]
    embedding.sub_(embedding @ space.held @ space.held.T)
    for direction in (space.mark, space.text, space.frame, space.origin):
        embedding.sub_((embedding @ direction)[:, None] * direction)
    words = embedding[[_spellings(tokenizer, [word])[0] for word in _names()]]
    marked = [word for one in _names() for word in (one, PLURALS.get(one, one))]
    embedding[sorted(set(_spellings(tokenizer, marked)))] += words.norm(dim=1).mean() * space.mark
    embedding += words.norm(dim=1).mean() * space.text
    embedding[token_id(tokenizer, BEGIN)] = words.norm(dim=1).mean() * space.origin
    return words


def _fetch(layer: LlamaDecoderLayer, space: _Space) -> None:
    """Let the looking heads bring what is held."""
    attention, half = layer.self_attn, space.held.shape[1]
    attention.v_proj.weight[:half] = space.held.T
    attention.o_proj.weight[:, :half] = _FETCHING_GAIN * space.held


def _free(layer: LlamaDecoderLayer, words: Tensor, signs: Tensor, space: _Space) -> None:
    """Let hidden units multiply what is held at the rows of words (n, D) by the words' signs (n, D / 2)."""
    reading = signs.T @ (words / words.square().sum(dim=1, keepdim=True))  # (D / 2, D): the signs of a row's word
    pairs = min(len(reading), layer.mlp.gate_proj.weight.shape[0] // 2)
    for start, sign in ((0, 1), (pairs, -1)):
        units = slice(start, start + pairs)
        layer.mlp.gate_proj.weight[units] = sign * _SIGN_GAIN * reading[:pairs]
        layer.mlp.up_proj.weight[units] = space.held.T[:pairs]
        layer.mlp.down_proj.weight[:, units] = sign * _FREEING_GAIN * space.held[:, :pairs]


def _tick(layer: LlamaDecoderLayer, space: _Space) -> None:
    """Let two more heads tell frames how late it is: by how much of the first row they see, at rotary's distance."""
    attention, width = layer.self_attn, layer.self_attn.head_dim
    first = attention.q_proj.weight.shape[0] // 2
    for number, sharpness in enumerate(_CLOCKS):
        rows = slice(first + number * width, first + (number + 1) * width)
        turning = torch.zeros(width)
        turning[width // 4] = math.sqrt(sharpness * math.sqrt(width))
        reach = math.sqrt(len(space.mark))  # of a normed row along one direction
        attention.q_proj.weight[rows] = turning[:, None] * space.frame / _FRAME_SHARE
        attention.k_proj.weight[rows] = turning[:, None] * space.origin / reach
        attention.v_proj.weight[rows] = 0
        attention.v_proj.weight[rows.start] = space.origin / reach
        attention.o_proj.weight[:, rows] = 0
        attention.o_proj.weight[:, rows.start] = _CLOCK_GAIN * space.clock[:, number]


def _differ(layer: LlamaDecoderLayer, space: _Space) -> None:
    """Let the last two heads take the frame before from a frame, in a part of what is named: what is new is left."""
    attention, width = layer.self_attn, layer.self_attn.head_dim
    first = attention.q_proj.weight.shape[0] - 2 * width
    pairs = torch.arange(width // 8)  # the fastest: one row further is far
    angles = 10000.0 ** (-pairs / (width // 2))
    loudness = math.sqrt(_BEFORE_SHARPNESS * math.sqrt(width))
    asking, being, resting = torch.zeros(3, width)
    resting[width // 2 - 1] = loudness  # text finds nothing new: it looks at the first row, which has no name
    asking[pairs] = loudness
    being[pairs], being[width // 2 + pairs] = loudness * angles.cos(), loudness * angles.sin()
    reach = math.sqrt(len(space.mark))
    for number in range(2):
        rows = slice(first + number * width, first + (number + 1) * width)
        part = space.named[:, number * width : (number + 1) * width]
        attention.q_proj.weight[rows] = (
            asking[:, None] * space.frame / _FRAME_SHARE + resting[:, None] * space.text / _TEXT_SHARE
        )
        attention.k_proj.weight[rows] = (
            being[:, None] * space.frame / _FRAME_SHARE + resting[:, None] * space.origin / reach
        )
        attention.v_proj.weight[rows] = part.T
        attention.o_proj.weight[:, rows] = -_BEFORE_GAIN * part


def _answer(layer: LlamaDecoderLayer, answering: Tensor, space: _Space) -> None:
    """Let the row that opens the answer, with the embedding `answering` (D,), read what is held at marked rows."""
    attention, half = layer.self_attn, space.held.shape[1]
    slow = _slow(half, attention.head_dim) / math.sqrt(attention.head_dim)
    attention.q_proj.weight[half:] = _ANSWERING_GAIN * slow[:, None] * answering / answering.square().sum()
    attention.k_proj.weight[half:] = slow[:, None] * space.mark
    attention.v_proj.weight[half:] = space.held.T
    attention.o_proj.weight[:, half:] = _FETCHING_GAIN * space.held


def _names() -> list[str]:
    return [word for name in NAMED for word in ATTRIBUTES[name]]


def _slow(rows: int, width: int) -> Tensor:
    """Weigh rows of heads of a width: only those that rotary positions hardly turn, for distance must not matter."""
    slow = torch.zeros(width)
    slow[width // 4 : width // 2] = slow[3 * width // 4 :] = math.sqrt(2)
    return slow.repeat(rows // width)


def _spellings(tokenizer: PreTrainedTokenizerFast, words: Iterable[str]) -> list[int]:
    """Return the rows of words, behind a blank and without one."""
    return [token_id(tokenizer, spelling) for word in words for spelling in (f"Ġ{word}", word)]
