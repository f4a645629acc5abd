"""Which semantic IDs are taken, and which is the nearest one free for a new item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.errors import NoSemanticId


class CodeSpace:
    """codes: (I, M), counted from 0 at every level. sizes: codes per level. An ID once taken is never given again."""

    def __init__(self, codes: np.ndarray, sizes: tuple[int, ...]) -> None:
        self._sizes = sizes
        self._first = np.sort(np.ravel_multi_index(tuple(codes.T), sizes))
        self._taken_since: set[int] = set()

    def take(self, codes: Sequence[int], last_codes: Sequence[int]) -> list[int]:
        """Takes the ID of a new item, of M codes. Raises NoSemanticId if none is left.

        codes: of the levels before the tokenizer's last. last_codes: of that level, the nearest first; where the IDs
        have one level more, which only tells items apart, its lowest free code follows.
        """
        prefix = list(codes)
        others = sorted(set(range(self._sizes[len(prefix)])).difference(last_codes))
        for last in (*last_codes, *others):
            for extra in np.ndindex(*self._sizes[len(prefix) + 1 :]):
                found = [*prefix, last, *extra]
                number = int(np.ravel_multi_index(tuple(found), self._sizes))
                if not self._is_taken(number):
                    self._taken_since.add(number)
                    return found
        raise NoSemanticId(
            "All semantic IDs next to this item's are taken; train a model with more codes, or give it another text."
        )

    def _is_taken(self, number: int) -> bool:
        index = int(np.searchsorted(self._first, number))
        return number in self._taken_since or (index < len(self._first) and int(self._first[index]) == number)
