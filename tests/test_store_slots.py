"""Ascending slots as sets."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from store.slots import NO_SLOTS, union, without

ascending = st.sets(st.integers(0, 60)).map(lambda slots: np.array(sorted(slots), np.int64))


@given(st.lists(ascending, max_size=4))
def test_a_union_has_every_slot_once_in_order(parts):
    assert union(*parts).tolist() == sorted({int(slot) for part in parts for slot in part})
    assert union(*parts).dtype == np.int64


@given(ascending, ascending)
def test_without_others_the_rest_stays_in_order(slots, others):
    assert without(slots, others).tolist() == sorted(set(slots.tolist()) - set(others.tolist()))


def test_nothing_is_a_set_too():
    assert union().tolist() == without(NO_SLOTS, np.array([1])).tolist() == []
