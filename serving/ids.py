"""What an id of a user or an item is, in JSON and in columns of Arrow: the same for training and offline scoring.

HTTP takes the same ids (`app/schemas/common.py`), so what was trained can be sent. An id is text of 1 to MAX_ID_LENGTH
characters; whole numbers are ids too and become text.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from serving.types import MAX_ID_LENGTH

LONE_SURROGATE = "contains a lone surrogate, which no encoding can write"


def id_fault(value: Any) -> str | None:
    """Why a value is no id, to be put after its name, such as "is empty"; None where it is one."""
    if value is None:
        return "is missing"
    if isinstance(value, bool) or not isinstance(value, str | int):
        return "is not a text (or a whole number)"
    text = str(value)
    if not text:
        return "is empty"
    if len(text) > MAX_ID_LENGTH:
        return f"has {len(text):,} characters, where ids have at most {MAX_ID_LENGTH}"
    if not is_unicode(text):
        return LONE_SURROGATE
    return None


def is_unicode(text: str) -> bool:
    """Whether a text can be written to any file. JSON can name half of an emoji, which no encoding can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_id_type(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold ids: any kind of text, bytes that may be text, whole numbers, only nulls.

    Writers that do not mark text as such, as older ones of Parquet, leave bytes.
    """
    kind = _plain(kind)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    others = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_integer,
              pa.types.is_null)  # fmt: skip
    return any(is_kind(kind) for is_kind in (*texts, *others))


def is_id_list_type(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold lists of ids."""
    return pa.types.is_null(kind) or (_is_list(kind) and is_id_type(kind.value_type))


def is_event_list_type(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold lists of events: structs whose item_id is text or a whole number."""
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    at = kind.value_type.get_field_index("item_id")
    return at >= 0 and is_id_type(kind.value_type.field(at).type)


def id_values(column: pa.Array, kind: pa.DataType) -> list[Any]:
    """The values of a column, as text or lists of text: kind is pa.string() or pa.list_(pa.string()).

    A value that is not UTF-8 becomes empty bytes, which are no id, and leaves the others as they are.
    """
    try:
        values: list[Any] = column.cast(kind).to_pylist()
    except (UnicodeDecodeError, pa.ArrowInvalid):
        return [_value(scalar) for scalar in column]
    return values


def event_values(column: pa.Array) -> list[Any]:
    """The values of a column of lists of events; empty bytes where a text in them is not UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: pa.Scalar) -> Any:
    try:
        value = scalar.as_py()
        if isinstance(value, list):
            return [part.decode() if isinstance(part, bytes) else part for part in value]
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return b""


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view,
             pa.types.is_large_list_view)  # fmt: skip
    return any(is_list(kind) for is_list in lists)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
