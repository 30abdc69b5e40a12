"""Questions to prompt ids and answer ids to text, by the checkpoint's own tokenizer and chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from compressor_service.llava_mini.checkpoint import BadCheckpoint, locate, name_of, read_json
from compressor_service.llava_mini.config import IMAGE_TOKEN_ID

# The published 8B checkpoint was trained with this text; others were not asked to be.
SYSTEM_TEXT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
PLACEHOLDER = "<image>"
_END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")  # of Llama 3: any of them ends a turn
_INCOMPLETE = "�"


class ControlTokenInQuestion(ValueError):
    """A question holds a string that the tokenizer would read as a control token, or as the place of the frames."""


class Prompt:
    """Builds prompts of one checkpoint, and reads its answers."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: frozenset[int],
        *,
        system: str = SYSTEM_TEXT,
        add_generation_prompt: bool = True,
    ) -> None:
        """`stop_ids` end an answer.

        `add_generation_prompt` opens the assistant's turn, as chat templates are meant to be used; the published code
        leaves it to the model to open it.
        """
        self.stop_ids = stop_ids
        self._tokenizer = tokenizer
        self._controls = sorted({PLACEHOLDER, *tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        self._system = self._checked(system)
        self._add_generation_prompt = add_generation_prompt

    @classmethod
    def from_pretrained(
        cls, path_or_hub_name: str | Path, *, system: str = SYSTEM_TEXT, add_generation_prompt: bool = True
    ) -> "Prompt":
        """Load the tokenizer, its chat template and the stop ids of a checkpoint. Raises BadCheckpoint."""
        folder = locate(path_or_hub_name)
        try:
            # The config is given, because the library refuses to guess from a model type that is not its own.
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, config=LlamaConfig(), local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise BadCheckpoint(f"{name_of(folder)} has no tokenizer that can be loaded: {error}") from error
        if tokenizer.chat_template is None:
            raise BadCheckpoint(f"{name_of(folder)} has no chat template, so questions cannot be put as it was trained")
        return cls(tokenizer, _stop_ids(folder, tokenizer), system=system, add_generation_prompt=add_generation_prompt)

    def build(self, question: str) -> list[int]:
        """Return the ids of a question about frames; IMAGE_TOKEN_ID stands once, where the frame tokens go.

        Raises ControlTokenInQuestion.
        """
        turns = [
            {"role": "system", "content": self._system},
            {"role": "user", "content": f"{PLACEHOLDER}\n{self._checked(question)}"},
        ]
        rendered = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=self._add_generation_prompt
        )
        halves = str(rendered).split(PLACEHOLDER)
        if len(halves) != 2:
            raise BadCheckpoint(f"the chat template writes the user's turn {len(halves) - 1} times, not once")
        before, after = (self._encode(half) for half in halves)
        return [*before, IMAGE_TOKEN_ID, *after]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of answer ids, without control tokens."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def stream_decoder(self) -> "StreamDecoder":
        return StreamDecoder(self)

    def _encode(self, text: str) -> list[int]:
        """Tokenize a rendered half: the template wrote every control token already."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _checked(self, text: str) -> str:
        for control in self._controls:
            if control in text:
                raise ControlTokenInQuestion(f"the text holds {control!r}, which is reserved: write it in another way")
        return text


class StreamDecoder:
    """Turns ids into text as they come: what it returns, put together, is the text of all of them.

    A character can span several ids, and an id can change how the one before it is spelt; text is handed out only once
    it is settled.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._ids: list[int] = []  # from the last settled id on
        self._settled = ""  # text of those of them that was handed out

    def feed(self, one: int) -> str:
        """Take one id and return the text that is now settled, often empty."""
        self._ids.append(one)
        text = self._prompt.decode(self._ids)
        if text.endswith(_INCOMPLETE) or not text.startswith(self._settled):
            return ""
        fresh = text.removeprefix(self._settled)
        self._ids = [one] if fresh else self._ids
        self._settled = self._prompt.decode(self._ids) if fresh else self._settled
        return fresh

    def finish(self) -> str:
        """Return what is left, a broken character included, after the last id."""
        return self._prompt.decode(self._ids).removeprefix(self._settled)


def _stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    named: list[Any] = [tokenizer.eos_token_id]
    for file in ("config.json", "generation_config.json"):
        if (folder / file).is_file():
            given = read_json(folder, file).get("eos_token_id")
            named.extend(given if isinstance(given, list) else [given])
    added = tokenizer.get_added_vocab()
    named.extend(added.get(token) for token in _END_TOKENS)
    return frozenset(one for one in named if isinstance(one, int))
