"""The RQ-VAE: it learns, follows its seed, revives dead codes, and leaves gradients where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.config import RqVaeConfig
from training.ids.embed import ItemEmbedding
from training.ids.rqvae import (
    KMEANS_ITEMS,
    Codebook,
    quantize_and_follow,
    restart_dead_codes,
    start_codebooks,
    train_rqvae,
)

SMALL = RqVaeConfig(
    levels=3, codes=16, latent=8, pca=16, hidden=32, steps=200, warmup_steps=50, batch=128, restart_every=20
)


def clusters(items: int = 300, width: int = 24, groups: int = 12, seed: int = 0) -> ItemEmbedding:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, width))
    matrix = centres[rng.integers(0, groups, items)] + 0.3 * rng.standard_normal((items, width))
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    return ItemEmbedding(matrix.astype(np.float32), "text")


def codebook(vectors: list[list[float]], members: float = 1.0) -> Codebook:
    table = torch.tensor(vectors)
    counts = torch.full((len(table),), members)
    return Codebook(table.clone(), counts, table * members)


def test_same_seed_same_codes_and_threads_are_restored() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    embedding = clusters()
    first, _ = train_rqvae(embedding, SMALL, seed=3)
    again, _ = train_rqvae(embedding, SMALL, seed=3)
    other, _ = train_rqvae(embedding, SMALL, seed=4)
    np.testing.assert_array_equal(first.encode(embedding.matrix), again.encode(embedding.matrix))
    assert (first.encode(embedding.matrix) != other.encode(embedding.matrix)).any()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_lowers_the_error_and_more_levels_help() -> None:
    def error(**changed: int) -> float:
        """Of the variance, as the mean of two shops."""
        setting = SMALL.model_copy(update=changed)
        return float(np.mean([train_rqvae(clusters(seed=s), setting, s)[1]["reconstruction_error"] for s in (0, 1)]))

    one, three, untrained = error(levels=1), error(levels=3), error(steps=51, warmup_steps=1)
    assert three < one - 0.01  # measured: 0.19 and 0.17
    assert three < 0.5 * untrained


def test_codes_are_used_and_shared_by_similar_items() -> None:
    embedding = clusters()
    codec, report = train_rqvae(embedding, SMALL)
    codes = codec.encode(embedding.matrix)
    assert all(len(np.unique(level)) >= 10 for level in codes.T)
    same = codes[:, None, 0] == codes[None, :, 0]
    similarity = embedding.matrix @ embedding.matrix.T
    assert similarity[same].mean() > similarity[~same].mean() + 0.4
    assert 0 < report["autoencoder_error"] < report["reconstruction_error"] < 1
    assert 0.5 < report["pca_variance"] <= 1


def test_codes_do_not_collapse_with_a_minimal_warm_up() -> None:
    """From one step of warm-up the codebooks start on as many codes as there are clusters; restarts spread them."""
    embedding = clusters(groups=4)
    codes = train_rqvae(embedding, SMALL.model_copy(update={"warmup_steps": 1}))[0].encode(embedding.matrix)
    assert len(np.unique(codes[:, 0])) >= 8  # measured: 12 and more, and 4 without restarts


@pytest.mark.parametrize("whiten", [False, True])
def test_pca_of_the_codec_is_centred_and_scaled(whiten: bool) -> None:
    embedding = clusters()
    codec, _ = train_rqvae(embedding, SMALL.model_copy(update={"whiten": whiten, "steps": 2, "warmup_steps": 1}))
    scores = (torch.from_numpy(embedding.matrix) - codec.mean) @ codec.projection
    torch.testing.assert_close(scores.mean(dim=0), torch.zeros(16), atol=1e-4, rtol=0)
    assert scores.square().mean().item() == pytest.approx(1, abs=0.02)
    spread = scores.std(dim=0)
    assert (spread.max() / spread.min() < 1.05) == whiten


def test_fewer_items_than_codes_works() -> None:
    embedding = clusters(items=9)
    codec, report = train_rqvae(embedding, SMALL)
    codes = codec.encode(embedding.matrix)
    assert codes.shape == (9, 3)
    assert all(np.isfinite(book.numpy()).all() for book in codec.codebooks)
    assert np.isfinite(report["reconstruction_error"])


def test_quantize_sums_codes_and_pulls_the_latent_towards_them() -> None:
    books = [codebook([[1.0, 0.0], [0.0, 4.0]]), codebook([[0.5, 0.0], [0.0, -1.0]])]
    latent = torch.tensor([[2.0, 0.0]], requires_grad=True)
    quantized, commitment = quantize_and_follow(latent, books, decay=1.0)
    assert quantized.tolist() == [[1.5, 0.0]]  # [1, 0], then [.5, 0] for the residual [1, 0]
    assert commitment.item() == pytest.approx((1.0 + 0.25) / 2)  # mean squares over two axes, summed over levels
    commitment.backward()
    assert latent.grad is not None
    assert latent.grad.tolist() == [[1.0 + 0.5, 0.0]]  # 2 r / axes at each level


def test_codes_follow_their_members() -> None:
    book = codebook([[0.0, 0.0], [10.0, 10.0]])
    book.follow(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 0]), decay=0.5)
    # code 0: members .5 + .5 * 2, sum .5 * [6, 0]; code 1: half its weight, in the same place
    assert book.members.tolist() == [1.5, 0.5]
    assert book.vectors.tolist() == [[2.0, 0.0], [10.0, 10.0]]


def test_dead_codes_restart_on_items() -> None:
    latent = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    book = codebook([[0.0, 0.0], [1.0, 1.0], [500.0, 500.0]], members=10.0)
    book.members[2] = 0.01
    restarted = restart_dead_codes(latent, [book], below=0.2, generator=torch.Generator().manual_seed(0))
    assert restarted == 1
    assert (latent == book.vectors[2]).all(dim=1).any()
    assert book.vectors[:2].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert restart_dead_codes(latent, [book], below=0.2, generator=torch.Generator()) == 0


def test_an_invalid_config_is_refused() -> None:
    with pytest.raises(ValueError, match="levels"):
        RqVaeConfig(levels=0)


def test_kmeans_of_many_items_starts_from_a_sample_of_them() -> None:
    config = SMALL.model_copy(update={"levels": 1, "codes": 4, "batch": 100})
    centres = 10 * torch.eye(4)
    data = centres.repeat(KMEANS_ITEMS + 50, 1)
    (book,) = start_codebooks(torch.nn.Identity(), data, config, seed=0)
    found = book.vectors.argmax(1).sort()
    torch.testing.assert_close(book.vectors[found.indices], centres)
    assert float(book.members.sum()) == pytest.approx(config.batch)
    assert len(book.members.unique()) > 1, "of all items, every code has as many"
