"""Semantic IDs: M codes per item, unique, from an RQ-VAE, at random, or from a file.

Where items collide, neither their ids nor their order decides which gets which code: both often follow first
appearance and would reveal the future to a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from serving.items.tokenizer import Codec
from training.config import RqVaeConfig, TokenizeConfig
from training.data.errors import DataError
from training.data.given_ids import GivenIds
from training.ids.embed import ItemEmbedding
from training.ids.rqvae import Progress, train_rqvae


@dataclass(frozen=True, slots=True)
class SemanticIds:
    """codes: (I, M), int32, unique rows, counted from 0 at each level. report: JSON-ready, see `usage`.

    shared_levels: how many levels, from the first on, have one codebook together.
    """

    codes: np.ndarray
    codebook_sizes: tuple[int, ...]
    report: dict[str, Any]
    codec: Codec | None = None
    shared_levels: int = 0


def build_semantic_ids(
    embedding: ItemEmbedding,
    config: TokenizeConfig,
    seed: int = 0,
    given: GivenIds | None = None,
    progress: Progress | None = None,
) -> SemanticIds:
    """Semantic IDs of the configured kind. given: for kind "given"."""
    if config.kind == "random":
        return random_ids(len(embedding.matrix), (config.rqvae.codes,) * config.rqvae.levels, seed)
    if config.kind == "given":
        if given is None:
            raise DataError('tokenizer.kind "given" needs a file of semantic IDs; name it with given_ids')
        return given_ids(given, seed)
    return rqvae_ids(embedding, config.rqvae, seed, progress)


def rqvae_ids(
    embedding: ItemEmbedding, config: RqVaeConfig, seed: int = 0, progress: Progress | None = None
) -> SemanticIds:
    """Train the quantizer, encode every item, resolve collisions."""
    codec, errors = train_rqvae(embedding, config, seed, progress)
    with torch.inference_mode():
        codes, residual = codec.quantize(codec.latent(embedding.matrix))
        distance = torch.cdist(residual, codec.codebooks[-1])
    raw, sizes = codes.numpy().astype(np.int32), (config.codes,) * config.levels
    moved = move_colliding(raw, distance.numpy(), seed)
    unique, sizes = separate_colliding(moved, sizes, seed)
    report = {"kind": "rqvae", "source": embedding.source} | errors | usage(raw, unique, sizes)
    return SemanticIds(unique, sizes, report | {"moved_items": int((raw != moved).any(axis=1).sum())}, codec)


def random_ids(n_items: int, codebook_sizes: Sequence[int], seed: int = 0) -> SemanticIds:
    """Distinct IDs drawn uniformly: the control that shows what the meaning in the codes is worth."""
    room = float(np.prod(np.asarray(codebook_sizes, dtype=np.float64)))
    if not n_items <= room < 2**62:
        raise DataError(f"{n_items} items do not fit codebooks of {list(codebook_sizes)}; change levels or codes")
    sizes = tuple(map(int, codebook_sizes))
    numbers = np.random.default_rng(seed).choice(int(room), size=n_items, replace=False)
    codes = np.stack(np.unravel_index(numbers, sizes), axis=1).astype(np.int32)
    return SemanticIds(codes, sizes, {"kind": "random"} | usage(codes, codes, sizes))


def given_ids(given: GivenIds, seed: int = 0) -> SemanticIds:
    """IDs made elsewhere, codes from 0. Items that share one get their codes in other orders where all levels have one
    codebook, and where that is not enough, or not possible, all items get an extra last level.
    """
    codes = np.asarray(given.codes)
    if codes.ndim != 2 or not len(codes) or not np.issubdtype(codes.dtype, np.integer) or codes.min() < 0:
        raise DataError("given semantic IDs must be whole numbers from 0, as many for every item; correct their file")
    codes = codes.astype(np.int32)
    levels, apart, sizes = codes.shape[1], codes, tuple(int(n) + 1 for n in codes.max(axis=0))
    if given.shared_codebook:
        apart, sizes = reorder_colliding(codes, seed), (int(codes.max()) + 1,) * levels
    unique, sizes = separate_colliding(apart, sizes, seed)
    shared_levels = levels if given.shared_codebook else 0
    report = {"kind": "given", "shared_levels": shared_levels} | usage(codes, unique, sizes)
    return SemanticIds(unique, sizes, report, shared_levels=shared_levels)


def reorder_colliding(codes: np.ndarray, seed: int) -> np.ndarray:
    """Give items that share an ID of one codebook its codes in other orders, that of the last codes changed first.

    One of them, drawn at random, keeps its ID, and the codes say of every item what they said before. Where all orders
    are taken (of those tried, 1,000 an item) an item stays as it is. Shape: (I, M) -> (I, M).
    """
    codes, order = codes.copy(), np.random.default_rng(seed).permutation(len(codes))
    taken = set(map(tuple, codes.tolist()))
    for group in _groups(codes[order]):
        orders = permutations(codes[order[group[0]]].tolist())
        for row in order[group[1:]]:
            free = next((other for other in islice(orders, 1000) if other not in taken), None)
            if free is not None:
                codes[row] = free
                taken.add(free)
    return codes


def move_colliding(codes: np.ndarray, distance: np.ndarray, seed: int) -> np.ndarray:
    """Give items that share an ID the nearest last codes that are free under their prefix, at the least total distance.

    Only items that collide move. Where a prefix has more items than codes its items stay as they are.
    Shapes: codes (I, M), distance (I, C) of every item to every code of the last level -> (I, M).
    """
    codes = codes.copy()
    order = np.random.default_rng(seed).permutation(
        len(codes)
    )  # equal texts have equal distances: ties are broken at random
    for group in _groups(codes[order, :-1]):
        group = order[group]
        last, counts = np.unique(codes[group, -1], return_counts=True)
        if counts.max() == 1 or len(group) > distance.shape[1]:
            continue
        alone = last[counts == 1]
        colliding = group[~np.isin(codes[group, -1], alone)]
        free = np.setdiff1d(np.arange(distance.shape[1]), alone)
        _, chosen = linear_sum_assignment(distance[np.ix_(colliding, free)])
        codes[colliding, -1] = free[chosen]
    return codes


def separate_colliding(codes: np.ndarray, sizes: tuple[int, ...], seed: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Add a level if any two items still share an ID: 0, 1, … in random order among those who do.

    Shapes: (I, M) -> (I, M) or (I, M + 1), and the codebook sizes to match.
    """
    order = np.random.default_rng(seed + 1).permutation(len(codes))
    extra = np.zeros(len(codes), dtype=np.int32)
    for group in _groups(codes[order]):
        extra[order[group]] = np.arange(len(group))
    if not extra.any():
        return codes, sizes
    return np.column_stack([codes, extra]), (*sizes, int(extra.max()) + 1)


def usage(raw: np.ndarray, unique: np.ndarray, sizes: tuple[int, ...]) -> dict[str, Any]:
    """How well codes are used. Per level: codes used, and perplexity exp(-sum p log p), p a code's share of items.

    collisions_before: items that shared an ID with another, and their share, in `raw`; collisions_after in `unique`.
    """
    counts = [np.bincount(level, minlength=size) for level, size in zip(unique.T, sizes, strict=True)]
    shares = [count[count > 0] / len(unique) for count in counts]
    return {
        "items": len(unique),
        "codebook_sizes": list(sizes),
        "codes_used": [len(share) for share in shares],
        "perplexity": [round(float(np.exp(-(share * np.log(share)).sum())), 2) for share in shares],
        "collisions_before": _colliding(raw),
        "collisions_after": _colliding(unique),
        "extra_level": sizes[-1] if unique.shape[1] > raw.shape[1] else 0,
    }


def _colliding(codes: np.ndarray) -> dict[str, float]:
    _, counts = np.unique(codes, axis=0, return_counts=True)
    shared = int(counts[counts > 1].sum())
    return {"items": shared, "share": round(shared / len(codes), 5)}


def _groups(keys: np.ndarray) -> list[np.ndarray]:
    """Rows with equal keys, in the order of rows within a group. keys: (I, n), n may be 0 (one group)."""
    if not keys.shape[1]:
        return [np.arange(len(keys))]
    _, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.ravel()
    return np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
