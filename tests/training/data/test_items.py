"""The file of items: what is harmless is mended and counted, everything else is one sentence with the row."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.data.errors import DataError
from training.data.read import Items, read_items


def items(folder: Path, *lines: str | bytes) -> Items:
    path = folder / "items.jsonl"
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return read_items(path)


def test_nan_is_nothing(tmp_path):
    read = items(
        tmp_path,
        '{"item_id": "a", "title": NaN, "brand": -Infinity, "categories": ["x", NaN], '
        '"description": [NaN, "y", 1e999]}',
        '{"item_id": "b", "title": "NaN", "categories": NaN}',
    )
    assert (read.titles, read.brands, read.descriptions) == ([None, "NaN"], [None, None], ["y", None])
    assert read.categories == [["x"], []]


def test_half_a_character_is_dropped_and_counted(tmp_path):
    line = '{"item_id": "%s", "title": "cut \\ud83d", "categories": ["\\ude00", "k\\ud83d"], "brand": "\\ud83d\\ude00"}'
    read = items(tmp_path, line % "a", line % "b")
    assert (read.titles, read.categories, read.brands) == (["cut"] * 2, [["k"]] * 2, ["\U0001f600"] * 2)
    assert read.mended == {"texts of items with a lone surrogate (dropped)": 4}


def test_a_byte_order_mark_windows_line_ends_and_nesting_are_harmless(tmp_path):
    deep = "[" * 900 + '"x"' + "]" * 900
    read = items(tmp_path, b'\xef\xbb\xbf{"item_id": 7}\r', "", f'{{"item_id": "b", "title": {deep}}}')
    assert read.item_ids == ["7", "b"] and read.titles == [None, "x"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"item_id": "b\\ud83d"}', "item_id contains a lone surrogate"),
        ('{"item_id": "%s"}' % ("x" * 257), "item_id has 257 characters"),
        ('{"item_id": NaN}', "item_id is not a text"),
        ('{"item_id": ""}', "item_id is empty"),
        ('{"item_id": true}', "item_id is not a text"),
        ('{"item_id": 1.0}', "item_id is not a text"),
        ('{"item_id": %s}' % ("9" * 5000), "not readable"),
        ('{"item_id": "b", "title": %s}' % ("[" * 100_000 + "]" * 100_000), "not readable"),
        ('["b"]', "no item_id"),
        ("7", "no item_id"),
        ("null", "no item_id"),
        ('{"item_id": "b"} x', "not valid JSON (Extra data)"),
        (b'{"item_id": "caf\xe9"}', "not UTF-8"),
        (b'{"item_id": "b", "title": "\xed\xa0\xbd"}', "not UTF-8"),
        ('{"item_id": "b"}'.encode("utf-16"), "not UTF-8"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_sentence_with_the_row(tmp_path, line, words):
    with pytest.raises(DataError) as error:
        items(tmp_path, '{"item_id": "a"}', line)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'items.jsonl'}, row 2: ") and words in message and "\n" not in message


def test_fields_keep_their_types_and_the_brand_is_one(tmp_path):
    read = items(
        tmp_path,
        '{"item_id": "a", "brand": "Lux", "fields": {"price": 9.5, "sale": true, "sizes": ["M"], "gone": null}}',
        '{"item_id": "b", "fields": null}',
        '{"item_id": "c", "brand": "Lux", "fields": {"brand": "Nord", "year": 2026, "none": NaN}}',
    )
    assert read.fields == {
        0: {"price": 9.5, "sale": True, "sizes": ["M"], "brand": "Lux"},
        2: {"brand": "Nord", "year": 2026},
    }


@pytest.mark.parametrize("fields", ["[1]", '{"a": {"b": 1}}', '{"a": [1]}', '{"a": 1e999}', '{"a": "\\ud83d"}'])
def test_fields_of_another_type_are_one_sentence_with_the_row(tmp_path, fields):
    with pytest.raises(DataError, match=r"row 1: .*fields? "):
        items(tmp_path, f'{{"item_id": "a", "fields": {fields}}}')
