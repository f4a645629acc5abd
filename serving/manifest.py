"""A bundle's manifest, `bundle.json`: its layout, a sha256 per file of the bundle, and one of the manifest itself."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from serving.errors import BundleError
from serving.items.neighbours import Neighbours
from serving.items.vocabulary import Vocabulary
from serving.types import BundleSettings, EncoderAttention, Gate, Merge, Normalise, StepForm

FORMAT = 3  # from 2 on a bundle says what its softmax runs over; from 3 on its gate may have powers
READABLE = (1, 2, 3)
MANIFEST = "bundle.json"
SEAL = "manifest_sha256"  # the manifest's hash of itself; older bundles have none
UNSEALED = "0" * 64
GET_ANOTHER = "Get a fresh copy of the bundle, or export it again."
SUBSETS = "catalogues"  # a file per named subset, and beside it one of all whose name cannot be a file's
OTHER_SUBSETS = "catalogues.json"
FOLDERS = ("model", "tokenizer", SUBSETS)
REQUIRED_FILES = {"model/config.json", "model/model.safetensors", "heads.safetensors", "catalogue.parquet"}
CHOICES = {
    "step_form": get_args(StepForm),
    "merge": get_args(Merge),
    "attention": get_args(EncoderAttention),
    "normalise": get_args(Normalise),
}


def settings_to_json(vocabulary: Vocabulary, settings: BundleSettings, neighbours: Neighbours | None) -> dict[str, Any]:
    """The sections of a manifest that determine what the bundle answers."""
    return {
        "tokens_per_item": vocabulary.tokens_per_item,
        "vocabulary": vocabulary.to_json(),
        "history": {
            "max_items": settings.max_items,
            "suffix_tokens": list(settings.suffix_tokens),
            "type_weights": dict(settings.type_weights),
        },
        "reasoning": {
            "max_steps": vocabulary.max_steps,
            "default_steps": settings.default_steps,
            "start_tokens": vocabulary.start_tokens,
            "step_form": settings.step_form,
            "paths": settings.paths,
        },
        "score": {
            "temperature": settings.temperature,
            "normalise": settings.normalise,
            "dense_weight": settings.dense_weight,
            "dense_candidates": settings.dense_candidates,
            "neighbours_weight": settings.neighbours_weight,
            "neighbours_recency": neighbours.recency if neighbours else None,
            "neighbours_floor": neighbours.floor if neighbours else None,
            "neighbours_kind": "log-linear" if settings.gate is None else "mixture",
            "neighbours_gate": _gate_to_json(settings.gate),
            "merge": settings.merge,
        },
        "encoder": {
            "attention": settings.attention,
            "age_bias": settings.age_bias,
            "time_bias": settings.time_bias,
            "item_input": settings.item_input,
        },
    }


def settings_from_json(manifest: dict[str, Any]) -> BundleSettings:
    """Raises KeyError, TypeError or ValueError if a section is missing or has a value that no bundle may have."""
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
        gate=_gate_from_json(score),
        attention=manifest["encoder"]["attention"],
        normalise=score.get("normalise", "vocabulary"),
        age_bias=bool(manifest["encoder"].get("age_bias", False)),
        time_bias=bool(manifest["encoder"].get("time_bias", False)),
        item_input=bool(manifest["encoder"].get("item_input", False)),
        type_weights=tuple(history.get("type_weights", {}).items()),
    )
    for name, values in CHOICES.items():
        if asdict(settings)[name] not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}")
    if not all(0 <= weight < math.inf for _, weight in settings.type_weights):  # no comparison with NaN is true
        raise ValueError("a weight of type_weights is not a number of at least 0")
    if not 0 <= settings.default_steps <= reasoning["max_steps"]:
        raise ValueError("default_steps is not in 0..max_steps")
    return settings


def _gate_to_json(gate: Gate | None) -> dict[str, Any] | None:
    if gate is None:
        return None
    return {
        "intercept": gate.intercept,
        "features": list(gate.coefficients),
        "coefficients": list(gate.coefficients.values()),
        "network_power": gate.network_power,
        "memory_power": gate.memory_power,
    }


def _gate_from_json(score: dict[str, Any]) -> Gate | None:
    kind = score.get("neighbours_kind", "log-linear")  # bundles that do not say add log scores
    if kind == "log-linear":
        return None
    if kind != "mixture":
        raise ValueError("neighbours_kind must be one of mixture, log-linear")
    gate = score["neighbours_gate"]
    powers = {name: gate.get(name, 1.0) for name in ("network_power", "memory_power")}  # formats 1 and 2 have none
    found = Gate(gate["intercept"], **dict(zip(gate["features"], gate["coefficients"], strict=True)), **powers)
    if not all(math.isfinite(value) for value in asdict(found).values()):
        raise ValueError("a coefficient of neighbours_gate is not a finite number")
    if min(powers.values()) <= 0:
        raise ValueError("a power of neighbours_gate is not above 0")
    return found


def read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a bundle and the bundle's version. Raises BundleError."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BundleError(
            f"There is no bundle at {folder}: {MANIFEST} is missing; use the folder that training wrote."
        ) from error
    except OSError as error:  # no permission, a name that is too long, a disk that fails
        raise BundleError(
            f"There is no bundle at {folder} that can be read ({error.strerror}); use the folder that training wrote."
        ) from error
    try:
        manifest = json.loads(content)
        number = manifest["format"]
        name, _ = manifest["name"], manifest["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is not a bundle's manifest. {GET_ANOTHER}") from error
    if number not in READABLE:
        raise BundleError(
            f"The bundle {folder} has format {number} and this program reads {READABLE[0]} to {FORMAT}; "
            "update streamrec or export it again."
        )
    seal = manifest.get(SEAL)
    if seal is not None and seal != _unsealed_sha256(content, str(seal)):
        raise BundleError(
            f"The bundle's file {MANIFEST} is damaged, or was changed by hand: get a fresh copy, "
            f"or remove its {SEAL} if the change is intended."
        )
    return manifest, bundle_version(name, content)


def sealed(manifest: dict[str, Any]) -> str:
    """The manifest as text with its own sha256 in it, so that damage to it is noticed like damage to any other file."""
    text = json.dumps({**manifest, SEAL: UNSEALED}, indent=1, ensure_ascii=False) + "\n"
    return text.replace(UNSEALED, _unsealed_sha256(text.encode(), UNSEALED))


def bundle_version(name: str, manifest: bytes) -> str:
    """Changes whenever any byte of the bundle does."""
    return f"{name}-{hashlib.sha256(manifest).hexdigest()[:10]}"


def check_files(folder: Path, files: dict[str, str]) -> None:
    """Raises BundleError unless all files that the manifest lists are there, unchanged and inside the bundle."""
    for name, expected in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"The bundle's manifest names a file outside the bundle, {name!r}. {GET_ANOTHER}")
        if not path.is_file():
            raise BundleError(f"The bundle's file {name} is missing. {GET_ANOTHER}")
        if file_sha256(path) != expected:
            raise BundleError(f"The bundle's file {name} is damaged: its sha256 is not the manifest's. {GET_ANOTHER}")
    if absent := REQUIRED_FILES - files.keys():
        raise BundleError(f"The bundle's manifest does not list {sorted(absent)[0]}. {GET_ANOTHER}")


def foreign_to_bundle(folder: Path) -> str | None:
    """The name of something in the folder that is not listed by a manifest there; None for a bundle, whole or damaged.

    An empty folder has nothing foreign, and in one without a manifest everything is.
    """
    entries = sorted(folder.iterdir())
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = [Path(name) for name in manifest["files"]] if isinstance(manifest["format"], int) else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return entries[0].name if entries else None
    known = {Path(name) for name in (MANIFEST, *FOLDERS)}.union(files, *(file.parents for file in files))
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")))
    return next((str(path) for path in found if path not in known), None)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unsealed_sha256(content: bytes, seal: str) -> str:
    """sha256 of the manifest as it was before the seal was put in."""
    return hashlib.sha256(content.replace(seal.encode(), UNSEALED.encode())).hexdigest()
