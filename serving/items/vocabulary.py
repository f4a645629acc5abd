"""The layout of the vocabulary: which ids are padding, start tokens, item codes and reasoning codes.

    0 pad | 1 end | start_0 .. start_Lmax | level 0 codes | level 1 codes | … | reasoning codes

Every level of the semantic ID has its own block, so that a token determines its level; where given IDs take the codes
of several levels from one codebook, the first `shared_levels` levels have one block together. Reasoning codes have a
block of their own unless they are item codes (`reasoning_codes == 0`) [paper].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PAD, END, FIRST_START = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The sizes of the blocks, which determine where each begins. ValueError for levels that cannot share a block."""

    max_steps: int
    codebook_sizes: tuple[int, ...]  # length M
    reasoning_codes: int  # 0: reasoning tokens are item codes [paper]
    shared_levels: int = 0  # levels, from the first on, whose codes are of one codebook

    def __post_init__(self) -> None:
        if not 0 <= self.shared_levels <= len(self.codebook_sizes):
            raise ValueError("shared_levels is not in 0..tokens_per_item")
        if len(set(self.codebook_sizes[: self.shared_levels])) > 1:
            raise ValueError("levels that share a codebook must have one codebook size")

    @property
    def tokens_per_item(self) -> int:
        return len(self.codebook_sizes)

    @property
    def start_tokens(self) -> list[int]:
        """The decoder's start token for every number of steps 0..max_steps."""
        return list(range(FIRST_START, FIRST_START + self.max_steps + 1))

    @property
    def item_offset(self) -> int:
        return FIRST_START + self.max_steps + 1

    @property
    def level_offsets(self) -> np.ndarray:
        """First id of every level's block. Shape: (M,), int64."""
        return np.cumsum([self.item_offset, *self._new_ids[:-1]], dtype=np.int64)

    @property
    def level_ranges(self) -> tuple[tuple[int, int], ...]:
        """[first, last + 1) of every level's block."""
        offsets = self.level_offsets.tolist()
        return tuple((first, first + size) for first, size in zip(offsets, self.codebook_sizes, strict=True))

    @property
    def item_range(self) -> tuple[int, int]:
        """[first, last + 1) of all item codes."""
        return self.item_offset, self.item_offset + sum(self._new_ids)

    @property
    def reasoning_range(self) -> tuple[int, int]:
        """[first, last + 1) of the ids a reasoning token may take."""
        first, end = self.item_range
        return (end, end + self.reasoning_codes) if self.reasoning_codes else (first, end)

    @property
    def size(self) -> int:
        return self.item_range[1] + self.reasoning_codes

    @property
    def _new_ids(self) -> list[int]:
        """How many ids every level adds: none where the next one has the same block."""
        return [0 if level + 1 < self.shared_levels else size for level, size in enumerate(self.codebook_sizes)]

    def tokens_of(self, codes: np.ndarray) -> np.ndarray:
        """Semantic IDs (codes counted from 0 at each level) as vocabulary ids. Shapes: (I, M) -> (I, M), int32."""
        tokens: np.ndarray = np.asarray(codes, dtype=np.int64) + self.level_offsets
        return tokens.astype(np.int32)

    def to_json(self) -> dict[str, Any]:
        lo, hi = self.reasoning_range
        return asdict(self) | {
            "pad": PAD,
            "end": END,
            "size": self.size,
            "level_offsets": self.level_offsets.tolist(),
            "reasoning_range": [lo, hi],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Vocabulary:
        return Vocabulary(
            int(data["max_steps"]),
            tuple(int(n) for n in data["codebook_sizes"]),
            int(data["reasoning_codes"]),
            int(data.get("shared_levels", 0)),  # bundles of format 1 have none
        )
