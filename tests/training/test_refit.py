"""Learning from the events of validation: of whom, only where others' answers become better, and never unnoticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.bundle import Bundle
from serving.items.neighbours import Neighbours
from tests.training.shops import command, write_shop
from tests.training.small import ITEMS, USERS, small_config, small_workspace, walks
from training.__main__ import main
from training.data.examples import as_windows, newest_targets, steps_per_epoch
from training.data.prepare import Split, leave_one_out, split_by, with_newest
from training.data.read import Dataset, Items, read_data
from training.linear import LinearSetting
from training.memory import make_memory
from training.memory_choice import MemorySetting
from training.metrics import recall_ndcg
from training.neighbours import JoinedSetting
from training.refit import refit
from training.workspace import Workspace

FIRST, PAUSE = 1_700_000_000, 1000  # times of a shop
STEP, DRIFT = 7, 3  # round the circle: what training shows, and what followed since


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return read_data(write_shop(tmp_path / "shop", first=FIRST, pause=PAUSE))


@pytest.mark.parametrize("kind", ["leave-one-out", "chronological"])
def test_the_training_part_gets_the_validation_target_of_the_users_asked_for_and_nothing_else(data, kind):
    split = split_by(data, kind, times=True)
    users = np.arange(0, len(split.valid_users), 2)
    longer = with_newest(data, split, users)
    newest = dict(zip(split.valid_users[users].tolist(), split.valid_target[users].tolist(), strict=True))
    assert newest
    for row, user in enumerate(split.train_users.tolist()):
        expected = [*split.train[row].tolist(), *([newest[user]] if user in newest else [])]
        assert longer.train[row].tolist() == expected == data.events(user)[: len(expected)].tolist()
        times = data.times[data.offsets[user] :][: len(expected)]
        np.testing.assert_array_equal(longer.train_events[row].times, times)
        assert len(longer.train_events[row].weights) == len(expected)
    assert longer.valid_target is split.valid_target and longer.test_target is split.test_target


def test_the_newest_event_of_each_sequence_is_the_only_target():
    sequences = [np.arange(first, first + length, dtype=np.int32) for first, length in ((0, 2), (10, 4), (20, 9))]
    examples = newest_targets(sequences, 5, [sequence * 10.0 for sequence in sequences])
    every = np.arange(3)
    assert examples.targets(every).tolist() == [1, 13, 28]
    assert [history.tolist() for history in examples.histories(every)] == [[0], [10, 11, 12], [23, 24, 25, 26, 27]]
    assert [times.tolist() for times in examples.times_of(every)][1] == [100, 110, 120]
    windows = as_windows(examples)
    for row, first in enumerate((1, 3, 5)):
        items, real, own = windows.items(np.array([row]), 1)
        assert (items[0, -1], real.tolist(), own) == (examples.targets(every)[row], [[True]], first)
    assert steps_per_epoch(windows, 16) == 3 and steps_per_epoch(examples, 16) == 1  # a batch has one length, or any


def shop(newest: Callable[[int, int], int], *settings: str) -> tuple[Workspace, Dataset]:
    """Everybody has walked round the circle by STEP until now. newest: what followed, by user and last item."""
    walked = [walk[:-2].astype(np.int32) for walk in walks()]
    sequences = []
    for user, walk in enumerate(walked):
        after = newest(user, int(walk[-1])) % ITEMS
        sequences.append(np.array([*walk, after, after], dtype=np.int32))
    offsets = np.cumsum([0, *map(len, sequences)])
    nothing = [None] * ITEMS
    items = Items([f"i{row}" for row in range(ITEMS)], nothing, nothing, [[] for _ in nothing], nothing)
    events = np.concatenate(sequences)
    users = [f"u{user}" for user in range(USERS)]
    data = Dataset("walks", items, users, offsets, events, np.arange(len(events)), {})
    work = small_workspace(small_config("rl.steps=0", "refit.epochs=40", "refit.lr=0.01", *settings))
    return replace(work, split=leave_one_out(data)), data


def memory_of(work: Workspace, data: Dataset, split: Split) -> Neighbours:
    counted = MemorySetting(JoinedSetting(similar_weight=0.0), LinearSetting(), 0.0, 0.5)
    return make_memory(counted, data.items, split, work.config)


def weights(work: Workspace) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in work.network.parameters()])


@pytest.mark.parametrize("stage", ["pretrain", "packed", "sft"])
def test_network_and_memory_learn_from_all_where_others_get_better_answers(tmp_path: Path, stage: str) -> None:
    packed = ("model.attention=causal-by-item", "model.age_bias=true", "model.end_token=false", "refit.epochs=12")
    work, data = shop(lambda user, last: last + DRIFT, f"sft.steps={int(stage == 'sft')}",
                      *(packed if stage == "packed" else ()))  # fmt: skip
    assert (work.windows is not None) == (stage == "packed")
    work.neighbours, before = memory_of(work, data, work.split), weights(work)
    served, report = refit(work, data, partial(memory_of, work, data), tmp_path)
    assert report["kept"] and report["trial"]["gain_low"] > 0
    assert (report["trial"]["learnt_from"], report["trial"]["users"], report["trial"]["of"]) == (30, 30, 30)
    assert torch.equal(weights(work), before) and not torch.equal(weights(served), before)
    assert [s.tolist() for s in served.split.train] == [s[:-1].tolist() for s in map(data.events, range(USERS))]
    last = int(work.split.train[0][-1])
    row = slice(*served.neighbours.offsets[last : last + 2])
    assert (last + DRIFT) % ITEMS in served.neighbours.items[row]
    assert (last + DRIFT) % ITEMS not in work.neighbours.items[slice(*work.neighbours.offsets[last : last + 2])]
    learnt = served.ranker().rank(served.split.valid_history, 0, 12)
    assert recall_ndcg(learnt, served.split.valid_target)["recall@10"] > 0.8


def test_nothing_is_learnt_where_others_get_worse_answers(tmp_path: Path) -> None:
    """The learners' newest items are all one, and the judges walk on as the network knows it."""
    work, data = shop(lambda user, last: 0 if user % 2 == 0 else last + STEP, "sft.steps=0")
    known, _ = refit(*shop(lambda user, last: last + STEP, "sft.steps=0"), None, tmp_path / "walk")
    work = replace(work, network=known.network)
    served, report = refit(work, data, None, tmp_path)
    assert served is work and not report["kept"] and report["trial"]["gain_high"] < 0


def test_a_trial_that_diverges_names_the_setting_to_change(tmp_path: Path) -> None:
    work, data = shop(lambda user, last: last + DRIFT, "sft.steps=0", "refit.lr=1e30")
    with pytest.raises(FloatingPointError, match=r"refit-trial diverged.* a lower refit\.lr.*remove "):
        refit(work, data, None, tmp_path)


def test_a_run_that_goes_on_reads_back_what_was_learnt(tmp_path: Path) -> None:
    whole, _ = refit(*shop(lambda user, last: last + DRIFT, "sft.steps=0"), None, tmp_path / "whole")
    again, _ = refit(*shop(lambda user, last: last + DRIFT, "sft.steps=0"), None, tmp_path / "whole")
    assert torch.equal(weights(whole), weights(again))


def test_a_bundle_that_has_learnt_from_validation_says_so_and_is_not_measured_on_it(tmp_path, capsys):
    data, folder = write_shop(tmp_path / "shop", first=FIRST, pause=PAUSE), tmp_path / "bundle"
    settings = "sft.steps=0", "rl.steps=0", "refit.epochs=30", "refit.lr=0.01"
    assert main(command("run", data, folder, *settings)) == 0
    bundle = Bundle.load(folder)
    about = bundle.about["refit"]
    card = (folder / "README.md").read_text()
    assert about["kept"] and "has learnt from the events of all users" in card
    popularity = np.bincount(np.concatenate([walk[:-1] for walk in walks()]), minlength=ITEMS)
    order = [bundle.catalogue.row(f"i{item}") for item in range(ITEMS)]
    np.testing.assert_array_equal(bundle.catalogue.popularity[order], popularity)
    evaluate = ["evaluate", "--bundle", str(folder), "--data", str(data), "--steps", "0"]
    capsys.readouterr()
    assert main(evaluate) == 2
    assert "measure it with --split test" in capsys.readouterr().err
    assert main([*evaluate, "--split", "test"]) == 0
    assert json.loads(capsys.readouterr().out)["users"] == USERS
    check_updates(folder, data, capsys)


def check_updates(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An update is judged by events that the bundle has not learnt: by others, the weights of before would win."""
    update = ["update", "--bundle", str(folder), "--out", str(folder.with_name("next")), "--set", "sft.steps=0",
              "refit.epochs=0", "--data"]  # fmt: skip
    assert main([*update, str(data)]) == 2
    assert "has learnt what it was validated on, and 0 users of shop have two newer events" in capsys.readouterr().err
    until = Bundle.load(folder).about["learnt_until"]
    later = with_later_events(data, 2 * FIRST)
    read = read_data(later)
    judged = sum(read.times[end - 2] > until["valid"] for end in read.offsets[1:])
    assert 4 <= judged < USERS
    assert main([*update, str(later)]) == 0
    assert f"note: {USERS - judged} validation targets left out" in capsys.readouterr().out
    updated = Bundle.load(folder.with_name("next"))
    assert updated.about["learnt_until"] == until and {row["of"] for row in updated.accuracy} == {judged}
    evaluate = ["evaluate", "--bundle", str(folder.with_name("next")), "--data", str(later), "--steps", "0"]
    assert main(evaluate) == 0
    assert json.loads(capsys.readouterr().out)["of"] == judged


def with_later_events(data: Path, at: int) -> Path:
    """The shop after two more events of four users and one more of another four."""
    later = data.parent / "later" / "shop"
    later.mkdir(parents=True)
    events = [f"u{user},i{user + more},{at + more}" for user in range(8) for more in range(2 if user < 4 else 1)]
    (later / "interactions.csv").write_text((data / "interactions.csv").read_text() + "\n".join(events) + "\n")
    return later
