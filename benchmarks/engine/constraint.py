"""What the trie's constraint costs a search, compared with a dense mask, a binary search, a hash set and a dict trie.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.constraint

The search runs without its network: four steps over random log-probabilities, each of which expands a beam of prefixes
to the tokens that may follow and keeps the best 50. All contenders must find the same items with the same scores before
they are timed. `expand_us` is the constraint's share of one step, `step_us` the step with its top-k.

    step    all contenders by catalogue size; 50 rows are one request with 50 beams, 400 rows are eight
    flat    our trie alone, all sizes in turns: its cost relative to the smallest catalogue
    rules   what a request's rules add to a whole search (`constraint_rules.py`)
    build   building the trie in a process of its own, writing it and opening it again (`constraint_memory.py`)
    memory  bytes by catalogue size, measured and, beyond that, by formula

Times are CPU time of the process, which other work on the machine affects less than the clock: medians over rounds in
which contenders take turns. Catalogues are clustered, 4 levels of 256 codes.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.engine.constraint_contenders import (
    BinarySearch,
    Contender,
    DenseMask,
    DictTrie,
    HashSet,
    Ours,
    Unconstrained,
    clustered_codes,
)
from benchmarks.engine.constraint_memory import MIB, build, memory
from benchmarks.engine.constraint_rules import RULED, kinds_of_rules, rule_book, rules
from benchmarks.engine.constraint_walk import BATCHES, BEAMS, SAMPLES, SEED, Row, Walk, agree, samples, take_turns
from benchmarks.plots import BLUE, GREY, drawing

PEERS = (DenseMask, BinarySearch, HashSet, DictTrie)
COLUMNS = {
    "step": ["items", "rows", "contender", "expand_us", "step_us", "times_ours", "mib", "note"],
    "flat": ["rows", "contender", "items", "expand_us", "expand_ratio", "step_us", "step_ratio"],
    "rules": ["items", "rules", "added_ms", "set_up_ms", "first_ms"],
    "build": ["items", "nodes", "build_s", "arrays_mib", "tables_mib", "peak_mib", "write_s", "open_ms"],
    "memory": ["items", "levels", "arrays_gib", "tables_gib", "basis"],
}


def main() -> None:
    parser = argument_parser("benchmarks.engine.constraint", __doc__)
    parser.add_argument("--items", type=sizes, default="1e5,1e6,1e7", help="catalogue sizes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--limit-gib", type=float, default=6.0, help="leave out contenders that would need more memory")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/constraint.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run, found = Run(parser, options), list[Row]()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        catalogues = {items: Path(folder) / f"{items}.npy" for items in options.items}
        for items, path in catalogues.items():
            np.save(path, clustered_codes(items, SEED))
        parts: dict[str, Iterator[Row]] = {
            "build": build(catalogues),
            "flat": flat(catalogues, options.rounds),
            "rules": rules(catalogues, options.rounds),
            "step": steps(catalogues, options.rounds, options.limit_gib),
            "memory": memory(found),  # reads what `build` has found
        }
        for part, rows in parts.items():
            rows_of_part = [{"part": part, **row} for row in rows]
            found += rows_of_part
            print(f"\n{part}\n{table(rows_of_part, COLUMNS[part])}", flush=True)
    run.record(options.out, [SEED], found)


def sizes(text: str) -> list[int]:
    return [int(float(number)) for number in text.split(",")]


def steps(catalogues: dict[int, Path], rounds: int, limit_gib: float) -> Iterator[Row]:
    """All contenders at all sizes. One that would not fit, judged by its memory at the size before, is not run."""
    gib_per_item: dict[str, float] = {}
    for items, path in catalogues.items():
        codes = np.load(path)
        contenders: list[Contender] = [Unconstrained()]
        for make in (Ours, *PEERS):
            needed = DenseMask.GIB if make is DenseMask else gib_per_item.get(make.name, 0) * items
            if needed > limit_gib:
                note = f"not run: {needed:.0f} GiB"
                for batch in BATCHES:
                    yield {"items": items, "rows": batch * BEAMS, "contender": make.name, "note": note}
                continue
            contenders.append(make(codes))
            gib_per_item[make.name] = contenders[-1].nbytes / 2**30 / items
        for batch in BATCHES:
            yield from _timed(contenders, items, batch, rounds)
        del contenders
        gc.collect()


def _timed(contenders: list[Contender], items: int, batch: int, rounds: int) -> Iterator[Row]:
    log_probs = samples(batch)
    walks = {contender.name: Walk(contender) for contender in contenders}
    agree([walk for name, walk in walks.items() if name != Unconstrained.name], log_probs)
    for walk in walks.values():
        walk.clear_times()
    slow = {name: walk for name, walk in walks.items() if isinstance(walk.contender, HashSet | DictTrie)}
    take_turns([walk for name, walk in walks.items() if name not in slow], log_probs, rounds)
    take_turns(slow.values(), log_probs, max(SAMPLES, rounds // 10))
    ours = walks[Ours.name].per_step()["expand_us"]
    for name, walk in walks.items():
        cost = walk.per_step()
        yield {
            "items": items,
            "rows": batch * BEAMS,
            "contender": name,
            **cost,
            "times_ours": round(cost["expand_us"] / ours, 2),
            "mib": round(walk.contender.nbytes / MIB, 1),
            "note": walk.contender.note,
        }


def flat(catalogues: dict[int, Path], rounds: int) -> Iterator[Row]:
    """Our trie at all sizes in turns, without rules and with a list of 10,000 items on top of a prepared set."""
    plain = {items: Ours(np.load(path)) for items, path in catalogues.items()}
    ruled = {items: copy(ours) for items, ours in plain.items()}
    books = {items: rule_book(ours.trie) for items, ours in plain.items()}
    for batch in BATCHES:
        log_probs = samples(batch)
        with ExitStack() as stack:
            for items, ours in ruled.items():
                blocking = kinds_of_rules(items)[RULED]
                ours.blocked = stack.enter_context(books[items].blocked([blocking] * batch))
            walks = {("ours", items): Walk(ours) for items, ours in plain.items()}
            walks |= {("ours, with rules", items): Walk(ours) for items, ours in ruled.items()}
            take_turns(walks.values(), log_probs, SAMPLES)
            for walk in walks.values():
                walk.clear_times()
            take_turns(walks.values(), log_probs, rounds)
        for (name, items), walk in walks.items():
            cost, smallest = walk.per_step(), walks[name, min(catalogues)].per_step()
            yield {
                "rows": batch * BEAMS,
                "contender": name,
                "items": items,
                **cost,
                "expand_ratio": round(cost["expand_us"] / smallest["expand_us"], 2),
                "step_ratio": round(cost["step_us"] / smallest["step_us"], 2),
            }


COLOURS = {"ours": BLUE, "dense mask": GREY, "binary search": "#c98a4b", "hash set": "#7a9a6d", "dict trie": "#9a7aa8"}


def plot(result: dict[str, Any], path: Path) -> None:
    """The constraint's share of a step against the catalogue size. The legend gives each contender's memory at the
    largest size."""
    shown = [row for row in result["rows"] if row.get("contender") in COLOURS and row["part"] == "step"]
    shown = [row for row in shown if "expand_us" in row]
    largest = {row["contender"]: row for row in sorted(shown, key=lambda row: row["items"])}
    counts = sorted({row["rows"] for row in shown})
    with drawing(path, 10, 3.8) as figure:
        panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
        for panel, count in zip(panels, counts, strict=True):
            for name in largest:
                line = [row for row in shown if (row["contender"], row["rows"]) == (name, count)]
                panel.plot(
                    [row["items"] for row in line],
                    [row["expand_us"] for row in line],
                    color=COLOURS[name],
                    marker="o",
                    markersize=4,
                    linewidth=2.5 if name == Ours.name else 1.5,
                    label=f"{name}, {largest[name]['mib'] / 1024:.2g} GiB",
                )
            panel.set(xscale="log", yscale="log", xlabel="items in the catalogue")
            panel.set_title(f"{count} rows", fontsize=10, loc="left")
            panel.grid(alpha=0.3, which="major")
        panels[0].set_ylabel("CPU \N{MICRO SIGN}s of the constraint, each step")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=5, frameon=False)


if __name__ == "__main__":
    main()
