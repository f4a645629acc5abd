"""The RQ-VAE: an autoencoder whose middle is a sum of M codes, one from each of M codebooks.

[paper] L = L_recon + L_quant. [open] everything else, as in TIGER: PCA first, an MLP on either side, k-means to
start from, codebooks that follow their members by moving averages, and dead codes restarted where items are.
The quantizer is written out here because a bundle needs it as a few plain tensors (`Codec`), and because all of its
random draws must follow the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

from serving.items.tokenizer import Codec, nearest
from training.config import RqVaeConfig
from training.ids.embed import ItemEmbedding

Progress = Callable[[int, int], None]  # (steps done, steps in all)
KMEANS_ITEMS = 256  # that k-means reads for each code, at most: more no longer move its centres


@dataclass(slots=True)
class Codebook:
    """One level: the codes, and the moving averages they are made of."""

    vectors: Tensor  # (C, d) = sums / members
    members: Tensor  # (C,) items per step
    sums: Tensor  # (C, d)

    @staticmethod
    def start(residual: Tensor, codes: int, share: float, seed: int) -> Codebook:
        """k-means centres of the residuals. share: size of a batch as a share of all items. residual: (I, d)."""
        points = residual.numpy()
        distinct = len(np.unique(points, axis=0))
        kmeans = KMeans(min(codes, distinct), n_init=1, max_iter=50, random_state=seed).fit(points)
        vectors = torch.from_numpy(kmeans.cluster_centers_.astype(np.float32))
        members = torch.from_numpy(np.bincount(kmeans.labels_, minlength=len(vectors)).astype(np.float32)) * share
        if missing := codes - len(vectors):
            # fewer distinct points than codes: the rest start dead, out of reach of every item
            far = vectors.abs().max() + 1.0
            vectors = torch.cat([vectors, far * 1e3 * torch.ones(missing, vectors.shape[1])])
            members = torch.cat([members, torch.zeros(missing)])
        return Codebook(vectors, members, vectors * members[:, None])

    def follow(self, residual: Tensor, codes: Tensor, decay: float) -> None:
        """Move every code towards the mean of its members. Shapes: (B, d), (B,)."""
        members = torch.zeros_like(self.members).index_add_(0, codes, torch.ones(len(codes)))
        sums = torch.zeros_like(self.sums).index_add_(0, codes, residual)
        self.members.mul_(decay).add_(members, alpha=1 - decay)
        self.sums.mul_(decay).add_(sums, alpha=1 - decay)
        alive = self.members > 1e-3
        self.vectors[alive] = self.sums[alive] / self.members[alive, None]

    def restart_dead(self, residual: Tensor, below: float, generator: torch.Generator) -> int:
        """Put codes with too few members onto residuals drawn at random. Returns how many. residual: (B, d)."""
        even = len(residual) / len(self.vectors)
        dead = torch.nonzero(self.members < below * even).flatten()
        drawn = torch.randperm(len(residual), generator=generator)[: len(dead)]
        dead = dead[: len(drawn)]
        self.vectors[dead] = residual[drawn]
        self.members[dead] = even
        self.sums[dead] = residual[drawn] * even
        return len(dead)


def train_rqvae(
    embedding: ItemEmbedding, config: RqVaeConfig, seed: int = 0, progress: Progress | None = None
) -> tuple[Codec, dict[str, float]]:
    """Train on all items' embeddings. Equal input, config and seed give equal codes on one machine.

    Returns the codec, and how well it reconstructs, as shares of the variance that PCA kept: "autoencoder_error"
    without the quantizer, "reconstruction_error" with it; "pca_variance" is the share of all variance kept.
    """
    matrix = embedding.matrix
    pca = PCA(min(config.pca, *matrix.shape), whiten=config.whiten, svd_solver="covariance_eigh", random_state=seed)
    scores = pca.fit_transform(matrix)
    size = max(float(scores.std()), 1e-12)
    axes = pca.components_.T / (np.sqrt(pca.explained_variance_) if config.whiten else 1.0)
    mean, projection = (torch.from_numpy(a.astype(np.float32)) for a in (pca.mean_, axes / size))
    data = (torch.from_numpy(matrix) - mean) @ projection

    generator = torch.Generator().manual_seed(seed)
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = data.shape[1]
        encoder = nn.Sequential(nn.Linear(width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.latent))
        decoder = nn.Sequential(nn.Linear(config.latent, config.hidden), nn.ReLU(), nn.Linear(config.hidden, width))
        optimiser = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=config.lr)
        codebooks: list[Codebook] = []
        for step, rows in zip(range(config.steps), _batches(len(data), config.batch, generator), strict=False):
            if step == config.warmup_steps or (step == config.steps - 1 and not codebooks):
                codebooks = start_codebooks(encoder, data, config, seed)
            batch = data[rows]
            latent = encoder(batch)
            quantized, commitment = quantize_and_follow(latent, codebooks, config.decay)
            # straight through: the decoder sees the codes, the encoder gets the gradient
            reconstruction = decoder(latent + (quantized - latent).detach()) if codebooks else decoder(latent)
            loss = F.mse_loss(reconstruction, batch) + config.commitment * commitment
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            # none in the last quarter: a restarted code needs time to settle
            if codebooks and (step + 1) % config.restart_every == 0 and step < 0.75 * config.steps:
                restart_dead_codes(latent.detach(), codebooks, config.dead_below, generator)
            if progress:
                progress(step + 1, config.steps)

        linear = [layer for layer in encoder if isinstance(layer, nn.Linear)]
        codec = Codec(
            source=embedding.source,
            mean=mean,
            projection=projection,
            weights=tuple(layer.weight.detach().clone() for layer in linear),
            biases=tuple(layer.bias.detach().clone() for layer in linear),
            codebooks=tuple(codebook.vectors.clone() for codebook in codebooks),
            lift=embedding.lift,
        )
        with torch.inference_mode():
            latent = codec.latent(matrix)
            codes, _ = codec.quantize(latent)
            quantized = torch.stack([book[codes[:, m]] for m, book in enumerate(codec.codebooks)]).sum(dim=0)
            variance = max(float(data.square().mean()), 1e-12)
            report = {
                "pca_variance": float(pca.explained_variance_ratio_.sum()),
                "autoencoder_error": float(F.mse_loss(decoder(latent), data)) / variance,
                "reconstruction_error": float(F.mse_loss(decoder(quantized), data)) / variance,
            }
    return codec, report


def quantize_and_follow(latent: Tensor, codebooks: list[Codebook], decay: float) -> tuple[Tensor, Tensor]:
    """Sum of codes per item, and the encoder's part of L_quant = sum_m ||sg[r_m] - e_m||^2 + beta ||r_m - sg[e_m]||^2.

    The first term has no gradient step here: its minimum is the mean of a code's members, which the codebooks
    follow as a moving average. r_0 = latent, r_{m+1} = r_m - e_m. Shapes: (B, d) -> (B, d), ().
    """
    residual, quantized, commitment = latent, torch.zeros_like(latent), latent.new_zeros(())
    for codebook in codebooks:
        codes = nearest(residual.detach(), codebook.vectors)
        chosen = codebook.vectors[codes]
        commitment = commitment + F.mse_loss(residual, chosen)
        codebook.follow(residual.detach(), codes, decay)
        residual, quantized = residual - chosen, quantized + chosen
    return quantized, commitment


def start_codebooks(encoder: nn.Module, data: Tensor, config: RqVaeConfig, seed: int) -> list[Codebook]:
    """k-means, level by level, each on what the levels before it left over. data: (I, P); of more items than
    KMEANS_ITEMS a code, so many are drawn."""
    read = KMEANS_ITEMS * config.codes
    if len(data) > read:
        data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:read]]
    with torch.no_grad():
        residual = encoder(data)
    share = min(config.batch, len(data)) / len(data)
    codebooks = []
    for level in range(config.levels):
        codebooks.append(Codebook.start(residual, config.codes, share, seed + level))
        residual = residual - codebooks[-1].vectors[nearest(residual, codebooks[-1].vectors)]
    return codebooks


def restart_dead_codes(latent: Tensor, codebooks: list[Codebook], below: float, generator: torch.Generator) -> int:
    """Restart dead codes at every level from this batch's residuals. Returns how many. latent: (B, d)."""
    restarted, residual = 0, latent
    for codebook in codebooks:
        restarted += codebook.restart_dead(residual, below, generator)
        residual = residual - codebook.vectors[nearest(residual, codebook.vectors)]
    return restarted


def _batches(n_items: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows in shuffled batches, epoch after epoch, without end."""
    while True:
        yield from torch.split(torch.randperm(n_items, generator=generator), batch)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine's cores: equal seeds must give equal codes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
