"""Imports follow the contracts, no code can load a pickle, and every module has a docstring."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[2]
PACKAGES = ("app", "benchmarks", "clients", "serving", "streamrec", "training")
PICKLERS = {"cloudpickle", "dill", "joblib", "pickle", "shelve"}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=DEADLINE)


def test_imports_point_downwards() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("serving/types.py", "import serving.items.trie"),
        ("serving/engine.py", "import app"),
        ("serving/items/trie.py", "import serving.search.beam"),
        ("training/__init__.py", "import benchmarks"),
        ("app/__init__.py", "import training"),
        ("streamrec/client.py", "import serving.types"),
    ],
)
def test_an_import_upwards_breaks_the_contracts(tmp_path: Path, path: str, line: str) -> None:
    """One wrong line in a copy of the packages is enough."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / path).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr


def pickles(source: str) -> list[str]:
    """The calls and imports in the source that could read or write a pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if function == "torch.load" and options.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if function == "torch.save":
                found.append("torch.save")
            if options.get("allow_pickle", "False") != "False":
                found.append(f"{function} with allow_pickle")
            if function.endswith(("read_pickle", "to_pickle")):
                found.append(function)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle(path: Path) -> None:
    assert not pickles(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line", ["import pickle", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)"]
)
def test_a_pickle_is_found(line: str) -> None:
    assert pickles(line)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_a_docstring(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source)), "begin the file with a line that says so"
