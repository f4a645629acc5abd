"""Which semantic IDs are taken, and which is the nearest one free for a new item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.errors import NoSemanticId

MOST_NUMBERS = 2**63 - 1  # that numpy counts combinations of codes up to


class CodeSpace:
    """codes: (I, M), counted from 0 at every level. sizes: codes per level. An ID once taken is never given again."""

    def __init__(self, codes: np.ndarray, sizes: tuple[int, ...]) -> None:
        self._sizes = sizes
        self._groups = _level_groups(sizes)
        numbers = [np.ravel_multi_index(tuple(codes[:, group].T), sizes[group]) for group in self._groups]
        order = np.lexsort(numbers[::-1])
        self._first = [of_group[order] for of_group in numbers]  # sorted by the first group, then the second, ...
        self._taken_since: set[tuple[int, ...]] = set()

    def take(self, codes: Sequence[int], last_codes: Sequence[int]) -> list[int]:
        """Takes the ID of a new item, of M codes. Raises NoSemanticId if none is left.

        codes: of the levels before the tokenizer's last. last_codes: of that level, the nearest first; where the IDs
        have one level more, which only tells items apart, its lowest free code follows.
        """
        prefix = list(codes)
        others = sorted(set(range(self._sizes[len(prefix)])).difference(last_codes))
        for last in (*last_codes, *others):
            for extra in np.ndindex(*self._sizes[len(prefix) + 1 :]):
                found = (*prefix, last, *extra)
                if not self._is_taken(found):
                    self._taken_since.add(found)
                    return list(found)
        raise NoSemanticId(
            "All semantic IDs next to this item's are taken; train a model with more codes, or give it another text."
        )

    def _is_taken(self, codes: tuple[int, ...]) -> bool:
        low, high = 0, len(self._first[0])  # the IDs that begin as this one does
        for group, numbers in zip(self._groups, self._first, strict=True):
            number = np.ravel_multi_index(codes[group], self._sizes[group])
            within = numbers[low:high]
            low, high = (low + int(np.searchsorted(within, number, side)) for side in ("left", "right"))
        return codes in self._taken_since or low < high


def _level_groups(sizes: tuple[int, ...]) -> list[slice]:
    """Successive levels, as many together as have one number for each combination of their codes."""
    groups: list[slice] = []
    begin, product = 0, 1
    for level, size in enumerate(sizes):
        product *= size
        if product > MOST_NUMBERS:
            groups.append(slice(begin, level))
            begin, product = level, size
    return [*groups, slice(begin, len(sizes))]
