"""The tokenizer of the model that is trained here: the world's words whole, everything else byte by byte."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BEGIN, USER, ASSISTANT, END = "<|pad|>", "<|begin_of_text|>", "<|user|>", "<|assistant|>", "<|eot_id|>"
# The padding comes first: the published code gives id 0 to no word.
CONTROLS = (PAD, BEGIN, USER, ASSISTANT, END)

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|>' + message['content'] | trim }}{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = """
a across after again all an and another any anybody anyone anything appear appeared appears are around arrive arrived
arrives at away back be been before began begin beginning behind bicycle bicycles big bike bikes black blue box break
broke burn burning by came camera can car cars cat cats change changed changes close closed closes clip color colour
come comes coming count cross crossed crosses dark day daytime deliver delivered describe did different direction
disappear disappeared disappears do does dog dogs door down drive drove empty end ends enter entered enters ever every
everything far fire fires first for four from gate get give go goes going gone green had happen happened happening
happens has have he here how i image in into is it its kind lamp large last later leave leaves left light list long
longer look looks lot many me middle minute moment more move moved moves moving much near never new next night no nobody
none not nothing now number object objects of off often on once one only open opened opens or other out over package
parcel parcels parked pass passed passes past people person persons picture place places position put rain raining rains
red right road run same say scene second see seen show shows side since small so some somebody someone something stand
standing stands start started starts stay still stole stolen street switch switched take taken takes tell than that the
their them then there they thing things this three time to took towards true truck trucks turn turned turns two under
until up us vehicle video walk walked was way we wear wearing wears weather went were what when where which while white
who will with yard yellow yes you zero
"""


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write the tokenizer with its chat template to `folder`, and return it. The same words give the same files."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted(set(WORDS.split()) - set(letters))
    known = [*CONTROLS, *letters, *words, *(f"Ġ{word}" for word in sorted(set(WORDS.split())))]
    vocabulary = {token: number for number, token in enumerate(known)}
    # Without merges a word is either known as a whole or spelt; no corpus decides where it is cut.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROLS])
    whole = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    whole.save_pretrained(folder)
    return whole


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of a token that the vocabulary has."""
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)
    return number
