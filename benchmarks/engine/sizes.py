"""The models that speed is measured on: two sizes, random weights, and a catalogue clustered as quantizers make it."""

from __future__ import annotations

import numpy as np
import torch

from serving.items.vocabulary import Vocabulary
from serving.network.model import StreamRec
from serving.network.t5 import ModelConfig

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

    Freshly drawn T5 weights repeat their input: its embedding outweighs what the layers add, and the tied output layer
    recognises it. Small embeddings let the layers decide, as training does, and the last norm restores the logits.
    """
    torch.manual_seed(seed)
    network = StreamRec(config, items, "token").eval()
    with torch.no_grad():
        network.t5.shared.weight.mul_(EMBEDDING)
        network.t5.decoder.final_layer_norm.weight.mul_(SHARPNESS / EMBEDDING)
    return network


def clustered_codes(items: int, levels: int, codes: int, seed: int) -> np.ndarray:
    """Distinct semantic IDs as residual quantizers make them: of each node's children, some hold far more items.

    Shape: (items, levels) int64, 0 <= code < codes.
    """
    rng = np.random.default_rng(seed)
    drawn = (codes * rng.random((2 * items, levels)) ** 2).astype(np.int64)  # small ones are drawn more often ...
    for level in range(1, levels):  # ... and which code is the small one differs from parent to parent
        drawn[:, level] = (drawn[:, level] + 97 * drawn[:, level - 1] + 31 * level) % codes
    distinct = np.unique(drawn, axis=0)
    if len(distinct) < items:
        raise ValueError(f"Only {len(distinct)} distinct IDs were drawn; ask for fewer items or more codes.")
    return rng.permutation(distinct)[:items]
