"""A linear model of the next item, in closed form: the learned sibling of what `training/neighbours.py` counts.

    W = (X'X + ridge * 1)^-1 X'Y

X has a row per training prefix, with a_t * (t + 1) ** -recency for each of its last `max_items` items, t steps back
from the newest; Y is the prefix's next item, one-hot. a_t is the weight of the event, 1 unless its type has another,
and a row counts as much as the event of its next item. So n(j | history) = sum of a_t * (t + 1) ** -recency * W(i_t, j)
is the least-squares estimate of P(j | history), and what several items of the history say alike counts once. Entries of
W may be negative. Only a row's largest ones, by size, are kept. [open: not in the paper.]

Exact up to EXACT_ITEMS items: one matrix of 4 I^2 bytes (two up to DENSE_ITEMS) and about I^3 operations, which a core
does in seconds for 6,000 items and in ten minutes for 24,587 (2.4 GB). Beyond that, each item is regressed on the items
that most often precede it, which takes time and memory in proportion to I. Of more than SAMPLED_EVENTS events the
products are those of a random sample of the sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import linalg, sparse
from tqdm import tqdm

EXACT_ITEMS = 30_000
SAMPLED_EVENTS = 5_000_000  # X has 20 entries for each, and X'X up to 400
PREDECESSORS = 200  # items that one item is regressed on, beyond EXACT_ITEMS
BLOCK = 512  # rows of W computed at a time
DENSE_ITEMS = 12_000  # up to here X'Y is multiplied as a dense matrix, which is faster than a well-filled sparse one


@dataclass(frozen=True, slots=True)
class LinearSetting:
    """target: popular items count less, W(i, j) being divided by n_j ** target, with n the training events."""

    recency: float = 1.0
    ridge: float = 100.0
    target: float = 0.0


LINEAR_GRID = {
    "ridge": (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    "recency": (0.0, 0.3, 0.6, 1.0, 1.5, 2.0),
    "target": (0.0, 0.1, 0.2),
}


@dataclass(frozen=True, slots=True)
class Moments:
    """X'X and X'Y of the training prefixes under one recency. Shapes: (I, I) float32, sparse."""

    gram: sparse.csr_matrix
    cross: sparse.csr_matrix

    @staticmethod
    def of(
        sequences: Sequence[np.ndarray],
        items: int,
        max_items: int,
        recency: float,
        weights: Sequence[np.ndarray] | None = None,
    ) -> Moments:
        lengths = np.array([len(sequence) for sequence in sequences])
        if lengths.sum() > SAMPLED_EVENTS:
            drawn = np.random.default_rng(0).permutation(len(sequences))
            drawn = np.sort(drawn[: max(1, int((lengths[drawn].cumsum() <= SAMPLED_EVENTS).sum()))])
            sequences, lengths = [sequences[user] for user in drawn], lengths[drawn]
            weights = None if weights is None else [weights[user] for user in drawn]
        flat = np.concatenate(list(sequences))
        of_event = np.ones(len(flat), np.float32) if weights is None else np.concatenate(list(weights))
        owner = np.repeat(np.arange(len(sequences)), lengths)
        prefix, item, weight = [], [], []
        for steps in range(1, max_items + 1):
            begin = np.flatnonzero(owner[:-steps] == owner[steps:])
            prefix.append(begin + steps)  # a prefix goes by the position of its next item
            item.append(flat[begin])
            weight.append(np.full(len(begin), steps**-recency, np.float32) * of_event[begin])
        at, values = (np.concatenate(prefix), np.concatenate(item)), np.concatenate(weight)
        bags = sparse.csr_matrix((values, at), shape=(len(flat), items))
        following = sparse.csr_matrix((of_event, flat, np.arange(len(flat) + 1)), bags.shape)
        counted = bags if weights is None else sparse.diags(of_event) @ bags
        return Moments((bags.T @ counted).tocsr(), (bags.T @ following).tocsr())  # an empty bag pairs with nothing

    def among(self, items: np.ndarray) -> Moments:
        """The same for some items alone. Shape: items (I',) rows."""
        return Moments(self.gram[items][:, items], self.cross[items][:, items])


def predict(moments: Moments, ridge: float, history: sparse.csr_matrix) -> np.ndarray:
    """n(j | history) of U histories by the exact weights, without computing these. Shapes: (U, I) -> (U, I) float32."""
    factor = linalg.cho_factor(_ridged(moments.gram, ridge).T, lower=True, overwrite_a=True, check_finite=False)
    solved = linalg.cho_solve(factor, history.toarray().T.astype(np.float32), check_finite=False)
    scores: np.ndarray = solved.T @ moments.cross.toarray()
    return scores


def linear_weights(moments: Moments, ridge: float, scale: np.ndarray, keep: int) -> sparse.csr_matrix:
    """W times scale(j), with the `keep` largest weights of each row by size. Shapes: scale (I,) -> (I, I), sparse."""
    if moments.gram.shape[0] > EXACT_ITEMS:
        return largest(_restricted(moments, ridge) @ sparse.diags(scale), keep)
    # LAPACK works on the transpose, which is the same matrix, in place.
    lower = linalg.cholesky(_ridged(moments.gram, ridge).T, lower=True, overwrite_a=True, check_finite=False)
    inverse, failed = linalg.lapack.spotri(lower, lower=1, overwrite_c=1)
    assert not failed, "the Cholesky factor of a positive definite matrix has no zero on its diagonal"
    items = len(inverse)
    cross = moments.cross.toarray() if items <= DENSE_ITEMS else moments.cross
    kept = []
    for first in range(0, items, BLOCK):
        last = min(first + BLOCK, items)
        diagonal = np.tril(inverse[first:last, first:last])
        diagonal += np.tril(diagonal, -1).T
        rows = np.concatenate([inverse[first:last, :first], diagonal, inverse[last:, first:last].T], 1)
        kept.append(_largest_by_size(np.asarray(rows @ cross) * scale, keep))
    return sparse.vstack(kept, format="csr")


def _ridged(gram: sparse.csr_matrix, ridge: float) -> np.ndarray:
    dense: np.ndarray = gram.toarray().astype(np.float32, copy=False)
    np.einsum("ii->i", dense)[:] += ridge
    return dense


def _largest_by_size(rows: np.ndarray, keep: int) -> sparse.csr_matrix:
    count = min(keep, rows.shape[1])
    column = np.sort(np.argpartition(-np.abs(rows), count - 1, axis=1)[:, :count], axis=1)
    values = np.take_along_axis(rows, column, 1).astype(np.float32)
    offsets = np.arange(len(rows) + 1) * count
    found = sparse.csr_matrix((values.ravel(), column.ravel(), offsets), shape=rows.shape)
    found.eliminate_zeros()
    return found


def _restricted(moments: Moments, ridge: float) -> sparse.csr_matrix:
    """Column j is the ridge regression of item j on the PREDECESSORS items with the largest X'Y; elsewhere it is 0."""
    gram, cross = moments.gram, moments.cross.tocsc()
    rows, values = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    for item in tqdm(range(cross.shape[1]), desc="memory, linear model", unit="item", mininterval=1.0):
        before, weight = (part[cross.indptr[item] : cross.indptr[item + 1]] for part in (cross.indices, cross.data))
        if len(before) > PREDECESSORS:
            most = np.argpartition(-weight, PREDECESSORS)[:PREDECESSORS]
            before, weight = before[most], weight[most]
        if len(before):
            weight = linalg.solve(_ridged(gram[before][:, before], ridge), weight, assume_a="pos", check_finite=False)
        rows.append(before)
        values.append(weight)
    ends = np.cumsum([len(each) for each in rows])
    return sparse.csc_matrix((np.concatenate(values), np.concatenate(rows), ends), shape=cross.shape).tocsr()


def largest(weights: sparse.csr_matrix, keep: int) -> sparse.csr_matrix:
    """Every row's `keep` largest weights by size.

    Ties are broken at random: the order of a catalogue may reveal the future.
    """
    tie_break = np.random.default_rng(0).permutation(weights.shape[1])
    size, kept = np.abs(weights.data), weights.data != 0
    for begin, end in pairwise(weights.indptr.tolist()):  # row by row: to sort all at once takes seven times as long
        if end - begin > keep:
            order = np.lexsort((tie_break[weights.indices[begin:end]], -size[begin:end]))
            kept[begin + order[keep:]] = False
    offsets = np.concatenate([[0], np.cumsum(kept)])[weights.indptr]
    found = sparse.csr_matrix((weights.data[kept], weights.indices[kept], offsets), shape=weights.shape)
    found.sort_indices()
    return found
