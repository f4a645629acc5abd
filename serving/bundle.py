"""The bundle: the one thing that training hands to serving. This file opens it; `serving/bundle_writer.py` writes it.

A folder of safetensors, JSON and Parquet with a manifest (`serving/manifest.py`), an Arrow table of a large catalogue,
and an index of FAISS where the dense score of many items counts. Nothing in it is executable, and no pickle is ever
read. All large files are mapped, not copied, so that processes share their pages.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from serving.errors import BundleError
from serving.items.catalogue import Catalogue
from serving.items.catalogue_file import read_catalogue
from serving.items.neighbours import Neighbours, read_neighbours
from serving.items.titles import read_titles
from serving.items.trie import Trie
from serving.items.trie_file import read_trie
from serving.items.vocabulary import Vocabulary
from serving.manifest import GET_ANOTHER, OTHER_SUBSETS, SUBSETS, check_files, read_manifest, settings_from_json
from serving.network.model import StreamRec
from serving.network.t5 import ModelConfig
from serving.search.beam import search_settings
from serving.steps import Steps, worthwhile_steps
from serving.types import BundleSettings, EncoderState, SampleAnswer, SearchSettings

if TYPE_CHECKING:
    from serving.items.item_index import ItemIndex

TRIE = "trie.safetensors"
NEIGHBOURS = "neighbours.safetensors"
ITEM_INDEX = "items.faiss"
SAMPLE = "sample.json"
TITLES = "titles.safetensors"
MAPPED_CATALOGUE = "catalogue.arrow"
BOUND_SLACK = np.float32(1.01)  # rounding, to float16 at worst


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
    int8: dict[str, Any] | None = None  # what the int8 gate measured at export; None: it did not run
    trie: Trie | None = None  # of the catalogue, mapped; None: an older bundle, which has no file of it
    neighbours: Neighbours | None = None  # mapped too; None: training made none
    item_index: ItemIndex | None = None  # None: the dense score compares with all items
    sample: list[SampleAnswer] = field(default_factory=list)  # answers at export; []: an older bundle, which has none
    worthwhile_steps: tuple[int, ...] = field(init=False)  # fewest first, see `serving/steps.py`
    _state_bound: np.ndarray = field(init=False, repr=False)  # (D,)

    def __post_init__(self) -> None:
        self.worthwhile_steps = worthwhile_steps(self.accuracy, self.max_steps)
        # The encoder ends in an RMS norm: x / rms(x) is at most sqrt(D) in size, and is then scaled per dimension.
        scale = self.network.t5.encoder.final_layer_norm.weight.detach().abs().float().cpu().numpy()
        self._state_bound = np.sqrt(np.float32(len(scale))) * scale * BOUND_SLACK

    @property
    def max_steps(self) -> int:
        return self.vocabulary.max_steps

    @property
    def default_steps(self) -> int:
        return self.settings.default_steps

    def most_steps(self, requested: Steps) -> int:
        """The most steps that a request gets which names this number, leaves it open (`auto`), or names none."""
        if requested == "auto":
            return self.worthwhile_steps[-1]
        return self.default_steps if requested is None else requested

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

    def fits(self, state: EncoderState, items: int) -> bool:
        """Whether the encoder could have made this state of a history of so many items: the shape is right, and no
        number is NaN, infinite or larger than its last layer lets through."""
        tokens = max(1, items * self.vocabulary.tokens_per_item + len(self.settings.suffix_tokens))
        if state.hidden.shape != (tokens, len(self._state_bound)):
            return False
        return bool((np.abs(state.hidden) <= self._state_bound).all())  # no comparison with NaN is true

    @torch.inference_mode()
    def vectors_of(self, rows: torch.Tensor) -> torch.Tensor:
        """What the dense score compares states with. Shape: (n,) int64 catalogue rows -> (n, D) float32."""
        tokens = torch.from_numpy(self.catalogue.tokens[rows.numpy()].astype(np.int64))
        return self.network.vectors_of(rows, tokens)

    def unit_vectors(self, rows: Sequence[int]) -> np.ndarray:
        """The same made to length 1. Shape: (n,) catalogue rows -> (n, D) float32."""
        vectors: np.ndarray = F.normalize(self.vectors_of(torch.from_numpy(np.asarray(rows, np.int64))), dim=-1).numpy()
        return vectors

    @staticmethod
    def load(folder: Path | str) -> Bundle:
        """Opens and checks a bundle. Raises BundleError, in one sentence, if anything does not fit."""
        folder = Path(folder)
        manifest, version = read_manifest(folder)
        check_files(folder, manifest["files"])
        try:
            return _open(folder, manifest, version)
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, OSError) as error:
            reason = textwrap.shorten(str(error), 300)  # torch writes a line per tensor
            raise BundleError(f"The bundle {folder} does not fit together ({reason}). {GET_ANOTHER}") from error


def _open(folder: Path, manifest: dict[str, Any], version: str) -> Bundle:
    vocabulary = Vocabulary.from_json(manifest["vocabulary"])
    settings = settings_from_json(manifest)
    config = ModelConfig.from_transformers(_read_json(folder / "model/config.json"))
    if config.vocab_size != vocabulary.size:
        raise BundleError(
            f"The model knows {config.vocab_size} tokens and the vocabulary {vocabulary.size}. {GET_ANOTHER}"
        )
    subsets = _read_subsets(folder, manifest)
    mapped = folder / MAPPED_CATALOGUE if MAPPED_CATALOGUE in manifest["files"] else None
    catalogue = read_catalogue(folder / "catalogue.parquet", vocabulary.tokens_per_item, subsets, mapped)
    if TITLES in manifest["files"]:
        catalogue.title_index = read_titles(folder / TITLES, len(catalogue))
    _check_tokens(vocabulary, catalogue.tokens, settings.suffix_tokens)
    trie = read_trie(folder / TRIE) if TRIE in manifest["files"] else None
    if trie is not None:
        _check_trie(trie, catalogue.tokens)
        catalogue.fields.arrange(trie.order)
    network = StreamRec(
        config,
        len(catalogue),
        settings.step_form,
        settings.ages,
        times=settings.time_bias,
        reads_items=settings.item_input,
    )
    network.t5.load_state_dict(_read_weights(folder, "model/model.safetensors"), assign=True)
    network.heads.load_state_dict(_read_weights(folder, "heads.safetensors"), assign=True)
    return Bundle(
        name=manifest["name"],
        version=version,
        vocabulary=vocabulary,
        settings=settings,
        network=network.eval(),
        catalogue=catalogue,
        accuracy=manifest["accuracy"],
        about=manifest.get("about", {}),
        folder=folder,
        int8=dict(manifest["int8"]) if manifest.get("int8") else None,
        trie=trie,
        neighbours=_read_neighbours(folder, manifest, settings, len(catalogue)),
        item_index=_read_item_index(folder, manifest, len(catalogue), config.d_model),
        sample=[SampleAnswer(**each) for each in _read_json(folder / SAMPLE)] if SAMPLE in manifest["files"] else [],
    )


def _read_subsets(folder: Path, manifest: dict[str, Any]) -> dict[str, list[str] | str]:
    """The named subsets in files that the manifest lists: others are no part of the bundle's version."""
    files = [folder / name for name in sorted(manifest["files"]) if Path(name).parent == Path(SUBSETS)]
    subsets = {file.stem: _read_json(file) for file in files if file.suffix == ".json"}
    return subsets | (_read_json(folder / OTHER_SUBSETS) if OTHER_SUBSETS in manifest["files"] else {})


def _read_neighbours(folder: Path, manifest: dict[str, Any], settings: BundleSettings, items: int) -> Neighbours | None:
    if NEIGHBOURS in manifest["files"]:
        score = manifest["score"]
        found = read_neighbours(folder / NEIGHBOURS, items, score["neighbours_recency"], score["neighbours_floor"])
        if found.floor is None and settings.gate is None:
            raise ValueError("neighbours_floor is missing, which log scores need")
        return found
    if settings.neighbours_weight:
        raise ValueError(f"neighbours_weight is set and {NEIGHBOURS} is not listed")
    return None


def _read_item_index(folder: Path, manifest: dict[str, Any], items: int, width: int) -> ItemIndex | None:
    if ITEM_INDEX not in manifest["files"]:
        return None
    from serving.items.item_index import read_index  # FAISS takes a while to import, which only its users should pay

    return read_index(folder / ITEM_INDEX, items, width)


def _read_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    weights = load_file(folder / name)
    for tensor, values in weights.items():
        extremes = torch.stack(values.aminmax())  # NaN where there is one
        if not extremes.isfinite().all():  # a single one can turn every score into NaN, and no answer would say why
            raise BundleError(f"The weight {tensor} in {name} is not finite. {GET_ANOTHER}")
    return weights


def _check_tokens(vocabulary: Vocabulary, tokens: np.ndarray, suffix: tuple[int, ...]) -> None:
    """Raises BundleError for a token that the network lacks, or that belongs to another level. Shape: tokens (I, M)."""
    first = vocabulary.level_offsets
    if ((tokens < first) | (tokens >= first + vocabulary.codebook_sizes)).any():
        raise BundleError(f"An item of the catalogue has a token outside of its level's codes. {GET_ANOTHER}")
    if not all(0 <= token < vocabulary.size for token in suffix):
        raise BundleError(f"A token of suffix_tokens is not in the vocabulary. {GET_ANOTHER}")


def _check_trie(trie: Trie, tokens: np.ndarray) -> None:
    """Raises BundleError unless the trie is the catalogue's: it would name the wrong items. Shape: tokens (I, M)."""
    fits = (len(trie.item), trie.levels) == tokens.shape
    if fits:
        token, parent = trie.token.numpy(), trie.parent.numpy()
        node = trie.leaf.numpy() + trie.level_start[-2]
        for level in reversed(range(trie.levels)):
            fits = fits and np.array_equal(token[node], tokens[:, level])
            node = parent[node]
    if not fits:
        raise BundleError(f"{TRIE} is the trie of another catalogue. {GET_ANOTHER}")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
