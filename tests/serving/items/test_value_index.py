"""The index of a column against the column itself."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.items.value_index import ValueIndex

ORDERS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
numbers = st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 1.0, np.nextafter(1.0, 2.0), 2.0, 50.0, np.inf])


def rows_of(mask: np.ndarray, count: int) -> list[bool]:
    assert mask.shape == (-(-count // 8),) and not np.unpackbits(mask, bitorder="little")[count:].any()
    return np.unpackbits(mask, count=count, bitorder="little").astype(bool).tolist()


@settings(max_examples=150, deadline=None)
@given(
    column=st.lists(st.one_of(numbers, st.just(np.nan)), max_size=40).map(np.array),
    value=numbers,
    some=st.lists(numbers, max_size=5),
    parts=st.integers(1, 9),
)
def test_rows_are_those_whose_values_are_in_bounds(
    column: np.ndarray, value: float, some: list[float], parts: int
) -> None:
    """With many equal values, none at all, and bounds in every distance from where a part begins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.items.value_index.PARTS", parts)
        index = ValueIndex(column)
    for order, compare in ORDERS.items():
        assert rows_of(index.compared(order, value), len(column)) == compare(column, value).tolist()
    assert rows_of(index.among(np.array(some)), len(column)) == [number in some for number in column.tolist()]
    assert rows_of(index.every(), len(column)) == (~np.isnan(column)).tolist()


def test_bounds_may_lie_anywhere_in_a_long_column() -> None:
    column = np.random.default_rng(0).permutation(3000).astype(np.int32)
    column[column < 100] = -1
    index = ValueIndex(column)
    for value in range(0, 3001, 7):
        assert rows_of(index.compared("<", value), 3000) == ((column >= 100) & (column < value)).tolist()
        assert rows_of(index.compared(">=", value), 3000) == (column >= max(value, 100)).tolist()
    some = np.arange(0, 3000, 40, np.int32)
    assert rows_of(index.among(some), 3000) == ((column >= 100) & (column % 40 == 0)).tolist()
