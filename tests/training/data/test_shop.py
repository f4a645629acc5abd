"""The generated shop: deterministic, readable, and its best possible recall is as stated."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from training.data.prepare import leave_one_out
from training.data.read import read_data
from training.data.shop import (
    BRAND_LOYALTY,
    DEMO_SHOP,
    OPENING,
    ROLES,
    TIER_FIT,
    TIER_PRIOR,
    TREND,
    YEAR,
    best_gains,
    build_shop,
    next_item,
    shop_events,
    write_demo_shop,
    write_shop,
)
from training.data.shop_words import BRANDS, KITS, SERIES


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("shop")
    return folder, write_shop(folder, users=4000, items=1000, seed=3)


def test_the_words_fit_together():
    assert set(KITS) == set(BRANDS)
    assert all(len(brands) == 6 for brands in BRANDS.values()) and {len(series) for series in SERIES} == {6}
    products = [product for kits in KITS.values() for _, four in kits for product in four]
    assert len(products) == len(set(products)) == len(KITS) * 4 * ROLES
    subcategories = [name for kits in KITS.values() for name, _ in kits]
    assert len({*KITS, *subcategories, *products}) == len(KITS) + len(subcategories) + len(products)


def test_the_folder_reads_as_data(demo):
    folder, truth = demo
    data = read_data(folder)
    assert (len(data.user_ids), len(data.items)) == (4000, 1000)
    assert data.skipped == {}
    assert 9.5 < np.diff(data.offsets).mean() < 10.5 and np.diff(data.offsets).min() >= 5
    assert len(set(data.items.titles)) == 1000 and data.items.has_text
    assert all(len(categories) == 3 for categories in data.items.categories)
    for user in range(200):
        assert len(set(data.events(user).tolist())) == len(data.events(user))  # nothing is bought twice
        assert (np.diff(data.times[data.offsets[user] : data.offsets[user + 1]]) > 0).all()
    assert json.loads((folder / "truth.json").read_text()) == truth
    assert not list(folder.glob("*.part"))


def test_item_order_and_numbers_tell_nothing(demo):
    data = read_data(demo[0])
    product = np.unique([categories[2] for categories in data.items.categories], return_inverse=True)[1]
    neighbours = (product[1:] == product[:-1]).mean()
    assert neighbours < 0.03  # by chance: 1 in 192
    counts = np.bincount(data.sequence, minlength=1000)
    assert abs(np.corrcoef(np.arange(1000), counts)[0, 1]) < 0.12
    assert [int(item_id[1:]) for item_id in data.items.item_ids] == list(range(1000))


def test_same_seed_same_bytes_other_seed_other_shop(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_shop(tmp_path / name, users=300, items=64, seed=seed)
    for file in ("interactions.csv.gz", "items.jsonl", "truth.json"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c


def test_parquet_holds_the_same_events(tmp_path):
    write_shop(tmp_path / "csv", users=200, items=64, seed=1)
    write_shop(tmp_path / "parquet", users=200, items=64, seed=1, format="parquet")
    one, other = read_data(tmp_path / "csv"), read_data(tmp_path / "parquet")
    assert one.items == other.items and one.user_ids == other.user_ids
    assert np.array_equal(one.sequence, other.sequence) and np.array_equal(one.times, other.times)


def test_users_come_in_chunks_whose_size_does_not_grow():
    shop = build_shop(20_000, seed=0)
    seen, reported = 0, []
    for user, item, time in shop_events(shop, 2500, seed=0):
        assert user[0] == seen and (np.diff(user) >= 0).all()
        assert item.min() >= 0 and item.max() < 20_000 and time.min() >= OPENING
        seen = int(user[-1]) + 1
        reported.append(len(np.unique(user)))
    assert seen == 2500 and len(reported) > 1 and max(reported) < 2500


@pytest.mark.parametrize(("users", "items"), [(0, 100), (10, 15)])
def test_impossible_sizes_are_refused(tmp_path, users, items):
    with pytest.raises(ValueError, match="needs at least"):
        write_shop(tmp_path, users=users, items=items, seed=0)


def test_best_gains_by_hand():
    gains = best_gains(np.array([[0.1, 0.4, 0.0, 0.5], [0.05] * 4]))
    assert gains[0] == pytest.approx([1.0, 1.0, 0.5 + 0.4 / np.log2(3) + 0.1 / 2, 0.5 + 0.4 / np.log2(3) + 0.1 / 2])
    assert gains[1, 0] == pytest.approx(0.2)
    ranks = np.arange(20, 0, -1) / 210
    many = best_gains(np.random.default_rng(0).permutation(ranks)[None])[0]
    assert many[:2] == pytest.approx([ranks[:5].sum(), ranks[:10].sum()])
    assert many[2] < many[3] < many[1]


def test_the_next_item_follows_from_the_history_alone():
    """p(next item) written again, slowly, from the observable events of a user, equals next_item."""
    shop = build_shop(48, seed=5)  # six kits, two variants a product: some products get sold out
    last: dict[int, tuple] = {}
    order: list[tuple] = []

    def observe(shoppers, items):
        for row, probabilities in enumerate(next_item(shop, shoppers)):
            order.append(
                (
                    shoppers.bought[row][shoppers.bought[row] >= 0].tolist(),
                    shoppers.time[row],
                    probabilities,
                    items[row],
                )
            )

    events = defaultdict(list)
    for user, item, time in shop_events(shop, 60, seed=5, observe=observe):
        for u, i, t in zip(user.tolist(), item.tolist(), time.tolist(), strict=True):
            events[u].append((i, t))
    for history in events.values():
        last[tuple(i for i, _ in history)] = tuple(t for _, t in history)
    assert len(order) == 60
    for bought, now, probabilities, target in order:
        times = last[(*bought, target)][:-1]
        assert probabilities == pytest.approx(slow_next_item(shop, bought, times, now), abs=2e-6)
        assert probabilities.sum() == pytest.approx(1) and probabilities[target] > 0


def slow_next_item(shop, bought: list[int], times: tuple[int, ...], now: float) -> np.ndarray:
    kit = role = 0
    brand: dict[int, int] = {}
    tier = TIER_PRIOR.copy()

    def variants(noun: int, t: int, when: float, before: list[int]) -> dict[int, float]:
        group = [i for i in range(len(shop.item_ids)) if shop.noun[i] == noun]
        group = [i for i in group if i not in before] or group
        weight = {
            i: shop.popularity[i]
            * np.exp(TREND * np.cos(2 * np.pi * (when / YEAR - shop.phase[i])))
            * (BRAND_LOYALTY if brand.get(shop.department[noun]) == shop.brand[i] else 1)
            * TIER_FIT[t, shop.tier[i]]
            for i in group
        }
        return {i: w / sum(weight.values()) for i, w in weight.items()}

    for step, (item, when) in enumerate(zip(bought, times, strict=True)):
        noun = shop.noun[item]
        tier = tier * [variants(noun, t, when, bought[:step])[item] for t in range(3)]
        tier /= tier.sum()
        brand[shop.department[noun]] = shop.brand[item]
        if noun % ROLES == 0 or (noun // ROLES == kit and noun % ROLES > role):
            kit, role = noun // ROLES, noun % ROLES
    result = np.zeros(len(shop.item_ids))
    for noun, chance in enumerate(shop.following[kit * ROLES + role]):
        for t in range(3):
            for item, p in variants(noun, t, now, bought).items():
                result[item] += chance * tier[t] * p
    return result


def test_the_best_ranking_reaches_the_stated_recall(demo):
    """Expectation against outcome on the same users: within four standard errors, for every metric."""
    _, truth = demo
    shop = build_shop(1000, seed=3)
    hits: list[np.ndarray] = []

    def observe(shoppers, items):
        probabilities = next_item(shop, shoppers)
        rank = (probabilities > probabilities[np.arange(len(items)), items][:, None]).sum(axis=1)
        gain = 1 / np.log2(rank + 2)
        hits.append(np.stack([rank < 5, rank < 10, gain * (rank < 5), gain * (rank < 10)], axis=1))

    for _ in shop_events(shop, 4000, seed=3, observe=observe):
        pass
    outcome = np.concatenate(hits)
    assert len(outcome) == truth["evaluated_users"] == 2000
    error = outcome.std(axis=0) / np.sqrt(len(outcome))
    promised = np.array(list(truth["best"].values()))
    assert (np.abs(outcome.mean(axis=0) - promised) < 4 * error).all()
    assert 0.5 < truth["best"]["recall@10"] < 0.8


def test_the_shop_can_be_learnt_but_not_by_popularity(demo):
    folder, truth = demo
    split = leave_one_out(read_data(folder))
    popular = [item for item, _ in Counter(np.concatenate(split.train).tolist()).most_common(10)]
    after = defaultdict(Counter)
    for sequence in split.train:
        for item, following in zip(sequence[:-1], sequence[1:], strict=True):
            after[item][following] += 1
    by_popularity = np.isin(split.test_target, popular).mean()
    top = {item: {follower for follower, _ in counts.most_common(10)} for item, counts in after.items()}
    pairs = zip(split.test_history, split.test_target, strict=True)
    by_pairs = np.mean([target in top.get(history[-1], ()) for history, target in pairs])
    best = truth["best"]["recall@10"]
    assert by_popularity < 0.15 * best < 0.5 * best < by_pairs < best  # and a model has room above plain pairs


def test_the_demo_shop_is_written_once_and_never_mistaken_for_another(tmp_path, monkeypatch):
    monkeypatch.setitem(DEMO_SHOP, "users", 60)
    monkeypatch.setitem(DEMO_SHOP, "items", 50)
    write_demo_shop(tmp_path / "shop")
    interactions = tmp_path / "shop" / "interactions.csv.gz"
    written = interactions.stat().st_mtime_ns
    write_demo_shop(tmp_path / "shop")
    assert interactions.stat().st_mtime_ns == written
    write_shop(tmp_path / "other", users=40, items=50, seed=0)
    with pytest.raises(ValueError, match="a shop of 40 users, seed 0, not the demo's: remove the folder"):
        write_demo_shop(tmp_path / "other")
