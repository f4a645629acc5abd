"""The catalogue on disk: catalogue.parquet, with a row per item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serving.errors import BundleError, FilterError
from serving.items.catalogue import Catalogue
from serving.items.fields_file import from_columns, to_columns
from serving.items.filter_parser import parse_filter

COLUMNS = {"item_id", "tokens", "title", "categories", "popularity"}


def write_catalogue(path: Path, catalogue: Catalogue) -> None:
    items, levels = catalogue.tokens.shape
    ends = np.arange(items + 1, dtype=np.int32) * np.int32(levels)
    table = pa.table({
        "item_id": pa.array(catalogue.item_ids, pa.string()),
        "tokens": pa.ListArray.from_arrays(ends, catalogue.tokens.astype(np.int32).ravel()),
        "title": pa.array(catalogue.titles, pa.string()),
        "categories": pa.array(catalogue.categories, pa.list_(pa.string())),
        "popularity": pa.array(catalogue.popularity, pa.float64()),
        **to_columns(catalogue.fields, items),
    })  # fmt: skip
    pq.write_table(table, path)


def read_catalogue(path: Path, tokens_per_item: int, subsets: dict[str, Sequence[str] | str]) -> Catalogue:
    """Reads catalogue.parquet and resolves named subsets: lists of item ids, or filters. Raises BundleError."""
    table = pq.read_table(path)
    missing = COLUMNS - set(table.column_names)
    if missing:
        raise BundleError(f"catalogue.parquet has no column {sorted(missing)[0]!r}; export the bundle again.")
    tokens = table["tokens"].combine_chunks()
    lengths = tokens.value_lengths().to_numpy(zero_copy_only=False)
    if (lengths != tokens_per_item).any():
        raise BundleError(f"Every item needs {tokens_per_item} tokens, as bundle.json says; export the bundle again.")
    catalogue = Catalogue(
        item_ids=table["item_id"].to_pylist(),
        tokens=tokens.flatten().to_numpy().reshape(-1, tokens_per_item),
        titles=table["title"].to_pylist(),
        categories=[names or [] for names in table["categories"].to_pylist()],
        popularity=table["popularity"].to_numpy(),
        fields=from_columns(table),
    )
    for name, subset in subsets.items():
        if isinstance(subset, str):
            catalogue.filters[name] = _filter(name, subset)
        else:
            catalogue.subsets[name] = _rows(catalogue, name, subset)
    return catalogue


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
