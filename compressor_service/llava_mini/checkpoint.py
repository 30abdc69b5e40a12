"""A checkpoint in the published layout: found, described, and read tensor by tensor. Nothing is unpickled."""

import json
import mmap
import struct
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from compressor_service.llava_mini.config import BadConfig, LlavaMiniConfig

Dtype = Literal["float32", "bfloat16", "float16"]
TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What is fetched from a hub: no pickles, which run code when they are opened.
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
_CLIP = "clip"  # folder beside the weights, for a tower that the config names by its place on a hub
_TOWER_INSIDE = "model.vision_tower.vision_tower."  # where published weights hold the tower, if they do
_TOWER_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
_TOKEN_PARTS = ("model.compressor.", "model.mm_projector.", "model.prefusion_layers.")


class BadCheckpoint(ValueError):
    """The folder is not a checkpoint that can be loaded; the message says what is wrong with it."""


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


class Weights:
    """The tensors of one folder's safetensors files, by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the names. Raises BadCheckpoint."""
        self._folder = folder
        self._files = _files_of_tensors(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self, *prefixes: str) -> list[str]:
        return sorted(name for name in self._files if name.startswith(prefixes))

    def fill(self, module: nn.Module, prefix: str, *, dtype: torch.dtype, device: torch.device) -> None:
        """Give a module that was built on the meta device its tensors `prefix` + own name. Raises BadCheckpoint."""
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        read = {name: self.read(prefix + name, shape).to(device, dtype) for name, shape in shapes.items()}
        module.load_state_dict(read, assign=True)
        module.requires_grad_(False)

    def read(self, name: str, shape: Iterable[int]) -> Tensor:
        """Read one tensor of the shape that the config asks for. Raises BadCheckpoint."""
        if name not in self._files:
            raise BadCheckpoint(f"{name_of(self._folder)}: tensor {name} is missing")
        with _opened(self._files[name]) as file:
            found, wanted = tuple(file.get_slice(name).get_shape()), tuple(shape)
            if found != wanted:
                raise BadCheckpoint(
                    f"{name_of(self._folder)}: tensor {name} has shape {found}, the config asks for {wanted}"
                )
            return file.get_tensor(name)

    def feed(self, digest: _Hash, names: Iterable[str], *, without: str = "") -> None:
        """Hash names (less the prefix `without`), types, shapes and bytes of tensors, straight from the files."""
        for name in names:
            with self._files[name].open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                (header_bytes,) = struct.unpack("<Q", mapped[:8])
                header = json.loads(mapped[8 : 8 + header_bytes])
                if name not in header:
                    raise BadCheckpoint(f"{name_of(self._folder)}: tensor {name} is not where the index says")
                entry = header[name]
                digest.update(f"{name.removeprefix(without)} {entry['dtype']} {entry['shape']} ".encode())
                start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
                with memoryview(mapped) as view, view[start:end] as tensor:
                    digest.update(tensor)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An opened checkpoint; its tensors are read on demand.

    The tower's tensors are in `tower` under `tower_prefix`, inside or beside the others. `clip` is the whole CLIP model
    if the checkpoint brings one: what projects pictures and text into one space for search.
    """

    name: str
    folder: Path
    config: LlavaMiniConfig
    weights: Weights
    tower: Weights
    tower_prefix: str
    clip: "Clip | None"

    @property
    def vector_width(self) -> int:
        """P: width of a search vector."""
        return self.config.vision_width if self.clip is None else self.clip.width

    def fingerprint(self, dtype: Dtype) -> str:
        """Name the tokens and vectors that this checkpoint makes in `dtype`: 16 hex digits.

        It hashes the weights that these depend on and no others, so that both halves of the model compute the same.
        """
        facts = [dtype, self.config.token_facts(), self.vector_width]
        digest = sha256(json.dumps(facts, sort_keys=True).encode())
        self.weights.feed(digest, self.weights.names(*_TOKEN_PARTS))
        tower_names = self.tower.names(*(self.tower_prefix + part for part in _TOWER_PARTS))
        self.tower.feed(digest, tower_names, without=self.tower_prefix)
        if self.clip is not None:
            self.clip.weights.feed(digest, ["visual_projection.weight"])
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A CLIP model with the projection of its vision half into the image-text space; `width` is P."""

    folder: Path
    weights: Weights
    text: CLIPTextConfig
    width: int

    @property
    def reads_text(self) -> bool:
        return "text_projection.weight" in self.weights and (self.folder / "tokenizer_config.json").is_file()


@dataclass(frozen=True, slots=True)
class Description:
    """What a checkpoint is, told without loading it."""

    name: str
    folder: Path
    config: LlavaMiniConfig
    fingerprint: str
    vector_width: int
    searches_text: bool


def describe(path_or_hub_name: str | Path, dtype: Dtype) -> Description:
    """Describe a checkpoint as it would be loaded in `dtype`. Raises BadCheckpoint."""
    checkpoint = open_checkpoint(path_or_hub_name)
    return Description(
        name=checkpoint.name,
        folder=checkpoint.folder,
        config=checkpoint.config,
        fingerprint=fingerprint(checkpoint.folder, dtype),
        vector_width=checkpoint.vector_width,
        searches_text=checkpoint.clip is not None and checkpoint.clip.reads_text,
    )


@lru_cache(maxsize=8)
def fingerprint(folder: Path, dtype: Dtype) -> str:
    """Checkpoint.fingerprint, kept for the process: of an 8B checkpoint it reads gigabytes."""
    return open_checkpoint(folder).fingerprint(dtype)


def open_checkpoint(path_or_hub_name: str | Path) -> Checkpoint:
    """Find a checkpoint, and check all that can be checked without reading tensors. Raises BadCheckpoint."""
    folder = locate(path_or_hub_name)
    raw = read_json(folder, "config.json")
    if raw.get("model_type") != "llava_mini_llama":
        raise BadCheckpoint(f"{name_of(folder)}: model_type is {raw.get('model_type')!r}, not 'llava_mini_llama'")
    weights = Weights(folder)
    inside = bool(weights.names(_TOWER_INSIDE))
    try:
        tower_folder = _tower_folder(raw, folder)
        vision_config, clip_config = _read_vision_config(tower_folder)
        beside = None if inside and not _has_tensors(tower_folder) else Weights(tower_folder)
    except BadCheckpoint as error:
        raise BadCheckpoint(
            f"{name_of(folder)}: the vision tower of mm_vision_tower: {error}. In place of a hub's, a folder {_CLIP!r} "
            "in the checkpoint's own is taken, with the CLIP model as safetensors"
        ) from error
    tower, base = (weights, _TOWER_INSIDE) if inside or beside is None else (beside, "")
    try:
        config = LlavaMiniConfig.parse(raw, vision_config)
    except BadConfig as error:
        raise BadCheckpoint(f"{name_of(folder)}/config.json: {error}") from error
    return Checkpoint(
        name=str(path_or_hub_name) if folder != Path(path_or_hub_name) else folder.resolve().name,
        folder=folder,
        config=config,
        weights=weights,
        tower=tower,
        tower_prefix=f"{base}vision_model." if tower.names(f"{base}vision_model.") else base,
        clip=None if beside is None else _whole_clip(tower_folder, beside, clip_config),
    )


def locate(path_or_hub_name: str | Path, base: Path | None = None) -> Path:
    """Return a folder, fetched from the hub if the name is not one here (or in `base`). Raises BadCheckpoint."""
    given = Path(path_or_hub_name).expanduser()
    path = given if base is None else base / given
    if path.is_dir():
        return path
    if path.exists():
        raise BadCheckpoint(f"{path.name} is a file: give the folder that holds config.json and the weights")
    name = str(path_or_hub_name)
    if not _may_be_of_a_hub(name):
        raise BadCheckpoint(f"there is no folder {given.name!r}, and it is no hub name of the form owner/name")
    return _fetch(name)


def name_of(folder: Path) -> str:
    """Name a folder in a message; a hub's cache names folders by commits, so those go by what was asked for."""
    owner, _, name = folder.parent.parent.name.removeprefix("models--").partition("--")
    return f"{owner}/{name}" if folder.parent.name == "snapshots" else folder.name


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one of the checkpoint's JSON objects. Raises BadCheckpoint."""
    path = folder / name
    if not path.is_file():
        raise BadCheckpoint(f"{name_of(folder)} has no {name}: it is not a checkpoint folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadCheckpoint(f"{name_of(folder)}/{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{name_of(folder)}/{name} holds no JSON object")
    return content


def _may_be_of_a_hub(name: str) -> bool:
    return not name.startswith(("/", ".", "~")) and name.count("/") == 1


def _fetch(hub_name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(hub_name, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise BadCheckpoint(f"there is no folder {hub_name!r}, and it is no valid hub name") from error
    except (HfHubHTTPError, OSError) as error:
        kind = type(error).__name__
        raise BadCheckpoint(
            f"there is no folder {hub_name!r}, and no such checkpoint could be had from the hub ({kind})"
        ) from error


def _tower_folder(raw: Mapping[str, Any], folder: Path) -> Path:
    """Find the folder that the config names; for a hub's name, one that the user put beside the weights comes first."""
    named = raw.get("mm_vision_tower")
    if not isinstance(named, str) or not named:
        raise BadCheckpoint("config.json names none")
    own = folder / _CLIP
    if _may_be_of_a_hub(named) and not (folder / named).is_dir() and (own / "config.json").is_file():
        return own
    return locate(named, base=folder)


def _whole_clip(folder: Path, weights: Weights, config: CLIPConfig | None) -> Clip | None:
    if config is None or "visual_projection.weight" not in weights:
        return None
    return Clip(folder, weights, cast(CLIPTextConfig, config.text_config), cast(int, config.projection_dim))


def _read_vision_config(folder: Path) -> tuple[CLIPVisionConfig, CLIPConfig | None]:
    raw = read_json(folder, "config.json")
    try:
        match raw.get("model_type"):
            case "clip":
                config = CLIPConfig(**raw)
                return cast(CLIPVisionConfig, config.vision_config), config
            case "clip_vision_model":
                return CLIPVisionConfig(**raw), None
            case other:
                raise BadCheckpoint(f"{name_of(folder)} is a {other!r}, not a CLIP model")
    except (TypeError, StrictDataclassError) as error:
        raise BadCheckpoint(f"{name_of(folder)}/config.json: {error}") from error


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Map every tensor's name to its file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return _files_of_index(folder, read_json(folder, index.name))
    if single.is_file():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    reason = "pickles (.bin) can run code when opened and are never read: convert them to safetensors first"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise BadCheckpoint(f"{name_of(folder)} has its weights only as pickles; {reason}")
    raise BadCheckpoint(f"{name_of(folder)} has no weights: no model.safetensors and no index of its shards; {reason}")


def _files_of_index(folder: Path, index: Mapping[str, Any]) -> dict[str, Path]:
    shards = index.get("weight_map")
    if not isinstance(shards, dict):
        raise BadCheckpoint(f"{name_of(folder)}/model.safetensors.index.json has no weight_map")
    for shard in sorted(set(map(str, shards.values()))):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadCheckpoint(f"{name_of(folder)}: the index names {shard!r}, not a safetensors file beside it")
        if not (folder / shard).is_file():
            raise BadCheckpoint(f"{name_of(folder)}: shard {shard} of the index is missing")
    return {name: folder / shard for name, shard in shards.items()}


def _has_tensors(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file()


@contextmanager
def _opened(path: Path):  # type: ignore[no-untyped-def]  # safetensors ships no name for what it yields
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise BadCheckpoint(f"{name_of(path.parent)}/{path.name} is damaged: {error}") from error
