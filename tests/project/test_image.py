"""Carries out the Dockerfile in an empty folder: its RUN steps, its COPYs, its CMD and its HEALTHCHECK.

No image is built and no network is used. pip finds the lock's packages in wheels made of what is installed here: they
carry the metadata, which is all that pip decides by, and the code is linked in afterwards: copying torch takes minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.waiting import DEADLINE, eventually

ROOT = Path(__file__).parents[2]
LINES = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")


def stage(name: str) -> list[tuple[str, str]]:
    """A stage's instructions, with what it is made from before them: (instruction, the rest)."""
    found = re.search(rf"^FROM (\S+) AS {name}$(.*?)(?=^FROM |\Z)", LINES, re.MULTILINE | re.DOTALL)
    assert found, f"no stage {name}"
    own = [tuple(line.split(maxsplit=1)) for line in found[2].splitlines() if line.strip()]
    return [*([] if found[1].startswith("$") else stage(found[1])), *own]  # type: ignore[list-item]


def environment(steps: list[tuple[str, str]], opt: Path) -> dict[str, str]:
    """The stage's variables, and nothing of this machine but what lies on its PATH."""
    given = {name: value for kind, rest in steps if kind == "ENV" for name, value in re.findall(r"(\w+)=(\S+)", rest)}
    path = given["PATH"].replace("/opt", str(opt)).replace("$PATH", os.environ["PATH"])
    return given | {"PATH": path, "HOME": str(opt)}


def normal(package: Distribution) -> str:
    return re.sub(r"[-_.]+", "_", package.name).lower()


def pack(package: Distribution, folder: Path) -> Path:
    """A wheel of an installed package's metadata."""
    tags = re.findall(r"^Tag: (\S+)$", package.read_text("WHEEL") or "", re.MULTILINE)
    tag = "-".join(".".join(dict.fromkeys(part)) for part in zip(*(tag.split("-") for tag in tags), strict=True))
    path = folder / f"{normal(package)}-{package.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in package.files or []:
            if file.parts[0].endswith(".dist-info"):
                wheel.write(file.locate(), str(file))
    return path


def with_hashes_of(lock: str, wheels: dict[str, Path]) -> str:
    """The lock with the hashes of these wheels for those of the published files."""

    def entry(match: re.Match[str]) -> str:
        wheel = wheels[match[1].replace("-", "_")]
        return f"{match[0]} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"

    return re.sub(r"^([a-z0-9-]+)==[^\\\n]*", entry, re.sub(r" \\\n +--hash=\S+", "", lock), flags=re.MULTILINE)


def link(package: Distribution, site: Path) -> None:
    """The installed package's code, in a site-packages folder where pip has put its metadata."""
    for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
        if not top.endswith(".dist-info") and not (site / top).exists():
            (site / top).symlink_to(package.locate_file(top))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/opt after the RUN steps of the stage that installs the packages."""
    folder, wheels = tmp_path_factory.mktemp("opt"), tmp_path_factory.mktemp("wheels")
    steps = stage("packages-cpu")
    for kind, rest in steps:
        if kind == "COPY":
            source, target = rest.split()
            shutil.copy(ROOT / source, folder / Path(target).name)
    lock = folder / "serving.lock"
    names = re.findall(r"^([a-z0-9-]+)==", lock.read_text(), re.MULTILINE)
    packages = [distribution(name) for name in [*names, "torch"]]
    files = {package.name: pack(package, wheels) for package in packages}
    lock.write_text(with_hashes_of(lock.read_text(), {normal(package): files[package.name] for package in packages}))
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    offline |= {"PATH": os.environ["PATH"], "HOME": str(folder)}
    for kind, rest in steps:
        if kind == "RUN":
            script = re.sub(r"/(opt|tmp)/", f"{folder}/", rest)
            done = subprocess.run(script, shell=True, env=offline, capture_output=True, text=True, timeout=DEADLINE)
            assert done.returncode == 0, f"RUN {rest}\n{done.stdout}\n{done.stderr}"
    (site,) = folder.glob("venv/lib/python*/site-packages")
    found = {path.name for path in site.glob("*.dist-info")}
    for package in packages:
        assert any(name.lower().startswith(normal(package)) for name in found), f"pip left {package.name} out"
        link(package, site)
    return folder


@pytest.fixture(scope="module")
def srv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder after the COPYs of the stage that serves."""
    folder = tmp_path_factory.mktemp("srv")
    for kind, rest in stage("service"):
        if kind == "COPY" and not rest.startswith("--from"):
            source, target = rest.split()
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, folder / target)
    return folder


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_the_image_serves_and_is_healthy(opt: Path, srv: Path) -> None:
    steps, port = stage("cpu"), str(free_port())
    words = next(rest for kind, rest in steps if kind == "CMD")
    check = re.search(r"CMD (\[.*\])$", next(rest for kind, rest in steps if kind == "HEALTHCHECK"))
    assert check
    command, health = (json.loads(text.replace("8000", port)) for text in (words, check[1]))
    before, variables = files(srv) | files(opt), environment(steps, opt)
    process = subprocess.Popen(command, cwd=srv, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:

        def healthy() -> bool:
            assert process.poll() is None, process.communicate()[1].decode()
            return not subprocess.run(health, cwd=srv, env=variables, capture_output=True, timeout=DEADLINE).returncode

        eventually(healthy)
        assert b"Ready" in process.stdout.readline()  # type: ignore[union-attr]
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=DEADLINE)
        assert process.returncode == 0, process.communicate()[1].decode()
    finally:
        process.kill()
        process.communicate()
    assert subprocess.run(health, cwd=srv, env=variables, capture_output=True, timeout=DEADLINE).returncode != 0
    assert files(srv) | files(opt) == before, "the root file system is read-only: nothing may be written to it"


def test_the_image_has_no_training_code(opt: Path, srv: Path) -> None:
    installed = {path.name.lower() for path in opt.glob("venv/lib/python*/site-packages/*")}
    training_only = {
        "transformers",
        "sklearn",
        "scipy",
        "sentence_transformers",
        "tensorboard",
        "ray",
        "pytest",
        "pandas",
    }
    assert not installed & training_only
    assert not (srv / "training").exists()
    assert not (srv / "benchmarks").exists()
