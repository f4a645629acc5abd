"""Building the trie, and the memory it takes: measured, and by formula for catalogues that do not fit here (Linux)."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.engine.constraint_contenders import CODES, LEVELS
from benchmarks.engine.constraint_walk import Row
from serving.items.trie import TABLE_ENTRIES, build_trie
from serving.items.trie_file import read_trie, write_trie

MIB = 2**20
BILLION = 10**9


def build(catalogues: dict[int, Path]) -> Iterator[Row]:
    """One row per catalogue, each from a process of its own, whose peak memory is the build's."""
    for path in catalogues.values():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            yield child.submit(_build, path).result()


def _build(path: Path) -> Row:
    codes = np.load(path)
    before = _memory_of_this_process("VmRSS")
    began = time.process_time()
    trie = build_trie(codes)
    built, peak = time.process_time() - began, _memory_of_this_process("VmHWM")
    file = path.with_suffix(".safetensors")
    began = time.process_time()
    write_trie(file, trie)
    written = time.process_time() - began
    private, began = _memory_of_this_process("RssAnon"), time.process_time()
    read = read_trie(file)
    opened = time.process_time() - began
    if not all(array.equal(read.arrays()[name]) for name, array in trie.arrays().items()):
        raise SystemExit("The trie that was read differs from the one that was written.")
    return {
        "items": len(codes),
        "nodes": trie.nodes,
        "parents": trie.level_start[-2],
        "build_s": round(built, 2),
        "arrays_mib": round(sum(array.nbytes for array in trie.arrays().values()) / MIB, 1),
        "tables_mib": round(sum(table.nbytes for table in trie.tables) / MIB, 1),
        "peak_mib": round((peak - before) / MIB, 1),
        "write_s": round(written, 2),
        "open_ms": round(opened * 1000, 1),
        "open_private_mib": round(max(0, _memory_of_this_process("RssAnon") - private) / MIB, 1),
    }


def memory(rows: Sequence[Row]) -> Iterator[Row]:
    """Measured, then by the arrays' sizes: two int32 per node, per node with children and per item."""
    for row in rows:
        if row["part"] == "build":
            yield _memory_row(row["items"], CODES, "measured", row["arrays_mib"] * MIB, row["tables_mib"] * MIB)
    for codes, basis in (
        (CODES, "formula; every prefix of three tokens has items"),
        (2048, "formula; hardly two items share three tokens"),
    ):
        nodes = [min(codes**level, BILLION) for level in range(LEVELS + 1)]
        parents = sum(nodes[:-1])
        tables = sum(count * codes for count in nodes[:-1] if count * codes <= TABLE_ENTRIES)
        yield _memory_row(BILLION, codes, basis, 8 * (parents + BILLION + parents + BILLION), 4 * tables)


def _memory_row(items: int, codes: int, basis: str, arrays: float, tables: float) -> Row:
    gib = {"arrays_gib": round(arrays / 2**30, 2), "tables_gib": round(tables / 2**30, 2)}
    return {"items": items, "levels": f"{LEVELS} x {codes}", **gib, "basis": basis}


def _memory_of_this_process(name: str) -> int:
    """Bytes. VmRSS: resident now; VmHWM: the most that was resident; RssAnon: private to this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
