"""Item embeddings: items that occur together are similar, order and ids do not matter, texts are cached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from serving.items import tokenizer
from training.config import TokenizeConfig
from training.data.errors import DataError
from training.data.read import Items
from training.ids import embed
from training.ids.embed import collaborative_embedding, embed_text, item_embedding, item_text

WORDS = ["stapler", "pen", "ruler", "coffee", "milk", "cup"]


def make_items(titles: list[str | None]) -> Items:
    n = len(titles)
    return Items([f"id-{i}" for i in range(n)], titles, [None] * n, [[] for _ in range(n)], [None] * n)


def two_shops(n_items: int = 12, users: int = 60, seed: int = 0) -> list[np.ndarray]:
    """Users buy even items only, or odd items only."""
    rng = np.random.default_rng(seed)
    return [rng.choice(np.arange(user % 2, n_items, 2), 5, replace=False).astype(np.int32) for user in range(users)]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Bag of words instead of the sentence embedder; the list holds all texts it has read."""
    texts_read: list[str] = []

    def bag_of_words(texts: list[str], name: str, progress: bool = False) -> np.ndarray:
        texts_read.extend(texts)
        counts = np.array([[0.1 + text.split().count(word) for word in WORDS] for text in texts], dtype=np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    monkeypatch.setattr(tokenizer, "embed_text", bag_of_words)
    return texts_read


def test_items_that_occur_together_are_similar() -> None:
    vectors = collaborative_embedding(two_shops(), 12, dim=4, seed=0)
    assert vectors.shape == (12, 4)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similarity = vectors @ vectors.T
    alike = np.arange(12)[:, None] % 2 == np.arange(12)[None] % 2
    assert similarity[alike].min() > similarity[~alike].max()


def test_row_numbers_do_not_matter() -> None:
    rename = np.random.default_rng(1).permutation(12)
    vectors = collaborative_embedding(two_shops(), 12, 4, seed=0)
    renamed = collaborative_embedding([rename[sequence] for sequence in two_shops()], 12, 4, seed=0)[rename]
    np.testing.assert_allclose(vectors @ vectors.T, renamed @ renamed.T, atol=1e-3)


def test_isolated_items_stay_near_the_centre_and_apart() -> None:
    vectors = collaborative_embedding(two_shops(), 15, 4, seed=0)
    assert (np.linalg.norm(vectors[12:], axis=1) < 0.1).all()
    assert len(np.unique(vectors[12:], axis=0)) == 3
    np.testing.assert_array_equal(vectors, collaborative_embedding(two_shops(), 15, 4, seed=0))
    alone = collaborative_embedding([np.array([0], dtype=np.int32)], 3, 4, seed=0)
    assert np.isfinite(alone).all()


def test_single_precision_finds_the_same_similar_items(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = collaborative_embedding(two_shops(), 15, 4, seed=0)
    monkeypatch.setattr(embed, "DOUBLE_ITEMS", 14)
    vectors = collaborative_embedding(two_shops(), 15, 4, seed=0)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors @ vectors.T, exact @ exact.T, atol=1e-4)
    np.testing.assert_array_equal(vectors[12:], exact[12:])


def test_pairs_count_within_a_history_only() -> None:
    counts = embed._cooccurrence([np.array([0, 1, 2]), np.array([3, 3])], 4, window=10).toarray()
    expected = np.zeros((4, 4))
    expected[0, 1] = expected[1, 0] = expected[1, 2] = expected[2, 1] = 1.0
    expected[0, 2] = expected[2, 0] = 0.5
    np.testing.assert_array_equal(counts, expected)


def test_texts_hold_no_ids() -> None:
    items = Items(["B00042"], ["Red pen"], ["Acme"], [["Office"]], ["Writes"])
    assert item_text(items) == ["Red pen. Acme. Office. Writes"]


def test_unseen_items_get_the_collaborative_half_that_their_text_suggests(read: list[str]) -> None:
    titles: list[str | None] = [*["stapler", "coffee"] * 6, "stapler", "coffee"]
    built = item_embedding(make_items(titles), two_shops(), TokenizeConfig(text_weight=0.25, collaborative_dim=4))
    assert built.matrix.shape == (14, len(WORDS) + 4)
    np.testing.assert_allclose(np.linalg.norm(built.matrix, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(built.matrix[:, : len(WORDS)], axis=1), 0.5, atol=1e-5)
    behaviour = built.matrix[:, len(WORDS) :]
    assert (behaviour[12] @ behaviour[:12:2].T).min() > (behaviour[12] @ behaviour[1:12:2].T).max()
    assert (behaviour[13] @ behaviour[1:12:2].T).min() > (behaviour[13] @ behaviour[:12:2].T).max()


def test_text_is_embedded_once(read: list[str], tmp_path: Path) -> None:
    texts = ["stapler pen", "milk"]
    first = embed_text(texts, "packaged", tmp_path)
    np.testing.assert_array_equal(embed_text(texts, "packaged", tmp_path), first)
    assert len(read) == 2
    embed_text(texts, "another", tmp_path)
    embed_text([*texts, "cup"], "packaged", tmp_path)
    assert len(read) == 7


def test_text_embeddings_of_items_without_text_are_refused(read: list[str]) -> None:
    with pytest.raises(DataError, match="collaborative"):
        item_embedding(make_items([None] * 12), two_shops(), TokenizeConfig(source="text"))
