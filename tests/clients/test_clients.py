"""The committed clients are those of the present API."""

from __future__ import annotations

import json

import pytest

from clients.__main__ import ROOT, WRITTEN, document
from clients.operations import PYTHON, TYPESCRIPT, Schema, operations


@pytest.fixture(scope="module")
def described() -> Schema:
    return document()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_client_is_up_to_date(name: str, described: Schema) -> None:
    assert WRITTEN[name](described) == (ROOT / name).read_text(encoding="utf-8"), "run make clients, and commit it"


def test_all_operations_are_there_under_short_names(described: Schema) -> None:
    names = [each.name for each in operations(described)]
    assert len(names) == len({*names}) and {"recommend", "rank", "append_events", "similar_items"} <= {*names}
    assert all(f"  async def {name}(" in (ROOT / "streamrec/operations.py").read_text() for name in names)


@pytest.mark.parametrize(
    ("schema", "python", "typescript"),
    [
        ({"$ref": "#/components/schemas/Item"}, "Item", "Item"),
        ({"type": "array", "items": {"type": "integer"}}, "list[int]", "Array<number>"),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, "dict[str, bool]", "Record<string, boolean>"),
        ({"type": "object", "additionalProperties": True}, "dict[str, Any]", "Record<string, unknown>"),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}, {"type": "null"}]}, "int | float | None", "number | null"),
        ({"enum": ["a", "b"], "type": "string"}, 'Literal["a"] | Literal["b"]', '"a" | "b"'),
        ({}, "Any", "unknown"),
    ],
)
def test_types_are_written_in_both_languages(schema: Schema, python: str, typescript: str) -> None:
    assert (PYTHON.type_of(schema), TYPESCRIPT.type_of(schema)) == (python, typescript)


def test_the_collection_has_every_operation_once(described: Schema) -> None:
    made = json.loads((ROOT / "clients/streamrec.postman_collection.json").read_text())
    requests = [each["request"] for folder in made["item"] for each in folder["item"]]
    found = [(request["method"], request["url"]["raw"]) for request in requests]
    paths = [each.path.replace("{", "{{").replace("}", "}}") for each in operations(described)]
    assert sorted(url for _, url in found) == sorted("{{address}}" + path for path in paths)
