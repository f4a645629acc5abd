"""A data folder in memory: interactions and items, checked as they are read.

Everything wrong in a file ends in a `DataError` whose one sentence names the file, the data row (1 is
the first one after the header) and what to do. Splits and statistics are in `prepare`, semantic IDs in `given_ids`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from serving.ids import id_fault, is_unicode
from serving.items.fields import MAX_FIELDS, Value
from training.data.errors import DataError
from training.data.interactions import Interactions, find_interactions, read_interactions

ITEMS = ("items.jsonl.gz", "items.jsonl")
TEXTS = ("title", "brand", "categories", "description")
UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError)


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
    fields: dict[int, dict[str, Value]] = field(default_factory=dict)  # what filters may ask, the brand too, by row
    mended: dict[str, int] = field(default_factory=dict)  # harmless oddities of the file, counted by reason

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def has_text(self) -> bool:
        """Whether any item has a title or a description. By a brand or categories alone, many items look the same."""
        return any(self.titles) or any(self.descriptions)


@dataclass(frozen=True, slots=True)
class Dataset:
    """All events, grouped by user (users in order of first appearance), oldest first within a user."""

    name: str
    items: Items
    user_ids: list[str]
    offsets: np.ndarray  # (users + 1,) int64; events of user u are sequence[offsets[u]:offsets[u + 1]]
    sequence: np.ndarray  # (events,) int32, item rows
    times: np.ndarray  # (events,) whole numbers or float64, seconds since 1970 or whatever unit the file counts in
    skipped: dict[str, int]  # harmless oddities, counted by reason
    type_names: tuple[str, ...] = ()  # of events, as far as the file has types
    types: np.ndarray | None = None  # (events,) int64, positions in type_names, -1 for events without a type
    values: np.ndarray | None = None  # (events,) float64, NaN for events without a value
    weights: np.ndarray | None = None  # (events,) float32, how much each counts; None: all alike

    def events(self, user: int) -> np.ndarray:
        """Item rows of one user, oldest first. Shape: (events of the user,), int32."""
        return self.sequence[self.offsets[user] : self.offsets[user + 1]]


def read_data(folder: Path, items: Items | None = None) -> Dataset:
    """Read and check a data folder: `interactions.csv[.gz]`, `.parquet` or `*.inter`, optionally `items.jsonl[.gz]`.

    Events may have types and values. Those of a user are sorted by time; where times tie, file order stays. Items
    without an event are kept (they can still be recommended). Without an items file the items are those of the
    interactions, shuffled, because their order of appearance would tell the future. items: take the place of the
    folder's own, and events of others are left out and counted.
    Raises DataError.
    """
    folder = Path(folder)
    path, items_path = data_files(folder)
    events = read_interactions(path)
    catalogue, left_out = items, 0
    if catalogue is None:
        catalogue = _items_of(events) if items_path is None else read_items(items_path)
    rows = pc.index_in(events.items, value_set=pa.array(catalogue.item_ids, pa.string()))
    if items is not None and rows.null_count:
        known, left_out = rows.is_valid(), rows.null_count
        events, rows = events.filter(known), rows.filter(known)
        if not len(rows):
            raise DataError(f"{path} has no event of a known item; give the interactions of this bundle's users")
    users = events.users
    if rows.null_count:
        row = int(np.flatnonzero(pc.is_null(rows).to_numpy())[0])
        raise DataError(
            f"{path}, row {row + 1}: item {events.items[row].as_py()!r} is not in {items_path and items_path.name}; "
            "add the item there or remove the row"
        )

    user_ids = pc.unique(users)  # in order of first appearance
    user = pc.index_in(users, value_set=user_ids).to_numpy()
    order = np.lexsort((events.times.order, user))  # a stable sort: ties keep file order
    counts = np.bincount(user, minlength=len(user_ids))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    skipped = {
        "users with fewer than 3 events (used for training only)": int((counts < 3).sum()),
        "items without an event (kept in the catalogue)": len(catalogue) - len(pc.unique(rows)),
        **catalogue.mended,
        "events of items without a semantic ID (left out)": left_out,
        "files .item (not read: texts of items belong into items.jsonl)": sum(1 for _ in folder.glob("*.item")),
    }
    type_names = () if events.types is None else tuple(sorted(filter(None, pc.unique(events.types).to_pylist())))
    types = None
    if type_names:
        index = pc.index_in(events.types, value_set=pa.array(type_names, pa.string()))
        types = pc.fill_null(index, -1).to_numpy()[order].astype(np.int64)
    return Dataset(
        name=folder_name(folder),
        items=catalogue,
        user_ids=user_ids.to_pylist(),
        offsets=offsets,
        sequence=rows.to_numpy()[order].astype(np.int32),
        times=events.times.values[order],
        skipped={reason: count for reason, count in skipped.items() if count},
        type_names=type_names,
        types=types,
        values=None if events.values is None else pc.fill_null(events.values, np.nan).to_numpy()[order],
    )


def _items_of(events: Interactions) -> Items:
    ids = pc.unique(events.items).to_pylist()
    ids = [ids[i] for i in np.random.default_rng(0).permutation(len(ids))]
    return Items(ids, [None] * len(ids), [None] * len(ids), [[] for _ in ids], [None] * len(ids))


def folder_name(folder: Path) -> str:
    """A folder's name as text that can be written anywhere, whatever bytes the file system has."""
    return os.fsencode(folder.resolve().name).decode(errors="replace")


def data_files(folder: Path) -> tuple[Path, Path | None]:
    """The interactions of a data folder and, where it has one, the file of items. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the folder that holds interactions.csv")
    items = [folder / name for name in ITEMS if (folder / name).is_file()]
    if len(items) > 1:
        raise DataError(f"{folder} has {' and '.join(path.name for path in items)}; keep one of them")
    return find_interactions(folder), items[0] if items else None


def read_items(path: Path) -> Items:
    """Read `items.jsonl[.gz]`: one object a line, `item_id` and any of title, brand, categories, description, fields.

    Ids that are numbers become strings, lists of texts become one text, nested categories become flat, NaN is nothing,
    and a lone surrogate, as at the end of a text that was cut, is dropped. Further keys are ignored. Raises DataError.
    """
    table = Items([], [], [], [], [])
    first_row: dict[str, int] = {}
    mended: Counter[str] = Counter()
    field_names: set[str] = set()
    for row, line in _lines(path):
        where = f"{path}, row {row}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error.msg}); write one complete object a line") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
            raise DataError(f"{where}: not readable ({error}); write one flat object a line") from None
        item_id = record.get("item_id") if isinstance(record, dict) else None
        if item_id is None:
            raise DataError(f"{where}: no item_id; give every item a string (or whole number) as item_id")
        if fault := id_fault(item_id):
            raise DataError(f"{where}: item_id {fault}; give every item a string (or whole number) as item_id")
        item_id = str(item_id)
        if item_id in first_row:
            raise DataError(
                f"{where}: item_id {item_id!r} is already in row {first_row[item_id]}; keep one row per item"
            )
        first_row[item_id] = row
        texts = {name: _strings(record.get(name), where, name) for name in TEXTS}
        for name, parts in texts.items():
            if not all(map(is_unicode, parts)):
                texts[name] = [part.encode(errors="ignore").decode() for part in parts]
                mended["texts of items with a lone surrogate (dropped)"] += 1
        joined = {name: " ".join(parts).strip() or None for name, parts in texts.items()}
        table.item_ids.append(item_id)
        table.titles.append(joined["title"])
        table.brands.append(joined["brand"])
        table.descriptions.append(joined["description"])
        fields = _fields(record.get("fields"), where)
        if joined["brand"]:
            fields.setdefault("brand", joined["brand"])
        if fields:
            table.fields[len(table) - 1] = fields
            field_names.update(fields)
        if len(field_names) > MAX_FIELDS:
            raise DataError(f"{where}: items have more than {MAX_FIELDS} different fields; keep those you filter by")
        names = [name.strip() for name in texts["categories"]]
        table.categories.append(list(dict.fromkeys(filter(None, names))))
    if not table.item_ids:
        raise DataError(f"{path} has no items; write one JSON object a line, or remove the file")
    table.mended.update(mended)
    return table


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers. Raises DataError."""
    row = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for row, line in enumerate(file, start=1):
                if line.strip():
                    yield row, line.decode("utf-8-sig" if row == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {row}: not UTF-8 ({error.reason}); write it again as UTF-8 JSON lines") from error
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read ({error}); write it again as UTF-8 JSON lines") from error


def _fields(value: Any, where: str) -> dict[str, Value]:
    """An item's typed fields; null is no value."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{where}: fields is not an object; write it as {{name: value}}")
    fields: dict[str, Value] = {}
    for name, known in value.items():
        is_list = isinstance(known, list) and all(isinstance(each, str) for each in known)
        if known is None or (isinstance(known, float) and math.isnan(known)):
            continue
        texts = [name, *(known if is_list else [known] if isinstance(known, str) else [])]
        is_scalar = isinstance(known, str) or (isinstance(known, int | float) and abs(known) <= sys.float_info.max)
        if not (is_list or is_scalar) or not all(map(is_unicode, texts)):
            raise DataError(f"{where}: the field {name!r} must be a number, a text, true, false or a list of texts")
        fields[name] = known
    return fields


def _strings(value: Any, where: str, name: str) -> list[str]:
    """All texts in a value that is null, a text, a number, or a (nested) list of these; pandas writes NaN for null."""
    texts, left = [], [value]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += reversed(value)
        elif isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            texts.append(str(value))
        elif isinstance(value, dict):
            raise DataError(f"{where}: {name} is an object; make it a text, a list of texts or null")
    return texts
