"""SASRec: a causal transformer over items, trained with the full softmax instead of sampled negatives.

p(next = j | i_1..i_t) = softmax_j(e_j . h_t), e tied to the input embeddings, the loss at every position. Kang and
McAuley 2018 sample one negative with a binary loss; with all items in the softmax the same network is much stronger
(Klenitskiy and Vasilev 2023), and the weaker form would be a straw man.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.accuracy.full_ranking import HISTORY_ITEMS


@dataclass(frozen=True, slots=True)
class Setting:
    width: int = 128
    layers: int = 2
    heads: int = 2
    dropout: float = 0.4
    learning_rate: float = 1e-3
    batch: int = 128
    max_epochs: int = 60
    patience: int = 5  # epochs without a better validation NDCG@10


class SASRec(nn.Module):
    def __init__(self, items: int, setting: Setting) -> None:
        super().__init__()
        self.items = items  # row `items` of the embedding is the padding
        self.embedding = nn.Embedding(items + 1, setting.width, padding_idx=items)
        self.position = nn.Embedding(HISTORY_ITEMS, setting.width)
        layer = nn.TransformerEncoderLayer(
            setting.width,
            setting.heads,
            4 * setting.width,
            setting.dropout,
            activation="gelu",
            batch_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, setting.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(setting.width)
        self.dropout = nn.Dropout(setting.dropout)
        for weight in self.parameters():
            if weight.dim() == 2:  # torch's embeddings of std 1 saturate the tied softmax, its layers drown the items
                nn.init.normal_(weight, std=0.02)

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        """history: (B, S) int64, oldest first, padded on the right. Returns the states (B, S, D).

        Padding on the right needs no mask: no real position looks at what comes after it.
        """
        length = history.shape[1]
        hidden = self.dropout(self.norm(self.embedding(history) + self.position.weight[:length]))
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        states: torch.Tensor = self.layers(hidden, mask=causal, is_causal=True)
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., I)."""
        return states @ self.embedding.weight[: self.items].T

    @torch.inference_mode()
    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """Shape: (U, I) float32. Histories are 1 to 20 item rows, oldest first."""
        self.eval()
        last = torch.tensor([len(h) - 1 for h in histories])
        states = self(self._padded(histories))
        return self.logits(states[torch.arange(len(last)), last]).numpy()

    def loss(self, windows: list[np.ndarray]) -> torch.Tensor:
        """Mean cross-entropy of the next item over all positions. windows: 2 to 21 item rows each."""
        whole = self._padded(windows)
        history, following = whole[:, :-1], whole[:, 1:]
        real = following != self.items  # (B, S): the large product with all items is spent on real positions only
        return F.cross_entropy(self.logits(self(history)[real]), following[real])

    def _padded(self, sequences: list[np.ndarray]) -> torch.Tensor:
        tensors = [torch.from_numpy(s.astype(np.int64)) for s in sequences]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=self.items)


def windows(sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Pieces of at most 21 items, cut from the end; neighbours share one item, so that every step is kept once."""
    pieces = []
    for sequence in sequences:
        for end in range(len(sequence), 1, -HISTORY_ITEMS):
            pieces.append(sequence[max(0, end - HISTORY_ITEMS - 1) : end])
    return pieces


def batches(pieces: list[np.ndarray], size: int, rng: np.random.Generator) -> Iterator[list[np.ndarray]]:
    """Batches in random order whose pieces are of similar length: padding is most of the cost otherwise."""
    shuffled = rng.permutation(len(pieces))
    lengths = np.array([len(p) for p in pieces])
    pools = [shuffled[n : n + 16 * size] for n in range(0, len(shuffled), 16 * size)]
    ordered = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
    cuts = [pool[n : n + size] for pool in ordered for n in range(0, len(pool), size)]
    for n in rng.permutation(len(cuts)):
        yield [pieces[row] for row in cuts[n]]


def train(
    sequences: list[np.ndarray],
    items: int,
    setting: Setting,
    seed: int,
    validation_ndcg: Callable[[SASRec], float],
    report: Callable[[str], None] = print,
) -> tuple[SASRec, int, float]:
    """Trains until validation stops rising. Returns the best epoch's model, that epoch, and its validation NDCG@10."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = SASRec(items, setting)
    optimiser = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    pieces = windows(sequences)
    best_state, best_epoch, best_ndcg = copy.deepcopy(model.state_dict()), 0, -1.0
    for epoch in range(1, setting.max_epochs + 1):
        model.train()
        losses = []
        for batch in batches(pieces, setting.batch, rng):
            loss = model.loss(batch)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            losses.append(loss.item())
        ndcg = validation_ndcg(model)
        report(f"sasrec epoch {epoch}: loss {np.mean(losses):.3f}, validation ndcg@10 {ndcg:.4f}")
        if ndcg > best_ndcg:
            best_state, best_epoch, best_ndcg = copy.deepcopy(model.state_dict()), epoch, ndcg
        elif epoch - best_epoch >= setting.patience:
            break
    model.load_state_dict(best_state)
    return model, best_epoch, best_ndcg
