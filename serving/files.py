"""Files and folders that appear complete or not at all, and folders that one process at a time may use.

Nothing that was not written by this program is ever replaced: who writes a folder says what in it is its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from serving.errors import FolderInUse, StorageError

PARTIAL = ".partial"  # ends the name of a file that is not complete; a kill may leave it behind


@contextmanager
def atomic_write(path: Path, suffix: str = PARTIAL) -> Iterator[Path]:
    """Yields a path in the same folder to write to; that file replaces `path` when the block ends without an error.

    Otherwise `path` stays as it was. suffix: of the temporary file; processes that may write the same `path` at the
    same time need different ones. Raises StorageError if the file cannot be written.
    """
    partial = path.with_name(path.name + suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name with no contents
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"The disk under {path.parent} is full; free some space and run the same command again."
            ) from error
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}); fix that and run the same command again."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def append_whole(file: FileIO, data: bytes, end: int) -> None:
    """Appends to an unbuffered file of `end` bytes, and returns once all of it is on the disk. Otherwise, as where the
    disk is full, the file stays as it was, and the error is raised."""
    try:
        written = 0
        while written < len(data):
            written += file.write(data[written:])
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(end)
        raise


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Reserves a folder, created if it is missing, for this process. Raises FolderInUse if another process has it.

    The lock ends with the process, however that ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise StorageError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUse(f"Another run is using {folder}; wait for it or choose another --out.") from error
        yield


# The name of something in a folder that is not ours to delete, or None where all of it is.
Foreign = Callable[[Path], str | None]


def check_replaceable(folder: Path, foreign: Foreign, kind: str) -> None:
    """Raises StorageError unless `replaced_folder` may put a new folder there, so that a long run is refused at once.

    There must be nothing, an empty folder, or one in which nothing is `foreign`. kind: what such a folder is, in words.
    """
    choose = "choose another --out"
    if folder.is_symlink():
        raise StorageError(f"{folder} is a link, which cannot be replaced; name the folder that it points to.")
    if folder.is_dir():
        if os.path.ismount(folder):
            raise StorageError(f"{folder} is the root of a disk, which cannot be replaced; name a folder in it.")
        if Path.cwd().is_relative_to(folder.resolve()):
            raise StorageError(f"This command runs in {folder}, which cannot be replaced; {choose}, or run elsewhere.")
        if (name := foreign(folder)) is not None:
            raise StorageError(f"{folder} holds {name}, which is not part of {kind}; {choose}, or move that away.")
    elif folder.exists():
        raise StorageError(f"{folder} is a file, and {kind} is a folder; {choose}.")
    check_writable(folder.parent)
    _check_leftovers(_unfinished(folder))


def check_writable(folder: Path) -> None:
    """Raises StorageError where no file can be made in a folder or, as long as it is missing, in those above it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(f"{folder} cannot be written to ({error.strerror}); choose another --out.") from error


@contextmanager
def replaced_folder(folder: Path, foreign: Foreign, kind: str) -> Iterator[Path]:
    """Yields a new folder to fill, which takes the place of `folder` when the block ends without an error.

    Otherwise `folder` stays as it was, and where the process is killed it does once this is called again. Raises
    StorageError like `check_replaceable`.
    """
    unfinished = _unfinished(folder)
    new, old = unfinished / "new", unfinished / "old"
    check_replaceable(folder, foreign, kind)
    _put_back(old, folder)  # an earlier run may have been killed just before `new` took its place
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        check_replaceable(folder, foreign, kind)  # the block may have taken long
        if folder.exists():
            try:
                folder.rename(old)
            except OSError:  # an overlay, as in containers, cannot rename a folder of the image
                shutil.rmtree(folder)
        new.rename(folder)
    finally:
        _put_back(old, folder)
        shutil.rmtree(unfinished, ignore_errors=True)


def _put_back(old: Path, folder: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)


def _unfinished(folder: Path) -> Path:
    """Where a folder is filled: next to it, because only then can it be renamed."""
    return folder.with_name(f".{folder.name}.partial")


def _check_leftovers(unfinished: Path) -> None:
    if unfinished.is_symlink() or (unfinished.exists() and not unfinished.is_dir()):
        raise StorageError(f"{unfinished} is in the way; remove it and run the same command again.")
    names = {path.name for path in unfinished.iterdir()} if unfinished.exists() else set()
    if names - {"new", "old"}:
        raise StorageError(f"{unfinished} was not left by an earlier run; move it away and run the same command again.")
