"""Items like a given one: those whose vectors are close to its own, and those that users took together with it.

    content(i, j)  = cos(v_i, v_j)    v: what the dense score compares a state with (`serving/network/model.py`)
    together(i, j) = share(j) of a history that is i alone    (`serving/items/neighbours.py`)

A vector is made from an item's semantic ID, and so from its text: an item that nobody has seen yet has one too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from serving.bundle import Bundle
from serving.errors import RequestError
from serving.online.scans import CatalogueScans
from serving.types import AlikeBy, Rules

BLOCK = 65536  # rows whose vectors are kept together


@dataclass(frozen=True, slots=True)
class Similar:
    """A catalogue row, in what way it is similar, and how much."""

    item: int
    score: float
    by: AlikeBy


class SimilarItems:
    """Those of one bundle, whose catalogue may change meanwhile. To be called on one event loop."""

    def __init__(self, bundle: Bundle, scans: CatalogueScans | None = None) -> None:
        self._bundle, self._scans = bundle, scans or CatalogueScans()
        self._blocks: list[np.ndarray] = []  # unit vectors of the catalogue's rows, made when they are first needed

    async def find(self, item: int, rules: Rules, k: int, by: AlikeBy | None = None) -> list[Similar]:
        """Up to k permitted items other than `item`, a catalogue row. by: None stands for those taken together with it,
        best first, and behind them, as far as k is not reached, those with similar content.

        Raises RequestError, UnknownCatalogue, and Overloaded where too many wait for a pass.
        """
        self._bundle.catalogue.check_names(rules)
        if by == "together" and self._bundle.neighbours is None:
            raise RequestError("This model has no item graph; ask for similar content.", "by")
        rules = replace(rules, exclude=(*rules.exclude, item))
        found = [] if by == "content" else self._together(item, rules)[:k]
        if by == "together" or len(found) == k:
            return found
        others = replace(rules, exclude=(*rules.exclude, *(each.item for each in found)))
        return found + await self._scans.run(partial(self._compare, item, others, k - len(found)))

    def _together(self, item: int, rules: Rules) -> list[Similar]:
        bundle = self._bundle
        if bundle.neighbours is None:
            return []
        shares, _ = bundle.neighbours.shares([(item,)], 1)
        best = np.argsort(-shares.values[0], kind="stable")
        rows, values = shares.items[0, best].tolist(), shares.values[0, best].tolist()
        return [
            Similar(rows[i], values[i], "together")
            for i in bundle.catalogue.permitted_indices(rows, rules)
            if values[i] > 0
        ]

    def _compare(self, item: int, rules: Rules, k: int) -> list[Similar]:
        catalogue = self._bundle.catalogue
        permitted = np.flatnonzero(catalogue.permitted(rules))
        self._make_up_to(1 + max(item, int(permitted.max(initial=0))))
        vector = self._blocks[item // BLOCK][item % BLOCK]
        cosine = np.concatenate([block @ vector for block in self._blocks])[permitted]
        best = np.argpartition(-cosine, k)[:k] if k < len(cosine) else np.arange(len(cosine))
        best = best[np.lexsort((permitted[best], -cosine[best]))]
        return [
            Similar(row, score, "content")
            for row, score in zip(permitted[best].tolist(), cosine[best].tolist(), strict=True)
        ]

    def _make_up_to(self, rows: int) -> None:
        """Makes the vectors of the first rows that are not there yet. An item keeps its semantic ID, and so its own."""
        for number, begin in enumerate(range(0, rows, BLOCK)):
            known, end = self._blocks[number : number + 1], min(begin + BLOCK, rows)
            made = begin + sum(map(len, known))
            if made < end:
                block = np.concatenate([*known, self._bundle.unit_vectors(range(made, end))])
                self._blocks[number : number + 1] = [block]
