"""New items held out of a tiny shop: who is asked about them, what is left to train on, and rows from end to end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.accuracy.cold import EXPLORED, hold_out, main, write_rest
from serving.items import tokenizer
from training.data.read import Dataset, Items, read_data
from training.data.shop import write_shop

SMALL = """
    tokenizer.rqvae.codes=8 tokenizer.rqvae.steps=20 tokenizer.rqvae.warmup_steps=5 tokenizer.rqvae.hidden=16
    model.d_model=16 model.d_kv=8 model.d_ff=16 model.layers=1 model.heads=2 pretrain.steps=3 pretrain.eval_every=0
    evaluation.valid_users=20 evaluation.choice_users=20
""".split()


def dataset(histories: list[list[int]], times: list[list[float]], items: int) -> Dataset:
    names = [f"i{row}" for row in range(items)]
    nothing: list[str | None] = [None] * items
    offsets = np.cumsum([0, *map(len, histories)])
    catalogue = Items(names, list(names), nothing, [[] for _ in names], nothing)
    sequence, when = np.array(sum(histories, []), np.int32), np.array(sum(times, []))
    return Dataset("tiny", catalogue, [f"u{user}" for user in range(len(histories))], offsets, sequence, when, {})


def test_the_newest_items_are_held_out_with_all_that_follows_them(tmp_path: Path) -> None:
    """Items 3 and 1 came last; item 4 nobody has had."""
    data = dataset([[0, 3, 2], [2, 0, 1, 3], [3, 0], [0, 2]], [[1, 8, 9], [2, 3, 7, 10], [9, 11], [1, 4]], 5)
    held_out, rest = hold_out(data, 50, seed=0)
    assert held_out.items.tolist() == [1, 3]
    assert [history.tolist() for history in held_out.history] == [[0], [2, 0]] and held_out.target.tolist() == [3, 1]
    assert [sequence.tolist() for sequence in rest] == [[0], [2, 0], [], [0, 2]]
    write_rest(tmp_path, data, held_out, rest)
    left = read_data(tmp_path)
    assert left.items.item_ids == ["i0", "i2", "i4"] and left.user_ids == ["u1", "u3"]
    assert [left.events(user).tolist() for user in (0, 1)] == [[1, 0], [0, 1]] and left.times.tolist() == [2, 3, 1, 4]


def test_without_times_a_seed_draws_the_items() -> None:
    data = dataset([[row, row + 1] for row in range(40)], [[0, 1]] * 40, 41)
    drawn = [hold_out(data, 25, seed)[0].items.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 10 and drawn[0] != list(range(31, 41))


def embed(texts: list[str], name: str, progress: bool = False) -> np.ndarray:
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") for text in texts]
    return np.stack([np.random.default_rng(seed).standard_normal(8) for seed in seeds]).astype(np.float32)


def test_rows_say_what_answers_find_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "embed_text", embed)
    write_shop(tmp_path / "shop", users=60, items=60, seed=0)
    command = ["--data", str(tmp_path / "shop"), "--work", str(tmp_path / "work"), "--set", *SMALL]

    def rows(name: str) -> list[dict[str, Any]]:
        main([*command, "--out", str(tmp_path / name)])
        found = json.loads((tmp_path / name).read_text())
        assert {"command", "commit", "machine", "minutes", "protocol"} <= found.keys() and found["newest"] is True
        return list(found["rows"])

    first = rows("first.json")
    explored = [f"explore {n}" for n in EXPLORED]
    asked = [("known", "all", name) for name in ("before they were added", "as served", *explored)]
    asked += [("new", "all", name) for name in ("as served", *explored, "network alone", "nearest text", "popularity")]
    asked += [("new", "held-out items", name) for name in ("as served", "network alone", "nearest text", "chance")]
    assert [(row["asked"], row["catalogue"], row["model"]) for row in first] == 2 * asked
    assert [(row["held_out"], row["items"], row["added"]) for row in first[:: len(asked)]] == [(2.0, 1, 1), (5.0, 3, 3)]
    for row in first:
        assert 0 <= row["recall@1"] <= row["ndcg@10"] <= row["recall@10"] <= 1
        assert row["recall_low"] <= row["recall@10"] <= row["recall_high"]
        if row["catalogue"] == "held-out items":
            assert row["recall@10"] == 1.0  # three items at most, and nothing else is permitted
        if row["model"] == "popularity":
            assert row["recall@10"] == 0.0  # nobody has had them
    assert rows("again.json") == first
