"""A trie is read back from disk as it was, mapped and not copied, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.errors import BundleError
from serving.items.trie import Trie, build_trie
from serving.items.trie_file import FORMAT, read_trie, write_trie
from tests.builders import random_codes
from tests.tools import require


def small(table_entries: int = 8) -> Trie:
    """The first level as a table, the others as runs."""
    return build_trie(random_codes(40, (6, 5, 4), 0) + np.array([3, 9, 14]), table_entries=table_entries)


@pytest.mark.parametrize("table_entries", [0, 8, 1000])
def test_what_is_written_is_read_back(tmp_path: Path, table_entries: int):
    trie = small(table_entries)
    write_trie(tmp_path / "trie.safetensors", trie)
    read = read_trie(tmp_path / "trie.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "trie.safetensors"]
    for name in ("level_start", "first_token", "tokens", "max_children"):
        assert getattr(read, name) == getattr(trie, name)
    for name, array in trie.arrays().items():
        assert read.arrays()[name].equal(array)
    assert len(read.tables) == 3 and all(a.equal(b) for a, b in zip(read.tables, trie.tables, strict=True))


def test_arrays_are_mapped_from_the_file(tmp_path: Path):
    write_trie(tmp_path / "trie.safetensors", small())
    read = read_trie(tmp_path / "trie.safetensors")
    maps = Path("/proc/self/maps")
    require(maps.exists(), "the mapping of files is", "run on Linux, for /proc/self/maps")
    mapped = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith("trie.safetensors")]
    spans = [range(int(low, 16), int(high, 16)) for low, high in mapped]
    assert all(any(array.data_ptr() in span for span in spans) for array in read.arrays().values())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("token", lambda t: t[:-1]),
        ("token", lambda t: t - 1),
        ("parent", lambda t: t + 40),
        ("parent", lambda t: t.to(torch.int64)),
        ("first_child", lambda t: t.flip(0).contiguous()),
        ("first_child", lambda t: t[1:]),
        ("item", lambda t: t + 1),
        ("leaf", lambda t: t - 1),
        ("table.0", lambda t: t + 100),
        ("table.0", lambda t: t[:, 1:].contiguous()),
        ("level_start", lambda t: t.flip(0).contiguous()),
        ("level_start", lambda t: t[1:]),
        ("tokens", lambda t: t[1:]),
        ("max_children", lambda t: t + 1),
        ("item", None),
        ("tokens", None),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path, name: str, wrong):
    path = tmp_path / "trie.safetensors"
    write_trie(path, small())
    stored = {key: array.clone() for key, array in load_file(path).items()}
    array = stored.pop(name)
    if wrong is not None:
        stored[name] = wrong(array)
    save_file(stored, path, {"format": FORMAT})
    with pytest.raises(BundleError, match="is not a complete trie"):
        read_trie(path)


def test_files_that_are_not_tries_are_refused(tmp_path: Path):
    path = tmp_path / "trie.safetensors"
    with pytest.raises(BundleError, match="is not a complete trie"):
        read_trie(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(BundleError, match="is not a complete trie"):
        read_trie(path)
    save_file({"item": torch.zeros(3)}, path)
    with pytest.raises(BundleError, match="its format is not"):
        read_trie(path)
    write_trie(path, small())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BundleError, match="is not a complete trie"):
        read_trie(path)
