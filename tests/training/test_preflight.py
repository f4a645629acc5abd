"""What a run refuses before its first stage; nothing of others is touched, and no trace is left."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from serving.errors import StorageError
from tests.builders import tiny_bundle
from tests.training.shops import QUICK, command, write_shop
from training.__main__ import main
from training.config_file import load_config
from training.data.errors import DataError
from training.data.prepare import split_by
from training.data.read import read_data
from training.data.shop import write_shop as generate_shop
from training.pipeline import run
from training.preflight import RunError, check_data, check_room


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_shop(tmp_path / "data")


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must end with one sentence on stderr and exit code 2, before anything is printed."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("streamrec: ") and output.err.count("\n") == 1, output
    return output.err


@pytest.mark.parametrize("stage", ["run", "prepare", "export"])
def test_no_folder_but_a_bundle_is_replaced(data, tmp_path, capsys, monkeypatch, stage):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").write_text("a year's work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    before = tree(tmp_path)
    refusals = {
        data: "interactions.csv",
        tmp_path: "data",
        tmp_path / "notes": "thesis.tex",
        tmp_path / "file": "is a file",
        tmp_path / "link": "is a link",
        tmp_path / "file/bundle": "cannot be written to",
        Path("/"): "/",
    }
    for out, words in refusals.items():
        assert words in refused(capsys, *command(stage, data, out))
    monkeypatch.chdir(tmp_path / "notes")
    for name in (".", "..", "../notes", "../notes/"):
        refused(capsys, *command(stage, data, Path(name)))
    assert tree(tmp_path) == before


def test_a_run_may_replace_an_earlier_bundle_unless_something_was_added_to_it(data, tmp_path, capsys):
    bundle = tiny_bundle(tmp_path / "bundle")
    (bundle / "catalogues/mine.json").write_text('["i1"]')
    assert "catalogues/mine.json" in refused(capsys, *command("run", data, bundle))
    (bundle / "catalogues/mine.json").unlink()
    (bundle / "heads.safetensors").unlink()  # damaged, but a bundle
    assert main(command("prepare", data, bundle)) == 0


def test_a_work_folder_of_others_is_left_alone(data, tmp_path, capsys):
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "log.jsonl").write_text("mine")
    assert "out.work holds log.jsonl and no training" in refused(capsys, *command("run", data, tmp_path / "out"))
    shutil.rmtree(work)
    shutil.copytree(data, work)
    assert "no training" in refused(capsys, *command("run", work, tmp_path / "out"))
    shutil.rmtree(work)
    work.write_text("x")
    assert "is a file" in refused(capsys, *command("run", data, tmp_path / "out"))
    work.unlink()
    work.mkdir()
    for content in ("{", "[]", '{"data": {}}'):
        (work / "run.json").write_text(content)
        assert "run.json is damaged" in refused(capsys, *command("run", data, tmp_path / "out"))


@pytest.mark.parametrize("name", ["run.json", "changes.jsonl"])
def test_a_run_that_was_killed_while_it_wrote_its_first_files_goes_on(data, tmp_path, name):
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "lock").touch()
    (work / f"{name}.partial").write_text("{")
    assert main(command("prepare", data, tmp_path / "out")) == 0


def test_data_that_nothing_can_be_chosen_on_are_refused(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    table = folder / "interactions.csv"
    table.write_text("user_id,item_id,timestamp\n" + "".join(f"u{user},i1,{at}\n" for user in "abc" for at in range(4)))
    assert "a single item" in refused(capsys, *command("run", folder, tmp_path / "out"))
    rows = [f"{user},i{at},{at}" for user in "abc" for at in range(2)]
    table.write_text("\n".join(["user_id,item_id,timestamp", *rows, "a,i5,5\n"]))
    assert "a single user to evaluate on" in refused(capsys, *command("run", folder, tmp_path / "out"))
    assert "choice_users must be at least 2" in refused(
        capsys, *command("run", folder, tmp_path / "out", "evaluation.choice_users=1")
    )
    table.write_text("user_id,item_id,timestamp\n" + "".join(f"u{user},i{at},{at}\n" for user in "abc" for at in "123"))
    assert "no user with two events for training" in refused(capsys, *command("run", folder, tmp_path / "out"))
    assert not (tmp_path / "out.work/run.json").exists()


@pytest.mark.parametrize(
    "setting",
    ["seed=-1", f"seed={2**32}", "rl.lr=-1", "sft.clip_norm=0", "rl.clip_norm=-1", "evaluation.dense_weights=[1e300]"],
)
def test_settings_that_would_fail_in_a_later_stage_are_refused(data, tmp_path, capsys, setting):
    assert setting.split("=")[0] in refused(capsys, *command("run", data, tmp_path / "out", setting))
    assert not (tmp_path / "out.work").exists()


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused(tmp_path, monkeypatch):
    network = torch.nn.Linear(1000, 250, bias=False)  # 1 MB, of which a stage leaves four times as much
    for free, stages, fits in ((8.1e6, 2, True), (7.9e6, 2, False), (4.1e6, 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=int(free)))
        with nullcontext() if fits else pytest.raises(StorageError, match="7.9 MB left and this run writes 8.0 MB"):
            check_room(tmp_path, network, ["sft", "rl"][:stages])
    (tmp_path / "sft.best.safetensors").write_bytes(b"0" * 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7_100_000))
    check_room(tmp_path, network, ["sft", "rl"])
    with pytest.raises(StorageError, match="7.1 MB left and this run writes 10.0 MB"):
        check_room(tmp_path, network, ["sft", "rl"], ["refit-trial"])  # which keeps no best weights


def test_a_run_that_learns_from_the_newest_events_needs_room_for_that_too(data, tmp_path, monkeypatch):
    config = load_config(None, QUICK)

    def asked(until: str, epochs: int) -> float:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        settings = config.model_copy(update={"refit": config.refit.model_copy(update={"epochs": epochs})})
        with pytest.raises(StorageError) as refusal:
            run(data, tmp_path / f"{until}-{epochs}", settings, until)
        return float(str(refusal.value).split("writes ")[1].split(" MB")[0])

    assert asked("export", 1) > asked("export", 0) == asked("rl", 1)


def test_a_gpu_that_is_not_there_is_refused(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = command("run", data, tmp_path / "out")
    assert "--device cuda needs a GPU" in refused(capsys, *arguments[:5], "--device", "cuda", *arguments[5:])
    assert not (tmp_path / "out.work").exists()


def test_checkpoints_are_not_kept_in_the_folder_that_becomes_the_bundle(data, tmp_path):
    for work in (tmp_path / "out", tmp_path / "out/training"):
        with pytest.raises(RunError, match="lies in the bundle's folder"):
            run(data, tmp_path / "out", load_config(None, list(QUICK)), work_folder=work)
    assert not (tmp_path / "out").exists()


def test_a_shop_replaces_nothing_but_a_shop(tmp_path):
    folder = tmp_path / "shop"
    generate_shop(folder, users=10, items=50, seed=0)
    generate_shop(folder, users=12, items=50, seed=0, format="parquet")
    names = ["interactions.parquet", "items.jsonl", "truth.json"]  # of two formats no command could read either
    assert sorted(path.name for path in folder.iterdir()) == names
    (folder / "truth.json").write_text(json.dumps({"users": 3}))
    before = tree(folder)
    with pytest.raises(StorageError, match=r"holds interactions\.parquet, which is not part of a generated shop"):
        generate_shop(folder, users=10, items=50, seed=0)
    assert tree(folder) == before


def test_a_model_that_reads_times_needs_them_in_seconds(tmp_path):
    rows = [(user, item, at) for user in "uvw" for at, item in enumerate("abcd")]
    for unit, refused in ((1_700_000_000, False), (1_700_000_000_000, True), (0, True)):
        lines = [f"{user},{item},{unit + at}" for user, item, at in rows]
        (tmp_path / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
        data = read_data(tmp_path)
        split = split_by(data, "leave-one-out", times=True)
        check_data(data, split)
        assert split.test_events[0].times.tolist() == [unit, unit + 1, unit + 2]
        if refused:
            with pytest.raises(DataError, match="does not count its times in seconds"):
                check_data(data, split, reads_times=True)
        else:
            check_data(data, split, reads_times=True)


@pytest.mark.parametrize("users", [2, 3, 4])
def test_learning_from_the_newest_events_needs_two_users_to_judge_it(tmp_path, capsys, users):
    """With fewer the run would end, after its last stage, in a comparison of one user's answers."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [f"u{user},i{(user + at) % 5},{at}" for user in range(users) for at in range(4)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    shape = ("tokenizer.rqvae.codes=3", "sft.steps=0", "rl.steps=0", "evaluation.choice_users=2")
    arguments = command("run", folder, tmp_path / "out", *shape, "refit.epochs=1")
    if users < 4:
        assert f"has {users} users to evaluate on, and refit.epochs needs 4" in refused(capsys, *arguments)
        assert not (tmp_path / "out.work/run.json").exists()
    else:
        assert main(arguments) == 0
        trial = json.loads((tmp_path / "out/bundle.json").read_text())["about"]["refit"]["trial"]
        assert (trial["learnt_from"], trial["users"]) == (2, 2)


def test_an_update_needs_two_test_users(data):
    """A chronological split may have many users to validate on and one to test on."""
    shop = read_data(data)
    split = split_by(shop, "leave-one-out")
    alone = replace(split, test_history=split.test_history[:1], test_target=split.test_target[:1])
    check_data(shop, alone)
    check_data(shop, split, compares=True)
    with pytest.raises(DataError, match="a single user with a test event"):
        check_data(shop, alone, compares=True)
