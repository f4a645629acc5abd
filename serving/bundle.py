"""The bundle: the one thing that training hands to serving. This file is its only reader and its only writer.

A folder of safetensors, JSON and Parquet with a manifest (`bundle.json`) that holds a sha256 per file. Nothing in it
is executable, and nothing pickled is ever read. Weights and trie are mapped, not copied: processes share their pages.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from serving.errors import BundleError
from serving.items.catalogue import Catalogue, read_catalogue, write_catalogue
from serving.items.neighbours import Neighbours, read_neighbours, write_neighbours
from serving.items.trie import Trie, build_trie
from serving.items.trie_file import read_trie, write_trie
from serving.items.vocabulary import Vocabulary
from serving.network.model import StreamRec
from serving.network.t5 import ModelConfig
from serving.search.beam import search_settings
from serving.types import BundleSettings, SearchSettings

FORMAT = 1
MANIFEST = "bundle.json"
TRIE = "trie.safetensors"
NEIGHBOURS = "neighbours.safetensors"
SEAL = "manifest_sha256"  # the manifest's hash of itself; bundles from before it have none
UNSEALED = "0" * 64
FRESH_LINE = "Get a fresh copy of the bundle, or export it again."


@dataclass(slots=True)
class Bundle:
    """An opened bundle. `version` changes whenever any byte of it does."""

    name: str
    version: str
    vocabulary: Vocabulary
    settings: BundleSettings
    network: StreamRec
    catalogue: Catalogue
    accuracy: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)  # how it was made: data, seed, settings, stages
    folder: Path | None = None
    int8: dict[str, Any] | None = None  # what the gate for the runtime onnx-int8 measured at export; None: nothing
    trie: Trie | None = None  # of the catalogue, mapped; None: of a bundle from before there was a file of it
    neighbours: Neighbours | None = None  # mapped too; None: the run fitted none

    @property
    def max_steps(self) -> int:
        return self.vocabulary.max_steps

    @property
    def default_steps(self) -> int:
        return self.settings.default_steps

    @property
    def max_items(self) -> int:
        return self.settings.max_items

    @property
    def dense_weight(self) -> float:
        return self.settings.dense_weight

    @property
    def neighbours_weight(self) -> float:
        return self.settings.neighbours_weight

    @property
    def search_settings(self) -> SearchSettings:
        return search_settings(self.vocabulary, self.settings)

    @staticmethod
    def load(folder: Path | str) -> Bundle:
        """Opens and checks a bundle. Raises BundleError, in one sentence, for whatever does not fit."""
        folder = Path(folder)
        manifest, version = _read_manifest(folder)
        _check_files(folder, manifest["files"])
        try:
            vocabulary = Vocabulary.from_json(manifest["vocabulary"])
            settings = _settings_from(manifest)
            config = ModelConfig.from_transformers(_read_json(folder / "model/config.json"))
            subsets = {path.stem: _read_json(path) for path in sorted((folder / "catalogues").glob("*.json"))}
            catalogue = read_catalogue(folder / "catalogue.parquet", vocabulary.tokens_per_item, subsets)
            if config.vocab_size != vocabulary.size:
                raise BundleError(
                    f"The model knows {config.vocab_size} tokens and the vocabulary {vocabulary.size}. {FRESH_LINE}"
                )
            _check_tokens(vocabulary, catalogue.tokens, settings.suffix_tokens)
            network = StreamRec(config, len(catalogue), settings.step_form)
            name, accuracy, about = manifest["name"], manifest["accuracy"], manifest.get("about", {})
            int8 = dict(manifest["int8"]) if manifest.get("int8") else None
            trie = read_trie(folder / TRIE) if TRIE in manifest["files"] else None
            if trie is not None:
                _check_trie(trie, catalogue.tokens)
            neighbours = None
            if NEIGHBOURS in manifest["files"]:
                score = manifest["score"]
                neighbours = read_neighbours(
                    folder / NEIGHBOURS, len(catalogue), score["neighbours_recency"], score["neighbours_floor"]
                )
            elif settings.neighbours_weight:
                raise ValueError(f"neighbours_weight is set and {NEIGHBOURS} is not listed")
            network.t5.load_state_dict(_read_weights(folder, "model/model.safetensors"), assign=True)
            network.heads.load_state_dict(_read_weights(folder, "heads.safetensors"), assign=True)
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, OSError) as error:
            reason = textwrap.shorten(str(error), 300)  # torch writes a line per tensor
            raise BundleError(f"The bundle {folder} does not fit together ({reason}). {FRESH_LINE}") from error
        network.eval()
        return Bundle(
            name, version, vocabulary, settings, network, catalogue, accuracy, about, folder, int8, trie, neighbours
        )


def write_bundle(
    folder: Path,
    bundle: Bundle,
    *,
    model_card: str,
    write_tokenizer: Callable[[Path], None],
) -> str:
    """Writes `bundle` to `folder`, whole or not at all, and returns its version.

    write_tokenizer fills the bundle's tokenizer folder.
    """
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "model").mkdir(parents=True)
    (work / "tokenizer").mkdir()
    (work / "catalogues").mkdir()
    _write_json(work / "model/config.json", bundle.network.t5.config.to_transformers())
    save_file(_plain(bundle.network.t5.state_dict()), work / "model/model.safetensors", {"format": "pt"})
    save_file(_plain(bundle.network.heads.state_dict()), work / "heads.safetensors", {"format": "pt"})
    write_catalogue(work / "catalogue.parquet", bundle.catalogue)
    write_trie(work / TRIE, build_trie(bundle.catalogue.tokens))
    if bundle.neighbours is not None:
        write_neighbours(work / NEIGHBOURS, bundle.neighbours)
    for name, rows in bundle.catalogue.subsets.items():
        _write_json(work / f"catalogues/{name}.json", [bundle.catalogue.item_ids[row] for row in rows])
    write_tokenizer(work / "tokenizer")
    (work / "README.md").write_text(model_card, encoding="utf-8")
    files = {str(path.relative_to(work)): _sha256(path) for path in sorted(work.rglob("*")) if path.is_file()}
    (work / MANIFEST).write_text(sealed(_manifest(bundle, files)), encoding="utf-8")
    version = _version(bundle.name, (work / MANIFEST).read_bytes())
    for path in work.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # another user serves it
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)
    return version


def _manifest(bundle: Bundle, files: dict[str, str]) -> dict[str, Any]:
    vocabulary, settings = bundle.vocabulary, bundle.settings
    return {
        "format": FORMAT,
        "name": bundle.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokens_per_item": vocabulary.tokens_per_item,
        "vocabulary": vocabulary.to_json(),
        "history": {"max_items": settings.max_items, "suffix_tokens": list(settings.suffix_tokens)},
        "reasoning": {
            "max_steps": vocabulary.max_steps,
            "default_steps": settings.default_steps,
            "start_tokens": vocabulary.start_tokens,
            "step_form": settings.step_form,
            "paths": settings.paths,
        },
        "score": {
            "temperature": settings.temperature,
            "dense_weight": settings.dense_weight,
            "dense_candidates": settings.dense_candidates,
            "neighbours_weight": settings.neighbours_weight,
            "neighbours_recency": bundle.neighbours.recency if bundle.neighbours else None,
            "neighbours_floor": bundle.neighbours.floor if bundle.neighbours else None,
            "merge": settings.merge,
        },
        "encoder": {"attention": settings.attention},
        "accuracy": bundle.accuracy,
        "int8": bundle.int8,
        "about": bundle.about,
        "files": files,
    }


def _settings_from(manifest: dict[str, Any]) -> BundleSettings:
    history, reasoning, score = manifest["history"], manifest["reasoning"], manifest["score"]
    settings = BundleSettings(
        max_items=history["max_items"],
        suffix_tokens=tuple(history["suffix_tokens"]),
        default_steps=reasoning["default_steps"],
        step_form=reasoning["step_form"],
        paths=reasoning["paths"],
        merge=score["merge"],
        temperature=score["temperature"],
        dense_weight=score["dense_weight"],
        dense_candidates=score.get("dense_candidates", 0),
        neighbours_weight=score.get("neighbours_weight", 0.0),
        attention=manifest["encoder"]["attention"],
    )
    known = {
        "step_form": ("token", "state", "both"),
        "merge": ("logsumexp", "max"),
        "attention": ("bidirectional", "causal-by-item"),
    }
    for name, values in known.items():
        if asdict(settings)[name] not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}")
    if not 0 <= settings.default_steps <= reasoning["max_steps"]:
        raise ValueError("default_steps lies outside 0..max_steps")
    return settings


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"There is no bundle at {folder}: {MANIFEST} is missing; give the folder that training wrote."
        )
    try:
        manifest = json.loads(path.read_bytes())
        number = manifest["format"]
        name, _ = manifest["name"], manifest["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is not a bundle's manifest. {FRESH_LINE}") from error
    if number != FORMAT:
        raise BundleError(
            f"The bundle {folder} has format {number} and this program reads {FORMAT}; "
            "update streamrec or export it again."
        )
    seal = manifest.get(SEAL)
    if seal is not None and seal != _digest_but(path.read_bytes(), str(seal)):
        raise BundleError(
            f"The bundle's file {MANIFEST} is damaged, or was changed by hand: get a fresh copy, "
            f"or remove its {SEAL} if the change is meant."
        )
    return manifest, _version(name, path.read_bytes())


def sealed(manifest: dict[str, Any]) -> str:
    """The manifest as text that holds its own sha256, so that damage to it shows like damage to any other file."""
    text = json.dumps({**manifest, SEAL: UNSEALED}, indent=1, ensure_ascii=False) + "\n"
    return text.replace(UNSEALED, _digest_but(text.encode(), UNSEALED))


def _digest_but(text: bytes, seal: str) -> str:
    """sha256 of the manifest as it was before the seal was put in."""
    return hashlib.sha256(text.replace(seal.encode(), UNSEALED.encode())).hexdigest()


def _check_files(folder: Path, files: dict[str, str]) -> None:
    for name, expected in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"The bundle's manifest names a file outside the bundle, {name!r}. {FRESH_LINE}")
        if not path.is_file():
            raise BundleError(f"The bundle's file {name} is missing. {FRESH_LINE}")
        if _sha256(path) != expected:
            raise BundleError(f"The bundle's file {name} is damaged: its sha256 is not the manifest's. {FRESH_LINE}")
    needed = {"model/config.json", "model/model.safetensors", "heads.safetensors", "catalogue.parquet"}
    if absent := needed - files.keys():
        raise BundleError(f"The bundle's manifest does not list {sorted(absent)[0]}. {FRESH_LINE}")


def _check_tokens(vocabulary: Vocabulary, tokens: np.ndarray, suffix: tuple[int, ...]) -> None:
    """Raises BundleError for a token that the network does not have, or has for another level. Shape: tokens (I, M)."""
    first = vocabulary.level_offsets
    if ((tokens < first) | (tokens >= first + vocabulary.codebook_sizes)).any():
        raise BundleError(f"An item of the catalogue has a token outside of its level's codes. {FRESH_LINE}")
    if not all(0 <= token < vocabulary.size for token in suffix):
        raise BundleError(f"A token of suffix_tokens is not in the vocabulary. {FRESH_LINE}")


def _check_trie(trie: Trie, tokens: np.ndarray) -> None:
    """Raises BundleError where the trie is of other items than the catalogue: rows would be other items. (I, M)."""
    fits = (len(trie.item), trie.levels) == tokens.shape
    if fits:
        token, parent = trie.token.numpy(), trie.parent.numpy()
        node = trie.leaf.numpy() + trie.level_start[-2]
        for level in reversed(range(trie.levels)):
            fits = fits and np.array_equal(token[node], tokens[:, level])
            node = parent[node]
    if not fits:
        raise BundleError(f"{TRIE} is the trie of another catalogue. {FRESH_LINE}")


def _read_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    weights = load_file(folder / name)
    for tensor, values in weights.items():
        if not values.isfinite().all():  # one of them can make every score NaN, and no answer would say why
            raise BundleError(f"The weight {tensor} in {name} is not finite. {FRESH_LINE}")
    return weights


def _plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _version(name: str, manifest: bytes) -> str:
    return f"{name}-{hashlib.sha256(manifest).hexdigest()[:10]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
