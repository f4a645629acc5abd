"""Histories as encoder input: the tokens of the last items, oldest first, then the suffix, padded to the longest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from serving.errors import RequestError
from serving.items.vocabulary import PAD


def history_tokens(
    histories: Sequence[Sequence[int] | np.ndarray], item_tokens: np.ndarray, max_items: int, suffix: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token matrix and mask of a batch. Shapes: item_tokens (I, M) -> (B, S) int64, (B, S) bool, True where real.

    An empty history without a suffix is one padding token that counts as real, because attention needs a position.
    Raises RequestError if a history names a row that the catalogue does not have: numpy would read a negative one as
    another item, and a token that the network does not have leaves a GPU unusable.
    """
    recent = [np.asarray(history[-max_items:], dtype=np.int64) for history in histories]
    rows = np.concatenate(recent)
    if len(wrong := rows[(rows < 0) | (rows >= len(item_tokens))]):
        raise RequestError(f"A history names row {wrong[0]}; the catalogue has 0 to {len(item_tokens) - 1}.", "history")
    end = np.array([len(history) for history in recent]) * item_tokens.shape[1]  # of the items' tokens
    position = np.arange(max(1, end.max() + len(suffix)))
    tokens = np.full((len(recent), len(position)), PAD, dtype=np.int64)
    tokens[position < end[:, None]] = item_tokens[rows].ravel()
    for offset, token in enumerate(suffix):
        tokens[np.arange(len(recent)), end + offset] = token
    mask = position < np.maximum(1, end + len(suffix))[:, None]
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def history_items(histories: Sequence[Sequence[int] | np.ndarray], max_items: int) -> torch.Tensor:
    """Catalogue rows of the last items, oldest first, -1 behind the shorter ones. Shape: (B, longest) int64."""
    recent = [np.asarray(history[-max_items:], dtype=np.int64) for history in histories]
    items = np.full((len(recent), max(map(len, recent))), -1, np.int64)
    for row, own in enumerate(recent):
        items[row, : len(own)] = own
    return torch.from_numpy(items)
