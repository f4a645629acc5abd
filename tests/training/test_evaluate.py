"""Evaluation: rows of a table, figures of failing reasoning, and the command's lines."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tests.builders import ranker_of, tiny_bundle, tiny_model
from tests.training.small import small_config, small_workspace
from training.__main__ import main
from training.data.prepare import sample_users, split_by
from training.data.read import read_data
from training.evaluate import evaluate_bundle, measure, validate
from training.stages.diagnostics import are_items, pairwise_cosine, reasoning_diagnostics, unparsable_share
from training.stages.reasoning import greedy, reason, teacher_force

HISTORIES = [np.array(h, dtype=np.int32) for h in ([1, 2, 3], [4], [9, 8, 7, 6, 5, 4, 3, 2], [11, 1])]


def test_a_row_of_a_table_by_hand():
    bundle = tiny_model(14, seed=3)
    ranker = ranker_of(bundle)
    best = ranker.rank(HISTORIES, 2, 64)
    target = np.array([best[0, 0], best[1, 1], best[2, 7], -2 % 14])
    target[3] = next(item for item in range(14) if item not in best[3])
    row, again = measure(ranker, HISTORIES, target, 2, 64)
    np.testing.assert_array_equal(again, best)
    assert (row["steps"], row["users"], row["beam"]) == (2, 4, 64)
    # places 1, 2, 8 and none
    assert (row["recall@5"], row["recall@10"]) == (0.5, 0.75)
    assert row["ndcg@5"] == pytest.approx((1 + 1 / math.log2(3)) / 4, abs=1e-5)
    assert row["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(9)) / 4, abs=1e-5)


def test_the_same_users_are_drawn_every_time():
    histories, target = [np.array([i]) for i in range(50)], np.arange(50)
    chosen, wanted = sample_users(histories, target, 20)
    again, _ = sample_users(histories, target, 20)
    assert [h[0] for h in chosen] == wanted.tolist() == [h[0] for h in again]
    assert len(set(wanted.tolist())) == 20 and wanted.tolist() != sorted(wanted.tolist())


def test_token_rows_that_are_items_and_rows_that_are_not():
    items = torch.tensor([[10, 20], [10, 21], [12, 20]])
    written = torch.tensor([[[10, 20], [12, 21]], [[21, 10], [0, 0]], [[12, 20], [500, 20]]])
    assert are_items(written, items).tolist() == [[True, False], [False, False], [True, False]]


@pytest.mark.parametrize("levels", [3, 8, 9, 17])
def test_long_token_rows_are_items_only_where_every_level_agrees(levels: int):
    """255 codes a level and one number for all others: in 64 bits a ninth level from the right would count nothing."""
    items = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (50, levels)))
    items[:2] = torch.tensor([[0], [254]])
    written = items[:, None].repeat(1, levels + 1, 1)
    for level in range(levels):  # the last copy stays as it is
        written[:, level, level] = (written[:, level, level] + 1) % 255
    known = {tuple(row) for row in items.tolist()}
    expected = [[tuple(row) in known for row in rows] for rows in written.tolist()]
    assert are_items(written, items).tolist() == expected


def test_diagnostics_of_a_model_that_collapsed_onto_one_code():
    work = small_workspace(small_config("model.step_form=token"))
    histories, target = work.split.valid_history, work.split.valid_target
    with torch.no_grad():
        for name, weight in work.network.t5.named_parameters():
            if name.endswith("EncDecAttention.o.weight"):
                weight.mul_(30)  # histories decide, so that tokens differ between users
    healthy = reasoning_diagnostics(work, histories, target, 2)
    names = {"entropy/1", "entropy/2", "codes/cosine", "cosine/0", "cosine/1", "cosine/2", "unparsable"}
    assert set(healthy) == names
    lo, hi = work.vocabulary.reasoning_range
    assert 0 < healthy["entropy/1"] <= math.log(hi - lo)
    with torch.no_grad():
        for name, weight in work.network.t5.named_parameters():
            if name.endswith("EncDecAttention.o.weight"):
                weight.zero_()  # no history counts: every user gets the same tokens and the same states
        cross = work.encode(histories[:1])
        start = work.vocabulary.start_tokens[2]
        trace = reason(work.network, cross, start, 2, greedy(work.network, (lo, hi)))
        _, last = teacher_force(work.network, cross, trace, work.item_tokens[:1].unsqueeze(1))
        wanted = work.network.item_vectors(work.item_tokens)[torch.from_numpy(target).long()]
    collapsed = reasoning_diagnostics(work, histories, target, 2)
    assert collapsed["entropy/1"] == collapsed["entropy/2"] == 0
    for step, state in enumerate([*trace.states, last]):
        expected = torch.nn.functional.cosine_similarity(state[0], wanted).mean()
        assert collapsed[f"cosine/{step}"] == pytest.approx(float(expected), abs=1e-4)


def test_the_mean_cosine_of_all_pairs_by_hand():
    vectors = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    assert pairwise_cosine(vectors) == pytest.approx(1 / 3)  # 1, 0 and 0
    assert pairwise_cosine(vectors[:1]) == 0


def test_the_share_of_unparsable_outputs_falls_when_every_output_is_an_item():
    config = small_config()
    work = small_workspace(config)
    histories, target = work.split.valid_history, work.split.valid_target
    assert (
        reasoning_diagnostics(work, histories, target, 0)["unparsable"] > 0.5
    )  # random weights write codes of any level anywhere
    everything = torch.cartesian_prod(*[torch.arange(work.vocabulary.size)] * 3)
    work.item_tokens = everything  # now whatever it writes is an item
    cross = work.network.cross_keys_values(torch.randn(5, 4, 16), torch.ones(5, 4, dtype=torch.bool), 3)
    with torch.no_grad():
        assert unparsable_share(work, cross, 2) == 0


def test_validation_measures_every_l_and_scores_their_mean():
    work = small_workspace(small_config())
    found = validate(work)
    assert found["score"] == pytest.approx((found["ndcg@10/l0"] + found["ndcg@10/l2"]) / 2)
    assert 0 < found["ndcg@10/state"] <= 1
    work.network.train()
    before = torch.get_rng_state()
    assert validate(work) == pytest.approx(found, abs=1e-3)  # in eval mode
    assert torch.equal(before, torch.get_rng_state())  # no random number is used up


def test_validation_asks_for_the_validation_targets_after_the_validation_histories(monkeypatch):
    work = small_workspace(small_config())
    measured: list = []

    def spy(ranker, histories, target, steps, beam, *, exclude_seen, events):
        assert exclude_seen
        measured.append((histories, target, steps, beam))
        return measure(ranker, histories, target, steps, beam, exclude_seen=exclude_seen, events=events)

    monkeypatch.setattr("training.evaluate.measure", spy)
    validate(work)
    split, evaluation = work.split, work.config.evaluation
    assert not np.array_equal(split.valid_target, split.test_target)
    wanted = [(*history, item) for history, item in zip(split.valid_history, split.valid_target, strict=True)]
    assert [(steps, beam) for *_, steps, beam in measured] == [(0, evaluation.beam), (2, evaluation.beam)]
    for histories, target, *_ in measured:
        found = {(*history, item) for history, item in zip(histories, target, strict=True)}
        assert found <= set(wanted) and len(histories) == evaluation.valid_users < len(wanted)


def test_until_answers_after_reasoning_are_trained_the_direct_ones_alone_are_judged():
    work = small_workspace(small_config())
    found = validate(work, reasons=False)
    assert found["score"] == found["ndcg@10/l0"] != found["ndcg@10/l2"]


@pytest.mark.parametrize("kind", ["leave-one-out", "chronological"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_bundle_is_measured_on_the_split_that_is_named(tmp_path, monkeypatch, split, kind):
    """Also on the data's items in the bundle's own order, with the item graph, and with what was seen left out."""
    names = [f"i{row}" for row in range(20)]
    write_data(tmp_path / "data", names[::-1])
    bundle = tiny_model(20, neighbours=True, neighbours_weight=0.5)
    bundle.about = {"config": {"split": kind}}
    measured: list = []

    def spy(ranker, histories, target, steps, beam, *, exclude_seen, events):
        measured.append((ranker, histories, target, exclude_seen))
        return {}, None

    monkeypatch.setattr("training.evaluate.measure", spy)
    data = read_data(tmp_path / "data")
    rows = list(evaluate_bundle(bundle, data, [2], split, 12, 0, True))
    assert rows == [{"of": len(measured[0][2]), "split": split}]
    ((ranker, histories, target, exclude_seen),) = measured
    assert exclude_seen and ranker.neighbours is bundle.neighbours and ranker.settings == bundle.settings

    held_out = split_by(data, kind)
    wanted = getattr(held_out, f"{split}_history"), getattr(held_out, f"{split}_target")
    expected = [
        tuple(data.items.item_ids[row] for row in (*history, item)) for history, item in zip(*wanted, strict=True)
    ]
    found = [
        tuple(bundle.catalogue.item_ids[row] for row in (*history, item))
        for history, item in zip(histories, target, strict=True)
    ]
    assert sorted(found) == sorted(expected)
    assert expected and data.items.item_ids != bundle.catalogue.item_ids


def write_data(folder, items: list[str], users: int = 6) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    events = [
        f"u{u},{items[i]},{100 + 10 * at + u}"
        for u in range(users)
        for at, i in enumerate(rng.permutation(len(items))[:5])
    ]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]) + "\n")


def test_the_command_prints_a_line_per_number_of_steps(tmp_path, capsys):
    write_data(tmp_path / "data", [f"i{row}" for row in range(40)])
    tiny_bundle(tmp_path / "b", 40)
    command = ["evaluate", "--bundle", str(tmp_path / "b"), "--data", str(tmp_path / "data"), "--beam", "12"]
    assert main([*command, "--steps", "0,3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["steps"] for row in rows] == [0, 3]
    assert {row["split"] for row in rows} == {"valid"}  # test data only where they are named
    contract = {"steps", "users", "recall@5", "recall@10", "ndcg@5", "ndcg@10", "beam", "seconds"}
    assert all(contract <= set(row) and (row["users"], row["of"], row["beam"]) == (6, 6, 12) for row in rows)
    assert main([*command, "--users", "2", "--split", "test", "--exclude-seen"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["steps"] for row in rows] == [0, 1, 2, 3, 4]  # all that the bundle knows
    assert all((row["users"], row["of"], row["split"]) == (2, 6, "test") and row["excluded"] for row in rows)


def test_the_command_finds_items_by_id_and_not_by_row(tmp_path, capsys):
    """A bundle whose catalogue has another order than the data must rank the same things."""
    names = [f"i{row}" for row in range(20)]
    write_data(tmp_path / "data", names)
    found = []
    for file, order in (("items.jsonl", names), ("items.jsonl", names[::-1])):
        (tmp_path / "data" / file).write_text("".join(json.dumps({"item_id": name}) + "\n" for name in order))
        tiny_bundle(tmp_path / "b", 20)
        assert (
            main(["evaluate", "--bundle", str(tmp_path / "b"), "--data", str(tmp_path / "data"), "--steps", "1"]) == 0
        )
        row = json.loads(capsys.readouterr().out)
        found.append({key: value for key, value in row.items() if key != "seconds"})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("steps", "items", "words"),
    [("0,9", 40, ["--steps", "0..4"]), ("two", 40, ["--steps", "two"]), ("0", 41, ["i40", "does not know"])],
)
def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys, steps, items, words):
    write_data(tmp_path / "data", [f"i{row}" for row in range(items)], users=40)
    tiny_bundle(tmp_path / "b", 40)
    command = ["evaluate", "--bundle", str(tmp_path / "b"), "--data", str(tmp_path / "data"), "--steps", steps]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert all(word in captured.err for word in words)


def test_the_number_of_paths_is_the_bundles_unless_given(tmp_path, capsys):
    write_data(tmp_path / "data", [f"i{row}" for row in range(40)], users=40)
    tiny_bundle(tmp_path / "b", 40, paths=3)
    command = ["evaluate", "--bundle", str(tmp_path / "b"), "--data", str(tmp_path / "data"), "--steps", "2"]
    found = []
    for more in ([], ["--paths", "3"], ["--paths", "1"]):
        assert main([*command, *more]) == 0
        row = json.loads(capsys.readouterr().out)
        found.append({key: value for key, value in row.items() if key != "seconds"})
    assert found[0] == found[1] and found[0]["paths"] == 3 and found[2]["paths"] == 1
    assert found[2] | {"paths": 3} != found[0]  # other paths find other items
    assert main([*command, "--paths", "0"]) == 2
    assert "--paths" in capsys.readouterr().err


def test_the_bundles_dense_weight_is_used(tmp_path, capsys):
    write_data(tmp_path / "data", [f"i{row}" for row in range(40)])
    tiny_bundle(tmp_path / "b", 40, dense_weight=0.5)
    assert main(["evaluate", "--bundle", str(tmp_path / "b"), "--data", str(tmp_path / "data"), "--steps", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["dense_weight"] == 0.5
