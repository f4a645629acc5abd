"""Writes a bundle: the whole folder, or nothing. `serving/bundle.py` reads it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from serving.bundle import ITEM_INDEX, MAPPED_CATALOGUE, NEIGHBOURS, SAMPLE, TITLES, TRIE, Bundle
from serving.files import replaced_folder
from serving.items.catalogue import Catalogue
from serving.items.catalogue_file import write_catalogue
from serving.items.item_index import EXACT_ITEMS, build_index, write_index
from serving.items.neighbours import write_neighbours
from serving.items.titles import write_titles
from serving.items.trie import build_trie
from serving.items.trie_file import write_trie
from serving.manifest import (
    FOLDERS,
    FORMAT,
    MANIFEST,
    OTHER_SUBSETS,
    SUBSETS,
    bundle_version,
    file_sha256,
    foreign_to_bundle,
    sealed,
    settings_to_json,
)

FILE_NAME = re.compile(r"[^./\\\0][^/\\\0]*")  # of a named subset, without its .json
MAX_FILE_NAME = 250  # bytes; file systems permit 255


def write_bundle(folder: Path, bundle: Bundle, *, model_card: str, write_tokenizer: Callable[[Path], None]) -> str:
    """Writes `bundle` to `folder`, in place of an earlier bundle there, and returns its version.

    write_tokenizer fills the bundle's tokenizer folder. Raises StorageError where the folder holds anything else.
    """
    with replaced_folder(folder, foreign_to_bundle, "a bundle") as new:
        return _write_files(new, bundle, model_card, write_tokenizer)


def _write_files(folder: Path, bundle: Bundle, model_card: str, write_tokenizer: Callable[[Path], None]) -> str:
    for name in FOLDERS:
        (folder / name).mkdir()
    _write_json(folder / "model/config.json", bundle.network.t5.config.to_transformers())
    save_file(_on_cpu(bundle.network.t5.state_dict()), folder / "model/model.safetensors", {"format": "pt"})
    save_file(_on_cpu(bundle.network.heads.state_dict()), folder / "heads.safetensors", {"format": "pt"})
    write_catalogue(folder / "catalogue.parquet", bundle.catalogue, folder / MAPPED_CATALOGUE)
    write_trie(folder / TRIE, build_trie(bundle.catalogue.tokens))
    bundle.catalogue.index_titles()
    assert bundle.catalogue.title_index is not None
    write_titles(folder / TITLES, bundle.catalogue.title_index)
    if bundle.neighbours is not None:
        write_neighbours(folder / NEIGHBOURS, bundle.neighbours)
    if bundle.settings.dense_weight and len(bundle.catalogue) > EXACT_ITEMS:
        write_index(folder / ITEM_INDEX, build_index(len(bundle.catalogue), bundle.vectors_of))
    if bundle.sample:
        _write_json(folder / SAMPLE, [asdict(each) for each in bundle.sample])
    _write_subsets(folder, bundle.catalogue)
    write_tokenizer(folder / "tokenizer")
    (folder / "README.md").write_text(model_card, encoding="utf-8")
    version = _write_manifest(folder, bundle)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # the service may run as another user
    return version


def _write_subsets(folder: Path, catalogue: Catalogue) -> None:
    """A file per named subset, in catalogues/; all whose name cannot be a file's in one."""
    lists = {name: [catalogue.item_ids[row] for row in rows] for name, rows in catalogue.subsets.items()}
    others: dict[str, list[str] | str] = {}
    for name, subset in (lists | catalogue.filters).items():
        if FILE_NAME.fullmatch(name) and len(os.fsencode(name)) <= MAX_FILE_NAME:
            _write_json(folder / SUBSETS / f"{name}.json", subset)
        else:
            others[name] = subset
    if others:
        _write_json(folder / OTHER_SUBSETS, others)


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


@torch.no_grad()
def _on_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
