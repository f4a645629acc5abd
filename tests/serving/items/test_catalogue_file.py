"""A large catalogue, which is mapped, is the same as a small one, which is lists; a file of other items is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.items.catalogue import Catalogue
from serving.items.catalogue_file import HASHED_ROWS, HASHES, read_catalogue, write_catalogue
from serving.items.columns import MappedColumn
from serving.items.fields import Fields
from serving.items.row_index import RowIndex, hash_ids
from serving.types import Rules
from tests.builders import on_disk, tiny_model

TITLES = ["Red shoe", None, "red hat", "", "Blå sko", "red, dark shoe"]
CATEGORIES = [["shoes"], [], ["hats", "red"], ["hats"], ["shoes", "blue"], ["red", "shoes"]]
FILTERS = ("price > 2", 'brand == "b"', 'sizes has "l"', 'categories has "hats"', "not (sale == true)")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """catalogue.parquet, and catalogue.arrow of the same items."""
    monkeypatch.setattr("serving.items.catalogue_file.LISTED_ITEMS", 5)
    fields = Fields()
    fields.reserve(len(TITLES))
    for row in range(len(TITLES)):
        fields.put(row, {"price": row, "brand": "ab"[row % 2], "sizes": ["s", "l"][: row % 3], "sale": row > 3})
    catalogue = Catalogue(
        [f"é{row}" for row in range(len(TITLES))], np.arange(12, dtype=np.int32).reshape(6, 2), [*TITLES],
        [*CATEGORIES], np.array([1.0, 0, 4, 3, 2, 5]), fields=fields,
    )  # fmt: skip
    write_catalogue(tmp_path / "catalogue.parquet", catalogue, tmp_path / "catalogue.arrow")
    return tmp_path / "catalogue.parquet", tmp_path / "catalogue.arrow"


def same(one: Catalogue, other: Catalogue) -> None:
    for name in ("item_ids", "titles", "categories", "tokens", "popularity"):
        assert [*map(str, getattr(one, name))] == [*map(str, getattr(other, name))], name
    ids = [*one.item_ids, "nobody"]
    assert one.rows(ids) == other.rows(ids) == [*range(len(one)), None]
    assert one.category_names == other.category_names
    for row in range(len(one)):
        assert one.fields.of(row) == other.fields.of(row)
    for rules in [Rules(catalogue="dear"), *(Rules(filters=(each,)) for each in FILTERS), Rules(categories=("hats",))]:
        assert one.members(rules).tolist() == other.members(rules).tolist()
    for query in ("shoe red", "sko", "", "nothing"):
        assert one.find_titles(query, 9) == other.find_titles(query, 9)


def test_a_mapped_catalogue_is_the_same_also_when_it_changes(files: tuple[Path, Path]) -> None:
    path, arrow = files
    subsets: dict[str, list[str] | str] = {"dear": ["é5", "é4"]}
    both = read_catalogue(path, 2, dict(subsets)), read_catalogue(path, 2, dict(subsets), arrow)
    assert isinstance(both[0].item_ids, list) and isinstance(both[1].item_ids, MappedColumn)
    same(*both)
    for each in both:
        each.describe(2, "a red shoe", ["shoes", "new"], {"price": 9, "sizes": ["l"]})
        assert each.add("new", [6, 7], None, ["hats"], {"brand": "b"}) == 6
        each.list_item(5, False)
    same(*both)
    mapped = both[1]
    assert mapped.find_titles("red shoe", 9) == [0, 2]
    assert np.flatnonzero(mapped.members(Rules(categories=("hats",)))).tolist() == [3, 6]


def test_a_small_catalogue_is_not_mapped(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, arrow = files
    monkeypatch.setattr("serving.items.catalogue_file.LISTED_ITEMS", 6)
    arrow.unlink()
    write_catalogue(path, read_catalogue(path, 2, {}), arrow)
    assert not arrow.exists()


def spoiled(arrow: Path, **columns: pa.Array) -> None:
    """Puts other columns into the file."""
    table = pa.ipc.open_file(arrow.read_bytes()).read_all()
    for name, values in columns.items():
        index = table.column_names.index(name)
        table = table.set_column(index, name, values) if values is not None else table.remove_column(index)
    arrow.unlink()
    with pa.ipc.new_file(str(arrow), table.schema) as file:
        file.write_table(table)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": pa.array(["é0", "é2", "é1", "é3", "é4", "é5"], pa.large_string())}, "is of other items than"),
        ({"title": None}, "no column 'title'"),
        ({HASHES: pa.array([5, 4, 3, 2, 1, 0], pa.uint32())}, "no index of its item ids"),
        ({HASHED_ROWS: pa.array([0, 1, 2, 3, 4, 6], pa.int32())}, "no index of its item ids"),
        ({HASHED_ROWS: pa.array([0, 1, 2, 3, 4, -1], pa.int32())}, "no index of its item ids"),
    ],
    ids=["other items", "no titles", "not ascending", "a row too high", "a negative row"],
)
def test_a_file_that_does_not_fit_is_refused(
    files: tuple[Path, Path], columns: dict[str, pa.Array], message: str
) -> None:
    path, arrow = files
    spoiled(arrow, **columns)
    with pytest.raises(BundleError, match=message):
        read_catalogue(path, 2, {}, arrow)


def test_ids_of_one_hash_are_told_apart_and_one_id_twice_is_refused() -> None:
    def mapped(*item_ids: str) -> Catalogue:
        ids, count = [*item_ids], len(item_ids)
        tokens, nothing = np.arange(count, dtype=np.int32)[:, None], np.zeros(count)
        return Catalogue(ids, tokens, [None] * count, [[]] * count, nothing, row_index=RowIndex(ids, *hash_ids(ids)))

    assert hash_ids(["plumless"])[0] == hash_ids(["buckeroo"])[0]
    assert mapped("a", "plumless", "buckeroo").rows(["buckeroo", "plumless", "b"]) == [2, 1, None]
    with pytest.raises(BundleError, match="share one id"):
        mapped("plumless", "buckeroo", "plumless")


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"\x80\x04K\x01."])
def test_garbage_is_refused(files: tuple[Path, Path], content: bytes) -> None:
    path, arrow = files
    arrow.write_bytes(content)
    with pytest.raises(BundleError, match=r"catalogue\.arrow is not a catalogue"):
        read_catalogue(path, 2, {}, arrow)


def test_offsets_that_lead_out_of_the_file_are_refused(files: tuple[Path, Path]) -> None:
    path, arrow = files
    content = arrow.read_bytes()
    offsets = np.array([0, 3, 6, 9, 12, 15, 18], np.int64).tobytes()  # of the ids: three bytes each
    assert content.count(offsets) == 1
    arrow.write_bytes(content.replace(offsets, np.array([0, 3, 6, 9, 12, 15, 1 << 40], np.int64).tobytes()))
    with pytest.raises(BundleError, match=r"catalogue\.arrow is not a catalogue"):
        read_catalogue(path, 2, {}, arrow)


def test_a_bundle_of_a_large_catalogue_maps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.items.catalogue_file.LISTED_ITEMS", 5)
    made = tiny_model()
    opened = Bundle.load(on_disk(tmp_path / "one", made))
    assert isinstance(opened.catalogue.item_ids, MappedColumn) and isinstance(opened.catalogue.titles, MappedColumn)
    assert opened.catalogue.row("i7") == 7 and opened.catalogue.subsets["small"].tolist() == [0, 1, 2, 3, 4]
    assert [*opened.catalogue.titles] == made.catalogue.titles
    again = Bundle.load(on_disk(tmp_path / "two", opened))  # what was mapped can be written
    assert [*again.catalogue.item_ids] == made.catalogue.item_ids
    (tmp_path / "one/catalogue.arrow").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"catalogue\.arrow is damaged"):
        Bundle.load(tmp_path / "one")
