"""Which rows a row may read, where the library's layers cannot tell by themselves."""

import torch
from torch import Tensor


def causal_mask(past: int, rows: Tensor) -> Tensor | None:
    """Which of past + S keys each of S new rows (B, S, D) may read: bool (S, past + S).

    None where the library's layers are right, and quicker, without: all rows new, or one alone.
    """
    new = rows.shape[1]
    if past == 0 or new == 1:
        return None
    return torch.ones(new, past + new, dtype=torch.bool, device=rows.device).tril(diagonal=past)
