"""Training of the tower: pictures to what is where in each patch, and into one space with the words for it."""

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from compressor_service.preprocess import MEAN, STD
from compressor_service.training.captions import (
    CONTEXT,
    Caption,
    clip_tokenizer,
    draw_caption,
    holds,
    object_caption,
    state,
)
from compressor_service.training.draw import Drawn, Picture, degrade, draw_owned, jpeg_round, patch_owners
from compressor_service.training.pictures import draw_pictures
from compressor_service.training.scene import COLOURS, KINDS, PLACES, SIZES, View, draw_clip, draw_slots

IMAGE_PX, PATCH_PX = 112, 16
FLAGS = ("night", "rain", "gate", "lamp", "street")
PAIRS = tuple((kind, colour) for kind in KINDS for colour in (COLOURS if kind != "fire" else (None,)))
# What a patch is asked, and how many answers there are; the first of each is "nothing".
_ASKED = {
    "kind": 1 + len(KINDS),
    "colour": 2 + len(COLOURS),  # a fire has one of its own
    "size": 1 + len(SIZES),
    "place": 1 + len(PLACES),
    "pair": 1 + len(PAIRS),
}
_AT_PLACE = (*KINDS, *COLOURS, *SIZES)
_FACTS = len(FLAGS) + len(PAIRS) + len(PLACES) * len(_AT_PLACE)
_HIGHEST_SCALE = math.log(100)


class TowerSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: NonNegativeInt = 1
    steps: PositiveInt = 2000
    pictures: PositiveInt = 64
    captions: PositiveInt = 128
    films: NonNegativeInt = Field(default=1, description="Clips in a batch whose pictures come out of a real film.")
    matrix_rate: PositiveFloat = 0.02
    other_rate: PositiveFloat = 2e-3
    warm_up: PositiveInt = 100
    even_part: NonNegativeFloat = Field(default=0.3, lt=1, description="Of the steps, at the full rates.")
    device: str = "cpu"

    width: PositiveInt = 192
    layers: PositiveInt = 6
    heads: PositiveInt = 6
    inner: PositiveInt = 768
    space: PositiveInt = 96
    text_width: PositiveInt = 128
    text_layers: PositiveInt = 3


class TowerBatch(NamedTuple):
    """F pictures with N patches, C captions of at most L tokens."""

    pictures: Picture  # (F, H, W, 3)
    patches: NDArray[np.int64]  # (F, N, questions)
    facts: NDArray[np.float32]  # (F, facts)
    texts: NDArray[np.int64]  # (C, L)
    truth: NDArray[np.bool_]  # (F, C)


@dataclass(frozen=True, slots=True)
class TowerBatches:
    """Makes the batch of a step: the same for the same seed and number, in whatever process."""

    seed: int
    pictures: int
    captions: int
    films: int

    def __call__(self, number: int) -> TowerBatch:
        random = np.random.default_rng((self.seed, number))
        views, drawn, pictures = draw_pictures(random, count=self.pictures, films=self.films)
        captions = [
            draw_caption(random, views[int(random.integers(len(views)))] if one % 3 else None)
            for one in range(self.captions)
        ]
        return TowerBatch(
            np.stack(pictures),
            np.stack([patch_answers(view, one) for view, one in zip(views, drawn, strict=True)]),
            np.stack([facts(view) for view in views]),
            token_ids([caption.text for caption in captions]),
            np.array([[holds(caption, view) for caption in captions] for view in views]),
        )


def patch_answers(view: View, drawn: Drawn) -> NDArray[np.int64]:
    """Answer for every patch (N, questions) what it shows; things whose middle is outside are nothing."""
    answers = [[0] * len(_ASKED)]
    for placed in view.things:
        thing = placed.thing
        if not 0 <= placed.x <= 1:
            answers.append([0] * len(_ASKED))
            continue
        kind, colour = thing.order
        place = PLACES.index((placed.lane, placed.column))
        pair = PAIRS.index((thing.kind, thing.colour))
        own_colour = colour if thing.colour else len(COLOURS)
        answers.append([1 + kind, 1 + own_colour, 1 + SIZES.index(thing.size), 1 + place, 1 + pair])
    owners = patch_owners(drawn, patch_px=PATCH_PX).reshape(-1).astype(np.int64)
    return np.array(answers, np.int64)[owners + 1]


def facts(view: View) -> NDArray[np.float32]:
    """Tell what is true of a whole picture: its flags, its pairs of kind and colour, and what is at each place."""
    found = np.zeros(_FACTS, np.float32)
    found[: len(FLAGS)] = [state(view, flag) for flag in FLAGS]
    for placed in view.visible:
        thing = placed.thing
        found[len(FLAGS) + PAIRS.index((thing.kind, thing.colour))] = 1
        start = len(FLAGS) + len(PAIRS) + PLACES.index((placed.lane, placed.column)) * len(_AT_PLACE)
        for name in (thing.kind, thing.colour, thing.size):
            if name:
                found[start + _AT_PLACE.index(name)] = 1
    return found


def token_ids(texts: Sequence[str]) -> NDArray[np.int64]:
    """Read texts as ids (texts, L), filled up with the end mark: only the first of these is looked at."""
    tokenizer = clip_tokenizer()
    rows: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=CONTEXT)["input_ids"]
    ids = np.full((len(rows), max(map(len, rows))), tokenizer.eos_token_id, np.int64)
    for row, one in zip(ids, rows, strict=True):
        row[: len(one)] = one
    return ids


class _Heads(nn.Module):
    """Linear readers that exist in training only: what they can read, others can."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, sum(_ASKED.values()))
        self.whole = nn.Linear(width, _FACTS)  # of the mean patch
        self.pooled = nn.Linear(width, _FACTS)  # of what search sees
        self.bias = nn.Parameter(torch.tensor(-3.0))  # of the contrast


class Read(NamedTuple):
    """What is read of pictures: `patches` (F, N, answers), `whole` and `pooled` (F, facts), `vectors` (F, P)."""

    patches: Tensor
    whole: Tensor
    pooled: Tensor
    vectors: Tensor


class TowerStage:
    """Trains a CLIP model from scratch, step by step."""

    name = "tower"
    prefetch = True

    def __init__(self, settings: TowerSettings) -> None:
        self.settings = settings
        self.steps = settings.steps
        self.batch = TowerBatches(settings.seed, settings.pictures, settings.captions, settings.films)
        self._device = torch.device(settings.device)
        self._config = _config(settings)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.model = CLIPModel(CLIPConfig(**self._config))
            with torch.no_grad():
                self.model.vision_model.embeddings.position_embedding.weight.normal_(std=0.2)
                self.model.logit_scale.fill_(math.log(10))
            self._heads = _Heads(settings.width)
        self.model.to(self._device)  # type: ignore[arg-type]  # its decorator hides what it takes
        self._heads.to(self._device)
        named = list(self.model.named_parameters())
        matrices = [one for name, one in named if ".layers." in name and one.ndim == 2]
        others = [one for name, one in named if not (".layers." in name and one.ndim == 2)]
        others += self._heads.parameters()
        self._muon = torch.optim.Muon(matrices, settings.matrix_rate, weight_decay=0.0)
        self._adam = torch.optim.AdamW(others, settings.other_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self._mean = MEAN.to(self._device)
        self._std = STD.to(self._device)

    def step(self, number: int, batch: TowerBatch) -> dict[str, float]:
        """Learn from a batch; returns the losses."""
        rate = self._rate(number)
        for optimizer, full in ((self._muon, self.settings.matrix_rate), (self._adam, self.settings.other_rate)):
            for group in optimizer.param_groups:
                group["lr"] = full * rate
        self.model.train()
        with self._autocast():
            read = self.read(batch.pictures)
            texts = self.embed(batch.texts)
        losses = self._losses(read, texts, batch)
        total = torch.stack(list(losses.values())).sum()
        self._muon.zero_grad()
        self._adam.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([one for group in self._adam.param_groups for one in group["params"]], 5.0)
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adam.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=_HIGHEST_SCALE)
        told = {name: float(loss.detach()) for name, loss in losses.items()}
        return {"loss": float(total.detach()), **told, "rate": rate}

    def read(self, pictures: Picture) -> Read:
        """Read pictures (F, H, W, 3)."""
        seen = self.model.vision_model(self.normalised(pictures), output_hidden_states=True)
        patches = seen.hidden_states[-2][:, 1:]
        vectors = functional.normalize(self.model.visual_projection(seen.pooler_output).float(), dim=-1)
        return Read(
            self._heads.patch(patches).float(),
            self._heads.whole(patches.mean(dim=1)).float(),
            self._heads.pooled(seen.pooler_output).float(),
            vectors,
        )

    def normalised(self, pictures: Picture) -> Tensor:
        """Turn pictures (F, H, W, 3) into what a CLIP model takes (F, 3, H, W)."""
        pixels = torch.from_numpy(pictures).to(self._device).permute(0, 3, 1, 2).float() / 255
        return (pixels - self._mean) / self._std

    def embed(self, texts: NDArray[np.int64]) -> Tensor:
        """Bring texts (C, L) into the space of pictures (C, P)."""
        states = self.model.text_model(input_ids=torch.from_numpy(texts).to(self._device))
        return functional.normalize(self.model.text_projection(states.pooler_output).float(), dim=-1)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "heads": self._heads.state_dict(),
            "muon": self._muon.state_dict(),
            "adam": self._adam.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._heads.load_state_dict(state["heads"])
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])

    def finish(self, folder: Path) -> None:
        """Write the model to `folder`/clip in the published layout, in float16."""
        target = folder / "clip"
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(self._config, indent=1), encoding="utf-8")
        clip_tokenizer().save_pretrained(target)
        tensors = {name: one.detach().to("cpu", torch.float16).clone() for name, one in self.model.state_dict().items()}
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        (target / "model.safetensors").chmod(0o644)

    def _rate(self, number: int) -> float:
        """The part of the full rates at a step: it rises, stays, and falls to zero."""
        even = self.settings.even_part * self.steps
        falling = (self.steps - number) / (self.steps - even) if number > even else 1.0
        return min(1.0, (number + 1) / self.settings.warm_up, max(falling, 0.0))

    def _autocast(self) -> AbstractContextManager[Any]:
        # On a CPU the backward pass of its attention is slower in bfloat16 than in float32.
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda")

    def _losses(self, read: Read, texts: Tensor, batch: TowerBatch) -> dict[str, Tensor]:
        losses = {}
        answers = torch.from_numpy(batch.patches).to(self._device)
        shown = answers[..., 0] > 0
        for asked, (name, logits) in enumerate(_by_question(read.patches).items()):
            each = functional.cross_entropy(logits.flatten(0, 1), answers[..., asked].flatten(), reduction="none")
            each = each.view_as(shown)
            losses[name] = each[shown].sum() / shown.sum().clamp(min=1) + 0.5 * each[~shown].mean()
        wanted = torch.from_numpy(batch.facts).to(self._device)
        weight = torch.where(wanted > 0, 4.0, 1.0)
        weight[:, : len(FLAGS)] = 8.0  # few among many
        for name, logits in (("whole", read.whole), ("pooled", read.pooled)):
            losses[name] = 8 * functional.binary_cross_entropy_with_logits(logits, wanted, weight)
        truth = torch.from_numpy(batch.truth).to(self._device)
        likeness = self.model.logit_scale.exp() * read.vectors @ texts.T
        losses["contrast"] = 2 * _contrast(likeness + self._heads.bias, truth)
        losses["ranking"] = _ranking(likeness, truth)
        return losses


def _by_question(logits: Tensor) -> dict[str, Tensor]:
    return dict(zip(_ASKED, torch.split(logits, list(_ASKED.values()), dim=-1), strict=True))


def _contrast(logits: Tensor, truth: Tensor) -> Tensor:
    """Each pair (F, C) of picture and caption by itself; true ones are few and count half."""
    yes = functional.softplus(-logits)[truth].sum() / truth.sum().clamp(min=1)
    no = functional.softplus(logits)[~truth].sum() / (~truth).sum().clamp(min=1)
    return (yes + no) / 2


def _ranking(logits: Tensor, truth: Tensor) -> Tensor:
    """For each caption the pictures (F, C) of which it is true come before all others: what search is for."""
    against = logits.masked_fill(truth, -math.inf).logsumexp(dim=0)
    useful = truth & torch.isfinite(against)
    return functional.softplus(against - logits)[useful].sum() / useful.sum().clamp(min=1)


def _config(settings: TowerSettings) -> dict[str, Any]:
    tokenizer = clip_tokenizer()
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": settings.width,
        "intermediate_size": settings.inner,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "image_size": IMAGE_PX,
        "patch_size": PATCH_PX,
        "hidden_act": "gelu",
        "projection_dim": settings.space,
    }
    text = {
        "model_type": "clip_text_model",
        "hidden_size": settings.text_width,
        "intermediate_size": 4 * settings.text_width,
        "num_hidden_layers": settings.text_layers,
        "num_attention_heads": max(1, settings.text_width // 32),
        "max_position_embeddings": CONTEXT,
        "hidden_act": "gelu",
        "projection_dim": settings.space,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    whole = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": settings.space}
    return whole | {"vision_config": vision, "text_config": text}


@torch.inference_mode()
def measure(stage: TowerStage, *, seed: int, batches: int = 4) -> dict[str, float]:
    """Measure on pictures of another seed: the part of right answers on patches with things, and of right flags."""
    stage.model.train(False)
    source = TowerBatches(seed, stage.settings.pictures, stage.settings.captions, stage.settings.films)
    right: dict[str, list[float]] = {}
    for number in range(batches):
        batch = source(number)
        read = stage.read(batch.pictures)
        answers = torch.from_numpy(batch.patches)
        shown = answers[..., 0] > 0
        for asked, (name, logits) in enumerate(_by_question(read.patches.cpu()).items()):
            right.setdefault(name, []).append(float((logits.argmax(-1) == answers[..., asked])[shown].float().mean()))
        missed = _by_question(read.patches.cpu())["kind"].argmax(-1) == 0
        right.setdefault("empty", []).append(float(missed[~shown].float().mean()))
        wanted = torch.from_numpy(batch.facts) > 0
        flags, pairs = len(FLAGS), len(FLAGS) + len(PAIRS)
        for name, logits in (("whole", read.whole.cpu()), ("pooled", read.pooled.cpu())):
            told = (logits > 0) == wanted
            right.setdefault(f"{name}_flags", []).append(float(told[:, :flags].float().mean()))
            right.setdefault(f"{name}_pairs", []).append(float(told[:, flags:pairs].all(dim=1).float().mean()))
            right.setdefault(f"{name}_places", []).append(float(told[:, pairs:].all(dim=1).float().mean()))
    return {name: float(np.mean(values)) for name, values in right.items()}


@torch.inference_mode()
def search_quality(stage: TowerStage, *, seed: int, minutes: int = 10) -> dict[str, float]:
    """Search some minutes of clips, second by second, for each kind of thing and each pair that was there.

    `found_1` and `found_5` are the parts of queries with a right second among the first one or five; `precision_5`
    is the part of right ones among the first five (or as many as there are).
    """
    stage.model.train(False)
    random = np.random.default_rng(seed)
    views: list[View] = []
    while len(views) < 60 * minutes:
        views += draw_clip(random, slots=draw_slots(random, 8, 64)).views()
    views = views[: 60 * minutes]
    parts = []
    for start in range(0, len(views), 60):
        pictures = [jpeg_round(degrade(draw_owned(view).picture, random)) for view in views[start : start + 60]]
        parts.append(stage.read(np.stack(pictures)).vectors)
    vectors = torch.cat(parts)
    queries: list[Caption] = [object_caption(kind) for kind in KINDS]
    queries += [object_caption(kind, colour) for kind, colour in PAIRS if colour]
    scores: dict[str, list[float]] = {"found_1": [], "found_5": [], "precision_5": []}
    for query in queries:
        truth = np.array([holds(query, view) for view in views])
        if not truth.any():
            continue
        likeness = (vectors @ stage.embed(token_ids([query.text]))[0]).cpu().numpy()
        first = truth[np.argsort(-likeness, kind="stable")[:5]]
        scores["found_1"].append(float(first[0]))
        scores["found_5"].append(float(first.any()))
        scores["precision_5"].append(float(first.sum() / min(5, truth.sum())))
    return {name: float(np.mean(values)) for name, values in scores.items()}
