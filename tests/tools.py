"""What some tests need and a machine may lack: there they are skipped, and say so; in CI, where all of it has to be,
the lack is a failure."""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType
from typing import TypeVar

import pytest

T = TypeVar("T")


def require(found: T | None, untested: str, remedy: str) -> T:
    """`found`, if there is something; else the test is skipped, or fails where CI=true."""
    if found:
        return found
    message = f"{untested} NOT tested: {remedy}"
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def require_program(untested: str, remedy: str, *names: str) -> str:
    """The path of the first of these programs that is on the PATH."""
    return require(next(filter(None, map(shutil.which, names)), None), untested, remedy)


def require_module(name: str, untested: str) -> ModuleType:
    """The module, imported; it belongs to the development packages."""
    try:
        found = importlib.import_module(name)
    except ImportError:
        found = None
    return require(found, untested, f"the package {name} is not installed; requirements/dev.lock has it")


def always_full() -> str:
    """A file on a disk that is always full."""
    return require(
        "/dev/full" if os.path.exists("/dev/full") else None, "a full disk is", "run on Linux, for /dev/full"
    )
