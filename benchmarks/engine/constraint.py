"""What the constraint costs: ours beside a dense mask, a binary search, a hash set and a dict trie; and what rules add.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.constraint

A search without its network: four steps over random log-probabilities, each expanding a beam of prefixes to what may
follow and keeping the best 50, from one row per request on. `expand_us` is a step's share for the constraint alone,
`step_us` with the top-k. All contenders find the same items with the same scores, which is checked before timing.

    step    all contenders by size of the catalogue; 50 rows are 1 request of 50 beams, 400 are 8
    flat    ours alone, the sizes in turns: how many times the smallest one's cost
    rules   what a request's rules add to a whole search: making them, reading them at every step, and undoing them
    build   the trie from the catalogue's tokens in a process of its own, on disk and back
    memory  bytes by size of the catalogue, measured and, beyond, by formula

Times are the process's CPU time, so that a neighbour on the machine costs the figures less; medians over rounds in
which contenders take turns. Catalogues are clustered, 4 levels of 256 codes.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, commit, record, table
from benchmarks.engine.constraint_contenders import (
    CODES,
    LEVELS,
    VOCABULARY,
    BinarySearch,
    Contender,
    DenseMask,
    DictTrie,
    HashSet,
    Ours,
    Unconstrained,
    clustered_codes,
)
from benchmarks.engine.constraint_plot import draw
from serving.items.rules import RuleBook
from serving.items.trie import TABLE_ENTRIES, build_trie
from serving.items.trie_file import read_trie, write_trie
from serving.types import Rules

PEERS = (DenseMask, BinarySearch, HashSet, DictTrie)
BEAMS = 50
BATCHES = (1, 8)
SAMPLES = 5  # sets of log-probabilities that rounds go through
LISTED = 10_000
SEED = 0
MIB = 2**20
COLUMNS = {
    "step": ["items", "rows", "contender", "expand_us", "step_us", "times_ours", "mib", "note"],
    "flat": ["rows", "contender", "items", "expand_us", "expand_ratio", "step_us", "step_ratio"],
    "rules": ["items", "rules", "added_ms", "set_up_ms", "first_ms"],
    "build": ["items", "nodes", "build_s", "arrays_mib", "tables_mib", "peak_mib", "write_s", "open_ms"],
    "memory": ["items", "levels", "arrays_gib", "tables_gib", "basis"],
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.constraint", description=__doc__)
    parser.add_argument(
        "--items", type=lambda text: tuple(int(float(n)) for n in text.split(",")), default="1e5,1e6,1e7"
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--limit-gib", type=float, default=6.0, help="a contender that would need more is left out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/constraint.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "benchmarks/plots/constraint.svg")
    options = parser.parse_args()
    torch.set_num_threads(1)
    code, started = commit(), time.perf_counter()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        catalogues = {items: Path(folder) / f"{items}.npy" for items in options.items}
        for items, path in catalogues.items():
            np.save(path, clustered_codes(items, SEED))
        parts: dict[str, Iterator[Row]] = {
            "build": build(catalogues),
            "flat": flat(catalogues, options.rounds),
            "rules": rules(catalogues, options.rounds),
            "step": steps(catalogues, options.rounds, options.limit_gib),
            "memory": memory(rows),
        }
        for part, found in parts.items():
            made = [{"part": part, **row} for row in found]
            rows += made
            print(f"\n{part}\n{table(made, COLUMNS[part])}", flush=True)
    sizes = ",".join(f"{items:.0e}".replace("e+0", "e") for items in options.items)
    record(
        options.out,
        f"python -m benchmarks.engine.constraint --items {sizes} --rounds {options.rounds}",
        [SEED],
        rows,
        minutes=round((time.perf_counter() - started) / 60, 1),
        **code,
    )
    draw(rows, options.plot)


# A search without its network


class Walk:
    """Searches with one contender and keeps what they cost: seconds of each walk, by part."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.expand: list[float] = []
        self.whole: list[float] = []

    def run(self, log_probs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The best beams. Shapes: LEVELS of (B, BEAMS, V) -> scores (B, BEAMS), paths (B, BEAMS)."""
        contender, batch = self.contender, log_probs[0].shape[0]
        beam, scores = contender.root(batch), torch.zeros(batch, 1)
        expanding, began = 0.0, time.process_time()
        for level in range(LEVELS):
            before = time.process_time()
            step, context = contender.expand(log_probs[level][:, : scores.shape[1]], beam, level)
            expanding += time.process_time() - before
            candidates = scores.unsqueeze(-1) + step
            scores, flat = candidates.flatten(1).topk(min(BEAMS, candidates[0].numel()))
            beam = contender.follow(beam, context, flat // step.shape[-1], flat % step.shape[-1])
        self.whole.append(time.process_time() - began)
        self.expand.append(expanding)
        return scores, contender.paths(beam)

    def forget(self) -> None:
        self.expand, self.whole = [], []

    def per_step(self) -> Row:
        """Microseconds of one step, medians over walks."""
        return {
            "expand_us": round(statistics.median(self.expand) * 1e6 / LEVELS, 1),
            "step_us": round(statistics.median(self.whole) * 1e6 / LEVELS, 1),
        }


def samples(batch: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    return [
        [torch.randn(batch, BEAMS, VOCABULARY, generator=generator).log_softmax(-1) for _ in range(LEVELS)]
        for _ in range(SAMPLES)
    ]


def take_turns(walks: Collection[Walk], log_probs: list[list[torch.Tensor]], rounds: int) -> None:
    for turn in range(rounds):
        for walk in walks:
            walk.run(log_probs[turn % SAMPLES])


def steps(catalogues: dict[int, Path], rounds: int, limit_gib: float) -> Iterator[Row]:
    """Every contender at every size. One that would not fit, by its memory at the size before, is named and not run."""
    gib_per_item: dict[str, float] = {}
    for items, path in catalogues.items():
        codes = np.load(path)
        contenders: list[Contender] = [Unconstrained()]
        for make in (Ours, *PEERS):
            needed = DenseMask.GIB if make is DenseMask else gib_per_item.get(make.name, 0) * items
            if needed > limit_gib:
                yield from (
                    {
                        "items": items,
                        "rows": batch * BEAMS,
                        "contender": make.name,
                        "note": f"not run: {needed:.0f} GiB",
                    }
                    for batch in BATCHES
                )
                continue
            contenders.append(make(codes))
            gib_per_item[make.name] = contenders[-1].nbytes / 2**30 / items
        for batch in BATCHES:
            log_probs = samples(batch)
            walks = {contender.name: Walk(contender) for contender in contenders}
            agree([walk for name, walk in walks.items() if name != Unconstrained.name], log_probs)
            for walk in walks.values():
                walk.forget()
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
        del contenders, walks, slow, walk
        gc.collect()


def agree(walks: list[Walk], log_probs: list[list[torch.Tensor]]) -> None:
    """Raises SystemExit where two contenders do not find the same items with the same scores."""
    for sample in log_probs:
        expected = walks[0].run(sample)
        for walk in walks[1:]:
            scores, paths = walk.run(sample)
            if not (torch.equal(scores, expected[0]) and torch.equal(paths, expected[1])):
                raise SystemExit(f"{walk.contender.name} finds other items than {walks[0].contender.name}.")


def flat(catalogues: dict[int, Path], rounds: int) -> Iterator[Row]:
    """Ours at all sizes in turns, without rules and with a list of 10,000 on top of a prepared set."""
    plain = {items: Ours(np.load(path)) for items, path in catalogues.items()}
    ruled = {items: copy(ours) for items, ours in plain.items()}
    books = {items: rule_book(ours) for items, ours in plain.items()}
    for batch in BATCHES:
        log_probs = samples(batch)
        with ExitStack() as stack:
            for items, ours in ruled.items():
                rules = kinds_of_rules(items)["subset and deny"]
                ours.blocked = stack.enter_context(books[items].blocked([rules] * batch))
            walks = {("ours", items): Walk(ours) for items, ours in plain.items()}
            walks |= {("ours, with rules", items): Walk(ours) for items, ours in ruled.items()}
            take_turns(walks.values(), log_probs, SAMPLES)
            for walk in walks.values():
                walk.forget()
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


# Rules


def kinds_of_rules(items: int) -> dict[str, Rules]:
    rng = np.random.default_rng(SEED)

    def some(count: int) -> tuple[int, ...]:
        return tuple(rng.choice(items, count, replace=False).tolist())

    return {
        "exclude 20": Rules(exclude=some(20)),
        "subset and exclude 20": Rules(catalogue="a fifth", exclude=some(20)),
        "deny 10,000": Rules(deny=some(LISTED)),
        "allow 10,000": Rules(allow=some(LISTED)),
        "subset": Rules(catalogue="a fifth"),
        "subset and deny": Rules(catalogue="a fifth", deny=some(LISTED)),
    }


def rule_book(ours: Ours) -> RuleBook:
    """With one named subset, of a fifth of the items."""
    items = len(ours.trie.item)
    fifth = np.random.default_rng(SEED + 1).choice(items, items // 5, replace=False)
    return RuleBook(ours.trie, lambda _: fifth)


def rules(catalogues: dict[int, Path], rounds: int) -> Iterator[Row]:
    """One request of 50 beams. `first_ms`: the first use, in which a subset is prepared and memory first touched."""
    log_probs = samples(1)
    for items, path in catalogues.items():
        ours = Ours(np.load(path))
        book, kinds = rule_book(ours), kinds_of_rules(items)
        walk = Walk(ours)
        first, set_up, whole = {}, defaultdict(list), defaultdict(list)
        for name, rule in {"none": Rules(), **kinds}.items():
            began = time.process_time()
            with book.blocked([rule]):
                pass
            first[name] = time.process_time() - began
        for turn in range(rounds + SAMPLES):
            for name, rule in {"none": Rules(), **kinds}.items():
                began = time.process_time()
                with book.blocked([rule]) as ours.blocked:
                    made = time.process_time()
                    walk.run(log_probs[turn % SAMPLES])
                    ran = time.process_time()
                done = time.process_time()
                if turn >= SAMPLES:
                    set_up[name].append(made - began + done - ran)
                    whole[name].append(done - began)
        without = statistics.median(whole["none"])
        for name in kinds:
            yield {
                "items": items,
                "rules": name,
                "added_ms": round((statistics.median(whole[name]) - without) * 1000, 3),
                "set_up_ms": round(statistics.median(set_up[name]) * 1000, 3),
                "first_ms": round(first[name] * 1000, 3),
            }


# Building, and memory


def build(catalogues: dict[int, Path]) -> Iterator[Row]:
    """Each in a process of its own, whose peak of memory is the build's."""
    for path in catalogues.values():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            yield child.submit(_build, path).result()


def _build(path: Path) -> Row:
    codes = np.load(path)
    before = _memory("VmRSS")
    began = time.process_time()
    trie = build_trie(codes)
    seconds, peak = time.process_time() - began, _memory("VmHWM")
    file = path.with_suffix(".safetensors")
    began = time.process_time()
    write_trie(file, trie)
    written = time.process_time() - began
    private, began = _memory("RssAnon"), time.process_time()
    read = read_trie(file)
    opened = time.process_time() - began
    if not all(array.equal(read.arrays()[name]) for name, array in trie.arrays().items()):
        raise SystemExit("The trie comes back from disk as another one.")
    return {
        "items": len(codes),
        "nodes": trie.nodes,
        "parents": trie.level_start[-2],
        "build_s": round(seconds, 2),
        "arrays_mib": round(sum(array.nbytes for array in trie.arrays().values()) / MIB, 1),
        "tables_mib": round(sum(table.nbytes for table in trie.tables) / MIB, 1),
        "peak_mib": round((peak - before) / MIB, 1),
        "write_s": round(written, 2),
        "open_ms": round(opened * 1000, 1),
        "open_private_mib": round(max(0, _memory("RssAnon") - private) / MIB, 1),
    }


def memory(rows: Sequence[Row]) -> Iterator[Row]:
    """Measured, then by what the arrays are: two int32 per node, one per node with children, two per item."""
    for row in rows:
        if row["part"] == "build":
            mib = row["arrays_mib"], row["tables_mib"]
            yield _memory_row(row["items"], CODES, "measured", *(size * MIB for size in mib))
    items = 10**9
    for codes, basis in (
        (CODES, "formula; every prefix of three tokens has items"),
        (2048, "formula; hardly two items share three tokens"),
    ):
        sizes = [min(codes**level, items) for level in range(LEVELS + 1)]
        parents = sum(sizes[:-1])
        tables = sum(size * codes for size in sizes[:-1] if size * codes <= TABLE_ENTRIES)
        yield _memory_row(items, codes, basis, 4 * (2 * (parents + items) + parents + 2 * items), 4 * tables)


def _memory_row(items: int, codes: int, basis: str, arrays: float, tables: float) -> Row:
    gib = {"arrays_gib": round(arrays / 2**30, 2), "tables_gib": round(tables / 2**30, 2)}
    return {"items": items, "levels": f"{LEVELS} x {codes}", **gib, "basis": basis}


def _memory(name: str) -> int:
    """Bytes of this process: VmRSS resident, VmHWM the most it has been, RssAnon its own. Linux alone tells."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
