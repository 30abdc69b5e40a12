"""What callers see of the compressor. Imports no torch: most processes of the service never run a model."""

from dataclasses import dataclass

from store.format import TokenFormat


class BadPicture(ValueError):
    """The bytes are not a picture that can be read."""


class SearchUnavailable(RuntimeError):
    """The checkpoint brings no text half of CLIP, so text cannot be searched for."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the service says about its model.

    `untrained` means that its answers carry no meaning, `world` that it knows nothing but a drawn world of this name.
    """

    name: str
    format: TokenFormat
    input_size_px: int
    device: str
    searches_text: bool
    untrained: bool
    world: str | None
