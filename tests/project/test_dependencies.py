"""Every import is declared in pyproject.toml, everything declared is used, and the locks hold exact versions."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"app", "benchmarks", "clients", "serving", "streamrec", "tests", "training"}
# Used as a command or plugin: the file that uses them, and the text there that shows it.
TOOLS = {
    "httptools": ("app/guard.py", "uvicorn.protocols.http.httptools_impl"),  # uvicorn imports it, we do not
    "import-linter": ("Makefile", "lint-imports"),
    "cyclonedx-bom": ("Makefile", "-m cyclonedx_py"),
    "mypy": ("Makefile", "-m mypy"),
    "pip-audit": ("requirements/audit.py", '"pip_audit"'),
    "pip-tools": ("requirements/lock.py", '"piptools"'),
    "pytest-cov": ("Makefile", "--cov"),
    "pytest-timeout": ("pyproject.toml", "timeout ="),
    "pytest-xdist": ("Makefile", "--dist"),
    "ruff": ("Makefile", "-m ruff"),
    "tensorboard": ("training/stages/loop.py", "torch.utils.tensorboard"),  # torch imports it, we do not
    "uvloop": ("app/server.py", '"uvloop"'),
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", name, maxsplit=1)[0]).lower()


def declared(*extras: str) -> set[str]:
    """The base dependencies and those of the extras, extras inside extras included."""
    names = {normal(line) for line in PROJECT["dependencies"]}
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            if inner := re.match(r"streamrec\[([\w,]+)\]", line):
                names |= declared(*inner[1].split(","))
            else:
                names.add(normal(line))
    return names


def imported(folder: str, *, lazy: bool = True) -> dict[str, str]:
    """Top-level modules that a folder's files import from outside: module -> one file. lazy: inside functions too."""
    found: dict[str, str] = {}
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree) if lazy else tree.body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = ast.unparse(node.func)
                if function.endswith(("import_module", "require_module", "find_spec")):
                    names = [str(node.args[0].value)]
            for name in names:
                module = name.split(".")[0]
                if module and module not in OURS | {"_typeshed", *sys.stdlib_module_names}:  # a type checker's own
                    found.setdefault(module, str(path.relative_to(ROOT)))
    return found


installed = functools.cache(packages_distributions)  # module -> distributions; it reads every package's file list


def distributions(module: str) -> set[str]:
    return {normal(name) for name in installed().get(module, [module])}


@pytest.mark.parametrize(
    ("folder", "lazy", "extras"),
    [
        ("serving", False, []),
        ("app", False, []),
        ("serving", True, ["ray", "text"]),  # new items and offline scoring, where the extras are installed
        ("app", True, ["otel"]),  # traces, where the extra is installed
        ("streamrec", True, ["client"]),
        ("training", True, ["training"]),
        ("benchmarks", True, ["dev"]),  # what ours is compared with, load and plots are no part of training
        ("tests", True, ["dev"]),
    ],
)
def test_every_import_is_declared(folder: str, lazy: bool, extras: list[str]) -> None:
    allowed = declared(*extras)
    allowed |= {"pydantic-core"} & {f"{name}-core" for name in allowed}  # pydantic requires one exact version of it
    # No dependencies: the chart's tests look whether the wheel of requirements/tools.lock is there, and a benchmark
    # says so where OpenVINO, which it compares with, is not installed.
    optional = {"aws_cdk", "openvino"}
    undeclared = {
        module: path
        for module, path in imported(folder, lazy=lazy).items()
        if not distributions(module) & allowed and module not in optional
    }
    assert not undeclared, f"imported, but not declared for {folder}: {undeclared}"


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_everything_declared_is_used(extra: str | None) -> None:
    folders = {
        None: ["serving", "app"],
        "client": ["streamrec"],
        "text": ["serving", "training"],
        "training": ["training", "benchmarks"],
    }
    used: set[str] = set()
    for folder in folders.get(extra, sorted(OURS)):
        used |= {name for module in imported(folder) for name in distributions(module)}
    used |= {tool for tool, (path, word) in TOOLS.items() if word in (ROOT / path).read_text()}
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    unused = {normal(line) for line in lines if not line.startswith("streamrec[")} - used
    assert not unused, f"declared, but nothing uses it: {sorted(unused)}"


def test_service_starts_without_the_extras() -> None:
    """Every module of serving and app imports where only the base dependencies exist."""
    extras = declared("dev") - declared()
    hidden = sorted(module for module, names in installed().items() if {normal(n) for n in names} <= extras)
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for folder in ("serving", "app")
        for path in (ROOT / folder).rglob("*.py")
        if path.stem != "__main__"
    )
    program = f"""
import importlib, sys
for name in {hidden!r}:
    sys.modules[name] = None  # importing it raises ImportError
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr


def pins(lock: str) -> dict[str, str]:
    """A lock's packages: name -> its entry, which is `name==version` and the hashes that its files may have."""
    lines = [line for line in (ROOT / "requirements" / lock).read_text().splitlines() if not line.startswith("#")]
    entries = re.split(r"\n(?! )", "\n".join(lines))
    return {entry.split("==")[0]: entry for entry in entries}


@pytest.mark.parametrize(("lock", "extras"), [("serving.lock", []), ("dev.lock", ["dev"])])
def test_lock_holds_exact_versions_and_hashes_of_all_that_is_declared(lock: str, extras: list[str]) -> None:
    pinned = pins(lock)
    exact = re.compile(r'[a-z0-9-]+==[0-9a-z.]+( ; sys_platform != "win32")?( \\\n    --hash=sha256:[0-9a-f]{64})+')
    for entry in pinned.values():
        assert exact.fullmatch(entry), f"not an exact version with hashes for every machine: {entry}"
    missing = declared(*extras) - pinned.keys() - {"torch"}
    assert not missing, f"`make lock` is due: {sorted(missing)}"
    foreign = [name for name in pinned if name.startswith(("nvidia", "cuda", "triton"))]
    assert not foreign, f"{foreign} belong to one kind of machine; its torch brings them"


def test_torch_alone_has_no_hash() -> None:
    """Its builds differ by machine; a hash of one of them would refuse the others."""
    assert re.fullmatch(r"torch==[\d.]+", pins("torch.lock")["torch"].strip())
    for lock in ("serving.lock", "dev.lock", "tools.lock"):
        assert "torch" not in pins(lock)
        assert all("--hash=sha256:" in entry for entry in pins(lock).values())


def test_the_locks_agree() -> None:
    differing = pins("serving.lock").items() - pins("dev.lock").items()
    assert not differing, "make serve and make test would undo each other's versions in one .venv"


@pytest.mark.parametrize("lock", ["serving.lock", "dev.lock"])
def test_a_lock_pins_every_dependency(lock: str) -> None:
    """Indirect dependencies included: pip installs a lock without resolving, so what it leaves out is not installed."""
    pinned = pins(lock).keys() | {"torch"}
    for package in sorted(pinned - {"torch"}):  # torch's needs differ by build, and are resolved when it is installed
        needs = {normal(line) for line in requires(package) or [] if ";" not in line}
        assert needs <= pinned, f"{package} needs {sorted(needs - pinned)}, which {lock} leaves open"
