"""Folders are replaced whole, and only where nothing in them is anybody else's."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.errors import StorageError
from serving.files import check_replaceable, locked_folder, replaced_folder
from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[2]
KIND = "a list"


def foreign(folder: Path) -> str | None:
    """Here a folder is ours as long as it holds nothing but `list.txt`."""
    return next((path.name for path in sorted(folder.iterdir()) if path.name != "list.txt"), None)


def write(folder: Path, text: str) -> None:
    with replaced_folder(folder, foreign, KIND) as new:
        (new / "list.txt").write_text(text)


def test_a_new_an_empty_and_an_earlier_folder_are_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new/deep", "empty", "empty"):
        write(tmp_path / name, name)
        assert (tmp_path / name / "list.txt").read_text() == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_what_is_of_others_stays_and_the_sentence_names_it(tmp_path):
    folder = tmp_path / "out"
    write(folder, "one")
    (folder / "thesis.tex").write_text("a year's work")
    with pytest.raises(StorageError, match=r"out holds thesis\.tex, which is not part of a list; choose another --out"):
        write(folder, "two")
    assert sorted(path.name for path in folder.iterdir()) == ["list.txt", "thesis.tex"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_others_put_there_meanwhile_stays_too(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(StorageError, match="thesis"), replaced_folder(folder, foreign, KIND):
        folder.mkdir()
        (folder / "thesis.tex").touch()
    assert (folder / "thesis.tex").exists()


def test_a_block_that_fails_leaves_the_earlier_folder(tmp_path):
    write(tmp_path / "out", "one")
    with pytest.raises(ZeroDivisionError), replaced_folder(tmp_path / "out", foreign, KIND) as new:
        (new / "list.txt").write_text("two")
        raise ZeroDivisionError
    assert (tmp_path / "out/list.txt").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_a_folder_cannot_be_renamed_it_is_removed(tmp_path, monkeypatch):
    write(tmp_path / "out", "one")
    rename = Path.rename

    def as_on_an_overlay(path: Path, target: Path) -> Path:
        if path.name == "out":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", as_on_an_overlay)
    write(tmp_path / "out", "two")
    assert (tmp_path / "out/list.txt").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    leftover = tmp_path / ".out.partial"
    (leftover / "new").mkdir(parents=True)
    (leftover / "new/list.txt").touch()
    write(tmp_path / "out", "one")
    assert not leftover.exists()
    leftover.mkdir()
    (leftover / "notes").touch()
    with pytest.raises(StorageError, match="was not left by an earlier run"):
        write(tmp_path / "out", "two")
    assert (leftover / "notes").exists() and (tmp_path / "out/list.txt").read_text() == "one"


KILLED_EVERYWHERE = """
import os, sys
from pathlib import Path
from serving.files import replaced_folder

folder, calls = Path(sys.argv[1]), {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def write(text):
    with replaced_folder(folder, lambda _: None, "a list") as new:
        before = (folder / "list.txt").read_text() if folder.exists() else "nothing"
        (new / "list.txt").write_text(text)
    return before

def killed(before_call):  # in a child process; whether it was
    child = os.fork()
    if child == 0:
        left = before_call
        def kill(event, arguments):
            nonlocal left
            if event in calls and str(folder.parent) in str(arguments[0]):
                left -= 1
                if left < 0:
                    os._exit(9)
        sys.addaudithook(kill)
        write("two")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

call = 0
write("one")
while killed(call):
    there = (folder / "list.txt").read_text() if folder.exists() else None
    print(there, write("one"))
    call += 1
"""


def test_a_kill_at_any_moment_loses_neither_the_earlier_folder_nor_the_next_one(tmp_path):
    command = [sys.executable, "-c", KILLED_EVERYWHERE, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=True)
    moments = [tuple(line.split()) for line in done.stdout.splitlines()]
    assert ("None", "one") in moments, "no kill came between the two renames"
    assert set(moments) <= {("one", "one"), ("None", "one"), ("two", "two")} and ("two", "two") in moments
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_files_and_the_current_folder_are_refused(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path / "real")
    refused = {
        tmp_path / "link": "is a link",
        tmp_path / "dangling": "is a link",
        tmp_path / "file": "is a file, and a list is a folder",
        tmp_path / "file/in": "cannot be written to",
        tmp_path / "real": "This command runs in",
        Path("/proc"): "root of a disk",
        Path("/proc/new"): "cannot be written to",
    }
    for folder, words in refused.items():
        with pytest.raises(StorageError, match=words):
            check_replaceable(folder, foreign, KIND)
    assert (tmp_path / "file").read_text() == "x" and (tmp_path / "link").is_symlink()


def test_a_folder_that_cannot_be_made_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match=r"cannot be written .*; choose another --out"),
        locked_folder(tmp_path / "file"),
    ):
        pass
