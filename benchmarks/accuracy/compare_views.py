"""Several views of one network (`views.py`) against what they must beat, each group given the same number of steps.

    plain         one network of one tree, with the beam and with as many times the beam as there are views
    views         one network of all trees: each view alone, the first two merged, all merged
    trees apart   a network per tree, each trained for its share of the steps
    seeds apart   as many networks of the first tree from other seeds, each trained for its share of the steps

The last two say what a gain of the views is made of. Where the views gain less than LEAST_GAIN over the plain network
on validation, there is nothing to explain, and the two are not trained; `left_out` of the result names them.

How lists are merged is chosen on validation, for every row by its own rule. `checks` tells of every group what its
members share of their lists, how their errors correlate, and when each was best on validation, and of the views what
they gain there. A group of which a member was best before it was trained, or whose members answer alike, has not been
tested, and has no rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from benchmarks.accuracy.ranks import gain_over
from benchmarks.accuracy.variants import Setup
from benchmarks.accuracy.view_networks import SOURCES, Member, Network, Networks
from benchmarks.accuracy.views import MERGES, correlation, overlap
from benchmarks.common import commit, record, table
from training.config import RunConfig
from training.metrics import mean_metrics, ndcg, target_ranks

Rows = list[dict[str, Any]]
VIEWS = len(SOURCES)
BEAM = 50
ALIKE = 0.9  # lists that share more than this are one list
LEAST_GAIN = 0.03  # of validation NDCG@10, relative
PLAIN, TOGETHER, TREES, SEEDS = "plain", "views", "trees apart", "seeds apart"
WIDE = f"plain, beam of {VIEWS * BEAM}"
COLUMNS = ("model", "excluded", "merge", "searches", "beam", "recall@10", "ndcg@10", "gain", "low", "high", "percent",
           "against", "minutes")  # fmt: skip
PROTOCOL = (
    "Leave-one-out, test, full ranking, history of 20 items; every row once with and once without the items of the "
    "history excluded. Networks keep their best weights by validation NDCG@10 (nothing excluded), and validation "
    "chose how lists are merged. gain: of NDCG@10 against the row named in `against`, with a 95% interval by paired "
    "bootstrap over users. minutes: training of the row's networks, on a core shared with other work. Tree n is "
    f"tokenized with the run's seed + n, from {', '.join(SOURCES)}."
)


def groups_of(config: RunConfig) -> dict[str, list[Member]]:
    """The members of each group; a group's networks train for `pretrain.steps` together."""
    seed, steps, trees = config.seed, config.pretrain.steps, tuple(range(VIEWS))
    together = Network(trees, seed, steps)
    return {
        PLAIN: [Member(Network((0,), seed, steps), 0)],
        TOGETHER: [Member(together, tree) for tree in trees],
        TREES: [Member(Network((tree,), seed, steps // VIEWS), tree) for tree in trees],
        SEEDS: [Member(Network((0,), seed + n, steps // VIEWS), 0) for n in range(VIEWS)],
    }


def networks_of(groups: dict[str, list[Member]]) -> dict[str, Network]:
    """Every network once, by name, in the order in which they are trained."""
    return {member.network.name: member.network for members in groups.values() for member in members}


def gain_on_validation(networks: Networks, groups: dict[str, list[Member]]) -> float:
    """Of all views merged, the better way, over the plain network; relative, in NDCG@10, nothing excluded."""
    worth = [float(ndcg(networks.ranks(groups[TOGETHER], form, "valid", BEAM, False)).mean()) for form in MERGES]
    plain = float(ndcg(networks.ranks(groups[PLAIN], next(iter(MERGES)), "valid", BEAM, False)).mean())
    return max(worth) / plain - 1


def train(networks: Networks, groups: dict[str, list[Member]]) -> tuple[float, list[str]]:
    """Trains what is missing. Returns what the views gain on validation, and the groups left out for that."""
    for network in networks_of({group: groups[group] for group in (PLAIN, TOGETHER)}).values():
        networks.train(network)
    gain = gain_on_validation(networks, groups)
    if gain < LEAST_GAIN:
        print(f"The views gain {100 * gain:.1f}% on validation; {TREES} and {SEEDS} are left out.", file=sys.stderr)
        return gain, [TREES, SEEDS]
    for network in networks_of(groups).values():
        networks.train(network)
    return gain, []


def checks(networks: Networks, groups: dict[str, list[Member]]) -> Rows:
    """Of every group with several members, whether they learnt and answer differently, on test users."""
    target, rows = networks.users("test")[1], []
    for group, members in groups.items():
        if len(members) == 1:
            continue
        tops = [networks.lists(member, "test", BEAM, False).items[:, :10] for member in members]
        best = [networks.best_step(member) for member in members]
        shared, errors = overlap(tops), correlation([ndcg(target_ranks(top, target)) for top in tops])
        row = {"model": group, "overlap": round(shared, 3), "error_correlation": round(errors, 3), "best_steps": best}
        rows.append(row | {"acts": min(best) > 0 and shared < ALIKE})
    return rows


def candidates(groups: dict[str, list[Member]]) -> dict[str, tuple[list[Member], int]]:
    """What is compared: members whose lists are merged, and the beam of each."""
    plain = groups[PLAIN]
    found = {PLAIN: (plain, BEAM), WIDE: (plain, VIEWS * BEAM)}
    for group, members in groups.items():
        if group == PLAIN:
            continue
        for member in members:
            found[f"{group}: tree {member.tree}, seed {member.network.seed}"] = ([member], BEAM)
        for count in range(2, len(members) + 1):
            found[f"{group}: {count} merged"] = (members[:count], BEAM)
    return found


def rows_of(networks: Networks, groups: dict[str, list[Member]], excluded: bool) -> tuple[Rows, Rows]:
    """The test's rows by one rule, and what validation said of each form of merging."""
    heads: dict[str, dict[str, Any]] = {}
    ranks: dict[str, np.ndarray] = {}
    validation = []
    for name, (members, beam) in candidates(groups).items():
        form, head = None, {"model": name, "excluded": excluded}
        if len(members) > 1:
            worth = {way: ndcg(networks.ranks(members, way, "valid", beam, excluded)).mean() for way in MERGES}
            form = max(worth, key=lambda way: worth[way])
            validation.append(head | {way: round(float(value), 5) for way, value in worth.items()})
        found = ranks[name] = networks.ranks(members, form or next(iter(MERGES)), "test", beam, excluded)
        minutes = networks.minutes(member.network for member in members)
        head |= {"merge": form, "searches": len(members), "beam": beam, "minutes": round(minutes, 1)}
        heads[name] = head | {"users": len(found)} | {k: round(v, 5) for k, v in mean_metrics(found).items()}
    merged = f"{TOGETHER}: {VIEWS} merged"
    pairs = [(name, PLAIN) for name in heads if name != PLAIN]
    pairs += [(merged, name) for name in (WIDE, *(f"{group}: {VIEWS} merged" for group in (TREES, SEEDS)))]
    rows = [heads[PLAIN]]
    rows += [
        heads[name] | {"against": other} | gain_over(ndcg(ranks[name]), ndcg(ranks[other]))
        for name, other in pairs
        if name in ranks and other in ranks
    ]
    return rows, validation


def answer(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    """Trains what is missing, writes the result, prints the table."""
    setup = Setup(options.data, options.work / "views", options.config, tuple(options.set), options.device)
    networks, code = Networks(setup), commit()
    groups = groups_of(networks.config())
    wanted = networks_of(groups)
    if options.only and options.only not in wanted:
        parser.error(f"--only takes one of {', '.join(wanted)}")
    if options.only:
        networks.train(wanted[options.only])
        return 0
    gain, left_out = train(networks, groups)
    groups = {group: members for group, members in groups.items() if group not in left_out}
    wanted = networks_of(groups)
    began = time.perf_counter()
    checked = checks(networks, groups)
    next(row for row in checked if row["model"] == TOGETHER)["percent_on_validation"] = round(100 * gain, 1)
    for row in checked:
        print(json.dumps(row), file=sys.stderr, flush=True)
        if not row["acts"]:
            print(f"{row['model']} has not been tested, for its members do not act; it has no rows.", file=sys.stderr)
            del groups[row["model"]]
    rows: Rows = []
    validation: Rows = []
    for excluded in (False, True):
        more, chosen = rows_of(networks, groups, excluded)
        rows, validation = rows + more, validation + chosen
    minutes = round(networks.minutes(wanted.values()) + (time.perf_counter() - began) / 60, 1)
    record(options.out, command, sorted({network.seed for network in wanted.values()}), rows, minutes=minutes,
           data=options.data.resolve().name, protocol=PROTOCOL, left_out=left_out, checks=checked,
           validation=validation, **networks.trained_by(wanted.values()), **code)  # fmt: skip
    print(table(rows, COLUMNS))
    return 0
