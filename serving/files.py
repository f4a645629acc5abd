"""Files that appear whole or not at all, and folders that one process owns at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.errors import FolderInUse, StorageError


@contextmanager
def whole_file(path: Path, suffix: str = ".partial") -> Iterator[Path]:
    """Gives a path beside `path` to write to; what was written there takes its place at the end of the block.

    Whatever goes wrong, `path` is as it was before. Raises StorageError where the disk does not take it.
    """
    partial = path.with_name(path.name + suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # a name must not outlive a power cut that its contents did not
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"The disk under {path.parent} is full; free some space and run the same command again."
            ) from error
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}); mend that and run the same command again."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Holds the folder (made where it is missing) for this process; a killed one holds nothing. Raises FolderInUse."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUse(f"Another run is using {folder}; wait for it or choose another --out.") from error
        yield
