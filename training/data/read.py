"""A data folder in memory: interactions, items and given semantic IDs, checked as they are read.

Everything wrong in a file ends in a `DataError` whose one sentence names the file, the data row (1 is
the first one after the header) and what to do. Splits and statistics are in `prepare`.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

INTERACTIONS = ("interactions.csv.gz", "interactions.csv", "interactions.parquet")
ITEMS = ("items.jsonl.gz", "items.jsonl")
TIME_COLUMNS = ("timestamp", "timestamp_or_order")
UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException)


class DataError(ValueError):
    """A data folder that cannot be used as it stands; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Items:
    """One row per item, in the order of the items file; the row number is the "item" everywhere else.

    Ids and row numbers often follow first appearance or the shop's own numbering, which tells a model
    the future: never use either to break ties, to order items, or as a feature.
    """

    item_ids: list[str]
    titles: list[str | None]
    brands: list[str | None]
    categories: list[list[str]]
    descriptions: list[str | None]

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def has_text(self) -> bool:
        """Whether any item has a title or a description."""
        return any(self.titles) or any(self.descriptions)


@dataclass(frozen=True, slots=True)
class Dataset:
    """All events, grouped by user (users in order of first appearance), oldest first within a user."""

    name: str
    items: Items
    user_ids: list[str]
    offsets: np.ndarray  # (users + 1,) int64; events of user u are sequence[offsets[u]:offsets[u + 1]]
    sequence: np.ndarray  # (events,) int32, item rows
    times: np.ndarray  # (events,) float64, seconds since 1970 or whatever unit the file counts in
    skipped: dict[str, int]  # harmless oddities, counted by reason

    def events(self, user: int) -> np.ndarray:
        """Item rows of one user, oldest first. Shape: (events of the user,), int32."""
        return self.sequence[self.offsets[user] : self.offsets[user + 1]]


def read_data(folder: Path) -> Dataset:
    """Read and check a data folder: `interactions.csv[.gz]` or `.parquet`, optionally `items.jsonl[.gz]`.

    Events of a user are sorted by time; where times tie, file order stays. Items without an event are
    kept (they can still be recommended). Without an items file the items are those of the interactions,
    shuffled, because their order of appearance would tell the future.
    Raises DataError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the folder that holds interactions.csv")
    path = _one_of(folder, INTERACTIONS)
    if path is None:
        raise DataError(f"{folder} has no {', '.join(INTERACTIONS)}; put one of these there")
    users, items, times = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    if not len(users):
        raise DataError(f"{path} has no data rows; every row is one event: user_id,item_id,timestamp")
    _refuse_null(path, "user_id", users)
    _refuse_null(path, "item_id", items)
    seconds = _seconds(path, times)

    items_path = _one_of(folder, ITEMS)
    if items_path is None:
        ids = pc.unique(items).to_pylist()
        ids = [ids[i] for i in np.random.default_rng(0).permutation(len(ids))]
        catalogue = Items(ids, [None] * len(ids), [None] * len(ids), [[] for _ in ids], [None] * len(ids))
    else:
        catalogue = read_items(items_path)
    rows = pc.index_in(items, value_set=pa.array(catalogue.item_ids, pa.string()))
    if rows.null_count:
        row = _first(pc.is_null(rows))
        raise DataError(
            f"{path}, row {row + 1}: item {items[row].as_py()!r} is not in {items_path and items_path.name}; "
            "add the item there or remove the row"
        )

    user_ids = pc.unique(users)  # in order of first appearance
    user = pc.index_in(users, value_set=user_ids).to_numpy()
    order = np.lexsort((seconds, user))  # a stable sort: ties keep file order
    counts = np.bincount(user, minlength=len(user_ids))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    skipped = {
        "users with fewer than 3 events (used for training only)": int((counts < 3).sum()),
        "items without an event (kept in the catalogue)": len(catalogue) - len(pc.unique(rows)),
    }
    return Dataset(
        name=folder.resolve().name,
        items=catalogue,
        user_ids=user_ids.to_pylist(),
        offsets=offsets,
        sequence=rows.to_numpy()[order].astype(np.int32),
        times=seconds[order],
        skipped={reason: count for reason, count in skipped.items() if count},
    )


def read_items(path: Path) -> Items:
    """Read `items.jsonl[.gz]`: one object a line, `item_id` and any of title, brand, categories, description.

    Ids that are numbers become strings, lists of texts become one text, nested categories become flat.
    Further keys are ignored. Raises DataError.
    """
    table = Items([], [], [], [], [])
    first_row: dict[str, int] = {}
    try:
        for row, line in _lines(path):
            where = f"{path}, row {row}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON ({error.msg}); write one complete object a line") from None
            item_id = record.get("item_id") if isinstance(record, dict) else None
            if isinstance(item_id, bool) or not isinstance(item_id, str | int) or item_id == "":
                raise DataError(f"{where}: no item_id; give every item a string (or whole number) as item_id")
            item_id = str(item_id)
            if item_id in first_row:
                raise DataError(
                    f"{where}: item_id {item_id!r} is already in row {first_row[item_id]}; keep one row per item"
                )
            first_row[item_id] = row
            table.item_ids.append(item_id)
            table.titles.append(_text(record.get("title"), where, "title"))
            table.brands.append(_text(record.get("brand"), where, "brand"))
            table.descriptions.append(_text(record.get("description"), where, "description"))
            names = [name.strip() for name in _strings(record.get("categories"), where, "categories")]
            table.categories.append(list(dict.fromkeys(filter(None, names))))
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read ({error}); write it again as UTF-8 JSON lines") from error
    if not table.item_ids:
        raise DataError(f"{path} has no items; write one JSON object a line, or remove the file")
    return table


def load_given_ids(path: Path, items: Items) -> tuple[np.ndarray, bool]:
    """Given semantic IDs, `{item_id: [codes]}` as JSON, plain or gzipped, for every item of the catalogue.

    A code is a whole number, or a text that ends in one (`"<a_121>"` is code 121 of its level).
    Returns: (I, M) int64, codes per level as the file numbers them; two items may share all codes. And whether the file
    names all levels alike (`"<T_3>"` at every one): then their codes are of one codebook.
    Raises DataError where an item has no codes, the lengths differ or a code has no number.
    """
    try:
        with _open_text(path) as file:
            given = json.load(file)
    except (*UNREADABLE, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); write it again as {{item_id: [codes]}}") from error
    if not isinstance(given, dict):
        raise DataError(f"{path} is not an object; write it as {{item_id: [codes]}}")
    rows: list[list[int]] = []
    prefixes: list[str] = []
    for item_id in items.item_ids:
        codes = given.get(item_id)
        if not isinstance(codes, list) or not codes:
            raise DataError(
                f"{path}: item {item_id!r} has no codes; give every item of the catalogue its list of codes"
            )
        if rows and len(codes) != len(rows[0]):
            raise DataError(
                f"{path}: item {item_id!r} has {len(codes)} codes, others have {len(rows[0])}; "
                "give all items the same number of codes"
            )
        found = [re.fullmatch(r"(.*?)(\d+)>?", str(code)) for code in codes]
        if None in found:
            raise DataError(f'{path}: item {item_id!r} has a code without a number; write codes as 12 or "<a_12>"')
        prefix = [match[1] for match in found if match]
        prefixes = prefixes or prefix
        if prefix != prefixes:
            # two spellings with one number would silently become one code
            raise DataError(
                f"{path}: item {item_id!r} names its levels {prefix}, others {prefixes}; use one name per level"
            )
        rows.append([int(match[2]) for match in found if match])
    return np.asarray(rows, dtype=np.int64), len(prefixes) > 1 and set(prefixes) != {""} and len(set(prefixes)) == 1


def _one_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} has {' and '.join(path.name for path in found)}; keep one of them")
    return found[0] if found else None


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _open_text(path) as file:
        for row, line in enumerate(file, start=1):
            if line.strip():
                yield row, line


def _time_column(path: Path, names: list[str]) -> str:
    for name in ("user_id", "item_id"):
        if name not in names:
            raise DataError(f"{path} has no column {name}; its first line must name user_id,item_id,timestamp")
    for name in TIME_COLUMNS:
        if name in names:
            return name
    raise DataError(f"{path} has no column {' or '.join(TIME_COLUMNS)}; add one, or the order of events as 0,1,2,…")


def _read_csv(path: Path) -> tuple[pa.ChunkedArray, pa.ChunkedArray, pa.ChunkedArray]:
    """User ids, item ids and times, all as text: "007" must stay "007"."""
    try:
        with _open_text(path) as file:
            header = next(csv.reader(file), [])
        if not header:
            raise DataError(f"{path} is empty; its first line must name user_id,item_id,timestamp")
        columns = ["user_id", "item_id", _time_column(path, header)]
        table = pyarrow.csv.read_csv(
            path,  # decompressed by its suffix
            read_options=pyarrow.csv.ReadOptions(use_threads=False),  # so that an error names the row
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=columns,
                column_types=dict.fromkeys(columns, pa.string()),
                strings_can_be_null=True,
                null_values=[""],
            ),
        )
    except UNREADABLE as error:
        text = str(error)
        if bad := re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", text):
            raise DataError(
                f"{path}, row {int(bad[1]) - 1}: {bad[3]} fields where the header has {bad[2]}; correct the row"
            ) from error
        raise DataError(f"{path} cannot be read ({text}); write it again as UTF-8 CSV") from error
    user, item, time = (table.column(name) for name in columns)
    return user, item, time


def _read_parquet(path: Path) -> tuple[pa.ChunkedArray, pa.ChunkedArray, pa.ChunkedArray]:
    try:
        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=["user_id", "item_id", _time_column(path, names)])
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read ({error}); write it again as Parquet") from error
    ids = []
    for name in ("user_id", "item_id"):
        column = table.column(name)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
            raise DataError(f"{path}: column {name} is {column.type}; store ids as strings (or whole numbers)")
        ids.append(column.cast(kind).cast(pa.string()))
    return ids[0], ids[1], table.column(2)


def _refuse_null(path: Path, name: str, column: pa.ChunkedArray) -> None:
    missing = pc.or_kleene(pc.is_null(column), pc.equal(column, ""))
    if pc.any(missing).as_py():
        raise DataError(f"{path}, row {_first(missing) + 1}: {name} is empty; fill it in or remove the row")


def _first(mask: pa.ChunkedArray) -> int:
    return int(
        np.flatnonzero(mask.to_numpy(zero_copy_only=False) if isinstance(mask, pa.Array) else mask.to_numpy())[0]
    )


def _seconds(path: Path, column: pa.ChunkedArray) -> np.ndarray:
    """Times as float64: numbers as they are, ISO 8601 dates (UTC unless they say otherwise) as seconds since 1970."""
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        micro = column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        values = pc.divide(micro.cast(pa.float64(), safe=False), 1e6)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = column.cast(pa.float64(), safe=False)
    else:
        texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
        unique = pc.unique(texts)
        parse = _number if _number(unique[0].as_py()) is not None else _date  # the first row decides which
        parsed = pa.array([parse(text) for text in unique.to_pylist()], pa.float64())
        values = pc.take(parsed, pc.index_in(texts, value_set=unique))
    seconds: np.ndarray = pc.fill_null(values, float("nan")).to_numpy()
    if not np.isfinite(seconds).all():
        row = int(np.flatnonzero(~np.isfinite(seconds))[0])
        raise DataError(
            f"{path}, row {row + 1}: {column.slice(row, 1)[0].as_py()!r} is not a time; "
            "write all times as numbers or all as ISO dates such as 2024-05-31T12:00:00"
        )
    return seconds


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _date(text: str | None) -> float | None:
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _strings(value: Any, where: str, name: str) -> list[str]:
    """All texts in a value that is null, a text, a number or a (nested) list of these."""
    if value is None:
        return []
    if isinstance(value, list):
        return [text for part in value for text in _strings(part, where, name)]
    if isinstance(value, str | int | float):
        return [str(value)]
    raise DataError(f"{where}: {name} is an object; make it a text, a list of texts or null")


def _text(value: Any, where: str, name: str) -> str | None:
    return " ".join(_strings(value, where, name)).strip() or None
