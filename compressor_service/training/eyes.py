"""The trained tower, frozen: pictures to patch features."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPModel

from compressor_service.preprocess import MEAN, STD
from compressor_service.training.descent import frozen, half_precision

_FRAMES_A_PASS = 64


class Eyes:
    """Looks with the tower that is in a folder's clip."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._device = device
        self._model = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32).vision_model
        self._model.to(device)
        self._model.train(False)
        frozen(self._model.parameters())
        self._mean, self._std = MEAN.to(device), STD.to(device)

    @torch.no_grad()
    def features(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Return the features (F, N, V) of pictures (F, H, W, 3), in float32."""
        made = []
        for start in range(0, len(pictures), _FRAMES_A_PASS):
            chunk = torch.from_numpy(pictures[start : start + _FRAMES_A_PASS]).to(self._device)
            pixels = (chunk.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std
            with half_precision(self._device):
                states = self._model(pixels, output_hidden_states=True).hidden_states[-2]
            made.append(states[:, 1:].float())
        return torch.cat(made)
