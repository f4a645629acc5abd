"""Bundles that a disk or a person has spoilt: refused when they are opened, each by name and in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.manifest import FORMAT, sealed
from tests.e2e.conftest import StartService
from tests.waiting import DEADLINE


def refused(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.load(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_one_byte_changed_in_any_file_is_refused_and_the_file_named(bundle, tmp_path):
    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert {"bundle.json", "README.md", "catalogue.parquet", "heads.safetensors"} < set(names)
    for name in names:
        path = folder / name
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            spoilt = bytearray(content)
            spoilt[place] ^= 1
            path.write_bytes(spoilt)
            assert name in refused(folder), (name, place)
        path.write_bytes(content[:-1])  # and one byte less
        assert name in refused(folder)
        path.write_bytes(content)
    Bundle.load(folder)


def test_a_service_does_not_start_with_a_spoilt_bundle_or_a_newer_one(
    bundle: Path, tmp_path: Path, start_service: StartService
) -> None:
    spoilt, newer = (Path(shutil.copytree(bundle, tmp_path / name)) for name in ("spoilt", "newer"))
    weights = bytearray((spoilt / "heads.safetensors").read_bytes())
    weights[-1] ^= 1
    (spoilt / "heads.safetensors").write_bytes(weights)
    manifest = json.loads((newer / "bundle.json").read_text())
    (newer / "bundle.json").write_text(sealed(manifest | {"format": FORMAT + 1}))
    for folder, words in ((spoilt, "heads.safetensors is damaged"), (newer, "update streamrec")):
        service = start_service(of=folder, wait=False)
        assert service.process.wait(DEADLINE) == 1
        said = [line for line in service.errors.read_text().splitlines() if not line.startswith("{")]
        assert len(said) == 1 and words in said[0]
