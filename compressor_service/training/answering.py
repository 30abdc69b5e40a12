"""How well a network answers a batch of questions: the loss to learn from, and which answers are right."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from compressor_service.training.examples import IGNORED, Texts
from compressor_service.training.network import Network, Read


class Answered(NamedTuple):
    """How a batch was answered."""

    loss: Tensor  # the mean
    right: Tensor  # (B, n), whether an answer is right to the last token, said token by token
    read: Read


def answer(network: Network, shared: Tensor, own: Tensor, texts: Texts) -> Answered:
    """Let a network answer n questions to each of B scenes.

    `shared` (B, P, D) is the prompt up to the last frame; `own` (B, n, L, D) what follows it, answers included.
    A long answer weighs more than a short one, but not as many times as it is longer.
    """
    targets = texts.targets.to(own.device)
    learned = targets != IGNORED
    read = network.read(shared, own)
    logits = network.language.lm_head(read.states[learned]).float()
    wanted = targets[learned]
    weights = learned.sum(dim=-1, keepdim=True).clamp(min=1).float().rsqrt().expand_as(learned)[learned]
    losses = functional.cross_entropy(logits, wanted, reduction="none")
    right = torch.ones_like(learned)
    right[learned] = logits.detach().argmax(dim=-1) == wanted
    return Answered((losses * weights).sum() / weights.sum(), right.all(dim=-1), read)
