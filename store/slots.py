"""Ascending slots as sets.

NumPy's own union1d, setdiff1d and unique hash integers since 2.4: a week of slots takes them 150 times as long as it
takes to sort what is sorted in parts already.
"""

import numpy as np
from numpy.typing import NDArray

NO_SLOTS = np.empty(0, np.int64)


def union(*parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the slots of all parts, each of which ascends: ascending, each once."""
    slots = np.sort(np.concatenate([NO_SLOTS, *parts]), kind="stable")
    return slots[np.diff(slots, prepend=-1) > 0]


def without(slots: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the slots, in their order, that are not among the others."""
    return slots[~np.isin(slots, others)] if len(others) else slots
