"""The comparison models on sequences small enough to check by hand, and the record of a whole run."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.accuracy import baselines, neighbours, sasrec
from benchmarks.accuracy.full_ranking import rank, top_items
from benchmarks.accuracy.popularity import Popularity
from benchmarks.common import record, table

REFERENCE_DATA = Path(__file__).parents[4] / "shared" / "data"
TINY = sasrec.Setting(width=16, dropout=0.0, learning_rate=0.01, batch=8, max_epochs=30, patience=30)


def seq(*items: int) -> np.ndarray:
    return np.array(items, np.int32)


def cycles(users: int, items: int = 12, seed: int = 0) -> list[np.ndarray]:
    """Walks i, i+1, i+2, ... around a ring of items: the next item is certain."""
    starts = np.random.default_rng(seed).integers(items, size=users)
    return [((start + np.arange(6)) % items).astype(np.int32) for start in starts]


def test_popularity_counts() -> None:
    model = Popularity([seq(2, 1, 2), seq(2, 3), seq(1)], items=5)
    assert model.scores([seq(0), seq(2)]).tolist() == [[0, 2, 3, 1, 0]] * 2


def test_top_items_pads_and_breaks_ties_without_the_row_number() -> None:
    ranked = top_items(np.array([[0.5, -np.inf, 2.0, 1.0]]))
    assert ranked.tolist() == [[2, 3, 0] + [-1] * 7]
    firsts = {int(top_items(np.zeros((1, 50)), seed)[0, 0]) for seed in range(20)}
    assert len(firsts) > 10


def test_rank_shows_twenty_items_and_excludes_all() -> None:
    history = np.arange(30, dtype=np.int32)
    shown: list[list[int]] = []

    def score(histories: list[np.ndarray]) -> np.ndarray:
        shown.extend(h.tolist() for h in histories)
        return -np.tile(np.arange(34.0), (len(histories), 1))

    assert rank(score, [history], exclude_seen=False)[0, 0] == 0
    assert rank(score, [history], exclude_seen=True).tolist() == [[30, 31, 32, 33] + [-1] * 6]
    assert shown == [list(range(10, 30))] * 2


def test_neighbours_by_hand() -> None:
    setting = neighbours.CountingSettings(window=2, distance=1.0, backward=0.25, recency=1.0, source=0.5, target=1.0)
    model = neighbours.Neighbours.fit([seq(0, 1, 2, 3), seq(1, 2)], 5, setting)  # n = 1, 2, 2, 1, 0
    one_to_two, one_to_three = 2 / (2**0.5 * 2), 0.5 / 2**0.5
    two_to_three, two_to_one = 1 / 2**0.5, 0.25 * 2 / (2**0.5 * 2)
    two_to_zero, one_to_zero = 0.25 * 0.5 / 2**0.5, 0.25 / 2**0.5
    scores = model.scores([seq(2, 1)])[0]  # 1 is the newest, 2 counts half
    expected = [
        one_to_zero + two_to_zero / 2,
        two_to_one / 2,
        one_to_two,
        one_to_three + two_to_three / 2,
        0,
    ]
    assert scores == pytest.approx(expected, abs=2 * neighbours.BACKFILL)


def test_items_without_neighbours_follow_by_popularity() -> None:
    model = neighbours.Neighbours.fit([seq(0, 1), seq(2), seq(2), seq(3)], 5, neighbours.CountingSettings())
    assert rank(model.scores, [seq(0)], exclude_seen=True)[0, :4].tolist() == [1, 2, 3, 4]


def test_tuning_finds_the_direction_that_validation_rewards() -> None:
    sequences = cycles(60)

    def follows(model: neighbours.Neighbours) -> float:
        best = rank(model.scores, [seq(i) for i in range(12)], exclude_seen=False)[:, 0]
        return float((best == (np.arange(12) + 1) % 12).mean())

    start = neighbours.CountingSettings(distance=0.0, backward=1.0)
    before = neighbours.Neighbours.fit(sequences, 12, start)
    tuned, value = neighbours.tune(sequences, 12, follows, start)
    assert value == follows(tuned) == 1.0 > follows(before)


def test_windows_keep_every_step_once() -> None:
    whole = np.arange(50, dtype=np.int32)
    pieces = sasrec.windows([whole, seq(7)])
    steps = sorted((int(a), int(b)) for piece in pieces for a, b in zip(piece[:-1], piece[1:], strict=True))
    assert steps == [(n, n + 1) for n in range(49)]
    assert max(map(len, pieces)) == 21


def test_batches_hold_every_piece_once() -> None:
    pieces = [np.arange(n % 7 + 2, dtype=np.int32) for n in range(50)]
    drawn = list(sasrec.batches(pieces, 8, np.random.default_rng(0)))
    assert sorted(len(p) for batch in drawn for p in batch) == sorted(map(len, pieces))
    assert max(map(len, drawn)) == 8


def test_sasrec_looks_back_only_and_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = sasrec.SASRec(12, TINY).eval()
    with torch.inference_mode():
        short, long = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[1, 2, 3, 9, 12]]))
    torch.testing.assert_close(short, long[:, :3])
    alone, beside = model.scores([seq(4, 5)]), model.scores([seq(4, 5), seq(1, 2, 3, 4, 5, 6)])
    np.testing.assert_allclose(alone[0], beside[0], atol=1e-5)
    assert not np.allclose(model.scores([seq(5, 4)]), alone)


def test_sasrec_loss_is_the_mean_over_real_positions() -> None:
    torch.manual_seed(0)
    model = sasrec.SASRec(12, TINY).eval()
    expected = []
    for window in (seq(3, 1, 2), seq(5, 6)):
        for end in range(1, len(window)):
            log_probabilities = torch.from_numpy(model.scores([window[:end]])[0]).log_softmax(-1)
            expected.append(-float(log_probabilities[window[end]]))
    assert model.loss([seq(3, 1, 2), seq(5, 6)]).item() == pytest.approx(np.mean(expected), abs=1e-5)


def test_sasrec_learns_a_certain_next_item_and_returns_the_best_epoch() -> None:
    seen: list[float] = []

    def hits(model: sasrec.SASRec) -> float:
        ranked = rank(model.scores, [seq(i, (i + 1) % 12) for i in range(12)], exclude_seen=False)
        seen.append(float((ranked[:, 0] == (np.arange(12) + 2) % 12).mean()))
        return seen[-1]

    model, epoch, value = sasrec.train(cycles(60), 12, TINY, 0, hits, report=lambda line: None)
    assert value == max(seen) == seen[epoch - 1] == 1.0
    assert hits(model) == value  # the weights of that epoch, not of the last


def test_a_run_from_folder_to_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ring"
    folder.mkdir()
    with gzip.open(folder / "interactions.csv.gz", "wt") as file:
        file.write("user_id,item_id,timestamp\n")
        for user, sequence in enumerate(cycles(60, items=30)):
            file.writelines(f"u{user},i{item},{step}\n" for step, item in enumerate(sequence))
    monkeypatch.setattr(sasrec, "Setting", lambda **given: dataclasses.replace(TINY, max_epochs=2, **given))
    out = tmp_path / "results" / "ring.json"
    baselines.main(["--data", str(folder), "--seeds", "0,1", "--out", str(out), "--sasrec-width", "8"])

    result = json.loads(out.read_text())
    assert result["seeds"] == [0, 1] and result["data"] == "ring" and "Leave-one-out" in result["protocol"]
    assert (
        result["command"].startswith("python -m benchmarks.accuracy.baselines --data ") and result["machine"]["torch"]
    )
    rows = result["rows"]
    assert len(rows) == 4 * (5 + 2)
    models = [(r["model"], r["seed"]) for r in rows[::4]]
    without_chance = [(name, None) for name in ("popularity", "neighbours", "neighbours+text", "linear", "memory")]
    assert models == [*without_chance, ("sasrec", 0), ("sasrec", 1)]
    assert all(r["setting"]["width"] == 8 for r in rows if r["model"] == "sasrec")
    near = {(r["split"], r["excluded"]): r for r in rows if r["model"] == "neighbours"}
    assert near["test", True]["recall@5"] > 0.9 > max(r["recall@5"] for r in rows if r["model"] == "popularity")
    assert near["test", True]["users"] == 60
    joined = {(r["split"], r["excluded"]): r for r in rows if r["model"] == "neighbours+text"}
    assert joined["test", True]["recall@5"] > 0.9
    printed = capsys.readouterr().out
    assert "| neighbours+text |" in printed and f"{near['test', True]['ndcg@10']:.4f}" in printed


def test_an_unknown_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        baselines.main(["--data", str(tmp_path), "--models", "magic", "--out", str(tmp_path / "x.json")])
    assert "'magic'" in capsys.readouterr().err


def test_record_leaves_no_partial_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        record(tmp_path / "x.json", "c", [0], [{"not json": object()}])
    assert list(tmp_path.iterdir()) == []


def test_table_is_aligned_markdown() -> None:
    rows: list[dict[str, object]] = [{"model": "a", "x": 0.12345}, {"model": "longer", "x": 12.34, "seen": True}]
    lines = table(rows, ["model", "x", "seen"]).split("\n")
    assert lines[0] == "| model  |      x | seen |"
    assert lines[1] == "| ------ | -----: | ---- |"
    assert lines[2] == "| a      | 0.1235 |      |"
    assert lines[3] == "| longer |   12.3 | yes  |"


@pytest.mark.skipif(not REFERENCE_DATA.is_dir(), reason="needs ../shared/data, which the repository does not hold")
def test_reference_figures_of_popularity() -> None:
    from training.data.prepare import leave_one_out
    from training.data.read import read_data

    data = read_data(REFERENCE_DATA / "scientific2018")
    rows = baselines.run(
        leave_one_out(data), data.items, ["popularity"], [0], sasrec.Setting(), report=lambda line: None
    )
    test = {r["excluded"]: r for r in rows if r["split"] == "test"}
    assert test[False]["recall@10"] == pytest.approx(0.0231, abs=2e-4)
    assert test[False]["ndcg@10"] == pytest.approx(0.0162, abs=2e-4)
    assert test[True]["ndcg@10"] == pytest.approx(0.0167, abs=2e-4)
