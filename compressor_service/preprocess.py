"""Pictures to what the vision tower reads. No torchvision: it has no build without CUDA for every platform."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compressor_service.facts import BadPicture
from compressor_service.pictures import opened

# Of CLIP, by colour channel.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
_MAX_PIXELS = 36_000_000  # an 8K picture has 35 million; beyond it a small file could fill the memory
_FORMATS = ("JPEG", "PNG", "WEBP")


def pixels(picture: bytes, *, image_size: int, ratio: int) -> Tensor:
    """Decode a picture and return what the tower reads of it: (parts, 3, image_size, image_size), float32.

    It is squashed to a square, as the published code does with frames. With `ratio` R above 1 the parts are R*R crops,
    row by row, and behind them the whole. Raises BadPicture.
    """
    whole = _decode(picture)
    side = image_size * ratio
    if whole.size != (side, side):  # a keyframe has this size already, and is then read as it is
        whole = whole.resize((side, side), Image.Resampling.BICUBIC)
    if ratio == 1:
        return torch.stack([_normalised(whole)])
    corners = [(column * image_size, row * image_size) for row in range(ratio) for column in range(ratio)]
    crops = [whole.crop((left, top, left + image_size, top + image_size)) for left, top in corners]
    small = whole.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.stack([_normalised(part) for part in [*crops, small]])


def _normalised(picture: Image.Image) -> Tensor:
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return (values.float() / 255 - MEAN) / STD


def _decode(picture: bytes) -> Image.Image:
    with opened(picture, _FORMATS) as found:
        if found.width * found.height > _MAX_PIXELS:
            raise BadPicture(f"the picture has {found.width} x {found.height} pixels, {_MAX_PIXELS} are allowed")
        found.load()
        return found if found.mode == "RGB" else found.convert("RGB")  # it copies what is RGB
