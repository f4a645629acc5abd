"""The wheel: built without a network, it carries all packages, their data files and the `streamrec` command."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import serving
from streamrec.__main__ import main
from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[2]
PACKAGES = ("app", "serving", "streamrec", "training")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that the checkout stays clean."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for package in (*PACKAGES, "benchmarks", "clients"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", out, copy], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("streamrec-*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def site(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as an installation has it in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


def installed(*arguments: str, path: list[Path], after: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command as its script does, in an empty folder, and then the statements `after`."""
    program = f"import sys\nfrom streamrec.__main__ import main\ntry:\n    status = main({list(arguments)!r})\n"
    program += f"except SystemExit as end:\n    status = end.code\n{after}\nsys.exit(status)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-P", "-c", program]  # -P: the script's folder is not the current one
    return subprocess.run(
        command, env=environment, cwd=path[-1].parent, capture_output=True, text=True, timeout=DEADLINE
    )


def test_the_wheel_has_all_code_and_data_files(wheel: zipfile.ZipFile) -> None:
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= set(wheel.namelist()), f"missing from the wheel: {sorted(expected - set(wheel.namelist()))}"
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected


def test_the_wheel_has_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert top == {*PACKAGES}
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_the_version_is_stated_once(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    assert Parser().parsestr(wheel.read(name).decode())["Version"] == serving.__version__
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_chart_readme_and_changelog_are_of_this_version() -> None:
    chart = (ROOT / "helm/streamrec/Chart.yaml").read_text()
    assert re.findall(r'^(?:version|appVersion): "?([\d.]+)"?$', chart, re.MULTILINE) == [serving.__version__] * 2
    assert set(re.findall(r"streamrec:(\d[\d.]*)", (ROOT / "README.md").read_text())) == {serving.__version__}
    assert f"## {serving.__version__} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("command", "option"),
    [("serve", "--port"), ("train", "--config"), ("evaluate", "--split"), ("score", "--histories")],
)
def test_each_command_reaches_its_program(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert option in capsys.readouterr().out


def test_serve_does_not_load_the_training_code(site: Path) -> None:
    after = "print([name for name in sys.modules if name.split('.')[0] == 'training'])"
    assert installed("serve", "--help", path=[site], after=after).stdout.endswith("[]\n")


def test_a_process_with_the_client_has_nothing_of_the_service_in_it(site: Path) -> None:
    after = "import streamrec.client\nprint(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(ast.literal_eval(installed("--help", path=[site], after=after).stdout.splitlines()[-1]))
    assert {"httpx", "streamrec"} <= loaded
    assert not loaded & {"app", "serving", "training", "torch", "numpy", "pyarrow", "fastapi", "pydantic"}


def test_help_and_version(site: Path) -> None:
    assert installed("--version", path=[site]).stdout == f"streamrec {serving.__version__}\n"
    assert installed(path=[site]).stdout == installed("--help", path=[site]).stdout
    done = installed("srve", path=[site])
    assert done.returncode == 2
    assert done.stderr == "streamrec: there is no command 'srve'; choose one of serve, train, evaluate, score.\n"


@pytest.mark.parametrize(
    ("command", "package"),
    [("serve", "app"), ("serve", "serving"), ("train", "training"), ("evaluate", "serving"), ("score", "serving")],
)
def test_a_foreign_package_that_hides_ours_is_named(site: Path, tmp_path: Path, command: str, package: str) -> None:
    foreign = tmp_path / "foreign" / package
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("raise SystemExit('the foreign package ran')")
    done = installed(command, "--help", path=[foreign.parent, site])
    assert done.returncode == 2
    assert done.stderr.startswith(f"streamrec: the package {package!r} at {foreign} hides streamrec's own at {site}")
    assert len(done.stderr.splitlines()) == 1


def test_a_foreign_package_that_a_command_does_not_need_is_no_obstacle(site: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign" / "training"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").touch()
    assert installed("serve", "--help", path=[foreign.parent, site]).returncode == 0


def test_a_missing_extra_is_named(site: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "yaml.py").write_text("raise ModuleNotFoundError('No module named yaml', name='yaml')")
    done = installed("train", "--help", path=[absent, site])
    assert done.returncode == 2
    assert done.stderr == (
        "streamrec: train needs yaml, which is not installed; run: pip install 'streamrec[training]'\n"
    )
