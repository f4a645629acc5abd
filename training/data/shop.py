"""A made-up shop of any size, written as a data folder, with the best recall anyone could reach on it.

How a user shops, event by event:

1. *Intent.* The user follows one kit (espresso: machine, grinder, beans, descaler) and mostly buys its
   next product, sometimes skips one, sometimes makes an impulse buy elsewhere and comes back, sometimes
   starts another kit: often of the same department, or one that usually follows, or a popular one.
2. *Item.* Among the variants of that product the choice is by Zipf popularity, a trend that rises and
   falls over the year, the brand the user bought last in this department, and the user's price tier.
   Nothing is bought twice while another variant is left.

The intent and the brands can be read off the history; the tier is hidden, but it has three values, so its
posterior is exact. Hence p(next item | history, date) is known exactly, and with it the best possible
recall: no model can beat it in expectation, and one that does not see the date has slightly less to go on.
Users are made in chunks, so memory does not grow with their number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from serving.files import replaced_folder
from training.data.shop_words import BRANDS, FINISHES, KITS, SERIES, TIERS

ROLES = 4  # products per kit
MIN_ITEMS = 16  # two kits with two variants per product
MIN_EVENTS, MEAN_EVENTS, MAX_EVENTS = 5, 10, 40
IMPULSE, NEW_INTENT, SKIP = 0.15, 0.15, 0.2  # per event; SKIP: of the events that go on in the kit
SAME_DEPARTMENT, USUALLY_NEXT = 0.5, 0.25  # where a new intent comes from; the rest is by popularity
BRAND_LOYALTY = 5.0  # times the weight of a variant of the brand bought last in the department
TIER_PRIOR = np.array([0.4, 0.4, 0.2])
TIER_FIT = np.array([[1.0, 0.4, 0.1], [0.4, 1.0, 0.4], [0.1, 0.4, 1.0]])  # user's tier x item's tier
TREND = 0.7  # log-weight amplitude over the year
DAY, YEAR = 86_400.0, 365 * 86_400.0
OPENING = 1_640_995_200.0  # 2022-01-01; users arrive during two years
TRUTH_USERS, TRUTH_CELLS = 2_000, 50_000_000  # best recall: at most so many users, and users x items
DEMO_SHOP = {"users": 20_000, "items": 1000, "seed": 0}

Format = Literal["csv.gz", "parquet"]
TRUTH = "truth.json"


@dataclass(frozen=True, slots=True)
class Shop:
    """The catalogue, variants of one product ("noun") side by side, and how intents move.

    Letters: I items, N nouns, K kits (noun = kit * ROLES + role). `starts[n]`: first item of noun n.
    """

    nouns: list[tuple[str, str, str]]  # per noun: department, subcategory, product
    item_ids: list[str]  # (I,) assigned at random
    brand: np.ndarray  # (I,) brand of the item within its department
    series: np.ndarray  # (I,)
    finish: np.ndarray  # (I,)
    mark: np.ndarray  # (I,) 0, or the edition where brands, series and finishes are used up
    noun: np.ndarray  # (I,)
    starts: np.ndarray  # (N,)
    sizes: np.ndarray  # (N,)
    department: np.ndarray  # (N,)
    popularity: np.ndarray  # (I,) weight among the variants of the noun
    phase: np.ndarray  # (I,) season of the item's peak, 0..1
    first: np.ndarray  # (N,) probability of the first noun
    following: np.ndarray  # (K * ROLES, N) probability of the next noun, given the kit and the role reached

    @property
    def tier(self) -> np.ndarray:
        """Price tier 0..2 of every item, which is its brand's. Shape: (I,)."""
        return self.brand // 2


@dataclass(slots=True)
class Shoppers:
    """What the generator knows of a chunk of n users, all but `tier` readable from their history."""

    kit: np.ndarray  # (n,) current intent
    role: np.ndarray  # (n,) how far along its kit
    brand: np.ndarray  # (n, departments) brand bought last, -1 none
    posterior: np.ndarray  # (n, 3) p(tier | history)
    bought: np.ndarray  # (n, MAX_EVENTS) items, -1 where none yet
    time: np.ndarray  # (n,) seconds, of the event to come
    tier: np.ndarray  # (n,) hidden

    def take(self, rows: np.ndarray) -> Shoppers:
        return Shoppers(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def build_shop(items: int, seed: int) -> Shop:
    """A shop with this many items; the same seed gives the same shop. Raises ValueError below MIN_ITEMS."""
    if items < MIN_ITEMS:
        raise ValueError(f"a shop needs at least {MIN_ITEMS} items, not {items}; give --items {MIN_ITEMS} or more")
    rng = np.random.default_rng([seed, 0])
    by_rank = [(department, *kits[rank]) for rank in range(4) for department, kits in KITS.items()]
    kits = by_rank[: min(len(by_rank), max(2, items // (2 * ROLES)))]
    nouns = [(department, name, product) for department, name, products in kits for product in products]
    names = list(KITS)
    department = np.array([names.index(noun[0]) for noun in nouns])

    sizes = np.full(len(nouns), items // len(nouns))
    sizes[rng.permutation(len(nouns))[: items % len(nouns)]] += 1
    noun = np.repeat(np.arange(len(nouns)), sizes)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    looks = len(BRANDS["Kitchen"]) * len(SERIES[0]) * len(FINISHES)
    # every noun deals its variants from a shuffled deck of looks, and opens another deck as a new edition
    deck = np.concatenate(
        [np.concatenate([rng.permutation(looks) for _ in range(-(-size // looks))])[:size] for size in sizes]
    )
    rank = np.concatenate([rng.permutation(size) for size in sizes])
    numbers = rng.permutation(items)
    width = max(5, len(str(items - 1)))
    first, following = _intents(department, rng)
    return Shop(
        nouns=nouns,
        item_ids=[f"p{number:0{width}d}" for number in numbers],
        brand=deck // (len(SERIES[0]) * len(FINISHES)),
        series=deck // len(FINISHES) % len(SERIES[0]),
        finish=deck % len(FINISHES),
        mark=(np.arange(items) - starts[noun]) // looks,
        noun=noun,
        starts=starts,
        sizes=sizes,
        department=department,
        popularity=1.0 / (1.0 + rank),
        phase=rng.random(items),
        first=first,
        following=following,
    )


def _intents(department: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the first noun (N,) and of the next noun given kit and role (K * ROLES, N)."""
    kits = len(department) // ROLES
    popular = 1.0 / (1.0 + rng.permutation(kits)) ** 0.7
    popular /= popular.sum()
    home = department[::ROLES]
    usual = (rng.permutation(kits), rng.integers(1, kits, kits))
    following = np.zeros((kits, ROLES, kits, ROLES))
    for kit in range(kits):
        same = ((home == home[kit]) & (np.arange(kits) != kit)) * popular
        new = (1 - SAME_DEPARTMENT - USUALLY_NEXT) * popular
        new[(kit + usual[1][kit]) % kits] += USUALLY_NEXT
        if same.any():
            new += SAME_DEPARTMENT * same / same.sum()
        new[kit] = 0.0
        impulse = np.repeat(popular[:, None], ROLES, axis=1)
        impulse[:, 0] = impulse[kit] = 0.0  # a main product always opens an intent
        for role in range(ROLES):
            rest = np.array([(1 - SKIP) * SKIP**ahead for ahead in range(ROLES - 1 - role)])
            go_on = 1 - IMPULSE - NEW_INTENT if len(rest) else 0.0
            row = following[kit, role]
            row += IMPULSE * impulse / impulse.sum()
            row[:, 0] += (1 - IMPULSE - go_on) * new / new.sum()
            row[kit, role + 1 :] += go_on * rest / rest.sum() if len(rest) else 0.0
    first = np.zeros((kits, ROLES))
    first[:, 0] = popular
    return first.reshape(-1), following.reshape(kits * ROLES, kits * ROLES)


def variant_probabilities(shop: Shop, shoppers: Shoppers, items: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """p(item | noun, tier, history, date) for every tier, normalised within each group of columns.

    items: (n, W) consecutive item numbers per row, then -1 as padding; starts: first column of each
    group. Returns: (n, W, 3), 0 in the padding.
    """
    season = shoppers.time[:, None] / YEAR - shop.phase[items]
    weight = shop.popularity[items] * np.exp(TREND * np.cos(2 * np.pi * season))  # (n, W)
    last = np.take_along_axis(shoppers.brand, shop.department[shop.noun[items]], axis=1)
    weight = weight * np.where(last == shop.brand[items], BRAND_LOYALTY, 1.0) * (items >= 0)
    tiers = weight[:, :, None] * TIER_FIT.T[shop.tier[items]]  # (n, W, 3)
    seen = np.zeros(items.shape, dtype=bool)
    column = shoppers.bought - items[:, :1]  # columns are consecutive items
    user, event = np.nonzero((shoppers.bought >= 0) & (column >= 0) & (column < items.shape[1]))
    seen[user, column[user, event]] = True
    fresh = np.where(seen[:, :, None], 0.0, tiers)
    widths = np.diff([*starts, items.shape[1]])
    total = np.repeat(np.add.reduceat(fresh, starts, axis=1), widths, axis=1)
    anew = np.repeat(np.add.reduceat(tiers, starts, axis=1), widths, axis=1)
    return np.where(total > 0, fresh / np.where(total > 0, total, 1.0), tiers / anew)


def next_item(shop: Shop, shoppers: Shoppers) -> np.ndarray:
    """The exact p(next item | history, date), what a perfect model would say. Returns: (n, I) float64."""
    n, every = len(shoppers.kit), np.arange(len(shop.item_ids))
    variants = variant_probabilities(shop, shoppers, np.broadcast_to(every, (n, len(every))), shop.starts)
    nouns = shop.following[shoppers.kit * ROLES + shoppers.role]
    probabilities: np.ndarray = nouns[:, shop.noun] * (variants @ shoppers.posterior[:, :, None])[:, :, 0]
    return probabilities


def shop_events(
    shop: Shop, users: int, seed: int, observe: Callable[[Shoppers, np.ndarray], None] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Chunks of (user, item, seconds) arrays, all (events,) int64, grouped by user, oldest first.

    `observe(shoppers, items)` sees the first users (see TRUTH_USERS) just before their last event, and
    the items they then buy.
    """
    observed = max(1, min(TRUTH_USERS, TRUTH_CELLS // len(shop.item_ids)))
    width = int(shop.sizes.max())
    chunk = int(np.clip(2_000_000 // (width * 8), 100, 20_000))
    for begin in range(0, users, chunk):
        n = min(chunk, users - begin)
        rng = np.random.default_rng([seed, 1, begin])
        lengths = np.minimum(MIN_EVENTS + rng.poisson(MEAN_EVENTS - MIN_EVENTS, n), MAX_EVENTS)
        people = Shoppers(
            kit=np.zeros(n, dtype=np.int64),
            role=np.zeros(n, dtype=np.int64),
            brand=np.full((n, len(KITS)), -1),
            posterior=np.tile(TIER_PRIOR, (n, 1)),
            bought=np.full((n, MAX_EVENTS), -1),
            time=OPENING + rng.random(n) * 2 * YEAR,
            tier=rng.choice(len(TIERS), n, p=TIER_PRIOR),
        )
        times = np.zeros((n, MAX_EVENTS), dtype=np.int64)
        for step in range(int(lengths.max())):
            active = np.flatnonzero(step < lengths)
            now = people.take(active)
            times[active, step] = now.time.astype(np.int64)
            chance = np.tile(shop.first, (len(active), 1)) if step == 0 else shop.following[now.kit * ROLES + now.role]
            noun = _draw(chance, rng)
            offset = np.arange(width)
            items = np.where(offset < shop.sizes[noun, None], shop.starts[noun, None] + offset, -1)
            variants = variant_probabilities(shop, now, items, np.array([0]))
            row = np.arange(len(active))
            pick = _draw(variants[row, :, now.tier], rng)
            item = items[row, pick]
            if observe is not None:
                last = np.flatnonzero((step == lengths[active] - 1) & (active + begin < observed))
                if len(last):
                    observe(now.take(last), item[last])

            kit, role = noun // ROLES, noun % ROLES
            moves = (role == 0) | ((kit == now.kit) & (role > now.role))  # all else was an impulse
            people.kit[active] = np.where(moves, kit, now.kit)
            people.role[active] = np.where(moves, role, now.role)
            people.brand[active, shop.department[noun]] = shop.brand[item]
            belief = now.posterior * variants[row, pick]
            people.posterior[active] = belief / belief.sum(axis=1, keepdims=True)
            people.bought[active, step] = item
            pause = np.where(moves & (role == 0), 40.0, 6.0) * DAY
            people.time[active] += 60 + rng.exponential(pause)
        happened = np.arange(MAX_EVENTS) < lengths[:, None]
        yield np.repeat(np.arange(begin, begin + n), lengths), people.bought[happened], times[happened]


def write_shop(
    folder: Path,
    users: int,
    items: int,
    seed: int,
    format: Format = "csv.gz",
    progress: Callable[[int], None] = lambda users: None,
) -> dict[str, Any]:
    """Write a shop as a data folder with `truth.json`, and return what that file says.

    `progress` is called with the number of users written since the last call. truth.json holds the
    expected recall and NDCG at 5 and 10 of the best possible ranking for the last event of up to
    TRUTH_USERS users, by p(next item | history, date). Raises ValueError for impossible sizes, and
    StorageError where the folder holds anything but an earlier shop, which is replaced.
    """
    if users < 1:
        raise ValueError(f"a shop needs at least one user, not {users}; give --users 1 or more")
    shop = build_shop(items, seed)
    folder = Path(os.path.abspath(folder))
    gains: list[np.ndarray] = []

    def observe(shoppers: Shoppers, _: np.ndarray) -> None:
        size = max(1, 1_000_000 // items)
        for begin in range(0, len(shoppers.kit), size):
            gains.append(
                best_gains(next_item(shop, shoppers.take(np.arange(begin, min(begin + size, len(shoppers.kit))))))
            )

    item_ids = pa.array(shop.item_ids)
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
    width = max(7, len(str(users - 1)))
    with replaced_folder(folder, foreign_to_shop, "a generated shop") as new:
        _write_items(shop, new / "items.jsonl")
        with _table_writer(new / f"interactions.{format}", schema, format) as writer:
            for user, item, time in shop_events(shop, users, seed, observe):
                names = pa.array([f"u{number:0{width}d}" for number in range(user[0], user[-1] + 1)])
                columns = [names.take(pa.array(user - user[0])), item_ids.take(pa.array(item)), pa.array(time)]
                writer.write_table(pa.table(columns, schema=schema))
                progress(int(user[-1] - user[0]) + 1)
        truth = _truth(np.concatenate(gains), users, items, seed)
        (new / TRUTH).write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
    return truth


def _truth(gains: np.ndarray, users: int, items: int, seed: int) -> dict[str, Any]:
    """What truth.json says. gains: (evaluated users, 4), see `best_gains`."""
    best = dict(zip(("recall@5", "recall@10", "ndcg@5", "ndcg@10"), gains.mean(axis=0).tolist(), strict=True))
    return {
        "seed": seed,
        "users": users,
        "items": items,
        "evaluated_users": len(gains),
        "best": best,
        "meaning": "expectation, over the last event of users, of the ranking by the generator's exact "
        "p(next item | history, date of the event); no model can expect more",
    }


def foreign_to_shop(folder: Path) -> str | None:
    """The name of something in a folder that `write_shop` did not write there; None for a shop or an empty folder."""
    names = sorted(path.name for path in folder.iterdir())
    ours: set[str] = set()
    if read_truth(folder):
        ours = {TRUTH, "items.jsonl", *(f"interactions.{format}" for format in get_args(Format))}
    return next((name for name in names if name not in ours), None)


def read_truth(folder: Path) -> dict[str, Any] | None:
    """What the truth.json of a generated shop says; None where there is no such file."""
    try:
        truth = json.loads((folder / TRUTH).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return truth if isinstance(truth, dict) and DEMO_SHOP.keys() <= truth.keys() else None


def write_demo_shop(folder: Path) -> None:
    """Write the shop that bundles/demo is trained and evaluated on, unless the folder already holds it.

    Raises ValueError where the folder holds another shop: the bundle would be evaluated on users it never saw.
    """
    found = read_truth(folder)
    if found is None:
        write_shop(folder, DEMO_SHOP["users"], DEMO_SHOP["items"], DEMO_SHOP["seed"])
    elif any(found[name] != value for name, value in DEMO_SHOP.items()):
        raise ValueError(
            f"{folder} holds a shop of {found['users']:,} users, seed {found['seed']}, not the demo's: remove the "
            "folder and run the same command again"
        )


def best_gains(probabilities: np.ndarray) -> np.ndarray:
    """Expected recall@5, recall@10, ndcg@5, ndcg@10 of ranking by these probabilities. (n, I) -> (n, 4).

    E[recall@k] = sum of the k largest p;  E[ndcg@k] = sum_r p_(r) / log2(r + 1), for one target.
    """
    k = min(10, probabilities.shape[1])
    top = -np.sort(-np.partition(probabilities, -k, axis=1)[:, -k:], axis=1)
    discounted = top / np.log2(np.arange(2, k + 2))
    return np.stack([top[:, :5].sum(1), top.sum(1), discounted[:, :5].sum(1), discounted.sum(1)], axis=1)


def _draw(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One column per row. (n, W) -> (n,)."""
    cumulative = np.cumsum(probabilities, axis=1)
    column: np.ndarray = (cumulative <= rng.random((len(cumulative), 1)) * cumulative[:, -1:]).sum(axis=1)
    return column


@contextmanager
def _table_writer(path: Path, schema: pa.Schema, format: Format) -> Iterator[Any]:
    with ExitStack() as stack:
        file: Any = stack.enter_context(pa.OSFile(str(path), "wb"))
        if format == "parquet":
            yield stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd"))
            return
        file = stack.enter_context(pa.CompressedOutputStream(file, "gzip"))
        file.write((",".join(schema.names) + "\n").encode())  # pyarrow would quote the names
        options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none")
        yield stack.enter_context(pyarrow.csv.CSVWriter(file, schema, write_options=options))


def _write_items(shop: Shop, path: Path) -> None:
    """One line per item, in the order of the (random) ids, so that the order tells nothing."""
    with path.open("w", encoding="utf-8") as file:
        for item in np.argsort(shop.item_ids):
            department, subcategory, product = shop.nouns[shop.noun[item]]
            brand, tier = BRANDS[department][shop.brand[item]], shop.tier[item]
            finish, mark = FINISHES[shop.finish[item]], shop.mark[item]
            title = f"{brand} {SERIES[tier][shop.series[item]]} {product}, {finish}"
            kit = shop.noun[item] // ROLES
            others = [shop.nouns[kit * ROLES + role][2] for role in range(ROLES)]
            company = " and ".join(other.lower() for other in others if other != product)
            record = {
                "item_id": shop.item_ids[item],
                "title": title + (f", edition {mark + 1}" if mark else ""),
                "brand": brand,
                "categories": [department, subcategory, product],
                "description": f"{product} for {subcategory.lower()}, {TIERS[tier]} quality by {brand}. "
                f"Goes with {company}.",
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
