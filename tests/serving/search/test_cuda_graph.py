"""The static form of the search: padding, buckets and fixed buffers, with a recorder that simply runs again.

CUDA itself is not needed: what a graph adds to this is only that `run` is not Python any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch

from serving.errors import EngineError
from serving.items.rules import RuleBook
from serving.items.trie import build_trie
from serving.network.eager import EagerRuntime
from serving.search import cuda_graph as graph
from serving.search.beam import search
from serving.search.cuda_graph import RecordedSearch, padded_batch
from serving.types import Beams, Rules
from tests.builders import tiny_model


def run_again(run: Callable[[], Beams]) -> tuple[Callable[[], None], Beams]:
    """What a CUDA graph does, by hand: every replay writes into the beams of the recording."""
    beams = run()

    def replay() -> None:
        fresh = run()
        for field in fields(Beams):
            getattr(beams, field.name).copy_(getattr(fresh, field.name))

    return replay, beams


@pytest.fixture
def parts():
    bundle = tiny_model(40, paths=2, dense_candidates=4)
    tokens = torch.from_numpy(bundle.catalogue.tokens.astype(np.int64))
    runtime = EagerRuntime(bundle.network, tokens, bundle.settings.attention)
    trie = build_trie(bundle.catalogue.tokens)
    return runtime, trie, bundle.search_settings, RuleBook(trie, bundle.catalogue.members, rows=8)


@torch.inference_mode()
@pytest.mark.parametrize("ruled", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("prior", [False, True])
def test_replays_answer_like_the_search(parts, ruled, dense, prior):
    runtime, trie, settings, book = parts
    recorded = RecordedSearch(runtime, trie, settings, run_again)
    rng = torch.Generator().manual_seed(0)
    for batch, history in ((1, 3), (3, 40), (1, 33), (5, 8), (3, 7), (1, 1)):
        hidden = torch.randn(batch, history, 16, generator=rng)
        mask = torch.arange(history) < torch.randint(1, history + 1, (batch, 1), generator=rng)
        weight = torch.rand(batch, generator=rng) if dense else None
        known = torch.randn(batch, 40, generator=rng) if prior else None
        rules = [Rules(exclude=(row, 2 * row), catalogue="small" if row == 2 else None) for row in range(batch)]
        rules += [Rules()] * (padded_batch(batch) - batch)
        if not ruled:
            rules = [Rules()] * len(rules)
        with book.blocked(rules) as blocked:
            options = {"steps": 2, "beam_width": 12, "dense_weight": weight, "prior": known}
            found = recorded.search(hidden, mask, paths=2, blocked=blocked, **options)
        with book.blocked(rules[:batch]) as blocked:
            expected = search(runtime, trie, settings, runtime.memory(hidden, mask), blocked=blocked, **options)
        assert torch.equal(found.items, expected.items)
        for field in fields(Beams):
            torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), atol=1e-5, rtol=1e-5)
    assert len(recorded._recordings) == 5  # (1, 32) served two of the six


@torch.inference_mode()
def test_recordings_are_bounded(parts, monkeypatch):
    runtime, trie, settings, _ = parts
    monkeypatch.setattr(graph, "MOST_RECORDINGS", 2)
    made = []

    def counted(run: Callable[[], Beams]) -> tuple[Callable[[], None], Beams]:
        made.append(run)
        return run_again(run)

    recorded = RecordedSearch(runtime, trie, settings, counted)
    for width in (3, 4, 3, 5, 3, 4):
        recorded.search(torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool), steps=0, beam_width=width, paths=1)
    assert len(made) == 4  # 3, 4, 5 and again 4, which was used least recently when 5 came


@torch.inference_mode()
def test_what_one_request_left_in_the_buffers_reaches_no_other(parts):
    """States of a longer history that are no numbers lie behind the next one's: masked, and yet they would spread."""
    runtime, trie, settings, _ = parts
    recorded = RecordedSearch(runtime, trie, settings, run_again)
    options = {"steps": 1, "beam_width": 5}
    broken, hidden, mask = torch.full((1, 9, 16), torch.nan), torch.randn(1, 4, 16), torch.ones(1, 9, dtype=torch.bool)
    assert recorded.search(broken, mask, paths=2, **options).scores.isnan().all()
    found = recorded.search(hidden, mask[:, :4], paths=2, **options)
    expected = search(runtime, trie, settings, runtime.memory(hidden, mask[:, :4]), **options)
    assert torch.equal(found.items, expected.items)
    assert len(recorded._recordings) == 1


@torch.inference_mode()
def test_a_recording_keeps_the_rules_buffers_that_it_reads(parts):
    """It is found by their address, which another batch's buffers must not take while it lives."""
    runtime, trie, settings, _ = parts
    book = RuleBook(trie)
    recorded = RecordedSearch(runtime, trie, settings, lambda run: (lambda: None, run()))
    hidden, mask = torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool)
    with book.blocked([Rules(deny=(1,))]) as blocked:
        recorded.search(hidden, mask, steps=0, beam_width=3, paths=1, blocked=blocked)
    read = weakref.ref(blocked.own)
    with book.blocked([Rules(deny=(1,))] * 2) as blocked:  # the book needs more room, and moves
        pass
    assert read() is not None


@torch.inference_mode()
def test_a_search_that_reads_prepared_sets_has_a_recording_of_its_own(parts):
    runtime, trie, settings, book = parts
    recorded = RecordedSearch(runtime, trie, settings, run_again)
    hidden, mask = torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool)
    options = {"steps": 0, "beam_width": 12}
    for rules in (Rules(exclude=(1,)), Rules(catalogue="small"), Rules(exclude=(2,))):
        with book.blocked([rules]) as blocked:
            found = recorded.search(hidden, mask, paths=2, blocked=blocked, **options)
            expected = search(runtime, trie, settings, runtime.memory(hidden, mask), blocked=blocked, **options)
        assert torch.equal(found.items, expected.items)
    assert len(recorded._recordings) == 2


def test_a_failed_recording_is_an_error(parts):
    runtime, trie, settings, _ = parts

    def fails(_: Callable[[], Beams]) -> tuple[Callable[[], None], Beams]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(EngineError, match="could not be recorded"):
        RecordedSearch(runtime, trie, settings, fails).search(
            torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool), steps=0, beam_width=3, paths=1
        )
