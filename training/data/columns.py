"""Columns of a table of events, checked: ids, types and values. Times have a module of their own, `times.py`.

Everything raises DataError, which names the file and, where one is at fault, the first such data row (the first is 1).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from serving.ids import id_fault, is_id_type
from serving.types import MAX_ID_LENGTH, MAX_TYPE_LENGTH
from training.data.errors import DataError

MAX_TYPES = 100


def read_ids(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids as text."""
    ids = read_texts(path, name, column)
    length = pc.fill_null(pc.utf8_length(ids), 0)
    bad = pc.or_(pc.equal(length, 0), pc.greater(length, MAX_ID_LENGTH))
    if pc.any(bad).as_py():
        row = int(np.flatnonzero(bad.to_numpy())[0])
        fault = id_fault(ids[row].as_py() or "")
        raise DataError(f"{path}, row {row + 1}: {name} {fault}; correct it or remove the row")
    return ids


def read_types(path: Path, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Types of events as text, null where there is none."""
    types = read_texts(path, "type", column)
    types = pc.if_else(pc.equal(types, ""), None, types)
    if pc.any(too_long := pc.fill_null(pc.greater(pc.utf8_length(types), MAX_TYPE_LENGTH), False)).as_py():
        row = int(np.flatnonzero(too_long.to_numpy())[0])
        raise DataError(f"{path}, row {row + 1}: type has more than {MAX_TYPE_LENGTH} characters; shorten it")
    if (count := len(pc.unique(types.drop_null()))) > MAX_TYPES:
        raise DataError(
            f"{path} has {count:,} types of events, and at most {MAX_TYPES} are supported; use kinds such as view and "
            "purchase, or rename the column"
        )
    return types


def read_values(path: Path, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values of events as float64, null where there is none."""
    try:
        if is_id_type(column.type) and not pa.types.is_integer(column.type):
            texts = pc.utf8_trim_whitespace(read_texts(path, "value", column))
            column = pc.if_else(pc.equal(texts, ""), None, texts)
        values = column.cast(pa.float64())
    except pa.ArrowException as error:
        raise DataError(f"{path}: not every value is a number ({error}); correct them, or rename the column") from error
    bad = pc.fill_null(pc.invert(pc.is_finite(values)), False)
    if pc.any(bad).as_py():
        row = int(np.flatnonzero(bad.to_numpy())[0])
        raise DataError(f"{path}, row {row + 1}: the value is not a finite number; leave it empty where there is none")
    return values


def read_texts(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any kind of column as text."""
    try:
        texts = column.cast(pa.string())
        texts.validate(full=True)  # Parquet does not check what it calls text
    except pa.ArrowInvalid:
        for row, value in enumerate(column.cast(pa.binary()).to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, row {row + 1}: {name} is not UTF-8 text ({error}); write the file again as UTF-8"
                ) from error
        raise
    return texts
