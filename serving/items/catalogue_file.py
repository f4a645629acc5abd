"""The catalogue on disk: catalogue.parquet, with a row per item, for anyone to read.

A large catalogue is in catalogue.arrow as well, the same table and an index of item ids, which processes map and share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import BundleError, FilterError
from serving.items.catalogue import Catalogue
from serving.items.columns import array_of, column_of, packed
from serving.items.fields_file import from_columns, to_columns
from serving.items.filter_parser import parse_filter
from serving.items.row_index import RowIndex, hash_ids

COLUMNS = {"item_id", "tokens", "title", "categories", "popularity"}
HASHES, HASHED_ROWS = "item_id hashes", "item_id rows"  # of the index of item ids
LISTED_ITEMS = 100_000  # up to here every process has lists of its own, some 50 MB, and reads them a few µs faster


def write_catalogue(path: Path, catalogue: Catalogue, mapped: Path) -> None:
    """Writes catalogue.parquet to `path`, and catalogue.arrow to `mapped` if the catalogue is a large one."""
    items, levels = catalogue.tokens.shape
    item_ids = list(catalogue.item_ids)
    ends = np.arange(items + 1, dtype=np.int32) * np.int32(levels)
    table = pa.table({
        "item_id": pa.array(item_ids, pa.string()),
        "tokens": pa.ListArray.from_arrays(ends, catalogue.tokens.astype(np.int32).ravel()),
        "title": pa.array(list(catalogue.titles), pa.string()),
        "categories": pa.array(list(catalogue.categories), pa.list_(pa.string())),
        "popularity": pa.array(catalogue.popularity, pa.float64()),
        **to_columns(catalogue.fields, items),
    })  # fmt: skip
    pq.write_table(table, path)
    if items > LISTED_ITEMS:
        hashes, rows = hash_ids(item_ids)
        table = packed(table).append_column(HASHES, pa.array(hashes)).append_column(HASHED_ROWS, pa.array(rows))
        with pa.ipc.new_file(str(mapped), table.schema) as file:
            file.write_table(table)


def read_catalogue(
    path: Path, tokens_per_item: int, subsets: Mapping[str, Sequence[str] | str], mapped: Path | None = None
) -> Catalogue:
    """Reads catalogue.parquet, or maps catalogue.arrow in its place, and resolves named subsets: lists of item ids, or
    filters. Raises BundleError."""
    table = pq.read_table(path) if mapped is None else _map(mapped, path)
    missing = COLUMNS - set(table.column_names)
    if missing:
        raise BundleError(f"catalogue.parquet has no column {sorted(missing)[0]!r}; export the bundle again.")
    tokens = array_of(table["tokens"])
    lengths = tokens.value_lengths().to_numpy(zero_copy_only=False)
    if (lengths != tokens_per_item).any():
        raise BundleError(f"Every item needs {tokens_per_item} tokens, as bundle.json says; export the bundle again.")
    item_ids = column_of(table["item_id"])
    catalogue = Catalogue(
        item_ids=item_ids,
        tokens=tokens.flatten().to_numpy().reshape(-1, tokens_per_item),
        titles=column_of(table["title"]),
        categories=column_of(table["categories"]),
        popularity=array_of(table["popularity"]).to_numpy(),
        fields=from_columns(table),
        row_index=None if mapped is None else RowIndex(item_ids, *_id_index(table)),
    )
    for name, subset in subsets.items():
        if isinstance(subset, str):
            catalogue.filters[name] = _filter(name, subset)
        else:
            catalogue.subsets[name] = _rows(catalogue, name, subset)
    return catalogue


def _map(mapped: Path, path: Path) -> pa.Table:
    """catalogue.arrow, if it is of the items in catalogue.parquet: it would name the wrong ones."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(mapped))).read_all()
        table.validate(full=True)  # or an offset could lead out of the file
        known = pq.read_table(path, columns=["item_id"])["item_id"]
        fits = table["item_id"].equals(known.cast(pa.large_string()))
    except (pa.ArrowException, KeyError) as error:
        raise BundleError(f"{mapped.name} is not a catalogue ({error}); export the bundle again.") from error
    if not fits:
        raise BundleError(f"{mapped.name} is of other items than {path.name}; export the bundle again.")
    return table


def _id_index(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    hashes, rows = (array_of(table[name]).to_numpy() for name in (HASHES, HASHED_ROWS))
    if (hashes[1:] < hashes[:-1]).any() or rows.min() < 0 or rows.max() >= len(rows):
        raise BundleError("catalogue.arrow has no index of its item ids; export the bundle again.")
    return hashes, rows


def _filter(name: str, text: str) -> str:
    try:
        return parse_filter(text).text
    except FilterError as error:
        raise BundleError(f"Correct the named catalogue {name!r}. {error}") from error


def _rows(catalogue: Catalogue, name: str, item_ids: Sequence[str]) -> np.ndarray:
    rows = catalogue.rows(item_ids)
    if None in rows:
        raise BundleError(
            f"The named catalogue {name!r} lists an item that the catalogue does not have; correct the list."
        )
    return np.unique(np.asarray(rows, dtype=np.int64))
