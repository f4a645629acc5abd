"""Rules as counts over the trie against their definition, `Catalogue.permitted`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.catalogue import Catalogue
from serving.errors import RequestError, UnknownCatalogue
from serving.rules import RuleBook
from serving.trie import Trie, build_trie
from serving.types import Rules
from tests.builders import random_codes


def shop(items: int, seed: int, sizes: tuple[int, ...] = (5, 4, 6)) -> Catalogue:
    rng = np.random.default_rng(seed)
    return Catalogue(
        item_ids=[f"i{row}" for row in range(items)],
        tokens=random_codes(items, sizes, seed).astype(np.int32),
        titles=[None] * items,
        categories=[[name for name in "abc" if rng.random() < 0.4] or ["rest"] for _ in range(items)],
        popularity=rng.permutation(items).astype(float),
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
    every = torch.arange(trie.nodes, dtype=torch.int32).expand(len(rules), 1, -1)
    with book.blocked(rules) as blocked:
        if blocked is None:
            return np.zeros((len(rules), trie.nodes), bool), np.zeros((len(rules), len(trie.item)), bool)
        return blocked.of(every).squeeze(1).numpy(), blocked.items().numpy()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    items=st.integers(1, 60),
    levels=st.integers(1, 3),
    batches=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    sets=st.integers(0, 3),
)
def test_blocks_what_the_definition_blocks(seed, items, levels, batches, sets):
    """Also when hardly a prepared set fits, so that sets push each other out or have to do without."""
    sizes = (5, 4, 6)[:levels]
    catalogue = shop(min(items, int(np.prod(sizes))), seed, sizes)
    trie = build_trie(catalogue.tokens)
    rng = np.random.default_rng(seed)
    book = RuleBook(trie, catalogue.members, set_bytes=sets * 2 * trie.nodes)
    for batch in batches:
        rules = [random_rules(rng, catalogue) for _ in range(batch)]
        nodes, by_item = ask(book, trie, rules)
        for rule, of_nodes, of_items in zip(rules, nodes, by_item, strict=True):
            permitted = catalogue.permitted(rule)
            np.testing.assert_array_equal(of_nodes, blocked_nodes(trie, permitted))
            np.testing.assert_array_equal(of_items, ~permitted)


def test_nothing_is_left_behind():
    catalogue = shop(60, 0)
    trie = build_trie(catalogue.tokens)
    book = RuleBook(trie, catalogue.members)
    everything = Rules(deny=tuple(range(60)))
    with pytest.raises(ZeroDivisionError), book.blocked([everything]) as blocked:
        assert blocked is not None and bool(blocked.own.all())
        raise ZeroDivisionError
    assert not blocked.own.any()
    with pytest.raises(RequestError, match="Unknown category 'd'"):
        ask(book, trie, [everything, Rules(categories=("d",))])
    with pytest.raises(UnknownCatalogue):
        ask(book, trie, [everything, Rules(catalogue="d")])
    nodes, items = ask(book, trie, [Rules(exclude=(3,)), Rules()])
    assert items.sum() == 1 and items[0, 3] and not nodes[1].any()


def test_two_batches_at_a_time_are_refused():
    trie = build_trie(shop(9, 0).tokens)
    book = RuleBook(trie)
    with book.blocked([Rules(deny=(1,))]):
        with pytest.raises(RuntimeError, match="still in use"), book.blocked([Rules(deny=(2,))]):
            pass
    with book.blocked([Rules(deny=(2,))]) as blocked:
        assert blocked is not None and blocked.items()[0].tolist() == [row == 2 for row in range(9)]


def test_buffers_stay_where_they_are():
    """A recorded search reads them by address."""
    catalogue = shop(60, 1)
    book = RuleBook(build_trie(catalogue.tokens), catalogue.members, rows=4)
    places = set()
    for rules in ([Rules(deny=(1,))], [Rules(catalogue="most"), Rules(categories=("a",))], [Rules(allow=(1,))] * 4):
        with book.blocked(rules) as blocked:
            assert blocked is not None
            places.add((blocked.own.data_ptr(), blocked.inverted.data_ptr(), blocked.sets.data_ptr(),
                        blocked.set_of.data_ptr()))  # fmt: skip
    assert len(places) == 1


def test_takes_no_decision_on_the_host():
    """torch.export fails where a value decides what is computed."""
    catalogue = shop(60, 2)
    trie = build_trie(catalogue.tokens)
    book = RuleBook(trie, catalogue.members)

    class Step(torch.nn.Module):
        def forward(self, log_probs, node, own, inverted, sets, set_of):
            scores, child = trie.expand(log_probs, node, 1)
            return scores.masked_fill(type(blocked)(own, inverted, sets, set_of, trie.leaf).of(child), -torch.inf)

    with book.blocked([Rules(deny=tuple(range(0, 60, 2))), Rules(catalogue="most")]) as blocked:
        assert blocked is not None
        inputs = (torch.randn(2, 3, 9), torch.randint(1, 1 + trie.nodes_at(1), (2, 3)), blocked.own, blocked.inverted,
                  blocked.sets, blocked.set_of)  # fmt: skip
        exported = torch.export.export(Step(), inputs).module()
        torch.testing.assert_close(exported(*inputs), Step()(*inputs))
