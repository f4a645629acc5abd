"""Fields as columns of catalogue.parquet: a column per field and type, named `number:price`, `string:brand` and so on.

Categories have a column of their own there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from serving.items.columns import column_of
from serving.items.fields import Fields, Strings
from serving.items.labels import Labels

MICROSECONDS = 1e6  # of a time, and no finer


def to_columns(fields: Fields, rows: int) -> dict[str, pa.Array]:
    """The first rows of all columns, with nulls."""
    columns: dict[str, pa.Array] = {}
    for name, column in fields.numbers.items():
        columns[f"number:{name}"] = pa.array(fields.order.by_row(column[:rows]), pa.float64(), from_pandas=True)
    for name, column in fields.times.items():
        times = fields.order.by_row(column[:rows])
        missing = np.isnan(times)
        whole = (np.where(missing, 0, times) * MICROSECONDS).round().astype(np.int64)
        columns[f"time:{name}"] = pa.array(whole, pa.timestamp("us", "UTC"), mask=missing)
    for name, strings in fields.strings.items():
        codes = fields.order.by_row(strings.codes[:rows]).tolist()
        found = [strings.values[code] if code >= 0 else None for code in codes]
        for prefix, kind, type in (("string", str, pa.string()), ("boolean", bool, pa.bool_())):
            columns[f"{prefix}:{name}"] = pa.array([each if isinstance(each, kind) else None for each in found], type)
    for name, labels in fields.lists.items():
        if name != "categories":
            columns[f"list:{name}"] = pa.array([labels.of(row) or None for row in range(rows)], pa.list_(pa.string()))
    return {name: column for name, column in columns.items() if column.null_count < rows}


def from_columns(table: pa.Table) -> Fields:
    """What `to_columns` has made; other columns are ignored."""
    fields = Fields()
    fields.reserve(table.num_rows)
    for column in table.column_names:
        prefix, _, name = column.partition(":")
        values = table[column]
        match prefix:
            case "number":
                fields.numbers[name] = np.array(values.to_numpy(), np.float64)
            case "time":
                fields.times[name] = np.array(values.cast(pa.int64()).to_numpy(), np.float64) / MICROSECONDS
            case "string" | "boolean":
                _add_strings(fields, name, values)
            case "list":
                fields.lists[name] = Labels(column_of(values))
    return fields


def _add_strings(fields: Fields, name: str, column: pa.ChunkedArray) -> None:
    encoded = column.combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy().astype(np.int32)
    values: Sequence[Any] = encoded.dictionary.to_pylist()
    known = fields.strings.setdefault(name, Strings(np.full(len(codes), -1, np.int32)))
    own = np.array([known.code(value) for value in values], np.int32)
    known.codes[codes >= 0] = own[codes[codes >= 0]]
