"""Going down: Muon for the matrices inside layers, AdamW for everything else, one schedule for both."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

_LONGEST_GRADIENT = 1.0


class Rates(BaseModel):
    """Rates rise for `warm_up` steps, stay for `even_part` of all, and fall to zero at the last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    matrices: PositiveFloat = 0.003
    others: PositiveFloat = 6e-4
    words: PositiveFloat = 2e-4
    made: PositiveFloat = Field(default=3e-4, description="Of the matrices in layers that start out made.")
    warm_up: PositiveInt = 50
    even_part: NonNegativeFloat = Field(default=0.1, lt=1)

    def at(self, number: int, steps: int) -> float:
        """Return the part of the full rates at a step."""
        even = self.even_part * steps
        falling = (steps - number) / (steps - even) if number > even else 1.0
        return min(1.0, (number + 1) / self.warm_up, max(falling, 0.0))


class Descent:
    """Steps a module's parameters; those that need no gradient stay as they are.

    Muon's steps are as long in every direction: at the full rate they undo what starts out `made` (prefixes of names)
    before anything has learned to use it.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], rates: Rates, *, steps: int, made: tuple[str, ...] = ()
    ) -> None:
        self._rates, self._steps = rates, steps
        matrices: list[nn.Parameter] = []
        makes: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        words: list[nn.Parameter] = []
        sorted_in: set[int] = set()  # by id: the embedding belongs to two modules
        for name, parameter in named:
            if not parameter.requires_grad or id(parameter) in sorted_in:
                continue
            sorted_in.add(id(parameter))
            if "embed" in name:
                words.append(parameter)  # slowly, or they drift together and cannot be told apart
            elif "layers." in name and parameter.ndim == 2:
                (makes if name.startswith(made) else matrices).append(parameter)
            else:
                others.append(parameter)
        self._clipped = [*others, *words]
        groups = [{"params": matrices, "full": rates.matrices}, {"params": makes, "full": rates.made}]
        self._muon = torch.optim.Muon([group for group in groups if group["params"]], rates.matrices, weight_decay=0.0)
        groups = [{"params": others, "full": rates.others}, {"params": words, "full": rates.words}]
        self._adam = torch.optim.AdamW(groups, rates.others, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, number: int, loss: Tensor) -> None:
        """Take one step against the gradient of a loss."""
        part = self._rates.at(number, self._steps)
        for group in (*self._muon.param_groups, *self._adam.param_groups):
            group["lr"] = group["full"] * part
        self._muon.zero_grad()
        self._adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._clipped, _LONGEST_GRADIENT)
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adam.step()

    def state(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])


def half_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Multiply matrices in bfloat16 where the device is made for it; elsewhere that is slower than float32."""
    able = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=able)


def frozen(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)
