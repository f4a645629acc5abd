"""Writes a bundle: the whole folder, or nothing. `serving/bundle.py` reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from serving.bundle import NEIGHBOURS, TRIE, Bundle
from serving.items.catalogue import write_catalogue
from serving.items.neighbours import write_neighbours
from serving.items.trie import build_trie
from serving.items.trie_file import write_trie
from serving.manifest import FORMAT, MANIFEST, bundle_version, file_sha256, sealed, settings_to_json


def write_bundle(folder: Path, bundle: Bundle, *, model_card: str, write_tokenizer: Callable[[Path], None]) -> str:
    """Writes `bundle` to `folder`, replacing what was there, and returns its version.

    write_tokenizer fills the bundle's tokenizer folder.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("model", "tokenizer", "catalogues"):
        (partial / name).mkdir(parents=True)
    _write_json(partial / "model/config.json", bundle.network.t5.config.to_transformers())
    save_file(_on_cpu(bundle.network.t5.state_dict()), partial / "model/model.safetensors", {"format": "pt"})
    save_file(_on_cpu(bundle.network.heads.state_dict()), partial / "heads.safetensors", {"format": "pt"})
    write_catalogue(partial / "catalogue.parquet", bundle.catalogue)
    write_trie(partial / TRIE, build_trie(bundle.catalogue.tokens))
    if bundle.neighbours is not None:
        write_neighbours(partial / NEIGHBOURS, bundle.neighbours)
    for name, rows in bundle.catalogue.subsets.items():
        _write_json(partial / f"catalogues/{name}.json", [bundle.catalogue.item_ids[row] for row in rows])
    write_tokenizer(partial / "tokenizer")
    (partial / "README.md").write_text(model_card, encoding="utf-8")
    version = _write_manifest(partial, bundle)
    for path in partial.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # the service may run as another user
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return version


def _write_manifest(folder: Path, bundle: Bundle) -> str:
    """Describes all files written so far; returns the version."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "name": bundle.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **settings_to_json(bundle.vocabulary, bundle.settings, bundle.neighbours),
        "accuracy": bundle.accuracy,
        "int8": bundle.int8,
        "about": bundle.about,
        "files": {str(path.relative_to(folder)): file_sha256(path) for path in paths},
    }
    text = sealed(manifest)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return bundle_version(bundle.name, text.encode())


def _on_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
