"""The search takes no decision on the host: what a CUDA graph or an exported program needs, shown without either."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from serving.bundle import Bundle
from serving.items.blocked import Blocked
from serving.items.rules import RuleBook
from serving.items.trie import build_trie
from serving.network.eager import EagerRuntime
from serving.search.beam import search
from serving.search.cuda_graph import GraphSearch
from serving.search.memory import MemoryScores
from serving.types import Rules
from tests.builders import tiny_model
from tests.meta import OffTheDevice, captured_once

# What makes the host wait for the device, gives a shape that depends on data, or copies host memory during a capture.
ON_THE_HOST = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "lift_fresh",
    "_to_copy.device",
    "index.bool",
}


class HostDecisions(TorchDispatchMode):
    """Collects every operation of `ON_THE_HOST`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name == "_to_copy" and (kwargs or {}).get("device") is not None:
            name = "_to_copy.device"
        if name == "index" and any(index is not None and index.dtype is torch.bool for index in args[1]):
            name = "index.bool"
        if name in ON_THE_HOST:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Search(torch.nn.Module):
    """A whole search as one function of tensors."""

    def __init__(self, bundle: Bundle, steps: int) -> None:
        super().__init__()
        self.network, self.settings, self.steps = bundle.network, bundle.search_settings, steps
        tokens = bundle.catalogue.tokens
        self.runtime = EagerRuntime(
            bundle.network, torch.from_numpy(tokens.astype(np.int64)), bundle.settings.attention
        )
        self.trie = build_trie(tokens)

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor,
        weight: torch.Tensor,
        touched: torch.Tensor,
        shares: torch.Tensor,
        gate: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        cross = self.runtime.cross_keys_values(hidden, mask)
        beams = search(
            self.runtime, self.trie, self.settings, cross, steps=self.steps, beam_width=10, dense_weight=weight,
            memory=MemoryScores(touched, shares, torch.zeros_like(weight), gate),
        )  # fmt: skip
        return beams.items, beams.scores, beams.token_log_probs


def inputs(width: int = 16) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(3, 7, width),
        torch.ones(3, 7, dtype=torch.bool),
        torch.full((3,), 0.5),
        torch.stack([torch.arange(first, 40, 4) for first in range(3)]),
        torch.rand(3, 10),
        torch.randn(3),
    )


@pytest.mark.parametrize("form", ["token", "state", "both"])
@pytest.mark.parametrize("options", [{}, {"paths": 3}, {"paths": 3, "dense_candidates": 4}, {"age_bias": True}])
@torch.no_grad()
def test_nothing_is_decided_on_the_host(form, options):
    module = Search(tiny_model(40, step_form=form, **options), steps=2)
    with HostDecisions() as seen:
        module(*inputs())
    assert seen.found == []


@torch.no_grad()
def test_the_check_itself_sees_a_decision_on_the_host():
    scores = torch.ones(3)
    with HostDecisions() as seen:
        if scores.max() > 0:
            scores = scores[scores > 0]
        scores + torch.tensor([1.0])
    assert set(seen.found) == {"_local_scalar_dense", "index.bool", "lift_fresh"}


@pytest.mark.parametrize(
    ("table_entries", "options"),
    [
        (1 << 20, {"step_form": "token", "paths": 3}),
        (0, {"step_form": "state", "temperature": 0.8}),
        (0, {"step_form": "both", "paths": 2, "merge": "max", "dense_candidates": 4}),
    ],
)
@torch.inference_mode()
def test_a_captured_search_stays_on_the_device(table_entries, options):
    """On `meta`, where tensors have shapes and no values: to read one is an error, and the host has nothing to add."""
    bundle = tiny_model(40, **options)
    catalogue, width = bundle.catalogue, 16
    tokens = torch.from_numpy(catalogue.tokens.astype(np.int64)).to("meta")
    runtime = EagerRuntime(copy.deepcopy(bundle.network).to("meta"), tokens, bundle.settings.attention)
    trie = build_trie(catalogue.tokens, table_entries=table_entries)
    with RuleBook(trie, catalogue.sets).blocked([Rules(exclude=(1, 2), catalogue="small")] * 4) as rules:
        parts = [getattr(rules, field.name) for field in fields(Blocked)]
    there = Blocked(*tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), parts))
    hidden, mask = torch.empty(3, 7, width, device="meta"), torch.empty(3, 7, dtype=torch.bool, device="meta")
    weights, scores = torch.empty(3, device="meta"), torch.empty(3, 9, device="meta")
    added, mixed = (MemoryScores(scores.long(), scores, weights, gate) for gate in (None, weights))
    for blocked, weight, memory in (
        (None, None, None), (there, weights, None), (there, None, added), (there, None, mixed)
    ):  # fmt: skip
        graphs = GraphSearch(runtime, trie.to("meta"), bundle.search_settings, captured_once)
        with OffTheDevice() as seen:
            beams = graphs.search(
                hidden, mask, steps=2, beam_width=10, paths=bundle.settings.paths, blocked=blocked, dense_weight=weight,
                memory=memory,
            )  # fmt: skip
        assert seen.found == [] and beams.items.shape == (3, 10)


def test_the_check_itself_sees_what_the_host_adds():
    there = torch.empty(3, device="meta")
    with OffTheDevice() as seen:
        there + torch.ones(3).sum()
    assert seen.found == ["aten::ones", "aten::sum", "aten::add"]
    with pytest.raises(RuntimeError, match="meta"):
        bool(there.max() > 0)


@torch.no_grad()
def test_the_whole_search_exports_as_one_program():
    """Selection and trie included; a branch on data would be an error of the exporter."""
    module = Search(tiny_model(40, sizes=(8, 7), paths=2, dense_candidates=3), steps=1)
    assert len(module.runtime.item_vectors) == 40  # kept from the first use on, which must not be inside the export
    given = inputs()
    program = torch.export.export(module, given, strict=False).module()
    for values in (given, inputs()):
        for exported, direct in zip(program(*values), module(*values), strict=True):
            torch.testing.assert_close(exported, direct)
