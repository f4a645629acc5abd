"""Names by row and rows by name, as they change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.items.labels import Labels
from tests.builders import random_order

names = st.lists(st.sampled_from("abc"), max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    by_row=st.lists(names, max_size=8),
    steps=st.lists(st.one_of(st.sampled_from("abcd"), st.tuples(st.integers(0, 40), names)), max_size=20),
    count=st.integers(0, 50),
    many=st.sampled_from([0.0, 0.5, 1.0]),
    later=st.integers(0, 20),
)
def test_positions_of_a_name_follow_the_names_of_rows(
    by_row: list[list[str]], steps: list[str | tuple[int, list[str]]], count: int, many: float, later: int
) -> None:
    """Read after some changes or none, of which one may undo another. Of names in some rows, in many and in none."""
    expected = dict(enumerate(by_row))
    order = random_order(len(by_row) + later)  # of items without names as well
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.items.labels.MANY_ROWS", many)
        labels = Labels([list(each) for each in by_row])
        labels.arrange(order)
        for step in [*steps, *"abcd"]:
            if isinstance(step, tuple):
                labels.put(*step)
                expected[step[0]] = step[1]
                continue
            wanted, at = {step, "a"}, order.rows_at(np.arange(count)).tolist()
            having = np.unpackbits(labels.having(wanted, count), count=count, bitorder="little")
            assert having.tolist() == [not wanted.isdisjoint(expected.get(row, [])) for row in at]
            assert labels.among(np.arange(count)[::-1], wanted).tolist() == having[::-1].astype(bool).tolist()
            named = [row for row, some in expected.items() if step in some]
            assert labels.positions(step).tolist() == sorted(order.positions_of(np.array(named, np.int64)).tolist())
    assert {name for some in expected.values() for name in some} <= labels.names


def test_a_change_leaves_what_was_read_before_as_it_was() -> None:
    labels = Labels([["a"], ["a"], []])
    before = labels.positions("a")
    labels.put(0, [])
    labels.put(2, ["a"])
    assert labels.positions("a").tolist() == [1, 2] and before.tolist() == [0, 1]
    assert labels.positions("a").dtype == before.dtype == np.int32
