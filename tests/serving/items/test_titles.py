"""The index of titles: it leaves out no title that contains all words, and a file that does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from serving.errors import BundleError
from serving.items import titles as module
from serving.items.titles import ARRAYS, TitleIndex, build_title_index, read_titles, write_titles

words = st.text(alphabet="abé\U0001f600.(\\", min_size=1, max_size=4)
titles = st.lists(st.lists(words, max_size=4).map(" ".join), max_size=12)


@given(titles=titles, query=st.lists(words, max_size=3))
def test_every_title_that_contains_all_words_is_a_candidate(titles: list[str], query: list[str]) -> None:
    found = build_title_index(titles).candidates(query)
    expected = [rank for rank, title in enumerate(titles) if all(word in title for word in query)]
    if not query:
        assert found is None
        return
    assert found is not None and found.tolist() == sorted(set(found.tolist()))
    assert [rank for rank in found.tolist() if all(word in titles[rank] for word in query)] == expected
    assert len(query) > 1 or found.tolist() == expected  # one word: nothing is left to check


def test_words_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ["red shoe", "a shoe", "blue shoehorn", "horn"]
    monkeypatch.setattr(module, "WORDS_AT_ONCE", 2)
    found = build_title_index(made).candidates(["sho"])
    assert found is not None and found.tolist() == [0, 1, 2]


def test_what_most_titles_contain_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_title_index(["red shoe", "red hat", "red", "blue hat"])
    monkeypatch.setattr(module, "MOST_RANKS", 2)
    monkeypatch.setattr(module, "MOST_ALONE", 1)
    assert index.candidates(["hat"]) is index.candidates(["red", "red"]) is None
    found = index.candidates(["red", "hat"])
    assert found is not None and found.tolist() == [1, 3]  # the caller still reads them


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    for number, made in enumerate((["red shoe", "", "a shoe"], ["", ""])):
        path = tmp_path / f"{number}.safetensors"
        index = build_title_index(made)
        write_titles(path, index)
        found = read_titles(path, len(made))
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(found, name), getattr(index, name))
        assert (found.candidates(["shoe"]) is not None) and len(found.candidates(["shoe"])) == (2, 0)[number]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spoil",
    [
        {"ranks": np.array([0, 1, 3], np.int32)},
        {"ranks": np.array([0, -1, 1], np.int32)},
        {"ranks": np.array([0, 1, 1])},
        {"offsets": np.array([0, 1, 2])},
        {"offsets": np.array([0, 2, 1, 3])},
        {"offsets": np.array([0, 1, 2, 4])},
        {"begins": np.array([0, 0, 4])},
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, spoil: dict[str, np.ndarray]) -> None:
    index: TitleIndex = replace(build_title_index(["red shoe", "hat", ""]), **spoil)
    save_file({name: getattr(index, name) for name in ARRAYS}, tmp_path / "t.safetensors")
    with pytest.raises(BundleError, match=r"t\.safetensors is not the index of this catalogue's titles; export"):
        read_titles(tmp_path / "t.safetensors", 3)
    save_file({"text": index.text}, tmp_path / "t.safetensors")
    with pytest.raises(BundleError, match=r"t\.safetensors is not an index of titles; export"):
        read_titles(tmp_path / "t.safetensors", 3)
