"""One vector per item: from its text, from the items it occurs with in the training histories, or from both.

It uses neither item ids nor their order: both may reveal the future to a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from serving.files import atomic_write
from serving.items import tokenizer
from serving.items.tokenizer import CodesFrom, TextLift
from training.config import TokenizeConfig
from training.data.errors import DataError
from training.data.read import Items

WINDOW = 5  # steps of a history in which two items count as near each other
DOUBLE_ITEMS = 1 << 16  # up to here embeddings are decomposed in double precision, beyond in half the time and memory


@dataclass(frozen=True, slots=True)
class ItemEmbedding:
    """matrix: (I, E), float32, rows of unit length. lift: how a new item's text gets there (source "both" only)."""

    matrix: np.ndarray
    source: CodesFrom
    lift: TextLift | None = None


def item_embedding(
    items: Items,
    train_sequences: Sequence[np.ndarray],
    config: TokenizeConfig,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = False,
) -> ItemEmbedding:
    """The embedding that semantic IDs are made from.

    "both": text and collaborative side by side, text_weight the share of text in their inner product; collaborative
    alone if no item has text. An item that no training history holds gets the collaborative half that its text
    suggests, as a new item will when it is served. Raises DataError for "text" if the items have none.
    """
    source, dim = config.source, config.collaborative_dim
    if source == "both" and not items.has_text:
        source = "collaborative"
    if source == "collaborative":
        return ItemEmbedding(collaborative_embedding(train_sequences, len(items), dim, seed), source)
    if not any(texts := item_text(items)):
        raise DataError(f'tokenizer source "{source}" needs item text; add titles to the items or use "collaborative"')
    text = embed_text(texts, config.embedder, cache, progress)
    if source == "text":
        return ItemEmbedding(text, source)
    behaviour = collaborative_embedding(train_sequences, len(items), dim, seed)
    seen = np.isin(np.arange(len(items)), np.concatenate(list(train_sequences)))
    ridge = Ridge(alpha=1.0).fit(text[seen], behaviour[seen])
    weight = torch.from_numpy(ridge.coef_.T.astype(np.float32).copy())
    lift = TextLift(weight, torch.from_numpy(ridge.intercept_.astype(np.float32)), config.text_weight)
    behaviour[~seen] = lift.predict(torch.from_numpy(text[~seen])).numpy()
    return ItemEmbedding(lift.join(torch.from_numpy(text), torch.from_numpy(behaviour)).numpy(), source, lift)


def item_text(items: Items) -> list[str]:
    """Title, brand, categories and the start of the description of every item; "" where it has none of them."""
    rows = zip(items.titles, items.brands, items.categories, items.descriptions, strict=True)
    return [tokenizer.item_text(*row) for row in rows]


def embed_text(texts: Sequence[str], model_name: str, cache: Path | None = None, progress: bool = False) -> np.ndarray:
    """Sentence embeddings, unit length. Returns: (len(texts), E), float32.

    cache: a folder in which they are kept under a hash of the model's name and all texts (some 30 s of reading per
    thousand items otherwise). Raises ServingError where the model cannot be loaded.
    """
    if cache and (path := _cached(texts, model_name, cache)).is_file():
        return load_file(path)["embedding"]
    embedding = tokenizer.embed_text(texts, model_name, progress)
    if cache:
        keep_embedding(texts, model_name, cache, embedding)
    return embedding


def keep_embedding(texts: Sequence[str], model_name: str, cache: Path, embedding: np.ndarray) -> None:
    """Writes what `embed_text` will read back for these texts."""
    with atomic_write(_cached(texts, model_name, cache)) as partial:  # a kill while writing leaves no broken cache
        save_file({"embedding": embedding}, partial)


def _cached(texts: Sequence[str], model_name: str, cache: Path) -> Path:
    digest = hashlib.sha256("\x00".join([model_name, *texts]).encode()).hexdigest()[:24]
    return cache / f"text-{digest}.safetensors"


def collaborative_embedding(train_sequences: Sequence[np.ndarray], n_items: int, dim: int, seed: int) -> np.ndarray:
    """Truncated SVD of the positive pointwise mutual information of items near each other. (n_items, dim), float32.

    PPMI_ij = max(0, log(n_ij n / (n_i n_j))), n_ij = sum of 1 / distance over pairs at most WINDOW steps apart in
    a history; n_j is smoothed by a power of 0.75 against the pull of rare items (Levy, Goldberg & Dagan 2015).
    Rows have unit length. An item that occurs with no other gets a small seeded random vector.
    """
    ppmi = _ppmi(_cooccurrence(train_sequences, n_items, WINDOW))
    if n_items > DOUBLE_ITEMS:
        ppmi = ppmi.astype(np.float32)
    rng = np.random.default_rng(seed)
    vectors = np.zeros((n_items, dim), np.float32)
    rank = min(dim, n_items - 1)
    if ppmi.nnz and rank > 0:
        left, strength, _ = randomized_svd(ppmi, rank, n_iter=6, random_state=seed)
        vectors[:, :rank] = normalize(left * np.sqrt(strength))
    isolated = np.linalg.norm(vectors, axis=1) < 1e-6
    vectors[isolated] = 0.01 * rng.standard_normal((int(isolated.sum()), dim))
    return vectors


def _ppmi(counts: sparse.coo_matrix) -> sparse.csr_matrix:
    row_sum = np.asarray(counts.sum(axis=1)).ravel()
    smooth = row_sum**0.75
    expected = row_sum[counts.row] * smooth[counts.col] / max(smooth.sum(), 1e-12)
    ppmi = sparse.csr_matrix((np.maximum(0.0, np.log(counts.data / expected)), (counts.row, counts.col)), counts.shape)
    ppmi.eliminate_zeros()
    return ppmi


def _cooccurrence(train_sequences: Sequence[np.ndarray], n_items: int, window: int) -> sparse.coo_matrix:
    """Symmetric counts of different items near each other, weighted by 1 / distance. (n_items, n_items)."""
    flat = np.concatenate(list(train_sequences)).astype(np.int64)
    owner = np.repeat(np.arange(len(train_sequences)), [len(sequence) for sequence in train_sequences])
    total = sparse.csr_matrix((n_items, n_items))
    for distance in range(1, min(window, len(flat) - 1) + 1):
        near = (owner[distance:] == owner[:-distance]) & (flat[distance:] != flat[:-distance])
        rows, cols = flat[:-distance][near], flat[distance:][near]
        total = total + sparse.csr_matrix((np.full(len(rows), 1 / distance), (rows, cols)), shape=(n_items, n_items))
    return (total + total.T).tocoo()
