"""Graph search on any machine: padding, buckets and fixed buffers, with a capture that runs the search again.

CUDA is not needed for that: all that a real graph changes is that `run` is no longer Python.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from serving.errors import EngineError
from serving.items.neighbours import NO_ITEM
from serving.items.rules import RuleBook
from serving.items.trie import build_trie
from serving.network.eager import EagerRuntime
from serving.search import cuda_graph
from serving.search.beam import search
from serving.search.cuda_graph import GraphSearch, padded_batch
from serving.search.memory import MemoryScores
from serving.types import Beams, Rules
from tests.answers import assert_same_answer
from tests.builders import GATE, tiny_model


def run_again(run: Callable[[], Beams]) -> tuple[Callable[[], None], Beams]:
    """What a CUDA graph does, in Python: every replay writes into the same beams."""
    beams = run()

    def replay() -> None:
        fresh = run()
        for field in fields(Beams):
            getattr(beams, field.name).copy_(getattr(fresh, field.name))

    return replay, beams


def assert_same_beams(found: Beams, expected: Beams) -> None:
    """The same answers, and the same of everything else that is known of the items and the paths."""
    for row in range(len(expected.items)):
        assert_same_answer(*(pairs(beams, row) for beams in (found, expected)))
    torch.testing.assert_close(found.gate, expected.gate)
    known_of_items = ("path", "token_log_probs", "dense")
    same = found.items == expected.items  # items of equal scores may swap
    for name in ("scores", "states", "reasoning_tokens", "reasoning_log_probs", *known_of_items):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if name in known_of_items:
            ours, theirs = ours[same], theirs[same]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def pairs(beams: Beams, row: int) -> list[tuple[int, float]]:
    """Items and scores; of fewer items than beams the rest is -1."""
    both = zip(beams.items[row].tolist(), beams.scores[row].tolist(), strict=True)
    return [(item, score) for item, score in both if item >= 0]


@pytest.fixture
def parts():
    bundle = tiny_model(40, paths=2, dense_candidates=4, age_bias=True, time_bias=True, gate=GATE)
    tokens = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    runtime = EagerRuntime(bundle.network, tokens, bundle.settings.attention)
    trie = build_trie(bundle.catalogue.tokens)
    return runtime, trie, bundle.search_settings, RuleBook(trie, bundle.catalogue.sets, rows=8)


@torch.inference_mode()
@pytest.mark.parametrize("ruled", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("memory", ["none", "added", "mixed", "decides"])
def test_replays_answer_like_the_search(parts, ruled, dense, memory):
    runtime, trie, settings, book = parts
    graphs, paths = GraphSearch(runtime, trie, settings, run_again), 1 if memory == "decides" else 2
    rng = torch.Generator().manual_seed(0)
    for batch, history in ((1, 3), (3, 40), (1, 33), (5, 8), (3, 7), (1, 1)):
        hidden = torch.randn(batch, history, 16, generator=rng)
        mask = torch.arange(history) < torch.randint(1, history + 1, (batch, 1), generator=rng)
        weight = torch.rand(batch, generator=rng) if dense else None
        scores, gate = torch.rand(batch, 9, generator=rng).log_softmax(-1), torch.randn(batch, generator=rng)
        items = torch.rand(batch, 40, generator=rng).topk(9).indices.sort(1).values
        items[:, batch:] = NO_ITEM  # batches touch different numbers of items
        found_in_memory = {
            "none": None,
            "added": MemoryScores(items, scores, scores[:, 0] - 3, None),
            "mixed": MemoryScores(items, scores.exp(), torch.zeros(batch), gate),
            "decides": MemoryScores(items, scores.exp(), torch.zeros(batch), gate, decides=True),
        }[memory]
        rules = [Rules(exclude=(row, 2 * row), catalogue="small" if row == 2 else None) for row in range(batch)]
        rules += [Rules()] * (padded_batch(batch) - batch)
        if not ruled:
            rules = [Rules()] * len(rules)
        buckets = torch.randint(0, 32, mask.shape, generator=rng) * mask if dense else None
        with book.blocked(rules) as blocked:
            options = {"steps": 2, "beam_width": 12, "dense_weight": weight, "memory": found_in_memory}
            found = graphs.search(hidden, mask, paths=paths, blocked=blocked, buckets=buckets, **options)
        cross = runtime.cross_keys_values(hidden, mask, buckets)
        with book.blocked(rules[:batch]) as blocked:
            expected = search(runtime, trie, replace(settings, paths=paths), cross, blocked=blocked, **options)
        assert_same_beams(found, expected)
    assert len(graphs._graphs) == 5  # (1, 32) served two of the six


@torch.inference_mode()
def test_the_number_of_graphs_is_bounded(parts, monkeypatch):
    runtime, trie, settings, _ = parts
    monkeypatch.setattr(cuda_graph, "MAX_GRAPHS", 2)
    made = []

    def counted(run: Callable[[], Beams]) -> tuple[Callable[[], None], Beams]:
        made.append(run)
        return run_again(run)

    graphs = GraphSearch(runtime, trie, settings, counted)
    for width in (3, 4, 3, 5, 3, 4):
        graphs.search(torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool), steps=0, beam_width=width, paths=1)
    assert len(made) == 4  # 3, 4, 5 and again 4, which was used least recently when 5 came


@torch.inference_mode()
def test_no_request_sees_what_an_earlier_one_left_in_the_buffers(parts):
    """NaN states of a longer history would spread to the next one, although they are masked."""
    runtime, trie, settings, _ = parts
    graphs = GraphSearch(runtime, trie, settings, run_again)
    options = {"steps": 1, "beam_width": 5}
    broken, hidden, mask = torch.full((1, 9, 16), torch.nan), torch.randn(1, 4, 16), torch.ones(1, 9, dtype=torch.bool)
    assert graphs.search(broken, mask, paths=2, **options).scores.isnan().all()
    found = graphs.search(hidden, mask[:, :4], paths=2, **options)
    expected = search(runtime, trie, settings, runtime.cross_keys_values(hidden, mask[:, :4]), **options)
    assert_same_beams(found, expected)
    assert len(graphs._graphs) == 1


@torch.inference_mode()
def test_a_graph_keeps_the_buffers_of_the_rules_that_it_reads(parts):
    """It is looked up by their address, which must not be reused for other buffers while the graph exists."""
    runtime, trie, settings, _ = parts
    book = RuleBook(trie)
    graphs = GraphSearch(runtime, trie, settings, lambda run: (lambda: None, run()))
    hidden, mask = torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool)
    with book.blocked([Rules(deny=(1,))]) as blocked:
        graphs.search(hidden, mask, steps=0, beam_width=3, paths=1, blocked=blocked)
    read = weakref.ref(blocked.own)
    with book.blocked([Rules(deny=(1,))] * 2) as blocked:  # the book needs larger buffers
        pass
    assert read() is not None


@torch.inference_mode()
def test_a_search_that_reads_prepared_sets_has_a_graph_of_its_own(parts):
    runtime, trie, settings, book = parts
    graphs = GraphSearch(runtime, trie, settings, run_again)
    hidden, mask = torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool)
    options = {"steps": 0, "beam_width": 12}
    cross = runtime.cross_keys_values(hidden, mask)
    for rules in (Rules(exclude=(1,)), Rules(catalogue="small"), Rules(exclude=(2,))):
        with book.blocked([rules]) as blocked:
            found = graphs.search(hidden, mask, paths=2, blocked=blocked, **options)
            expected = search(runtime, trie, settings, cross, blocked=blocked, **options)
        assert_same_beams(found, expected)
    assert len(graphs._graphs) == 2


def test_a_failed_capture_is_an_error(parts):
    runtime, trie, settings, _ = parts

    def fails(_: Callable[[], Beams]) -> tuple[Callable[[], None], Beams]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(EngineError, match="could not be captured"):
        GraphSearch(runtime, trie, settings, fails).search(
            torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool), steps=0, beam_width=3, paths=1
        )
