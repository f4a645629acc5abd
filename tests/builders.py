"""Small real things that tests build in a moment: bundles with random weights over random catalogues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.bundle import Bundle
from serving.bundle_writer import write_bundle
from serving.items.catalogue import Catalogue
from serving.items.neighbours import Neighbours
from serving.items.order import Order
from serving.items.vocabulary import Vocabulary
from serving.network.eager import EagerRuntime
from serving.network.model import StreamRec
from serving.network.t5 import ModelConfig
from serving.search.ranker import Ranker
from serving.types import BundleSettings, Gate, StepForm


def random_codes(items: int, sizes: tuple[int, ...], seed: int) -> np.ndarray:
    """Distinct random semantic IDs. Shape: (items, M)."""
    rng = np.random.default_rng(seed)
    flat = rng.choice(int(np.prod(sizes)), size=items, replace=False)
    return np.stack(np.unravel_index(flat, sizes), axis=1)


def random_order(items: int, seed: int = 0) -> Order:
    rows = np.random.default_rng(seed).permutation(items).astype(np.int32)
    return Order(rows, np.argsort(rows).astype(np.int32))


# Every coefficient counts, and some histories come out on either side.
GATE = Gate(1.5, support=0.3, peak=-1.0, entropy=0.4, length=0.5, confidence=0.7, network_power=0.6, memory_power=3.0)


def random_neighbours(items: int, seed: int = 0, per_item: int = 4, *, mixed: bool = False) -> Neighbours:
    """Up to `per_item` weighted neighbours of each item; some items have none. mixed: some speak against an item."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, min(per_item, items) + 1, items)
    rows = [np.sort(rng.choice(items, count, replace=False)) for count in counts]
    weights = rng.uniform(-0.3 if mixed else 0, 1, counts.sum()).astype(np.float32)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    return Neighbours(offsets, np.concatenate(rows).astype(np.int32), weights, 0.8, None if mixed else 0.01)


def tiny_model(
    items: int = 60,
    *,
    sizes: tuple[int, ...] = (6, 5, 4),
    max_steps: int = 4,
    reasoning_codes: int = 8,
    shared_levels: int = 0,
    step_form: StepForm = "both",
    seed: int = 0,
    width: int = 16,
    int8: dict[str, object] | None = None,
    neighbours: bool = False,
    accuracy: Sequence[dict[str, Any]] = (),
    **settings: object,
) -> Bundle:
    """A bundle in memory: random weights, random distinct semantic IDs, two categories and a named subset `small`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vocabulary = Vocabulary(max_steps, sizes, reasoning_codes, shared_levels)
    config = ModelConfig(
        vocabulary.size, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2
    )
    made = BundleSettings(**{"max_items": 6, "default_steps": min(2, max_steps), "step_form": step_form, **settings})  # type: ignore[arg-type]
    network = StreamRec(config, items, step_form, made.ages, times=made.time_bias, reads_items=made.item_input)
    for parameter in network.heads.parameters():  # zero-initialised parts would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    catalogue = Catalogue(
        item_ids=[f"i{row}" for row in range(items)],
        tokens=vocabulary.tokens_of(random_codes(items, sizes, seed)),
        titles=[f"Thing number {row}" for row in range(items)],
        categories=[["even"] if row % 2 == 0 else ["odd"] for row in range(items)],
        popularity=rng.permutation(items).astype(float),
        subsets={"small": np.arange(min(5, items))},
    )
    graph = random_neighbours(items, seed, mixed=made.gate is not None) if neighbours else None
    return Bundle(
        "tiny", f"tiny-{seed}", vocabulary, made, network.eval(), catalogue, [*accuracy], int8=int8, neighbours=graph
    )


def measured_gains(gains: Sequence[tuple[float, float, float]], ndcg: float = 0.4) -> list[dict[str, Any]]:
    """What export writes of a model's accuracy. gains: of 1, 2, … steps over none, with the ends of their intervals."""
    users = {"recall@10": 0.6, "users": 2000, "of": 20000, "split": "valid"}
    rows: list[dict[str, Any]] = [{"steps": 0, "ndcg@10": ndcg} | users]
    for steps, (gain, low, high) in enumerate(gains, start=1):
        interval = {"gain": gain, "gain_low": low, "gain_high": high, "detectable": 0.0071}
        rows.append({"steps": steps, "ndcg@10": round(ndcg + gain, 5)} | users | interval)
    return rows


def tiny_bundle(folder: Path, items: int = 60, **options: object) -> Path:
    """The same on disk."""
    return on_disk(folder, tiny_model(items, **options))  # type: ignore[arg-type]


def on_disk(folder: Path, bundle: Bundle) -> Path:
    def write_tokenizer(path: Path) -> None:
        (path / "tokenizer.json").write_text(json.dumps({"kind": "random"}))

    write_bundle(folder, bundle, model_card="# tiny\n", write_tokenizer=write_tokenizer)
    return folder


def ranker_of(bundle: Bundle) -> Ranker:
    """Full ranking with a bundle's network in eager torch."""
    tokens = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    runtime = EagerRuntime(bundle.network, tokens, bundle.settings.attention)
    return Ranker.of(runtime, bundle.vocabulary, bundle.settings, bundle.neighbours)
