"""Semantic IDs that a data folder brings along: files `semantic_ids/NAME.json.gz`, of which a run may use one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.data.errors import DataError
from training.data.interactions import open_text
from training.data.read import UNREADABLE, Items

FOLDER, SUFFIX = "semantic_ids", ".json.gz"
MAX_CODE = 1_000_000  # the vocabulary has an embedding for every code below the largest
CODE = re.compile(r"(.*?)(\d+)>?")
SIGN_OR_WHOLE = re.compile(r"[-+]?(\d+\.)?")  # what stands before the digits of -3 and of 1.5, and names no level


@dataclass(frozen=True, slots=True)
class GivenIds:
    """codes: (I, M), per level as the file numbers them; two items may share all of theirs. shared_codebook: whether
    all levels take them from one. skipped: harmless oddities of the file, counted by reason.
    """

    codes: np.ndarray
    shared_codebook: bool = False
    skipped: dict[str, int] = field(default_factory=dict)


def given_file(data_folder: Path, name: str = "") -> Path:
    """The file of this name; without one, the only file that is there. Raises DataError for none, and for a choice."""
    if name:
        return data_folder / FOLDER / f"{name}{SUFFIX}"
    files = _files(data_folder)
    if not files:
        raise DataError(f"{data_folder} has no {FOLDER}/*{SUFFIX}, which tokenizer.kind=given needs; put one there")
    if len(files) > 1:
        names = ", ".join(map(name_of, files))
        raise DataError(f"{data_folder / FOLDER} has several files; say which with given_ids, one of {names}")
    return files[0]


def name_of(file: Path) -> str:
    """As `given_ids` takes it."""
    return file.name.removesuffix(SUFFIX)


def unused_note(data_folder: Path) -> str | None:
    """For a run that makes semantic IDs: what files it does not use, and how another would. None: there are none."""
    files = _files(data_folder)
    if not files:
        return None
    settings = "tokenizer.kind=given" + (f" given_ids={name_of(files[0])}" if len(files) > 1 else "")
    listed = ", ".join(f"{FOLDER}/{file.name}" for file in files)
    return f"Makes semantic IDs and does not use {listed}; to use them instead: --set {settings}"


def _files(data_folder: Path) -> list[Path]:
    return sorted((data_folder / FOLDER).glob(f"*{SUFFIX}"))


def load_given_ids(path: Path, items: Items) -> GivenIds:
    """Given semantic IDs, `{item_id: [codes]}` as JSON, plain or gzipped, for every item of the catalogue.

    A code is a whole number from 0, or a text that ends in one (`"<a_121>"` is code 121 of its level). Where the file
    names all levels alike (`"<T_3>"` at every one), they have one codebook.
    Raises DataError where an item has no codes, the lengths differ or a code has no such number.
    """
    try:
        with open_text(path) as file:
            given = json.load(file)
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}; put semantic IDs there and name the file with given_ids") from error
    except (*UNREADABLE, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); write it again as {{item_id: [codes]}}") from error
    if not isinstance(given, dict):
        raise DataError(f"{path} is not an object; write it as {{item_id: [codes]}}")
    rows: list[list[int]] = []
    names: list[str] = []
    for item_id in items.item_ids:
        codes, where = given.get(item_id), f"{path}: item {item_id!r}"
        if not isinstance(codes, list) or not codes:
            raise DataError(f"{where} has no codes; give every item of the catalogue its list of codes")
        if rows and len(codes) != len(rows[0]):
            raise DataError(
                f"{where} has {len(codes)} codes, others have {len(rows[0])}; give all items the same number of codes"
            )
        own_names, numbers = zip(*(_read_code(code, where) for code in codes), strict=True)
        names = names or list(own_names)
        if list(own_names) != names:
            # two spellings with one number would silently become one code
            raise DataError(f"{where} names its levels {list(own_names)}, others {names}; use one name per level")
        rows.append(list(numbers))
    shared_codebook = len(names) > 1 and names[0] != "" and len(set(names)) == 1
    others = len(given) - len(rows)
    skipped = {"given semantic IDs of items that are not in the catalogue (left out)": others} if others else {}
    return GivenIds(np.asarray(rows, dtype=np.int64), shared_codebook, skipped)


def _read_code(code: Any, where: str) -> tuple[str, int]:
    """The name of a code's level, empty for a plain number, and its number."""
    found = CODE.fullmatch(code if isinstance(code, str) else str(code) if type(code) is int else "")
    if found is None or (found[1] and SIGN_OR_WHOLE.fullmatch(found[1])):
        raise DataError(
            f'{where} has the code {json.dumps(code):.40}; write codes as whole numbers from 0, such as 12 or "<a_12>"'
        )
    if len(found[2]) > 9 or int(found[2]) > MAX_CODE:
        raise DataError(f"{where} has a code above {MAX_CODE:,}; number the codes from 0")
    return found[1], int(found[2])
