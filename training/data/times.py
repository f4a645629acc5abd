"""The times of events: as exact as the file has them for their order, as numbers for everything else.

Order numbers of 64 bits and nanoseconds have more digits than a float64, in which events of one second would tie.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from math import isfinite
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.data.errors import DataError

Exact = int | Decimal
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NANOSECONDS = 10**9
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": NANOSECONDS}
EMPTY = "{}, row {}: the time is empty; fill it in or remove the row"
WRITE = "write all times as numbers or all as ISO dates such as 2024-05-31T12:00:00"


@dataclass(frozen=True, slots=True)
class Times:
    """order: (events,) integers or float64 that sort as the exact times do, and tie only where these are equal.

    values: (events,) int64 or uint64 where the file counts in whole numbers, else float64. Seconds since 1970 for dates
    and timestamps, otherwise the file's own unit.
    """

    order: np.ndarray
    values: np.ndarray


def read_times(path: Path, column: pa.ChunkedArray) -> Times:
    """Numbers as they are, ISO 8601 dates and timestamps (UTC unless they say otherwise) as seconds since 1970.

    Raises DataError naming the first row without a time.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    column = column.cast(kind)
    if column.null_count:
        row = int(np.flatnonzero(pc.is_null(column).to_numpy())[0])
        raise DataError(EMPTY.format(path, row + 1))
    if pa.types.is_integer(kind):
        whole = column.cast(pa.uint64() if kind == pa.uint64() else pa.int64()).to_numpy()
        return Times(whole, whole)
    if pa.types.is_floating(kind):
        values = column.cast(pa.float64()).to_numpy()
        if not np.isfinite(values).all():
            _refuse(path, column, int(np.flatnonzero(~np.isfinite(values))[0]))
        return Times(values, values)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        unit = kind.unit if pa.types.is_timestamp(kind) else "ms"
        order = column.cast(pa.timestamp(unit, getattr(kind, "tz", None))).cast(pa.int64()).to_numpy()
        return Times(order, order / PER_SECOND[unit])
    try:
        texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
    except pa.ArrowException as error:
        raise DataError(f"{path}: the times are {kind}; {WRITE}") from error
    return _read_texts(path, texts)


def _read_texts(path: Path, texts: pa.ChunkedArray) -> Times:
    try:
        whole = texts.cast(pa.int64()).to_numpy()
        return Times(whole, whole)
    except pa.ArrowInvalid:
        pass  # not all are whole numbers of 64 bits
    unique = pc.unique(texts)
    index = pc.index_in(texts, value_set=unique).to_numpy()
    dates = _number(unique[0].as_py()) is None  # the first row decides for all
    parse: Callable[[str], Exact | None] = _nanoseconds if dates else _number
    exact: list[Exact] = []
    for number, text in enumerate(unique.to_pylist()):
        time = parse(text)
        if time is None:
            _refuse(path, texts, int(np.flatnonzero(index == number)[0]))
        exact.append(time)
    return Times(_ranks(exact)[index], _values(exact, NANOSECONDS if dates else 1)[index])


def _refuse(path: Path, column: pa.ChunkedArray, row: int) -> NoReturn:
    value = column[row].as_py()
    if value == "":
        raise DataError(EMPTY.format(path, row + 1))
    raise DataError(f"{path}, row {row + 1}: {repr(value)[:60]} is not a time; {WRITE}")


def _number(text: str) -> Exact | None:
    try:
        value: Exact = int(text)
    except ValueError:
        try:
            value = Decimal(text)
        except InvalidOperation:
            return None
    try:
        return value if isfinite(float(value)) else None
    except (ValueError, OverflowError):  # a signalling NaN; more digits than a float64 can hold
        return None


def _nanoseconds(text: str) -> int | None:
    """An ISO 8601 date as nanoseconds since 1970; datetime itself has microseconds."""
    fraction = re.fullmatch(r"(.*\d{2}:?\d{2}:?\d{2})[.,](\d+)(.*)", text)
    whole, digits, zone = fraction.groups() if fraction else (text, "0", "")
    try:
        time = datetime.fromisoformat(whole + zone)
    except ValueError:
        return None
    since = (time if time.tzinfo else time.replace(tzinfo=UTC)) - EPOCH
    return since // timedelta(seconds=1) * NANOSECONDS + int(digits[:9].ljust(9, "0"))


def _ranks(exact: list[Exact]) -> np.ndarray:
    """The rank of each value among all, equal values sharing one. Shape: (n,) int64."""
    ranks = np.zeros(len(exact), dtype=np.int64)
    rank, last = -1, None
    for index in sorted(range(len(exact)), key=exact.__getitem__):
        if exact[index] != last:
            rank, last = rank + 1, exact[index]
        ranks[index] = rank
    return ranks


def _values(exact: list[Exact], per_unit: int) -> np.ndarray:
    """Whole numbers where all are and have 64 bits, else float64. Shape: (n,)."""
    if per_unit == 1 and all(isinstance(value, int) for value in exact):
        for whole in (np.int64, np.uint64):
            if np.iinfo(whole).min <= min(exact) and max(exact) <= np.iinfo(whole).max:
                return np.array(exact, dtype=whole)
    return np.array([float(value / per_unit) for value in exact], dtype=np.float64)
