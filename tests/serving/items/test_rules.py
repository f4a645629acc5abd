"""Rules over the trie against their definition, `Catalogue.permitted`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from serving.errors import RequestError, UnknownCatalogue
from serving.items.blocked import Blocked
from serving.items.catalogue import Catalogue
from serving.items.order import ItemSets
from serving.items.rules import RuleBook
from serving.items.trie import TABLE_ENTRIES, Trie, build_trie
from serving.types import Rules
from tests.builders import random_codes, random_order


def shop(items: int, seed: int, sizes: tuple[int, ...] = (5, 4, 6)) -> Catalogue:
    rng = np.random.default_rng(seed)
    return Catalogue(
        item_ids=[f"i{row}" for row in range(items)],
        tokens=random_codes(items, sizes, seed).astype(np.int32),
        titles=[None] * items,
        categories=[[name for name in "abc" if rng.random() < 0.4] or ["rest"] for _ in range(items)],
        popularity=np.maximum(0.0, rng.permutation(items) - items // 4),  # a quarter of the items is new
        subsets={
            "some": rng.integers(0, items, 7),  # with repetitions
            "most": np.flatnonzero(rng.random(items) < 0.8),
            "none": np.array([], dtype=np.int64),
        },
    )


def random_rules(rng: np.random.Generator, catalogue: Catalogue) -> Rules:
    def rows(most: float) -> tuple[int, ...]:
        return tuple(rng.integers(0, len(catalogue), int(rng.integers(0, 1 + most * len(catalogue)))).tolist())

    names = sorted(catalogue.category_names)
    return Rules(
        exclude=rows(1.5) if rng.random() < 0.7 else (),
        deny=rows(3) if rng.random() < 0.4 else (),
        allow=rows(2) if rng.random() < 0.4 else None,
        categories=tuple(rng.choice(names, rng.integers(0, len(names) + 1)).tolist()) if rng.random() < 0.4 else (),
        catalogue=str(rng.choice(["some", "most", "none"])) if rng.random() < 0.4 else None,
        new_only=bool(rng.random() < 0.3),
    )


def blocked_nodes(trie: Trie, permitted: np.ndarray) -> np.ndarray:
    """By the definition: no leaf at or below is permitted. Shapes: (I,) -> (N,) bool."""
    blocked = np.ones(trie.nodes, dtype=bool)
    for leaf, row in enumerate(trie.item.tolist()):
        node = leaf + trie.level_start[trie.levels]
        for _ in range(trie.levels + 1):
            blocked[node] &= not permitted[row]
            node = int(trie.parent[node])
    return blocked


def ask(book: RuleBook, trie: Trie, rules: list[Rules]) -> tuple[np.ndarray, np.ndarray]:
    """What is blocked of nodes, (B, N) bool, and of items, (B, I) bool."""
    nodes = np.ones((len(rules), trie.nodes), bool)
    with book.blocked(rules) as blocked:
        if blocked is None:
            return ~nodes, np.zeros((len(rules), len(trie.item)), bool)
        for level in range(trie.levels):
            parents = torch.arange(*trie.level_start[level : level + 2]).expand(len(rules), -1)
            log_probs = torch.zeros(*parents.shape, int(trie.token.max()) + 1)
            scores, child = blocked.expand(trie, log_probs, parents, level)
            request, *index = torch.where(scores == 0)
            nodes[request, child[request, *index]] = False
        by_item = blocked.items(trie).numpy()
    nodes[:, 0] = by_item.all(1)  # nothing leads to the root
    return nodes, by_item


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    items=st.integers(1, 60),
    levels=st.integers(1, 3),
    batches=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    sets=st.integers(0, 3),
    entries=st.sampled_from([0, 20, TABLE_ENTRIES]),
    table_bytes=st.sampled_from([0, 0.8, 8]),
    few=st.sampled_from([0, 0.3, 1]),
    order=st.sampled_from(["rows", "leaves", "random"]),
)
def test_blocked_nodes_are_those_of_the_definition(
    seed, items, levels, batches, sets, entries, table_bytes, few, order
):
    """With tables and with runs; masks of sets as floats, as bits and not at all; items in any order; and with room for
    hardly any prepared set, so that sets replace each other or cannot be prepared."""
    sizes = (5, 4, 11)[:levels]
    catalogue = shop(min(items, int(np.prod(sizes))), seed, sizes)
    trie = build_trie(catalogue.tokens, table_entries=entries)
    rng = np.random.default_rng(seed)
    if order != "rows":
        catalogue.fields.arrange(trie.order if order == "leaves" else random_order(len(catalogue), seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.items.ancestry.LEAST_RUN", seed % 3)
        patch.setattr("serving.items.table_masks.TABLE_BYTES", table_bytes)
        patch.setattr("serving.items.prepared_sets.FEW", few)
        book = RuleBook(trie, catalogue.sets, set_bytes=sets * 2 * trie.nodes)
        for batch in batches:
            rules = [random_rules(rng, catalogue) for _ in range(batch)]
            nodes, by_item = ask(book, trie, rules)
            for rule, of_nodes, of_items in zip(rules, nodes, by_item, strict=True):
                permitted = catalogue.permitted(rule)
                np.testing.assert_array_equal(of_nodes, blocked_nodes(trie, permitted))
                np.testing.assert_array_equal(of_items, ~permitted)


@pytest.mark.parametrize("table_bytes", [0.8, 8], ids=["bits", "floats"])
@pytest.mark.parametrize("children", [127, 128, 255, 256])
def test_all_children_of_a_node_are_counted(children: int, table_bytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: none is blocked, until the last of them is."""
    monkeypatch.setattr("serving.items.table_masks.TABLE_BYTES", table_bytes)
    tokens = np.stack([np.zeros(children, np.int32), np.arange(children, dtype=np.int32)], 1)
    trie, everything = build_trie(tokens), tuple(range(children))
    book = RuleBook(trie, ItemSets(lambda rules: np.ones(children, bool)))
    nodes, _ = ask(book, trie, [Rules(catalogue="all"), Rules(catalogue="all", deny=everything[1:])])
    assert not nodes[0].any() and not nodes[1, :3].any() and nodes[1, 3:].all()
    nodes, _ = ask(book, trie, [Rules(catalogue="all", deny=everything)])
    assert nodes.all()


def test_nothing_is_left_in_the_buffers():
    catalogue = shop(60, 0)
    trie = build_trie(catalogue.tokens)
    book = RuleBook(trie, catalogue.sets)
    everything = Rules(deny=tuple(range(60)))
    with pytest.raises(ZeroDivisionError), book.blocked([everything]) as blocked:
        assert blocked is not None and bool(blocked.own[:, : trie.nodes].all())
        raise ZeroDivisionError
    assert not blocked.own.any()
    with pytest.raises(RequestError, match="No item is in one of these"):
        ask(book, trie, [everything, Rules(categories=("d",))])
    with pytest.raises(UnknownCatalogue):
        ask(book, trie, [everything, Rules(catalogue="d")])
    nodes, items = ask(book, trie, [Rules(exclude=(3,)), Rules()])
    assert items.sum() == 1 and items[0, 3] and not nodes[1].any()


@pytest.mark.parametrize("step", ["_fill", "_write", "_view"])
def test_a_batch_that_fails_at_any_step_does_not_stop_those_behind_it(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = shop(60, 0)
    trie = build_trie(catalogue.tokens)
    book = RuleBook(trie, catalogue.sets)
    do, calls = getattr(book, step), []

    def fails_once(*arguments: Any) -> Any:
        calls.append(1)
        done = do(*arguments)
        if len(calls) == 1:
            raise MemoryError
        return done

    monkeypatch.setattr(book, step, fails_once)
    with pytest.raises(MemoryError), book.blocked([Rules(deny=(1, 2)), Rules(allow=(3,))]):
        pass
    assert not book._own.any()
    _, items = ask(book, trie, [Rules(deny=(4,)), Rules()])
    assert np.argwhere(items).tolist() == [[0, 4]]


def test_a_batch_for_which_there_is_no_room_does_not_stop_those_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = shop(60, 0)
    trie = build_trie(catalogue.tokens)
    book = RuleBook(trie, catalogue.sets)
    for name in ("arange", "from_numpy"):
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, lambda *_, **__: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(MemoryError), book.blocked([Rules(deny=(1,))] * 4):
                pass
        _, items = ask(book, trie, [Rules(deny=(row,)) for row in range(4)])
        assert np.argwhere(items).tolist() == [[row, row] for row in range(4)]
        book = RuleBook(trie, catalogue.sets)


def test_a_batch_without_rules_is_searched_without_any() -> None:
    book = RuleBook(build_trie(shop(9, 0).tokens))
    with book.blocked([Rules(), Rules()]) as blocked:
        assert blocked is None  # so that most batches pay nothing
    with book.blocked([Rules(), Rules(deny=(1,))]) as blocked:
        assert blocked is not None


def test_two_batches_at_a_time_are_refused():
    trie = build_trie(shop(9, 0).tokens)
    book = RuleBook(trie)
    with book.blocked([Rules(deny=(1,))]):
        with pytest.raises(RuntimeError, match="still in use"), book.blocked([Rules(deny=(2,))]):
            pass
    with book.blocked([Rules(deny=(2,))]) as blocked:
        assert blocked is not None and blocked.items(trie)[0].tolist() == [row == 2 for row in range(9)]


def test_buffers_stay_where_they_are():
    """A captured graph reads them by address."""
    catalogue = shop(60, 1)
    book = RuleBook(build_trie(catalogue.tokens), catalogue.sets, rows=4)
    addresses = set()
    for rules in ([Rules(deny=(1,))], [Rules(catalogue="most"), Rules(categories=("a",))], [Rules(allow=(1,))] * 4):
        with book.blocked(rules) as blocked:
            assert blocked is not None
            parts = (blocked.own, blocked.inverted, blocked.sets, blocked.set_offset, *tree_leaves(blocked.level_masks))
            addresses.add(tuple(part.untyped_storage().data_ptr() for part in parts))
    assert len(addresses) == 1


def test_nothing_is_decided_on_the_host():
    """torch.export fails where a value decides what is computed."""
    catalogue = shop(60, 2)
    trie = build_trie(catalogue.tokens)
    book = RuleBook(trie, catalogue.sets)

    class Step(torch.nn.Module):
        def forward(self, log_probs, node, parts):
            return Blocked(*parts).expand(trie, log_probs, node, 1)

    with book.blocked([Rules(deny=tuple(range(0, 60, 2))), Rules(catalogue="most")]) as blocked:
        assert blocked is not None
        parts = tuple(getattr(blocked, field.name) for field in fields(Blocked))
        inputs = (torch.randn(2, 3, 9), torch.randint(1, 1 + trie.nodes_at(1), (2, 3)), parts)
        exported = torch.export.export(Step(), inputs).module()
        torch.testing.assert_close(exported(*inputs), Step()(*inputs))
