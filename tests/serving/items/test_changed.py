"""The order of changed items, beside a list that is kept the slow way."""

from __future__ import annotations

import numpy as np
import pytest

from serving.items.changed import KINDS, ChangedItems, ChangeKind, ItemChange

BUNDLED = 20


def random_changes(seed: int, count: int = 200) -> tuple[ChangedItems, list[ItemChange]]:
    """Changes of 20 items of a bundle and 40 more; the last of each item, the newest first."""
    rng, changed, last = np.random.default_rng(seed), ChangedItems(BUNDLED), dict[int, ItemChange]()
    for number in range(1, count + 1):
        row, at = int(rng.integers(60)), None if rng.random() < 0.1 else float(rng.random())
        is_removed = bool(rng.random() < 0.3)
        kind: ChangeKind = "removed" if is_removed else "changed" if row < BUNDLED else "added"
        changed.note(row, at, is_removed=is_removed)
        last[row] = ItemChange(row, kind, number, at)
    return changed, sorted(last.values(), key=lambda change: -change.number)


@pytest.mark.parametrize("seed", range(3))
def test_each_item_is_listed_once_by_its_last_change(seed: int) -> None:
    changed, expected = random_changes(seed)
    assert changed.newest(100) == expected and {each.kind for each in expected} == {*KINDS}
    for kinds in (("added",), ("changed",), ("removed", "added")):
        assert changed.newest(100, kinds) == [each for each in expected if each.kind in kinds]
        assert changed.newest(5, kinds) == [each for each in expected if each.kind in kinds][:5]
    removed = {each.row for each in expected if each.kind == "removed"}
    assert {row for row in range(70) if changed.is_removed(row)} == removed


def test_pages_neither_repeat_nor_leave_out_what_has_not_changed_meanwhile() -> None:
    changed, expected = random_changes(3)
    first = changed.newest(7)
    changed.note(expected[20].row, None, is_removed=False)  # to the front
    rest = changed.newest(100, before=first[-1].number)
    assert [*first, *rest] == [*expected[:20], *expected[21:]]
    assert changed.newest(1)[0].row == expected[20].row
    assert changed.newest(3, before=1) == ChangedItems(0).newest(3) == []
