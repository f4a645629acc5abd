"""Files that appear complete or not at all, and folders that one process at a time may use."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.errors import FolderInUse, StorageError


@contextmanager
def atomic_write(path: Path, suffix: str = ".partial") -> Iterator[Path]:
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


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Reserves a folder, created if it is missing, for this process. Raises FolderInUse if another process has it.

    The lock ends with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUse(f"Another run is using {folder}; wait for it or choose another --out.") from error
        yield
