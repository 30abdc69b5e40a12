"""8-bit weights for the language model's layers, through bitsandbytes."""

from types import ModuleType

import torch
from torch import nn


class QuantizationUnavailable(RuntimeError):
    """8-bit weights were asked for, and what makes them is not installed."""


def quantize_linears(module: nn.Module, device: torch.device) -> None:
    """Replace every linear layer of a loaded module by one of 8-bit weights. Raises QuantizationUnavailable."""
    library = _bitsandbytes()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _quantized(library, child).to(device))


def _quantized(library: ModuleType, linear: nn.Linear) -> nn.Module:
    quantized: nn.Module = library.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False, device="meta"
    )
    # The move to the device is what quantizes, so the full weights start from the CPU.
    weight = linear.weight.detach().cpu().contiguous()
    quantized.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    quantized.bias = linear.bias
    return quantized


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes
    except ImportError as error:
        raise QuantizationUnavailable(
            "load_in_8bit needs bitsandbytes, which is not installed: pip install 'tokenline[quantized]'"
        ) from error
    return bitsandbytes
