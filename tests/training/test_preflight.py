"""What a run refuses before its first stage; nothing of others is touched, and no trace is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from serving.errors import StorageError
from tests.builders import tiny_bundle
from tests.training.shops import command, write_shop
from training.__main__ import main
from training.data.shop import write_shop as generate_shop


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
    assert not (tmp_path / "out.work/run.json").exists()


def test_a_shop_replaces_nothing_but_a_shop(tmp_path):
    folder = tmp_path / "shop"
    generate_shop(folder, users=10, items=50, seed=0)
    generate_shop(folder, users=12, items=50, seed=0, format="parquet")
    names = ["interactions.parquet", "items.jsonl", "truth.json"]  # of two formats no command could read either
    assert sorted(path.name for path in folder.iterdir()) == names
    (folder / "truth.json").write_text(json.dumps({"users": 3}))
    before = tree(folder)
    with pytest.raises(StorageError, match=r"holds interactions\.parquet, which is no part of a generated shop"):
        generate_shop(folder, users=10, items=50, seed=0)
    assert tree(folder) == before
