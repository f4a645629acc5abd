"""The models whose speed is measured: two sizes with random weights over a clustered catalogue, and a random bundle."""

from __future__ import annotations

import numpy as np
import torch

from serving.bundle import Bundle
from serving.items.catalogue import Catalogue
from serving.items.vocabulary import Vocabulary
from serving.network.model import StreamRec
from serving.network.t5 import ModelConfig
from serving.types import BundleSettings

ITEMS = 100_000
HISTORY_ITEMS = 20
VOCABULARY = Vocabulary(max_steps=8, codebook_sizes=(256, 256, 256, 256), reasoning_codes=32)
SIZES = {
    "5M": ModelConfig(VOCABULARY.size, 128, 64, 1024, num_layers=4, num_decoder_layers=4, num_heads=6),
    "25M": ModelConfig(VOCABULARY.size, 384, 64, 1536, num_layers=6, num_decoder_layers=6, num_heads=6),
}
EMBEDDING = 0.05  # standard deviation of the token embeddings
SHARPNESS = 3.0  # standard deviation of the logits, about a trained model's


def random_network(config: ModelConfig, items: int, seed: int) -> StreamRec:
    """A network whose logits are about as sharp as a trained one's.

    A newly initialised T5 repeats its input: the embedding outweighs what the layers add, and the tied output layer
    recognises it. With small embeddings the layers decide, as after training, and the last norm restores the logits.
    """
    torch.manual_seed(seed)
    network = StreamRec(config, items, "token").eval()
    with torch.no_grad():
        network.t5.shared.weight.mul_(EMBEDDING)
        network.t5.decoder.final_layer_norm.weight.mul_(SHARPNESS / EMBEDDING)
    return network


def clustered_codes(items: int, levels: int, codes: int, seed: int) -> np.ndarray:
    """Distinct semantic IDs, distributed as residual quantizers do: of a node's children, some hold far more items.

    Shape: (items, levels) int64, 0 <= code < codes.
    """
    rng = np.random.default_rng(seed)
    drawn = (codes * rng.random((2 * items, levels)) ** 2).astype(np.int64)  # small codes are drawn more often ...
    for level in range(1, levels):  # ... and are mapped to other codes under every parent
        drawn[:, level] = (drawn[:, level] + 97 * drawn[:, level - 1] + 31 * level) % codes
    distinct = np.unique(drawn, axis=0)
    if len(distinct) < items:
        raise ValueError(f"Only {len(distinct)} distinct IDs were drawn; use fewer items or more codes.")
    return rng.permutation(distinct)[:items]


def random_bundle() -> Bundle:
    """A bundle with a model of 5M parameters that reads 50 items, over 10,000 items. Only its weights are random."""
    torch.manual_seed(0)
    vocabulary = Vocabulary(4, (256, 256, 256, 256), 32)
    config = ModelConfig(vocabulary.size, 128, 64, 1024, num_layers=4, num_decoder_layers=4, num_heads=6)
    rng, items = np.random.default_rng(0), 10_000
    codes = np.unique(rng.integers(0, 256, (items + 100, 4)), axis=0)[:items]
    catalogue = Catalogue(
        item_ids=[str(row) for row in range(items)],
        tokens=vocabulary.tokens_of(codes),
        titles=[None] * items,
        categories=[[] for _ in range(items)],
        popularity=np.ones(items),
        subsets={},
    )
    settings = BundleSettings(max_items=50, default_steps=0, step_form="both")
    return Bundle("random", "random", vocabulary, settings, StreamRec(config, items, "both").eval(), catalogue)


def size(bundle: Bundle) -> str:
    """The number of parameters, such as 4.6M."""
    return f"{sum(parameter.numel() for parameter in bundle.network.t5.parameters()) / 1e6:.1f}M"
