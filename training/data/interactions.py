"""The table of events of a data folder: its file found, and its columns read and checked.

A CSV may be separated by commas, semicolons, tabs or bars, and its header may give types as RecBole's `.inter` does
(`user_id:token`). Quotes are held to the standard (RFC 4180): a forgotten one would turn thousands of rows into one.
"""

from __future__ import annotations

import csv
import gzip
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from serving.ids import is_id_type
from training.data.columns import read_ids, read_texts, read_types, read_values
from training.data.errors import DataError
from training.data.times import Times, read_times

INTERACTIONS = ("interactions.csv.gz", "interactions.csv", "interactions.parquet", "interactions.inter")
TIME_COLUMNS = ("timestamp", "timestamp_or_order")
WANTED = (("user_id",), ("item_id",), TIME_COLUMNS)
OPTIONAL = ("type", "value")
NAMES = "user_id,item_id,timestamp"
NO_ROWS = "{} has no data rows; every row is one event: " + NAMES
BLOCK_SIZES = (1 << 20, 1 << 26, (1 << 31) - 1)  # bytes; a row has to fit into one
SEPARATORS = ",\t;|"
TYPED = re.compile(r"(.+):(?:token|token_seq|float|float_seq)")  # RecBole's
UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class Interactions:
    """A row per event, in the order of the file. Ids are text.

    types: text, null where an event has none. values: float64, null likewise. None: the file has no such column.
    """

    users: pa.ChunkedArray
    items: pa.ChunkedArray
    times: Times
    types: pa.ChunkedArray | None = None
    values: pa.ChunkedArray | None = None

    def filter(self, kept: pa.ChunkedArray) -> Interactions:
        """Those of the rows for which `kept` (booleans) is true."""
        mask = kept.to_numpy()
        times = Times(self.times.order[mask], self.times.values[mask])
        types, values = (column if column is None else column.filter(kept) for column in (self.types, self.values))
        return Interactions(self.users.filter(kept), self.items.filter(kept), times, types, values)


def read_interactions(path: Path) -> Interactions:
    """Raises DataError, which names the file and, where one is at fault, the data row (the first one is 1)."""
    columns = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    times = columns["timestamp"]
    if not len(times):
        raise DataError(NO_ROWS.format(path))
    if is_id_type(times.type) and not pa.types.is_integer(times.type):
        times = read_texts(path, "the time", times)
    return Interactions(
        read_ids(path, "user_id", columns["user_id"]),
        read_ids(path, "item_id", columns["item_id"]),
        read_times(path, times),
        read_types(path, columns["type"]) if "type" in columns else None,
        read_values(path, columns["value"]) if "value" in columns else None,
    )


def find_interactions(folder: Path) -> Path:
    """The one file of events in a data folder. Raises DataError where there are none or several."""
    found = [folder / name for name in INTERACTIONS if (folder / name).is_file()]
    found = found or sorted(path for path in folder.glob("*.inter") if path.is_file())
    if len(found) > 1:
        raise DataError(f"{folder} has {' and '.join(path.name for path in found)}; keep one of them")
    if not found:
        raise DataError(f"{folder} has no {', '.join(INTERACTIONS)}; put one of these there")
    return found[0]


def open_text(path: Path, errors: str = "strict") -> TextIO:
    """A file as text, unpacked where its name ends in .gz. errors: what to do where it is not UTF-8, see `open`."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors=errors, newline="")
    return path.open(encoding="utf-8-sig", errors=errors, newline="")


@dataclass(frozen=True, slots=True)
class Header:
    """Of a CSV: what its columns are called there, by what they hold, the index of the times, what separates fields."""

    columns: dict[str, str]
    time_index: int
    separator: str


def _read_csv(path: Path) -> dict[str, pa.ChunkedArray]:
    """Columns by what they hold, all as bytes: "007" must stay "007"."""
    try:
        with _long_fields():
            header = _read_header(path)
            _check_quotes(path, header)
        table = _read_columns(path, header)
    except UNREADABLE as error:
        text = str(error)
        if "Empty CSV" in text:  # a header without a line break behind it
            raise DataError(NO_ROWS.format(path)) from error
        if bad := re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", text):
            raise DataError(
                f"{path}, row {int(bad[1]) - 1}: {bad[3]} fields where the header has {bad[2]}; correct the row"
            ) from error
        raise DataError(f"{path} cannot be read ({text}); write it again as UTF-8 CSV") from error
    return {name: table.column(own) for name, own in header.columns.items()}


def _read_columns(path: Path, header: Header) -> pa.Table:
    for block_size in BLOCK_SIZES:
        try:
            return pyarrow.csv.read_csv(
                path,  # decompressed by its suffix
                read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=block_size),  # errors name the row
                parse_options=pyarrow.csv.ParseOptions(delimiter=header.separator, newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=list(header.columns.values()),
                    column_types=dict.fromkeys(header.columns.values(), pa.binary()),
                    strings_can_be_null=True,
                    null_values=[""],
                ),
            )
        except pa.ArrowInvalid as error:
            if "block" not in str(error) or block_size == BLOCK_SIZES[-1]:
                raise
    raise AssertionError("the last block size either reads the file or raises")


def _read_header(path: Path) -> Header:
    read: dict[str, list[str]] = {}
    with open_text(path, "surrogateescape") as file:  # a column that nobody reads need not be UTF-8
        for separator in SEPARATORS:
            file.seek(0)
            read[separator] = next((fields for fields in csv.reader(file, delimiter=separator) if fields), [])
    if not read[","]:
        raise DataError(f"{path} is empty; its first line must name {NAMES}")
    first = read[","][0]
    if first.startswith("\x1f"):
        raise DataError(f"{path} is packed with gzip; name it {path.name}.gz")
    if "\0" in first:
        raise DataError(f"{path} is not UTF-8 but perhaps UTF-16; write it again as UTF-8 CSV")
    separator = next((sign for sign in SEPARATORS if "user_id" in map(_untyped, read[sign])), ",")
    names = [_untyped(name) for name in read[separator]]
    indices = {name: names.index(own) for name, own in _wanted(path, names, ",".join(read[","])).items()}
    columns = {name: read[separator][index] for name, index in indices.items()}
    return Header(columns, indices["timestamp"], separator)


def _wanted(path: Path, names: list[str], header: str) -> dict[str, str]:
    """The columns to read, by what they hold. Raises DataError, see `_only`."""
    found = {wanted[0]: _only(path, names, wanted, header) for wanted in WANTED}
    return found | {name: _only(path, names, (name,), header) for name in OPTIONAL if name in names}


def _only(path: Path, names: list[str], wanted: tuple[str, ...], header: str) -> str:
    """The first of the wanted names that a column has. Raises DataError where none has, or two have the same."""
    for name in wanted:
        if names.count(name) > 1:
            raise DataError(f"{path} has {names.count(name)} columns named {name}; keep one of them")
        if name in names:
            return name
    padded = next((name for name in names if name.strip() in wanted), None)
    if padded is not None:
        raise DataError(f"{path} has a space in the name of the column {padded!r}; write {NAMES} without spaces")
    shown = header if len(header) <= 100 else header[:100] + "…"
    advice = f"name {NAMES} there"
    if wanted == TIME_COLUMNS:
        advice = "add one, or the order of events as 0,1,2,…"
    raise DataError(f"{path} has no column {' or '.join(wanted)} but {shown!r}; {advice}")


def _untyped(name: str) -> str:
    typed = TYPED.fullmatch(name)
    return typed[1] if typed else name


def _check_quotes(path: Path, header: Header) -> None:
    """Raises DataError for a quote that is not closed, or that closes rows later than its own.

    The latter may be standard CSV, but a line inside a field that is a row itself is no text of anybody's.
    """
    with open_text(path, "surrogateescape") as file:
        if not any('"' in block for block in iter(lambda: file.read(1 << 20), "")):
            return
        file.seek(0)
        reader, row, line = csv.reader(file, delimiter=header.separator, strict=True), -1, 0
        try:
            for fields in reader:
                row += bool(fields)
                if reader.line_num > line + 1 and row and _holds_rows(fields, header):
                    raise DataError(
                        f"{path}, row {row}: a quoted field goes on over lines that look like rows; close the quote, "
                        "or double it where it belongs to the text"
                    )
                line = reader.line_num
        except csv.Error as error:
            raise DataError(
                f"{path}, row {row + 1}: a quote opens a field and is not closed before the next separator ({error}); "
                "close it, or double every quote that belongs to the text and put the field in quotes"
            ) from error


def _holds_rows(fields: list[str], header: Header) -> bool:
    """Whether a line in one of a row's fields has as many fields as the row and a time in the place of the times."""
    shape = _shape(fields, header)
    lines = (line for field in fields for line in field.splitlines()[1:])
    return any(_shape(line.split(header.separator), header) == shape for line in lines)


def _shape(fields: list[str], header: Header) -> tuple[int, str]:
    """The number of fields, and the time with every number in it as 0: what rows of one file have in common."""
    time = fields[header.time_index] if len(fields) > header.time_index else ""
    return len(fields), re.sub(r"\d+", "0", time)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lets the csv module read fields of any length; its own limit is 128 KiB."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> dict[str, pa.ChunkedArray]:
    try:
        names = pq.read_schema(path).names
        wanted = _wanted(path, names, ",".join(names))
        table = pq.read_table(path, columns=list(wanted.values()))
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read ({error}); write it again as Parquet") from error
    columns = {name: table.column(own) for name, own in wanted.items()}
    for name, what in (("user_id", "ids"), ("item_id", "ids"), ("type", "types")):
        if name in columns and not is_id_type(columns[name].type):
            raise DataError(
                f"{path}: column {name} is {columns[name].type}; store {what} as strings (or whole numbers)"
            )
    return columns
