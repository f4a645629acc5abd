"""Which semantic IDs are taken: few codes, and so many that no 64-bit integer counts their combinations."""

from __future__ import annotations

import numpy as np
import pytest

from serving.errors import NoSemanticId
from serving.items.code_space import CodeSpace


@pytest.mark.parametrize(
    "sizes", [(3, 3, 3), (256,) * 7, (256,) * 8, (256,) * 17, (2**31, 2**31, 2, 4), (2**40, 2**40, 4)], ids=str
)
def test_new_items_get_the_nearest_ids_that_nobody_has(sizes: tuple[int, ...]):
    """The highest codes tell whether numbers overflow, and IDs that differ at one level whether every level counts."""
    highest = np.array(sizes) - 1
    *prefix, last = highest.tolist()
    others = [highest - highest[level] * (np.arange(len(sizes)) == level) for level in range(len(sizes))]
    space = CodeSpace(np.array([highest, *others]), sizes)  # under the prefix, the last code and 0 are taken
    free = sorted(set(range(sizes[-1])) - {last, 0, 1})
    assert space.take(prefix, [last, 0, 1]) == [*prefix, 1]
    assert [space.take(prefix, [last, 0, 1]) for _ in free] == [[*prefix, code] for code in free]
    with pytest.raises(NoSemanticId, match="are taken"):
        space.take(prefix, [last, 0, 1])
    elsewhere = [0, *prefix[1:]]  # here only the last code is taken
    assert space.take(elsewhere, [last, 0]) == [*elsewhere, 0]


@pytest.mark.parametrize("levels", [3, 8, 9])
def test_a_level_that_only_tells_items_apart_gives_its_lowest_free_code(levels: int):
    sizes = (256,) * levels
    prefix = [255] * (levels - 2)
    space = CodeSpace(np.array([[*prefix, 7, 0], [*prefix, 7, 2]]), sizes)
    assert [space.take(prefix, [7, 8]) for _ in range(2)] == [[*prefix, 7, 1], [*prefix, 7, 3]]
