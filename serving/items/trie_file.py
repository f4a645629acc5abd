"""A trie on disk: one safetensors file, mapped into memory when it is read, so that processes share its pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from serving.errors import BundleError
from serving.files import atomic_write
from serving.items.trie import ARRAYS, Trie

FORMAT = "streamrec trie 1"
FIRST_CHILD = "first_child"  # (J + 1,): the children of node n are the nodes first_child[n] .. first_child[n + 1] - 1
LAYOUT = ("level_start", "first_token", "tokens", "max_children")


def write_trie(path: Path, trie: Trie) -> None:
    """Writes a trie as safetensors, atomically: other processes may have the old file mapped."""
    layout = {name: torch.tensor(getattr(trie, name)) for name in LAYOUT}
    tables = {f"table.{level}": table for level, table in enumerate(trie.tables)}
    arrays = {name: array.cpu() for name, array in {**trie.arrays(), **tables, **layout}.items()}
    children = arrays.pop("children")
    arrays[FIRST_CHILD] = torch.cat([children[:, 0], children[-1:, 1]])
    with atomic_write(path) as partial:
        save_file(arrays, partial, {"format": FORMAT})


def read_trie(path: Path) -> Trie:
    """Reads what `write_trie` wrote. The arrays are mapped, not copied, and shared with other processes.

    Every array is checked once for entries out of range. Raises BundleError if the parts do not fit together.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
        stored = load_file(path)
        layout: dict[str, Any] = {name: tuple(stored[name].tolist()) for name in LAYOUT}
        tables = tuple(stored[f"table.{level}"] for level in range(len(layout["tokens"])))
        first_child = stored[FIRST_CHILD]
        arrays: dict[str, Any] = {name: stored[name] for name in ARRAYS if name != "children"}
        trie = Trie(**arrays, children=first_child.unfold(0, 2, 1), tables=tables, **layout)
        _check(trie, first_child)
    except (KeyError, TypeError, IndexError, ValueError, RuntimeError, SafetensorError, OSError) as error:
        raise BundleError(f"{path} is not a complete trie ({error}); write it again from the catalogue.") from error
    return trie


def _check(trie: Trie, first_child: torch.Tensor) -> None:
    """Raises ValueError, IndexError or TypeError if lengths, bounds of levels or ranges do not fit."""
    levels, nodes, inner, items = trie.levels, trie.nodes, trie.level_start[-2], len(trie.item)
    widths, sizes = max(trie.max_children), [trie.nodes_at(level) for level in range(levels + 1)]
    if trie.level_start[0] != 0 or sizes != sorted(sizes) or not sizes[0] == 1 <= items == sizes[-1]:
        raise ValueError("its levels do not grow from one root to the items")
    expected = {
        "token": (nodes + widths, 0, max(map(sum, zip(trie.first_token, trie.tokens, strict=True)))),
        "parent": (nodes, 0, inner),
        FIRST_CHILD: (inner + 1, 1, nodes + 1),
        "item": (items, 0, items),
        "leaf": (items, 0, items),
    }
    for name, (length, low, high) in expected.items():
        array = first_child if name == FIRST_CHILD else getattr(trie, name)
        if array.shape != (length,) or array.dtype != torch.int32 or not _within(array, low, high):
            raise ValueError(f"{name} has a wrong length, type or range")
    for level, table in enumerate(trie.tables):
        size = (sizes[level], trie.tokens[level])
        if table.numel() and (table.shape != size or table.dtype != torch.int32 or not _within(table, -1, nodes)):
            raise ValueError(f"the table of level {level} has a wrong shape, type or range")
    if first_child[list(trie.level_start[:-1])].tolist() != list(trie.level_start[1:]):
        raise ValueError("first_child does not match the first nodes of the levels")


def _within(array: torch.Tensor, low: int, high: int) -> bool:
    smallest, largest = array.aminmax()
    return low <= int(smallest) and int(largest) < high
