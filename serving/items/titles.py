"""A search over titles that reads its answers and not all titles: the distinct words, and which titles have each.

A word of a query is looked for inside the distinct words, of which a catalogue has far fewer than titles. Titles go by
their rank, that is, their position in whatever order they were given in.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from serving.errors import BundleError

# A word that is in more titles than this is not looked up: among so many the first few matches are soon found.
MOST_RANKS = 1 << 21
MOST_ALONE = 1 << 16  # of a query's only word, such as the first letters that somebody types
WORDS_AT_ONCE = 1 << 16  # that a search reads, a third of a millisecond, before other threads may run again
ARRAYS = {"text": np.uint8, "begins": np.int64, "offsets": np.int64, "ranks": np.int32}


@dataclass(frozen=True, slots=True)
class TitleIndex:
    """text: the W distinct words as UTF-8, a line break behind each. begins: (W,) int64, where each begins.

    offsets: (W + 1,) int64. ranks: (n,) int32; the titles that have word w are the entries offsets[w] ..
    offsets[w + 1] - 1, ascending.
    """

    text: np.ndarray
    begins: np.ndarray
    offsets: np.ndarray
    ranks: np.ndarray

    def candidates(self, words: Sequence[str]) -> np.ndarray | None:
        """Ascending ranks of titles that may contain all words; None: all may, for none of the words is rare.

        What is left out contains one of the words nowhere.
        """
        most = MOST_RANKS if len(words) > 1 else MOST_ALONE
        found = [ranks for word in words if (ranks := self._ranks_of(word, most)) is not None]
        return reduce(lambda one, two: np.intersect1d(one, two, assume_unique=True), found) if found else None

    def _ranks_of(self, word: str, most: int) -> np.ndarray | None:
        """Ascending ranks of the titles with a word that contains this one; None where there are more than `most`."""
        pattern, parts = re.compile(re.escape(word.encode())), list[np.ndarray]()
        for begin, end in pairwise([*self.begins[::WORDS_AT_ONCE].tolist(), len(self.text)]):
            at = [match.start() for match in pattern.finditer(self.text.data, begin, end)]
            known = np.unique(np.searchsorted(self.begins, at, side="right") - 1)
            most -= int((self.offsets[known + 1] - self.offsets[known]).sum())
            if most < 0:
                return None
            parts += [self.ranks[self.offsets[w] : self.offsets[w + 1]] for w in known]
        return parts[0] if len(parts) == 1 else np.unique(np.concatenate([*parts, np.empty(0, np.int32)]))


def build_title_index(titles: Iterable[str]) -> TitleIndex:
    """titles: case-folded, "" where an item has none."""
    numbers: dict[str, int] = {}
    word, rank = array("i"), array("i")
    for at, title in enumerate(titles):
        for name in set(title.split()):
            word.append(numbers.setdefault(name, len(numbers)))
            rank.append(at)
    encoded = [f"{name}\n".encode() for name in numbers]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    words, ranks = np.frombuffer(word, np.int32), np.frombuffer(rank, np.int32)
    counts = np.bincount(words, minlength=len(numbers))
    return TitleIndex(
        np.frombuffer(b"".join(encoded), np.uint8),
        np.concatenate([[0], ends])[:-1].astype(np.int64),
        np.concatenate([[0], counts.cumsum()]).astype(np.int64),
        ranks[np.argsort(words, kind="stable")],
    )


def write_titles(path: Path, index: TitleIndex) -> None:
    save_file({name: torch.from_numpy(getattr(index, name).copy()) for name in ARRAYS}, path, {"format": "pt"})


def read_titles(path: Path, items: int) -> TitleIndex:
    """Maps what `write_titles` wrote. Raises BundleError if it does not fit a catalogue of so many items."""
    try:
        stored = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        index = TitleIndex(**stored)
        begins, offsets, ranks = index.begins, index.offsets, index.ranks
        fits = (
            all(stored[name].dtype == dtype and stored[name].ndim == 1 for name, dtype in ARRAYS.items())
            and len(offsets) == len(begins) + 1
            and offsets[0] == 0
            and offsets[-1] == len(ranks)
            and (np.diff(offsets) >= 0).all()
            and (np.diff(begins) > 0).all()
            and (not len(ranks) or (ranks.min() >= 0 and ranks.max() < items))
        )
    except (SafetensorError, TypeError, ValueError, OSError) as error:
        raise BundleError(f"{path.name} is not an index of titles; export the bundle again.") from error
    if not fits:
        raise BundleError(f"{path.name} is not the index of this catalogue's titles; export the bundle again.")
    return index
